-- The last words of a transactional handler's transaction: still the one that was opened, the
-- lease still ours, the outcome beside the effects. FOR SHARE: others of the batch may settle too.
-- $1 token, $2 batch, $3 transaction id, $4 delivery, $5 number, $6 rev, $7 subscription,
-- $8 message, $9 worker, $10 microseconds it ran.
with held as materialized (
    select l.batch from {schema}.lease l
    where l.token = $1 and l.batch = $2 and pg_catalog.pg_current_xact_id()::pg_catalog.text = $3
    for share
),
ended as (
    insert into {schema}.outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker, started_at, finished_at)
    select $4, $5, 'succeeded', 'succeeded', $6, $7, $8, h.batch, $9,
        pg_catalog.clock_timestamp() - interval '1 microsecond' * $10::bigint::double precision, pg_catalog.clock_timestamp()
    from held h
)
select (select pg_catalog.count(*) from held) as held, pg_catalog.pg_current_xact_id()::pg_catalog.text as xid
