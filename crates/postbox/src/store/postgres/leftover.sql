-- What a lease still holds, with what the decision needs. In a statement of its own, after the
-- lease rows were locked: a settle that committed meanwhile must be seen. $1 tokens.
select l.token, l.batch, l.worker, l.delivery, l.message, l.subscription, l.priority, l.attempt, l.lost, l.rev, l.begun,
    s.kind, coalesce(m.max_attempts, s.max_attempts) as max_attempts, s.retry_base_ms, s.retry_cap_ms, s.timeout_ms, s.quiet_ms,
    (extract(epoch from pg_catalog.clock_timestamp() - coalesce(a.started_at, l.claimed_at)) * 1000000::numeric)::bigint as ran_us
from {schema}.leased l
join {schema}.subscription s on s.id = l.subscription
left join {schema}.message m on m.id = l.message
left join {schema}.attempt a on a.delivery = l.delivery and a.number = l.attempt + 1
where l.token = any ($1::pg_catalog.uuid[])
order by l.delivery
