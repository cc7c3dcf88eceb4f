-- Whether something is due for the subscription $1, and how long until something else is.
select exists (select from {schema}.ready r where r.subscription = $1) as ready,
    (select (extract(epoch from pg_catalog.min(s.due_at) - pg_catalog.clock_timestamp()) * 1000::numeric)::bigint
        from {schema}.scheduled s where s.subscription = $1) as wait_ms
