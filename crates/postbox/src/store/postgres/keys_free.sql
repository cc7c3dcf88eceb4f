-- Lets keys go on whose head has ended: $1 heads that are done with, $2 dead ones that hold their key unless its
-- subscription skips those; $3 a subscription and $4 a key of it that goes on whatever it waits for. Their lanes are held. So many of a key at once; the last of them lets the next come.
with freed as materialized (
    select k.subscription, k.key from {schema}.key_state k
    join {schema}.subscription s on s.id = k.subscription
    where k.state <> 'parked' and (k.head = any ($1::bigint[]) or k.head = any ($2::bigint[]) and s.on_dead = 'skip')
        or k.subscription = $3::int and k.key = $4::pg_catalog.text
),
parked as (
    update {schema}.key_state k set head = null where k.state = 'parked' and k.head = any ($1::bigint[])
),
waiting as materialized (
    select f.subscription, f.key, r.slot, r.place, r.delivery
    from freed f
    cross join lateral (
        select r.tableoid as slot, r.ctid as place, r.delivery
        from {schema}.ready r join {schema}.message m on m.id = r.message
        where r.subscription = f.subscription and r.priority = {schema}.held_of(f.key) and m.key = f.key
        order by r.pos
        limit {let_through}
    ) r
),
gone as (
    -- As in claim.sql.
    delete from {schema}.ready r
    where r.ctid = any (array(select w.place from waiting w))
        and ((r.tableoid, r.ctid) in (select w.slot, w.place from waiting w)) is true
    returning r.*
),
back as (
    insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
    select g.subscription, {schema}.lane_of(w.key, g.delivery), (pg_catalog.nextval('{schema}.delivery_id') >> 20) & 3::bigint,
        g.delivery, g.delivery, g.message, g.attempt, g.lost, g.rev
    from gone g join waiting w on w.delivery = g.delivery
),
counted as materialized (
    select f.subscription, f.key, pg_catalog.count(w.delivery) as number, pg_catalog.max(w.delivery) as last
    from freed f left join waiting w on w.subscription = f.subscription and w.key = f.key
    group by f.subscription, f.key
),
over as (
    delete from {schema}.key_state k using counted c
    where k.subscription = c.subscription and k.key = c.key and c.number < {let_through}
),
goes_on as (
    update {schema}.key_state k set head = c.last, upto = c.last, state = 'draining', since = pg_catalog.clock_timestamp(),
        cause = 'more wait than are let through at once'
    from counted c
    where k.subscription = c.subscription and k.key = c.key and c.number >= {let_through}
)
select pg_catalog.count(pg_catalog.pg_notify(r.channel, '')) as woken from {schema}.routing r
where exists (select from {schema}.worker w where w.asleep) and exists (select from waiting)
