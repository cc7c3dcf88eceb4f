-- Milliseconds until the next scheduled delivery is due.
select greatest(0, extract(epoch from s.due_at - pg_catalog.clock_timestamp()) * 1000::numeric)::bigint as wait_ms
from {schema}.scheduled s
order by s.due_at
limit 1
