-- Puts deliveries of the subscriptions $1 into their lanes that are in none.
with picked as materialized (
    select r.tableoid as slot, r.ctid as place
    from pg_catalog.unnest($1::int[]) as w(subscription)
    cross join lateral (
        -- The first of all levels: a priority means nothing to those in order.
        select f.tableoid, f.ctid
        from pg_catalog.unnest(array[-1, 0, 1]::smallint[]) as l(priority)
        cross join lateral (
            select r.tableoid, r.ctid, r.delivery from {schema}.ready r
            where r.subscription = w.subscription and r.priority = l.priority
            order by r.pos limit 5000
            for update skip locked
        ) f
        order by f.delivery limit 5000
    ) r
),
gone as (
    -- As in claim.sql.
    delete from {schema}.ready r
    where r.ctid = any (array(select p.place from picked p))
        and ((r.tableoid, r.ctid) in (select p.slot, p.place from picked p)) is true
    returning r.*
)
insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
select g.subscription, {schema}.lane_of(m.key, g.delivery), (pg_catalog.nextval('{schema}.delivery_id') >> 20) & 3::bigint,
    g.delivery, g.delivery, g.message, g.attempt, g.lost, g.rev
from gone g left join {schema}.message m on m.id = g.message
