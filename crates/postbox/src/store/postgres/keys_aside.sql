-- Puts aside what waits for another delivery of its key at the front of these lanes: $1 subscriptions, $2 lanes, which
-- are the claiming worker's own.
with waiting as materialized (
    select r.slot, r.place, r.delivery, m.key
    from unnest($1::int[], $2::smallint[]) as w(subscription, level)
    cross join lateral (
        select r.tableoid as slot, r.ctid as place, r.delivery, r.message from {schema}.ready r
        where r.subscription = w.subscription and r.priority = w.level
        order by r.pos limit 5000
    ) r
    join {schema}.message m on m.id = r.message
    join {schema}.key_state k on k.subscription = w.subscription and k.key = m.key
    where not (coalesce(r.delivery <= k.upto, false) or k.state <> 'parked' and coalesce(k.head = r.delivery, false))
),
gone as (
    -- As in claim.sql.
    delete from {schema}.ready r
    where r.ctid = any (array(select w.place from waiting w))
        and ((r.tableoid, r.ctid) in (select w.slot, w.place from waiting w)) is true
    returning r.*
)
insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
select g.subscription, {schema}.held_of(w.key), (pg_catalog.nextval('{schema}.delivery_id') >> 20) & 3::bigint,
    g.delivery + {far}, g.delivery, g.message, g.attempt, g.lost, g.rev
from gone g join waiting w on w.delivery = g.delivery
