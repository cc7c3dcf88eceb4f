-- One flush of a batch, guarded by the lease's token; a repeated one writes nothing.
-- $1 token, $2 batch, $3 part, $4 worker, $5 deliveries, $6 messages, $7 subscriptions,
-- $8 durations in microseconds, $9 released deliveries.
with held as materialized (
    select l.batch from {schema}.lease l where l.token = $1 and l.batch = $2 for share
),
part as (
    insert into {schema}.outcome_part (batch, part, worker, lowest, highest, deliveries, messages, subscriptions, durations_us, released)
    select h.batch, $3, $4,
        (select pg_catalog.min(d) from pg_catalog.unnest($5::bigint[]) d),
        (select pg_catalog.max(d) from pg_catalog.unnest($5::bigint[]) d),
        $5::bigint[], $6::pg_catalog.uuid[], $7::int[], $8::bigint[], $9::bigint[]
    from held h
    on conflict do nothing
    returning 1
)
select (select pg_catalog.count(*) from held) as held, (select pg_catalog.count(*) from part) as written
