-- Takes lanes of the subscription $2 that are nobody's, up to the share of the worker $1.
update {schema}.lane n set owner = $1, leaving = false
where n.subscription = $2 and n.level in (
    select f.level from {schema}.lane f
    where f.subscription = $2
        and (f.owner is null or not exists (select from {schema}.worker w where w.id = f.owner))
    order by f.level
    limit greatest(0, (
        select pg_catalog.ceil((select pg_catalog.count(*) from {schema}.lane a where a.subscription = $2)::double precision
            / greatest(pg_catalog.count(*), 1)::double precision)::bigint
            - (select pg_catalog.count(*) from {schema}.lane o where o.subscription = $2 and o.owner = $1)
        from {schema}.worker w
        where $2 = any (w.subscriptions) and w.expires_at > pg_catalog.clock_timestamp()))
    for update skip locked
)
