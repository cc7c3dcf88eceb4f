-- Every attempt at one delivery. $1 delivery.
select a.number, a.kind, a.worker,
    (extract(epoch from a.started_at) * 1000000::numeric)::bigint as started_us,
    (extract(epoch from a.finished_at) * 1000000::numeric)::bigint as finished_us,
    a.error, a.receipt::pg_catalog.text as receipt
from (
    select o.number, o.kind, o.worker, o.started_at, o.finished_at, o.error, o.receipt
    from {schema}.outcome o where o.delivery = $1
    union all
    select b.number, null, b.worker, b.started_at, null, null, null
    from {schema}.attempt b
    where b.delivery = $1
        and not exists (select from {schema}.outcome o where o.delivery = b.delivery and o.number = b.number)
    union all
    select 1, 'succeeded', p.worker, p.finished_at - interval '1 microsecond' * d.duration_us::double precision,
        p.finished_at, null, null
    from {schema}.outcome_part p
    cross join lateral unnest(p.deliveries, p.durations_us) as d(delivery, duration_us)
    where p.highest is not null and pg_catalog.int8range(p.lowest, p.highest, '[]') @> $1
        and d.delivery = $1
) a
order by a.number
