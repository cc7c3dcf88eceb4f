-- One flush of a batch, guarded by the lease's token; a repeated one writes nothing.
-- $1 token, $2 batch, $3 part, $4 worker, $5 deliveries, $6 messages, $7 subscriptions,
-- $8 durations in microseconds, $9 released deliveries; attempts that begin: $10 deliveries, $11 numbers;
-- successes with a row of their own: $12 deliveries, $13 numbers, $14 revisions, $15 subscriptions,
-- $16 messages, $17 durations and $18 ages in microseconds, $19 receipts; $20 whether the lease ends.
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
    returning pg_catalog.clock_timestamp() as now
),
begun as (
    insert into {schema}.attempt (delivery, number, batch, worker)
    select s.delivery, s.number, $2, $4
    from part p cross join unnest($10::bigint[], $11::int[]) as s(delivery, number)
),
ended as (
    insert into {schema}.outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker,
        started_at, finished_at, receipt)
    select e.delivery, e.number, 'succeeded', 'succeeded', e.rev, e.subscription, e.message, $2, $4,
        p.now - interval '1 microsecond' * (e.ran_us + e.ago_us)::double precision,
        p.now - interval '1 microsecond' * e.ago_us::double precision, e.receipt::pg_catalog.json
    from part p
    cross join unnest($12::bigint[], $13::int[], $14::int[], $15::int[], $16::pg_catalog.uuid[], $17::bigint[],
        $18::bigint[], $19::pg_catalog.text[])
        as e(delivery, number, rev, subscription, message, ran_us, ago_us, receipt)
),
closed as (
    delete from {schema}.lease l using part p where l.token = $1 and $20::pg_catalog.bool
)
-- When this is the whole transaction, its commit waits for the disk, whatever the role's settings are.
select (select pg_catalog.count(*) from held) as held, (select pg_catalog.count(*) from part) as written,
    case when pg_catalog.current_setting('synchronous_commit') in ('off', 'local')
        then pg_catalog.set_config('synchronous_commit', 'on', true) end as durable
