-- Schedules that are due, and the time by which they are, in microseconds. Whoever holds a row publishes its
-- ticks; the others pass it over. $1 how many.
select s.*, s.payload::pg_catalog.text as payload_text, s.headers::pg_catalog.text as headers_text,
    (extract(epoch from s.next_at) * 1000000::numeric)::bigint as next_us,
    (extract(epoch from s.last_at) * 1000000::numeric)::bigint as last_us,
    (extract(epoch from s.paused_at) * 1000000::numeric)::bigint as paused_us,
    (extract(epoch from s.run_at) * 1000000::numeric)::bigint as run_us,
    (extract(epoch from pg_catalog.statement_timestamp()) * 1000000::numeric)::bigint as now_us
from {schema}.schedule s
where s.run_at is not null or s.next_at <= pg_catalog.statement_timestamp()
order by s.next_at
limit $1
for update skip locked
