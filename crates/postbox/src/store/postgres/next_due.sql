-- Milliseconds until the next scheduled delivery is due. What has been due for long was moved, and may
-- still be in the index.
select greatest(0, extract(epoch from s.due_at - pg_catalog.clock_timestamp()) * 1000::numeric)::bigint as wait_ms
from {schema}.scheduled s
where s.due_at > pg_catalog.statement_timestamp() - interval '5 s'
order by s.due_at
limit 1
