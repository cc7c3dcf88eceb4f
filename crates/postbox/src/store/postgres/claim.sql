-- Leases a batch: rows leave ready, and one lease row carries them all.
-- $1 worker, $2 token, $3 subscriptions, $4 how many of each, $5 a lower level and $6 how many of it go before
-- all others, $7 to $9 the place after which the claim of each level begins. Of subscriptions that go by lanes:
-- $10 subscriptions, $11 lanes, $12 how many of each, $13 how many of the subscription.
with alive as materialized (
    -- The share lock keeps a takeover from missing this lease.
    select w.id from {schema}.worker w
    where w.id = $1 and w.expires_at > pg_catalog.clock_timestamp()
    for key share
),
picked as materialized (
    select p.slot, p.place
    from alive
    cross join unnest($3::int[], $4::int[], $5::smallint[], $6::int[], $7::bigint[], $8::bigint[], $9::bigint[])
        as w(subscription, room, lower, kept, high, normal, low)
    cross join lateral (
        select q.slot, q.place
        -- In this order: a loop takes them one by one, and stops when there is no room left. What a lower
        -- level has had as its share is passed over when its own turn comes.
        from (values
            (w.lower, 0, w.kept, case w.lower when 0 then w.normal else w.low end),
            (-1, 0, w.room, w.high),
            (0, case w.lower when 0 then w.kept else 0 end, w.room, w.normal),
            (1, case w.lower when 1 then w.kept else 0 end, w.room, w.low)
        ) as l(priority, passed, most, after)
        cross join lateral (
            select r.tableoid as slot, r.ctid as place from {schema}.ready r
            where r.subscription = w.subscription
                and r.priority = l.priority and r.pos > l.after
-- {many
                -- What nobody has touched, from stretches that no other claim is in: no row is locked before it is
                -- deleted, and the deletion decides (decision 0029).
                and r.xmax = 0
                and pg_catalog.pg_try_advisory_xact_lock('{schema}.ready'::pg_catalog.regclass::pg_catalog.oid::int,
                    ((r.pos >> 8) & 2147483647::bigint)::int)
-- many}
            order by r.pos
            offset l.passed limit l.most
-- {few
            for update skip locked
-- few}
        ) q
        limit w.room
    ) p
    -- Decided here, so that a pause holds at once for all.
    where (select s.paused_at is null from {schema}.subscription s where s.id = w.subscription)
),
-- {lanes
queued as materialized (
    -- From lanes that are this worker's own nobody else claims, so nothing is locked. What waits for another
    -- delivery of its key is put aside.
    select q.slot, q.place, q.delivery, q.key,
        k.subscription is not null
            and not (coalesce(q.delivery <= k.upto, false) or k.state <> 'parked' and coalesce(k.head = q.delivery, false)) as waits,
        coalesce(k.head = q.delivery, false) as leads
    from (
        select r.slot, r.place, r.delivery, w.subscription, w.room, m.key,
            pg_catalog.row_number() over (partition by w.subscription order by r.delivery) as nth
        from alive a
        cross join unnest($10::int[], $11::smallint[], $12::int[], $13::int[]) as w(subscription, level, most, room)
        join {schema}.lane n on n.subscription = w.subscription and n.level = w.level and n.owner = a.id and not n.leaving
        cross join lateral (
            select r.tableoid as slot, r.ctid as place, r.delivery, r.message from {schema}.ready r
            where r.subscription = w.subscription and r.priority = w.level
            order by r.pos limit w.most
        ) r
        left join {schema}.message m on m.id = r.message
        where (select s.paused_at is null from {schema}.subscription s where s.id = w.subscription)
    ) q
    left join {schema}.key_state k on k.subscription = q.subscription and k.key = q.key
    where q.nth <= q.room
),
-- lanes}
gone as (
    -- By their places: rows of ready are never updated, so a place is its row's or nobody's, and no plan can
    -- read the whole table for them. `is true` keeps the look-up a look-up: as a join it may become one of all with all, by
    -- a plan that was made when the table was empty.
    delete from {schema}.ready r
-- {plain
    where r.ctid = any (array(select p.place from picked p))
        and ((r.tableoid, r.ctid) in (select p.slot, p.place from picked p)) is true
-- plain}
-- {lanes
    where r.ctid = any (array(select p.place from picked p union all select q.place from queued q))
        and ((r.tableoid, r.ctid) in (select p.slot, p.place from picked p union all select q.slot, q.place from queued q)) is true
-- lanes}
    returning r.*
),
-- {lanes
aside as (
    insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
    select g.subscription, {schema}.held_of(q.key), (pg_catalog.nextval('{schema}.delivery_id') >> 20) & 3::bigint,
        g.delivery + {far}, g.delivery, g.message, g.attempt, g.lost, g.rev
    from gone g join queued q on q.delivery = g.delivery and q.waits
),
-- lanes}
leased as (
    insert into {schema}.lease (token, batch, worker, deliveries, messages, subscriptions, priorities, attempts, losts, revs)
    select $2, pg_catalog.nextval('{schema}.batch_id'), $1,
        pg_catalog.array_agg(g.delivery), pg_catalog.array_agg(g.message), pg_catalog.array_agg(g.subscription),
        pg_catalog.array_agg(g.priority), pg_catalog.array_agg(g.attempt), pg_catalog.array_agg(g.lost),
        pg_catalog.array_agg(g.rev + 1)
    from (
        select * from gone
-- {lanes
        where delivery not in (select q.delivery from queued q where q.waits)
-- lanes}
        order by priority, pos
    ) g
    having pg_catalog.count(*) > 0
    returning batch
)
-- In no order: who reads it knows the places.
select l.batch,
-- {lanes
    coalesce(q.leads, false) as leads,
-- lanes}
    g.delivery, g.subscription, g.message, g.priority, g.pos, g.attempt, g.lost, g.rev + 1 as rev,
    m.topic, m.key, m.payload::pg_catalog.text as payload, m.body, m.content_type, m.headers::pg_catalog.text as headers,
    (extract(epoch from m.occurred_at) * 1000000::numeric)::bigint as occurred_us,
    m.source, m.external_id, m.correlation_id, m.causation_id, m.max_attempts
from gone g
cross join leased l
left join {schema}.message m on m.id = g.message
-- {lanes
left join queued q on q.delivery = g.delivery
where q.waits is not true
-- lanes}
