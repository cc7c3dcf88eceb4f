-- Whether something is due for the subscription $1 that no open transaction holds, and how long until
-- something else is.
select exists (
        select from (
            select r.pos from {schema}.ready r where r.subscription = $1
            order by r.priority, r.pos limit 1 for key share skip locked
        ) r
    ) as ready,
    (select (extract(epoch from pg_catalog.min(s.due_at) - pg_catalog.clock_timestamp()) * 1000::numeric)::bigint
        from {schema}.scheduled s where s.subscription = $1) as wait_ms
