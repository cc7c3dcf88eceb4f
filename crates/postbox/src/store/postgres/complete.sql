-- A pulled delivery's success, in its caller's transaction: the lease goes, which keeps it locked until
-- that ends, and the outcome stands beside the caller's effects.
-- $1 token, $2 batch, $3 worker, $4 delivery, $5 number, $6 rev, $7 subscription, $8 message.
with held as (
    delete from {schema}.lease l where l.token = $1 and l.batch = $2 and l.worker = $3
    returning l.batch, l.claimed_at
),
ended as (
    insert into {schema}.outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker, started_at, finished_at)
    select $4, $5, 'succeeded', 'succeeded', $6, $7, $8, h.batch, $3, h.claimed_at, pg_catalog.clock_timestamp()
    from held h
)
select pg_catalog.count(*) as held from held
