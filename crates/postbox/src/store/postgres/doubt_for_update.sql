-- One doubt, locked. $1 delivery.
select d.delivery, d.message, d.subscription, d.priority, d.attempt, d.rev, d.word::pg_catalog.text as word, s.kind, s.idempotent,
    coalesce(m.max_attempts, s.max_attempts) as max_attempts, s.retry_base_ms, s.retry_cap_ms, s.continues
from {schema}.doubt d
join {schema}.subscription s on s.id = d.subscription
left join {schema}.message m on m.id = d.message
where d.delivery = $1
for update of d
