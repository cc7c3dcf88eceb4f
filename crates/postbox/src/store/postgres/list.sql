-- Deliveries with what lists show, from a union of where they can be, each part bounded and newest
-- first. $1 limit.
select d.delivery, d.state, d.rev, d.message, coalesce(m.topic, '(gone)') as topic, m.key, m.external_id,
    s.application, s.name as subscription, s.kind, d.attempt,
    coalesce(m.max_attempts, s.max_attempts) as max_attempts,
    (extract(epoch from d.due_at) * 1000000::numeric)::bigint as due_us,
    (extract(epoch from d.since) * 1000000::numeric)::bigint as since_us,
    d.note, e.error as last_error,
    (extract(epoch from e.finished_at) * 1000000::numeric)::bigint as last_error_us,
    coalesce(w.name, d.worker::pg_catalog.text) as worker,
    coalesce(m.priority, d.priority) as priority, l.replay_of
from ({places}) d
join {schema}.subscription s on s.id = d.subscription
left join {schema}.message m on m.id = d.message
left join {schema}.late_delivery l on l.message = d.message and l.delivery = d.delivery
left join {schema}.worker w on w.id = d.worker
left join lateral (
    select o.error, o.finished_at from {schema}.outcome o
    where o.delivery = d.delivery and o.kind <> 'succeeded'
    order by o.number desc limit 1
) e on true
order by d.delivery desc
limit $1
