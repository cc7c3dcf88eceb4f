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
    select p.subscription, p.priority, p.pos
    from alive
    cross join unnest($3::int[], $4::int[], $5::smallint[], $6::bigint[]) as w(subscription, room, priority, pos)
    cross join lateral (
        select r.subscription, r.priority, r.pos from {schema}.ready r
        where r.subscription = w.subscription
            and (r.priority, r.pos) > (w.priority, w.pos)
        order by r.priority, r.pos
        limit w.room
        for update skip locked
    ) p
),
gone as (
    delete from {schema}.ready r using picked p
    where r.subscription = p.subscription and r.priority = p.priority and r.pos = p.pos
    returning r.*
),
leased as (
    insert into {schema}.lease (token, batch, worker, deliveries, messages, subscriptions, priorities, attempts, losts, revs)
    select $2, pg_catalog.nextval('{schema}.batch_id'), $1,
        pg_catalog.array_agg(g.delivery order by g.priority, g.pos),
        pg_catalog.array_agg(g.message order by g.priority, g.pos),
        pg_catalog.array_agg(g.subscription order by g.priority, g.pos),
        pg_catalog.array_agg(g.priority order by g.priority, g.pos),
        pg_catalog.array_agg(g.attempt order by g.priority, g.pos),
        pg_catalog.array_agg(g.lost order by g.priority, g.pos),
        pg_catalog.array_agg(g.rev + 1 order by g.priority, g.pos)
    from gone g
    having pg_catalog.count(*) > 0
    returning batch
)
select l.batch, g.delivery, g.subscription, g.message, g.priority, g.pos, g.attempt, g.lost, g.rev + 1 as rev,
    m.topic, m.key, m.payload::pg_catalog.text as payload, m.body, m.content_type, m.headers::pg_catalog.text as headers,
    (extract(epoch from m.occurred_at) * 1000000::numeric)::bigint as occurred_us,
    m.source, m.external_id, m.correlation_id, m.causation_id, m.max_attempts
from gone g
cross join leased l
left join {schema}.message m on m.id = g.message
order by g.priority, g.pos
