-- Stores one message that is due now and has no dedup key, where what its topic fans out to is stored:
-- the short way. No row: nothing is stored, and publish.sql has to do it. Of the marked lines, those marked
-- `one` are for a topic with one subscription, those marked `several` for one with more.
-- $1 topic, $2 key, $3 payload, $4 headers, $5 time of occurrence in microseconds, $6 source,
-- $7 external id, $8 correlation id, $9 causation id, $10 attempts, $11 body, $12 content type.
with fan as materialized (
    select {schema}.uuid7() as id, t.epoch,
        -- {one
        t.subscriptions[1] as subscription, pg_catalog.nextval('{schema}.delivery_id') as delivery
        -- one}
        -- {several
        t.subscriptions, array(select pg_catalog.nextval('{schema}.delivery_id') from pg_catalog.unnest(t.subscriptions)) as deliveries
        -- several}
    from {schema}.route t
    where t.topic = $1
        -- {one
        and pg_catalog.cardinality(t.subscriptions) = 1
        and t.uniques is null
        -- one}
        -- {several
        and pg_catalog.cardinality(t.subscriptions) > 1
        and t.uniques is null
        -- several}
        -- As in publish.sql: a stricter snapshot may be older than the lock on message.
        and pg_catalog.current_setting('transaction_isolation') = 'read committed'
),
stored as (
    insert into {schema}.message (id, epoch, topic, key, payload, headers, occurred_at, source,
        external_id, correlation_id, causation_id, max_attempts, body, content_type,
        -- {one
        delivery)
        -- one}
        -- {several
        deliveries)
        -- several}
    select f.id, f.epoch, $1, $2, $3::pg_catalog.json, $4::pg_catalog.json,
        pg_catalog.to_timestamp($5::bigint::double precision / 1000000::double precision),
        $6, $7, $8, $9, $10, $11, $12,
        -- {one
        f.delivery
        -- one}
        -- {several
        f.deliveries
        -- several}
    from fan f
),
readied as (
    insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
    -- {one
    select pg_catalog.abs(f.subscription), case when f.subscription > 0 then 0::smallint else {schema}.lane_of($2, f.delivery) end,
        (f.delivery >> 20) & 3::bigint, f.delivery, f.delivery, f.id, 0, 0, 0
    from fan f
    -- one}
    -- {several
    select pg_catalog.abs(d.subscription), case when d.subscription > 0 then 0::smallint else {schema}.lane_of($2, d.delivery) end,
        (d.delivery >> 20) & 3::bigint, d.delivery, d.delivery, f.id, 0, 0, 0
    from fan f cross join lateral unnest(f.subscriptions, f.deliveries) as d(subscription, delivery)
    -- several}
)
select f.id,
    -- Tells a worker that said it would sleep; a busy one is not told, because NOTIFY costs.
    (
        select pg_catalog.pg_notify(r.channel, '')::pg_catalog.text from {schema}.routing r
        where exists (select from {schema}.worker w where w.asleep)
    ) as told
from fan f
