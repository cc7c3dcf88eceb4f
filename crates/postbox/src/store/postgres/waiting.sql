-- Whether something is due for the subscription $1 that no open transaction holds, and how long until
-- something else is. Of a paused one nothing is.
select exists (
        select from (
            select r.pos from {schema}.ready r where r.subscription = s.id
            order by r.priority, r.pos limit 1 for key share skip locked
        ) r
    ) as ready,
    (select (extract(epoch from pg_catalog.min(d.due_at) - pg_catalog.clock_timestamp()) * 1000::numeric)::bigint
        from {schema}.scheduled d where d.subscription = s.id) as wait_ms
from {schema}.subscription s
where s.id = $1 and s.paused_at is null
