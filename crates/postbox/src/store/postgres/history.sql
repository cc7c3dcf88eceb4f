-- One page of a new subscription's history. $1 subscription, $2 the last id of the page before,
-- $3 messages a page. Runs once every transaction that could still commit an older epoch has ended.
with wanted as materialized (
    select s.* from {schema}.subscription s where s.id = $1
),
page as materialized (
    select m.id, m.topic, m.key, m.epoch, m.due_at, coalesce(m.priority, 0::smallint) as priority from {schema}.message m
    where m.id > $2
    order by m.id
    limit $3
),
wide as materialized (
    select f.id as message, f.key, f.due_at, f.priority, pg_catalog.nextval('{schema}.delivery_id') as delivery
    from (
        select p.id, p.key, p.due_at, p.priority from page p cross join wanted s
        where p.epoch < s.scan_epoch and p.topic ~ s.scan_matcher
            and (s.start_at is null or {schema}.minted_at(p.id) >= s.start_at)
        order by p.id
    ) f
),
-- Of a subscription that takes one delivery of a key at a time, the first has it.
held as materialized (
    select h.delivery
    from (
        select pg_catalog.array_agg($1::int) as subscriptions, pg_catalog.array_agg(w.key) as keys,
            pg_catalog.array_agg(w.message) as messages, pg_catalog.array_agg(w.delivery) as numbers
        from wide w
        where w.key is not null and exists (select from {schema}.one_per_key u where u.subscription = $1)
        having pg_catalog.count(*) > 0
    ) a
    cross join lateral {schema}.take_keys(a.subscriptions, a.keys, a.messages, a.numbers, false) h
),
fan as materialized (
    select w.* from wide w where w.delivery not in (select h.delivery from held h)
),
kept as (
    insert into {schema}.late_delivery (message, delivery, subscription)
    select f.message, f.delivery, $1 from fan f
),
readied as (
    insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
    select $1, f.priority, (f.delivery >> 20) & 3::bigint, f.delivery, f.delivery, f.message, 0, 0, 0 from fan f
    where f.due_at is null or f.due_at <= pg_catalog.clock_timestamp()
),
later as (
    insert into {schema}.scheduled (delivery, due_at, subscription, priority, message, attempt, lost, rev)
    select f.delivery, f.due_at, $1, f.priority, f.message, 0, 0, 0 from fan f
    where f.due_at > pg_catalog.clock_timestamp()
)
select p.id as last from page p order by p.id desc limit 1
