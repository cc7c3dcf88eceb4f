-- Doubts that it is time to ask about. They are held back while one worker asks.
-- $1 subscriptions, $2 limit, $3 milliseconds to hold back.
with due as materialized (
    select d.delivery from {schema}.doubt d
    join {schema}.subscription s on s.id = d.subscription
    where d.subscription = any ($1::int[]) and d.ask_at <= pg_catalog.statement_timestamp()
        and (s.reconciles or d.word is not null)
    order by d.ask_at
    limit $2
    for update of d skip locked
),
held as (
    update {schema}.doubt d
    set ask_at = pg_catalog.clock_timestamp() + interval '1 millisecond' * $3::bigint::double precision
    from due where d.delivery = due.delivery
    returning d.*
)
select d.delivery, d.subscription, d.message, d.rev, d.attempt, d.asks, d.word::pg_catalog.text as word,
    d.quiet_at <= pg_catalog.clock_timestamp() as quiet,
    m.topic, m.key, m.payload::pg_catalog.text as payload, m.body, m.content_type, m.headers::pg_catalog.text as headers,
    (extract(epoch from m.occurred_at) * 1000000::numeric)::bigint as occurred_us,
    m.source, m.external_id, m.correlation_id, m.causation_id, m.max_attempts
from held d left join {schema}.message m on m.id = d.message
order by d.delivery
