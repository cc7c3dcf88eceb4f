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
-- What the ids of a batch have in common: the time of a new id, and a random number from which they count on. So they
-- are in the order of the batch.
batch as materialized (
    select pg_catalog."left"(b.own, 18) as head,
        (pg_catalog.hashtextextended(b.own, 0) & 2305843009213693951::bigint) - 9223372036854775807::bigint - 1::bigint as first
    from (select {schema}.uuid7()::pg_catalog.text as own offset 0) b
),
-- Arrays that are null stand for nulls. Each is walked once: an element in the middle of one is found by walking to it.
input as materialized (
    select i.*, (b.head || pg_catalog.to_hex(b.first + i.ord))::pg_catalog.uuid as id,
        case
            when i.due_us is not null
                and pg_catalog.to_timestamp(i.due_us::double precision / 1000000::double precision) > pg_catalog.clock_timestamp()
                then pg_catalog.to_timestamp(i.due_us::double precision / 1000000::double precision)
            when i.delay_ms > 0 then pg_catalog.clock_timestamp() + interval '1 millisecond' * i.delay_ms::double precision
        end as due_at
    from batch b cross join unnest($1::pg_catalog.text[], $2::pg_catalog.text[], $3::pg_catalog.text[], $4::pg_catalog.text[], $5::bigint[],
        $6::pg_catalog.text[], $7::pg_catalog.text[], $8::pg_catalog.text[], $9::pg_catalog.text[], $10::int[],
        $11::bigint[], $12::bigint[], $13::pg_catalog.text[], $14::bigint[], $15::pg_catalog.bytea[], $16::pg_catalog.text[],
        $17::smallint[])
        with ordinality as i(topic, key, payload, headers, occurred_us, source, external_id, correlation_id,
            causation_id, max_attempts, delay_ms, due_us, dedup_key, dedup_ms, body, content_type, priority, ord)
),
fresh as (
    insert into {schema}.dedup as d (topic, key, message, body_hash, expires_at)
    select i.topic, i.dedup_key, i.id, {schema}.body_hash(i.key, i.payload, i.body, i.content_type),
        pg_catalog.clock_timestamp() + interval '1 millisecond' * i.dedup_ms::double precision
    from input i where i.dedup_key is not null
    order by i.topic, i.dedup_key
    on conflict (topic, key) do update
        set message = excluded.message, body_hash = excluded.body_hash, expires_at = excluded.expires_at
        where d.expires_at <= pg_catalog.statement_timestamp()
    returning d.message
),
-- What each topic fans out to.
ways as materialized (
    select w.topic,
        -- As learn_routes.sql has them: those that go by lanes are negative.
        coalesce(t.subscriptions, array(select case when s.per_key is null then s.id else -s.id end from {schema}.subscription s
            where s.removed_at is null and w.topic ~ s.matcher order by s.id)) as subscriptions,
        case when t.subscriptions is null then nullif(array(select u.subscription from {schema}.one_per_key u), '{}')
            else t.uniques end as uniques
    from (select distinct i.topic from input i) w
    left join lateral (
        -- An older epoch's routes go with it; a stricter snapshot may hold them still.
        select t.subscriptions, t.uniques from {schema}.route t
        where t.topic = w.topic and t.epoch = (select r.epoch from routing r)
        offset 0
    ) t on true
),
fan as materialized (
    select k.*,
        case pg_catalog.cardinality(k.subscriptions)
            when 1 then array[pg_catalog.nextval('{schema}.delivery_id')]
            else array(select pg_catalog.nextval('{schema}.delivery_id') from pg_catalog.unnest(k.subscriptions))
        end as deliveries
    from (
        -- Sorted before the numbers are drawn: they are the order of a key.
        select i.*, w.subscriptions, w.uniques
        from input i left join ways w on w.topic = i.topic
        where i.dedup_key is null or i.id in (select f.message from fresh f)
        order by i.ord
        offset 0
    ) k
),
-- One row for each delivery.
aimed as materialized (
    select f.id, f.key, f.priority, f.due_at, f.uniques, pg_catalog.unnest(f.subscriptions) as subscription,
        pg_catalog.unnest(f.deliveries) as delivery
    from fan f
),
-- Deliveries that are not made: of a key of which there is one that is unfinished.
held as materialized (
    select h.message, h.delivery, h.holder
    from (
        select pg_catalog.array_agg(d.subscription) as subscriptions, pg_catalog.array_agg(d.key) as keys,
            pg_catalog.array_agg(d.id) as messages, pg_catalog.array_agg(d.delivery) as deliveries
        from aimed d
        where d.uniques is not null and d.key is not null and d.subscription = any (d.uniques)
        having pg_catalog.count(*) > 0
    ) a
    cross join lateral {schema}.take_keys(a.subscriptions, a.keys, a.messages, a.deliveries, $18::pg_catalog.bool) h
),
stored as (
    insert into {schema}.message (id, epoch, topic, key, payload, headers, occurred_at, due_at, source,
        external_id, correlation_id, causation_id, max_attempts, delivery, deliveries, body, content_type, priority)
    select f.id, (select r.epoch from routing r), f.topic, f.key, f.payload::pg_catalog.json, f.headers::pg_catalog.json,
        pg_catalog.to_timestamp(f.occurred_us::double precision / 1000000::double precision), f.due_at, f.source,
        f.external_id, f.correlation_id, f.causation_id, f.max_attempts,
        case when pg_catalog.cardinality(f.deliveries) = 1 and f.uniques is null then f.deliveries[1] end,
        case
            when f.uniques is not null then nullif(array(
                select d.delivery from pg_catalog.unnest(f.deliveries) as d(delivery)
                where d.delivery not in (select h.delivery from held h) order by d.delivery), '{}')
            when pg_catalog.cardinality(f.deliveries) > 1 then f.deliveries
        end, f.body, f.content_type, nullif(f.priority, 0)
    from fan f
),
readied as (
    insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
    select pg_catalog.abs(d.subscription),
        case when d.subscription > 0 then coalesce(d.priority, 0::smallint) else {schema}.lane_of(d.key, d.delivery) end,
        (d.delivery >> 20) & 3::bigint, d.delivery, d.delivery, d.id, 0, 0, 0
    from aimed d
    where d.due_at is null and d.delivery not in (select h.delivery from held h)
),
later as (
    insert into {schema}.scheduled (delivery, due_at, subscription, priority, message, attempt, lost, rev)
    select d.delivery, d.due_at, pg_catalog.abs(d.subscription),
        case when d.subscription > 0 then coalesce(d.priority, 0::smallint) else {schema}.lane_of(d.key, d.delivery) end,
        d.id, 0, 0, 0
    from aimed d
    where d.due_at is not null and d.delivery not in (select h.delivery from held h)
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
    ) >= 0 as stored,
    c.holders as coalesced
from input i
left join (
    select h.message, pg_catalog.array_agg(h.holder order by h.delivery) as holders from held h group by h.message
) c on c.message = i.id
order by i.ord
