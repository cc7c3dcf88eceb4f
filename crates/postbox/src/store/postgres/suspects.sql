-- The server is another one than before, or another timeline of it: a standby was promoted, or a backup
-- restored. Operations that had begun may have ended in commits that are lost. $1 the cluster now,
-- $2 the worker that found out.
with now as materialized (
    select r.cluster as before from {schema}.routing r where r.cluster is distinct from $1 for update
),
told as (
    update {schema}.routing r set cluster = $1 from now
),
open as (
    select a.delivery, a.number from {schema}.attempt a, now
    where now.before is not null
        and not exists (select from {schema}.outcome o where o.delivery = a.delivery and o.number = a.number)
    union all
    select d.delivery, d.attempt from {schema}.doubt d, now where now.before is not null
),
flagged as (
    insert into {schema}.observation (delivery, number, worker, kind, detail)
    select o.delivery, o.number, $2, 'suspect',
        pg_catalog.format('begun on %s, and the server is %s now: what was committed last may be lost, so look at the remote', now.before, $1)
    from open o, now
    returning 1
)
select now.before, (select pg_catalog.count(*) from flagged) as suspects from now
