-- Subscriptions with deliveries that wait for nobody: no live worker stands behind them. What is due later
-- does not wait yet. What waits behind a pause waits for its end.
select w.application, w.name, w.waiting, w.later
from (
    select s.application, s.name,
        (select pg_catalog.count(*) from (select from {schema}.ready r where r.subscription = s.id limit 100001) r)
        + (select pg_catalog.count(*) from (select from {schema}.scheduled r
            where r.subscription = s.id and r.due_at <= pg_catalog.statement_timestamp() limit 100001) r)
        + (select pg_catalog.count(*) from {schema}.leased l where l.subscription = s.id)
        + (select pg_catalog.count(*) from {schema}.doubt d where d.subscription = s.id) as waiting,
        (select pg_catalog.count(*) from (select from {schema}.scheduled r
            where r.subscription = s.id and r.due_at > pg_catalog.statement_timestamp() limit 100001) r) as later
    from {schema}.subscription s
    where s.paused_at is null and not exists (select from {schema}.worker w
        where s.id = any (w.subscriptions) and w.expires_at > pg_catalog.statement_timestamp())
) w
where w.waiting > 0
order by w.application, w.name
