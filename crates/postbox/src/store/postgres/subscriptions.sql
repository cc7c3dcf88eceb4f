-- The subscriptions with their counts; what waits is counted up to 100001.
select s.id, s.application, s.name, s.pattern, s.kind, s.idempotent, s.max_attempts, not s.backfilled and s.removed_at is null as backfilling,
    (extract(epoch from s.removed_at) * 1000000::numeric)::bigint as removed_us,
    (extract(epoch from s.paused_at) * 1000000::numeric)::bigint as paused_us, b.actor as paused_by, b.reason as paused_reason,
    f.at_once, f.token_us, f.burst, (select coalesce(pg_catalog.sum(p.permits), 0::bigint)::bigint from {schema}.permit p
        where p.subscription = s.id and exists (select from {schema}.worker w where w.id = p.worker)) as held,
    least(f.burst::double precision, f.tokens
        + extract(epoch from pg_catalog.statement_timestamp() - f.refilled_at)::double precision * 1000000::double precision / f.token_us) as tokens,
    (select pg_catalog.count(*) from {schema}.worker w
        where s.id = any (w.subscriptions) and w.expires_at > pg_catalog.statement_timestamp()) as workers,
    (select pg_catalog.count(*) from (select from {schema}.ready r where r.subscription = s.id limit 100001) r)
        + coalesce(l.unbegun, 0) as pending,
    (select pg_catalog.count(*) from (select from {schema}.ready r where r.subscription = s.id and r.priority = -1 limit 100001) r) as pending_high,
    (select pg_catalog.count(*) from (select from {schema}.ready r where r.subscription = s.id and r.priority = 1 limit 100001) r) as pending_low,
    (select pg_catalog.count(*) from (select from {schema}.scheduled r where r.subscription = s.id limit 100001) r) as scheduled,
    coalesce(l.running, 0) as running,
    (select pg_catalog.count(*) from {schema}.doubt d where d.subscription = s.id) as in_doubt,
    (select pg_catalog.count(*) from {schema}.dead_letter d where d.subscription = s.id and d.state = 'dead') as dead,
    coalesce(o.succeeded, 0) + coalesce(p.succeeded, 0) + coalesce(x.succeeded, 0) as succeeded_last_hour,
    (select extract(epoch from pg_catalog.statement_timestamp() - {schema}.minted_at(pg_catalog.min(f.message::pg_catalog.text)::pg_catalog.uuid))::double precision
        from (
            select * from (values (-1), (0), (1)) as v(priority)
            union all
            select n.level from {schema}.lane n where n.subscription = s.id
        ) as l(priority)
        cross join lateral (
            select r.message from {schema}.ready r where r.subscription = s.id and r.priority = l.priority
            order by r.pos limit 1
        ) f) as oldest_age_s
from {schema}.subscription s
left join {schema}.flow_limit f on f.subscription = s.id
-- A pause counts from the first who paused.
left join lateral (
    select a.actor, a.reason from {schema}.audit a
    where s.paused_at is not null and a.subscription = s.id and a.action = 'pause subscription' and a.at >= s.paused_at
    order by a.seq limit 1
) b on true
left join (
    select d.subscription,
        pg_catalog.count(*) filter (where d.begun or k.kind <> 'operation') as running,
        pg_catalog.count(*) filter (where not d.begun and k.kind = 'operation') as unbegun
    from {schema}.leased d join {schema}.subscription k on k.id = d.subscription group by d.subscription
) l on l.subscription = s.id
left join lateral (
    select pg_catalog.count(*) as succeeded from {schema}.outcome q
    where q.subscription = s.id and q.state_after = 'succeeded'
        and q.finished_at > pg_catalog.statement_timestamp() - interval '1 hour'
) o on true
left join (
    select u.subscription, pg_catalog.count(*) as succeeded
    from {schema}.outcome_part q cross join lateral pg_catalog.unnest(q.subscriptions) as u(subscription)
    where q.finished_at > pg_catalog.statement_timestamp() - interval '1 hour'
    group by u.subscription
) p on p.subscription = s.id
left join lateral (
    select pg_catalog.count(*) as succeeded from {schema}.resolution q
    where q.subscription = s.id and q.state_after = 'succeeded'
        and q.at > pg_catalog.statement_timestamp() - interval '1 hour'
) x on true
order by s.application, s.name, s.id
