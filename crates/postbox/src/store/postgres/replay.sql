-- New deliveries of ended ones' messages, due now, each with its entry in the audit. Arrays in order:
-- $1 the ended deliveries, $2 their messages, $3 their subscriptions, $4 their states;
-- $5 actor, $6 action, $7 reason.
with wide as materialized (
    select o.ord, o.delivery, o.message, o.subscription, o.state, pg_catalog.nextval('{schema}.delivery_id') as fresh
    from (
        select e.* from unnest($1::bigint[], $2::pg_catalog.uuid[], $3::int[], $4::pg_catalog.text[])
            with ordinality as e(delivery, message, subscription, state, ord)
        order by e.ord
    ) o
),
-- Those of a key of which there is one that is unfinished are not made.
held as materialized (
    select h.delivery, h.holder
    from (
        select pg_catalog.array_agg(w.subscription) as subscriptions, pg_catalog.array_agg(m.key) as keys,
            pg_catalog.array_agg(w.message) as messages, pg_catalog.array_agg(w.fresh) as numbers
        from wide w join {schema}.message m on m.id = w.message
        where m.key is not null and exists (select from {schema}.one_per_key u where u.subscription = w.subscription)
        having pg_catalog.count(*) > 0
    ) a
    cross join lateral {schema}.take_keys(a.subscriptions, a.keys, a.messages, a.numbers, false) h
),
made as materialized (
    select w.* from wide w where w.fresh not in (select h.delivery from held h)
),
kept as (
    insert into {schema}.late_delivery (message, delivery, subscription, replay_of)
    select m.message, m.fresh, m.subscription, m.delivery from made m
),
readied as (
    insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
    select m.subscription, coalesce(g.priority, 0::smallint), (m.fresh >> 20) & 3::bigint, m.fresh, m.fresh, m.message, 0, 0, 0
    from made m left join {schema}.message g on g.id = m.message
),
told as materialized (
    -- An operator has no other way into the audit; each call sees the number of the one before.
    select m.delivery, r.seq, r.at
    from made m
    cross join lateral {schema}.record_action($5, $6, m.delivery, m.subscription, null, null, m.state, m.state, $7,
        pg_catalog.json_build_object('replayed_as', m.fresh)) r
)
select m.delivery, m.fresh, t.seq, (extract(epoch from t.at) * 1000000::numeric)::bigint as at_us,
    session_user::pg_catalog.text as login, (select s.name from {schema}.subscription s where s.id = m.subscription) as name,
    (select pg_catalog.count(pg_catalog.pg_notify(r.channel, ''))
        from {schema}.routing r where exists (select from {schema}.worker w where w.asleep)) as woken
from made m join told t on t.delivery = m.delivery
order by m.ord
