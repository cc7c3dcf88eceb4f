-- Milliseconds until a schedule is due; no row: none waits for anything.
select case
        when s.run_at is not null then 0::bigint
        else greatest(0, pg_catalog.ceil(extract(epoch from s.next_at - pg_catalog.statement_timestamp()) * 1000::numeric))::bigint
    end as wait_ms
from {schema}.schedule s
where s.run_at is not null or s.next_at is not null
order by s.run_at is null, s.next_at
limit 1
