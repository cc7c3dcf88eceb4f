-- How the attempts ended that end with these moves. ?1 is a JSON array of moves, ?2 the batch,
-- ?3 the worker, ?4 the token of the lease.
insert into postbox_outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker,
    started_at, finished_at, error, receipt)
select d.id, m.value ->> 'number', m.value ->> 'kind', m.value ->> 'state', m.value ->> 'rev', d.subscription, d.message,
    ?2, ?3, c.now - (m.value ->> 'ran_ms') - (m.value ->> 'ago_ms'), c.now - (m.value ->> 'ago_ms'),
    m.value ->> 'error', m.value ->> 'receipt'
from json_each(?1) m cross join postbox_clock c
join postbox_delivery d on d.id = m.value ->> 'delivery'
where m.value ->> 'kind' is not null and d.token = ?4
