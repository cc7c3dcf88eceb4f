-- Leases a batch: rows leave ready, and one lease row carries them all.
-- $1 worker, $2 token, $3 subscriptions, $4 how many of each, $5 and $6 the priority and the place after
-- which the claim of each begins.
with alive as materialized (
    -- The share lock keeps a takeover from missing this lease.
    select w.id from {schema}.worker w
    where w.id = $1 and w.expires_at > pg_catalog.clock_timestamp()
    for key share
),
picked as materialized (
    select p.slot, p.place
    from alive
    cross join unnest($3::int[], $4::int[], $5::smallint[], $6::bigint[]) as w(subscription, room, priority, pos)
    cross join lateral (
        select r.tableoid as slot, r.ctid as place from {schema}.ready r
        where r.subscription = w.subscription
            and (r.priority, r.pos) > (w.priority, w.pos)
        order by r.priority, r.pos
        limit w.room
        for update skip locked
    ) p
    -- Decided here, so that a pause holds at once for all.
    where (select s.paused_at from {schema}.subscription s where s.id = w.subscription) is null
),
gone as (
    -- By their places: rows of ready are never updated, these are locked, and no plan can read the whole
    -- table for them.
    delete from {schema}.ready r
    where r.ctid = any (array(select p.place from picked p))
        and (r.tableoid, r.ctid) in (select p.slot, p.place from picked p)
    returning r.*
),
leased as (
    insert into {schema}.lease (token, batch, worker, deliveries, messages, subscriptions, priorities, attempts, losts, revs)
    select $2, pg_catalog.nextval('{schema}.batch_id'), $1,
        pg_catalog.array_agg(g.delivery), pg_catalog.array_agg(g.message), pg_catalog.array_agg(g.subscription),
        pg_catalog.array_agg(g.priority), pg_catalog.array_agg(g.attempt), pg_catalog.array_agg(g.lost),
        pg_catalog.array_agg(g.rev + 1)
    from (select * from gone order by priority, pos) g
    having pg_catalog.count(*) > 0
    returning batch
)
-- In no order: who reads it knows the places.
select l.batch, g.delivery, g.subscription, g.message, g.priority, g.pos, g.attempt, g.lost, g.rev + 1 as rev,
    m.topic, m.key, m.payload::pg_catalog.text as payload, m.body, m.content_type, m.headers::pg_catalog.text as headers,
    (extract(epoch from m.occurred_at) * 1000000::numeric)::bigint as occurred_us,
    m.source, m.external_id, m.correlation_id, m.causation_id, m.max_attempts
from gone g
cross join leased l
left join {schema}.message m on m.id = g.message
