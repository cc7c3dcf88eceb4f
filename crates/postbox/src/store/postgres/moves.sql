-- Puts deliveries where they go next, with the attempts that ended. $1 is a JSON array of moves.
with moved as materialized (
    -- One look at the clock for a move: how long it waits counts from the end that is on record.
    select *, pg_catalog.clock_timestamp() as now from pg_catalog.jsonb_to_recordset($1::pg_catalog.jsonb) as m(
        ord int, delivery bigint, message pg_catalog.uuid, subscription int, priority smallint, rev int,
        state pg_catalog.text, attempts int, lost int, wait_ms bigint, quiet_ms bigint, note pg_catalog.text,
        number int, kind pg_catalog.text, error pg_catalog.text, receipt pg_catalog.json, ran_us bigint, ago_us bigint,
        batch bigint, worker pg_catalog.uuid)
),
-- Left out when no attempt ended: an operator may move deliveries, and write no attempt's outcome.
-- {ended
ended as (
    insert into {schema}.outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker,
        started_at, finished_at, error, receipt)
    select m.delivery, m.number, m.kind, m.state, m.rev, m.subscription, m.message, m.batch, m.worker,
        m.now - interval '1 microsecond' * (m.ran_us + m.ago_us)::double precision,
        m.now - interval '1 microsecond' * m.ago_us::double precision, m.error, m.receipt
    from moved m where m.kind is not null
),
-- ended}
readied as (
    insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
    select r.subscription, r.priority, (r.pos >> 20) & 3::bigint,
        -- In a lane each keeps its own place.
        case when r.priority < {lanes} then r.pos else r.delivery end, r.delivery, r.message, r.attempts, r.lost, r.rev
    from (
        select o.*, pg_catalog.nextval('{schema}.delivery_id') as pos
        from (select * from moved m where m.state = 'pending' and m.wait_ms = 0 order by m.ord) o
    ) r
),
later as (
    insert into {schema}.scheduled (delivery, due_at, subscription, priority, message, attempt, lost, rev)
    select m.delivery, m.now + interval '1 millisecond' * m.wait_ms::double precision,
        m.subscription, m.priority, m.message, m.attempts, m.lost, m.rev
    from moved m where m.state = 'pending' and m.wait_ms > 0
),
doubted as (
    insert into {schema}.doubt (delivery, message, subscription, priority, attempt, rev, cause, receipt, quiet_at, ask_at)
    select m.delivery, m.message, m.subscription, m.priority, m.attempts, m.rev, m.note, m.receipt,
        m.now + interval '1 millisecond' * m.quiet_ms::double precision, m.now
    from moved m where m.state = 'in_doubt'
),
died as (
    insert into {schema}.dead_letter (delivery, message, subscription, priority, attempt, rev, state, reason)
    select m.delivery, m.message, m.subscription, m.priority, m.attempts, m.rev, m.state, m.note
    from moved m where m.state in ('dead', 'cancelled')
)
select pg_catalog.count(*) as moved,
    (select pg_catalog.count(pg_catalog.pg_notify(r.channel, ''))
        from {schema}.routing r
        where exists (select from {schema}.worker w where w.asleep)
            and exists (select from moved m where m.state = 'pending' and m.wait_ms = 0)) as woken
from moved m
