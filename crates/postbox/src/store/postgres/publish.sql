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
input as materialized (
    select i.*, {schema}.uuid7() as id,
        case
            when i.due_us is not null and pg_catalog.to_timestamp(i.due_us / 1000000.0) > pg_catalog.clock_timestamp()
                then pg_catalog.to_timestamp(i.due_us / 1000000.0)
            when i.delay_ms > 0 then pg_catalog.clock_timestamp() + i.delay_ms * interval '1 millisecond'
        end as due_at
    from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[],
        $8::text[], $9::text[], $10::int[], $11::bigint[], $12::bigint[], $13::text[], $14::bigint[])
        with ordinality as i(topic, key, payload, headers, occurred_us, source, external_id,
            correlation_id, causation_id, max_attempts, delay_ms, due_us, dedup_key, dedup_ms, ord)
),
fresh as (
    insert into {schema}.dedup as d (topic, key, message, body_hash, expires_at)
    select i.topic, i.dedup_key, i.id, {schema}.body_hash(i.key, i.payload),
        pg_catalog.clock_timestamp() + i.dedup_ms * interval '1 millisecond'
    from input i where i.dedup_key is not null
    order by i.topic, i.dedup_key
    on conflict (topic, key) do update
        set message = excluded.message, body_hash = excluded.body_hash, expires_at = excluded.expires_at
        where d.expires_at <= pg_catalog.statement_timestamp()
    returning d.message
),
kept as materialized (
    select i.* from input i
    where i.dedup_key is null or i.id in (select f.message from fresh f)
),
fan as materialized (
    select f.ord, f.id, f.subscription, f.due_at, pg_catalog.nextval('{schema}.delivery_id') as delivery
    from (
        select k.ord, k.id, k.due_at, s.subscription
        from kept k cross join routing r
        left join {schema}.route t on t.topic = k.topic and t.epoch = r.epoch
        cross join lateral (
            select u.subscription from unnest(t.subscriptions) as u(subscription) where t.topic is not null
            union all
            select s.id from {schema}.subscription s
            where t.topic is null and s.removed_at is null and k.topic ~ s.matcher
        ) s
        order by k.ord, s.subscription
    ) f
),
stored as (
    insert into {schema}.message (id, epoch, topic, key, payload, headers, occurred_at, due_at, source,
        external_id, correlation_id, causation_id, max_attempts, deliveries)
    select k.id, r.epoch, k.topic, k.key, k.payload::json, k.headers::json,
        pg_catalog.to_timestamp(k.occurred_us / 1000000.0), k.due_at, k.source, k.external_id,
        k.correlation_id, k.causation_id, k.max_attempts, a.deliveries
    from kept k cross join routing r
    left join (select f.ord, pg_catalog.array_agg(f.delivery order by f.delivery) as deliveries
        from fan f group by f.ord) a on a.ord = k.ord
),
readied as (
    insert into {schema}.ready (subscription, priority, pos, delivery, message, attempt, lost, rev)
    select f.subscription, 0, f.delivery, f.delivery, f.id, 0, 0, 0 from fan f where f.due_at is null
),
later as (
    insert into {schema}.scheduled (delivery, due_at, subscription, priority, message, attempt, lost, rev)
    select f.delivery, f.due_at, f.subscription, 0, f.id, 0, 0, 0 from fan f where f.due_at is not null
),
nobody as (
    insert into {schema}.unrouted (message, topic, epoch)
    select k.id, k.topic, r.epoch from kept k cross join routing r
    where not exists (select from fan f where f.ord = k.ord)
)
select i.ord, i.id,
    k.id is not null and (
        -- Tells a worker that said it would sleep; a busy one is not told, because NOTIFY costs.
        select pg_catalog.count(pg_catalog.pg_notify(r.channel, ''))
        from routing r where exists (select from {schema}.worker w where w.asleep)
    ) >= 0 as stored
from input i left join kept k on k.ord = i.ord
order by i.ord
