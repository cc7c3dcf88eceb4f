-- Stores messages and fans them out, in the caller's transaction; one atomic statement.
-- Under READ COMMITTED the lock on message is taken before the snapshot, so a registration that
-- waits for the lock's holders misses nobody. A stricter snapshot may be older than the lock: there
-- the routing row is locked, which fails with 40001 if the routing has moved on since.
with routing as materialized (
    select r.epoch, r.channel from {schema}.routing r
    where pg_catalog.current_setting('transaction_isolation') = 'read committed'
    union all
    select s.epoch, s.channel from (
        select r.epoch, r.channel from {schema}.routing r
        where pg_catalog.current_setting('transaction_isolation') <> 'read committed'
        for share
    ) s
),
-- Narrow on purpose: payloads are read once, by their place in the array, where they are stored.
input as materialized (
    select i.ord, i.topic, i.dedup_key, {schema}.uuid7() as id,
        case
            when i.due_us is not null
                and pg_catalog.to_timestamp(i.due_us::double precision / 1000000::double precision) > pg_catalog.clock_timestamp()
                then pg_catalog.to_timestamp(i.due_us::double precision / 1000000::double precision)
            when i.delay_ms > 0 then pg_catalog.clock_timestamp() + interval '1 millisecond' * i.delay_ms::double precision
        end as due_at
    from unnest($1::pg_catalog.text[], $11::bigint[], $12::bigint[], $13::pg_catalog.text[])
        with ordinality as i(topic, delay_ms, due_us, dedup_key, ord)
),
fresh as (
    insert into {schema}.dedup as d (topic, key, message, body_hash, expires_at)
    select i.topic, i.dedup_key, i.id,
        {schema}.body_hash(($2::pg_catalog.text[])[i.ord], ($3::pg_catalog.text[])[i.ord],
            ($15::pg_catalog.bytea[])[i.ord], ($16::pg_catalog.text[])[i.ord]),
        pg_catalog.clock_timestamp() + interval '1 millisecond' * ($14::bigint[])[i.ord]::double precision
    from input i where i.dedup_key is not null
    order by i.topic, i.dedup_key
    on conflict (topic, key) do update
        set message = excluded.message, body_hash = excluded.body_hash, expires_at = excluded.expires_at
        where d.expires_at <= pg_catalog.statement_timestamp()
    returning d.message
),
kept as materialized (
    select i.ord, i.id, i.topic, i.due_at from input i
    where i.dedup_key is null or i.id in (select f.message from fresh f)
),
routed as materialized (
    select k.ord, k.id, k.topic, k.due_at,
        coalesce(
            (select t.subscriptions from {schema}.route t
                where t.topic = k.topic and t.epoch = (select r.epoch from routing r)),
            array(select s.id from {schema}.subscription s
                where s.removed_at is null and k.topic ~ s.matcher order by s.id)) as subscriptions
    from kept k
),
fan as materialized (
    select r.*, array(select pg_catalog.nextval('{schema}.delivery_id') from pg_catalog.unnest(r.subscriptions)) as deliveries
    from routed r
),
stored as (
    insert into {schema}.message (id, epoch, topic, key, payload, headers, occurred_at, due_at, source,
        external_id, correlation_id, causation_id, max_attempts, deliveries, body, content_type)
    select f.id, (select r.epoch from routing r), f.topic, ($2::pg_catalog.text[])[f.ord],
        ($3::pg_catalog.text[])[f.ord]::pg_catalog.json, ($4::pg_catalog.text[])[f.ord]::pg_catalog.json,
        pg_catalog.to_timestamp(($5::bigint[])[f.ord]::double precision / 1000000::double precision), f.due_at,
        ($6::pg_catalog.text[])[f.ord], ($7::pg_catalog.text[])[f.ord], ($8::pg_catalog.text[])[f.ord],
        ($9::pg_catalog.text[])[f.ord], ($10::int[])[f.ord], f.deliveries,
        ($15::pg_catalog.bytea[])[f.ord], ($16::pg_catalog.text[])[f.ord]
    from fan f
),
readied as (
    insert into {schema}.ready (subscription, priority, pos, delivery, message, attempt, lost, rev)
    select d.subscription, 0, d.delivery, d.delivery, f.id, 0, 0, 0
    from fan f cross join lateral unnest(f.subscriptions, f.deliveries) as d(subscription, delivery)
    where f.due_at is null
),
later as (
    insert into {schema}.scheduled (delivery, due_at, subscription, priority, message, attempt, lost, rev)
    select d.delivery, f.due_at, d.subscription, 0, f.id, 0, 0, 0
    from fan f cross join lateral unnest(f.subscriptions, f.deliveries) as d(subscription, delivery)
    where f.due_at is not null
),
nobody as (
    insert into {schema}.unrouted (message, topic, epoch)
    select f.id, f.topic, (select r.epoch from routing r) from fan f
    where pg_catalog.cardinality(f.subscriptions) = 0
)
select i.ord, i.id,
    (i.dedup_key is null or i.id in (select f.message from fresh f)) and (
        -- Tells a worker that said it would sleep; a busy one is not told, because NOTIFY costs.
        select pg_catalog.count(pg_catalog.pg_notify(r.channel, ''))
        from routing r where exists (select from {schema}.worker w where w.asleep)
    ) >= 0 as stored
from input i
order by i.ord
