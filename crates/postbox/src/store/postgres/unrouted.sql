-- Gives messages that nobody was subscribed to, to the subscriptions that were registered first
-- after them: all of the lowest epoch above the message's that match. Those with a scan of their own
-- (from_beginning, from a time) count as takers with what they scan for, and take it there.
with picked as materialized (
    select u.message, u.topic, u.epoch, taker.epoch as taker_epoch
    from {schema}.unrouted u
    cross join lateral (
        select pg_catalog.min(t.epoch) as epoch from (
            select s.epoch from {schema}.subscription s
            where s.removed_at is null and not s.backfilled and s.start = 'unrouted'
                and s.epoch > u.epoch and u.topic ~ s.matcher
            union all
            select s.scan_epoch from {schema}.subscription s
            where s.removed_at is null and s.scan_epoch > u.epoch and u.topic ~ s.scan_matcher
                and (s.start_at is null or {schema}.minted_at(u.message) >= s.start_at)
        ) t
    ) taker
    where taker.epoch is not null
    order by u.message
    limit 500
),
gone as (
    delete from {schema}.unrouted u using picked p where u.message = p.message
    returning u.message, u.topic, p.taker_epoch
),
wide as materialized (
    select f.*, pg_catalog.nextval('{schema}.delivery_id') as delivery
    from (
        select g.message, s.id as subscription, m.key, m.due_at, coalesce(m.priority, 0::smallint) as priority
        from gone g
        join {schema}.subscription s
            on s.epoch = g.taker_epoch and s.removed_at is null and s.start = 'unrouted' and g.topic ~ s.matcher
        join {schema}.message m on m.id = g.message
        order by g.message, s.id
    ) f
),
-- Of a subscription that takes one delivery of a key at a time, the first has it.
held as materialized (
    select h.delivery
    from (
        select pg_catalog.array_agg(w.subscription) as subscriptions, pg_catalog.array_agg(w.key) as keys,
            pg_catalog.array_agg(w.message) as messages, pg_catalog.array_agg(w.delivery) as numbers
        from wide w
        where w.key is not null and exists (select from {schema}.one_per_key u where u.subscription = w.subscription)
        having pg_catalog.count(*) > 0
    ) a
    cross join lateral {schema}.take_keys(a.subscriptions, a.keys, a.messages, a.numbers, false) h
),
fan as materialized (
    select w.* from wide w where w.delivery not in (select h.delivery from held h)
),
kept as (
    insert into {schema}.late_delivery (message, delivery, subscription)
    select f.message, f.delivery, f.subscription from fan f
),
readied as (
    insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
    select f.subscription, f.priority, (f.delivery >> 20) & 3::bigint, f.delivery, f.delivery, f.message, 0, 0, 0 from fan f
    where f.due_at is null or f.due_at <= pg_catalog.clock_timestamp()
),
later as (
    insert into {schema}.scheduled (delivery, due_at, subscription, priority, message, attempt, lost, rev)
    select f.delivery, f.due_at, f.subscription, f.priority, f.message, 0, 0, 0 from fan f
    where f.due_at > pg_catalog.clock_timestamp()
)
select pg_catalog.count(*) as moved from gone
