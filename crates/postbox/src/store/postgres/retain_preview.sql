-- What retention would remove now, by subscription and outcome; the last row counts the messages.
-- $1 how long a message that nobody is subscribed to is kept, in milliseconds.
with ended as (
    select d.delivery, d.message, d.subscription, d.state, d.at, s.keep_dead_ms as keep_ms
    from {schema}.dead_letter d join {schema}.subscription s on s.id = d.subscription
    union all
    select o.delivery, o.message, o.subscription, 'succeeded', o.finished_at, s.keep_succeeded_ms
    from {schema}.outcome o join {schema}.subscription s on s.id = o.subscription
    where o.state_after = 'succeeded'
    union all
    select r.delivery, r.message, r.subscription, 'succeeded', r.at, s.keep_succeeded_ms
    from {schema}.resolution r join {schema}.subscription s on s.id = r.subscription
    where r.state_after = 'succeeded'
    union all
    select u.delivery, u.message, u.subscription, 'succeeded', p.finished_at,
        (select pg_catalog.max(s.keep_succeeded_ms) from {schema}.subscription s where s.id = any (p.subscriptions))
    from {schema}.outcome_part p
    cross join lateral unnest(p.deliveries, p.messages, p.subscriptions) as u(delivery, message, subscription)
    where not exists (select from {schema}.lease l where l.batch = p.batch)
),
expired as materialized (
    select e.* from ended e
    where e.at < pg_catalog.statement_timestamp() - interval '1 millisecond'
            * greatest(e.keep_ms, (select t.keep_at_least_ms from {schema}.retention t))::double precision
        and e.delivery not in (
            select i.delivery from {schema}.lease l cross join lateral pg_catalog.unnest(l.deliveries) as i(delivery))
)
select s.application, s.name, x.state as outcome, x.many, (extract(epoch from x.oldest) * 1000000::numeric)::bigint as oldest_us
from (
    select e.subscription, e.state, pg_catalog.count(*) as many, pg_catalog.min(e.at) as oldest
    from expired e group by e.subscription, e.state
) x join {schema}.subscription s on s.id = x.subscription
union all
select null, null, 'messages', (
    select pg_catalog.count(*)
    from (select e.message, pg_catalog.count(*) as gone from expired e group by e.message) t
    join {schema}.message m on m.id = t.message
    left join {schema}.thinned h on h.message = m.id
    where t.gone + coalesce(h.deliveries, 0)
            = coalesce(pg_catalog.cardinality(m.deliveries), 0)
                + (select pg_catalog.count(*) from {schema}.late_delivery l where l.message = m.id)
        and not exists (select from {schema}.unrouted u where u.message = m.id)
) + (
    select pg_catalog.count(*) from {schema}.unrouted u
    where u.message < {schema}.uuid_at(pg_catalog.statement_timestamp() - interval '1 millisecond'
            * greatest($1::bigint, (select t.keep_at_least_ms from {schema}.retention t))::double precision)
        and not exists (select from {schema}.subscription s where not s.backfilled and s.removed_at is null)
), null
order by 1, 2, 3
