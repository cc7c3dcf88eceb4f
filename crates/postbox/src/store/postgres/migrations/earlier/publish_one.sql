-- Stores one message that is due now and has no dedup key, where what its topic fans out to is stored:
-- the short way. No row: nothing is stored, and publish.sql has to do it.
-- $1 topic, $2 key, $3 payload, $4 headers, $5 time of occurrence in microseconds, $6 source,
-- $7 external id, $8 correlation id, $9 causation id, $10 attempts, $11 body, $12 content type.
with fan as materialized (
    select {schema}.uuid7() as id, r.epoch, r.channel, t.subscriptions,
        case pg_catalog.cardinality(t.subscriptions)
            when 1 then array[pg_catalog.nextval('{schema}.delivery_id')]
            else array(select pg_catalog.nextval('{schema}.delivery_id') from pg_catalog.unnest(t.subscriptions))
        end as deliveries
    from {schema}.routing r
    join {schema}.route t on t.topic = $1 and t.epoch = r.epoch
    -- As in publish.sql: a stricter snapshot may be older than the lock on message.
    where pg_catalog.cardinality(t.subscriptions) > 0
        and pg_catalog.current_setting('transaction_isolation') = 'read committed'
),
stored as (
    insert into {schema}.message (id, epoch, topic, key, payload, headers, occurred_at, source,
        external_id, correlation_id, causation_id, max_attempts, deliveries, body, content_type)
    select f.id, f.epoch, $1, $2, $3::pg_catalog.json, $4::pg_catalog.json,
        pg_catalog.to_timestamp($5::bigint::double precision / 1000000::double precision),
        $6, $7, $8, $9, $10, f.deliveries, $11, $12
    from fan f
),
readied as (
    insert into {schema}.ready (subscription, priority, pos, delivery, message, attempt, lost, rev)
    select d.subscription, 0, d.delivery, d.delivery, f.id, 0, 0, 0
    from fan f cross join lateral unnest(f.subscriptions, f.deliveries) as d(subscription, delivery)
)
select f.id,
    -- Tells a worker that said it would sleep; a busy one is not told, because NOTIFY costs.
    case when exists (select from {schema}.worker w where w.asleep) then pg_catalog.pg_notify(f.channel, '')::pg_catalog.text end as told
from fan f
