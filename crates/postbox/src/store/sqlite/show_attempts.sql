-- Every attempt at the delivery ?1; those that still run have no outcome.
select o.number, o.kind, o.worker, o.started_at, o.finished_at, o.error, o.receipt
from postbox_ended o where o.delivery = ?1 and o.lowest <= ?1 and o.highest >= ?1
union all
select a.number, null, a.worker, a.started_at, null, null, null
from postbox_attempt a
where a.delivery = ?1
    and not exists (select 1 from postbox_outcome o where o.delivery = a.delivery and o.number = a.number)
order by 1
