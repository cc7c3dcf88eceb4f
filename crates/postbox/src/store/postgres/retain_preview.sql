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
    -- As sift_window does it: a window that is over goes but for what is still referred to, unless that is too much.
    select coalesce(pg_catalog.sum(case when w.kept <= least(1000000::bigint, w.there * 3::bigint / 4::bigint) then w.there - w.kept else 0 end), 0)::bigint
    from (
        select (select pg_catalog.count(*) from {schema}.message m where m.id >= o.from_id and m.id < o.to_id) as there,
            (
                select pg_catalog.count(distinct r.message) from {schema}.reference r
                where r.message >= o.from_id and r.message < o.to_id
                    and case when r.delivery is not null then r.delivery not in (select e.delivery from expired e)
                        else r.message >= {schema}.uuid_at(pg_catalog.statement_timestamp() - interval '1 millisecond'
                                * greatest($1::bigint, (select t.keep_at_least_ms from {schema}.retention t))::double precision)
                            or exists (select from {schema}.subscription s where not s.backfilled and s.removed_at is null)
                        end
            ) as kept
        from {schema}.message_window o
        where o.to_id <= {schema}.uuid_at(pg_catalog.statement_timestamp() - interval '1 millisecond' * greatest(
            (select t.keep_at_least_ms from {schema}.retention t),
            (select least($1::bigint, pg_catalog.min(s.keep_succeeded_ms), pg_catalog.min(s.keep_dead_ms)) from {schema}.subscription s)
            )::double precision)
    ) w
), null
order by 1, 2, 3
