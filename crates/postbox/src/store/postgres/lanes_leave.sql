-- Claims no more from lanes of the subscription $2 that are above the share of the worker $1.
update {schema}.lane n set leaving = true
where n.subscription = $2 and n.owner = $1 and not n.leaving and n.level in (
    select o.level from {schema}.lane o
    where o.subscription = $2 and o.owner = $1 and not o.leaving
    order by o.level
    offset (
        select pg_catalog.ceil((select pg_catalog.count(*) from {schema}.lane a where a.subscription = $2)::double precision
            / greatest(pg_catalog.count(*), 1)::double precision)::bigint
        from {schema}.worker w
        where $2 = any (w.subscriptions) and w.expires_at > pg_catalog.clock_timestamp())
)
