-- Leases one delivery to a puller, with its attempt on record as begun.
-- $1 worker, $2 token, $3 subscription, $4 a lower level that goes first this time, or null.
with alive as materialized (
    -- The share lock keeps a takeover from missing this lease.
    select w.id from {schema}.worker w
    where w.id = $1 and w.expires_at > pg_catalog.clock_timestamp()
    for key share
),
picked as materialized (
    select p.slot, p.place
    from alive
    -- An operation's attempt needs a handler that the engine calls.
    join {schema}.subscription s on s.id = $3 and s.kind <> 'operation' and s.paused_at is null
    cross join lateral (
        select q.slot, q.place
        from (values ($4::smallint), (-1), (0), (1)) as l(priority)
        cross join lateral (
            select r.tableoid as slot, r.ctid as place from {schema}.ready r
            where r.subscription = s.id and r.priority = l.priority
            order by r.pos
            limit 1
            for update skip locked
        ) q
        limit 1
    ) p
),
gone as (
    -- As in claim.sql.
    delete from {schema}.ready r
    where r.ctid = any (array(select p.place from picked p))
        and (r.tableoid, r.ctid) in (select p.slot, p.place from picked p)
    returning r.*
),
leased as (
    insert into {schema}.lease (token, batch, worker, deliveries, messages, subscriptions, priorities, attempts, losts, revs)
    select $2, pg_catalog.nextval('{schema}.batch_id'), $1, array[g.delivery], array[g.message], array[g.subscription],
        array[g.priority], array[g.attempt], array[g.lost], array[g.rev + 1]
    from gone g
    returning batch
),
begun as (
    insert into {schema}.attempt (delivery, number, batch, worker)
    select g.delivery, g.attempt + 1, l.batch, $1 from gone g cross join leased l
)
select l.batch, g.delivery, g.subscription, g.message, g.priority, g.attempt, g.lost, g.rev + 1 as rev,
    s.kind, coalesce(m.max_attempts, s.max_attempts) as max_tries, s.retry_base_ms, s.retry_cap_ms,
    m.topic, m.key, m.payload::pg_catalog.text as payload, m.body, m.content_type, m.headers::pg_catalog.text as headers,
    (extract(epoch from m.occurred_at) * 1000000::numeric)::bigint as occurred_us,
    m.source, m.external_id, m.correlation_id, m.causation_id, m.max_attempts
from gone g
cross join leased l
join {schema}.subscription s on s.id = g.subscription
left join {schema}.message m on m.id = g.message
