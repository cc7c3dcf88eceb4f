-- Shares out the permits of limited subscriptions, whose rows of flow_limit the caller has locked before.
-- $1 worker, $2 subscriptions, $3 how many it could use of each, $4 how many it keeps in any case.
with wish as materialized (
    select w.subscription, w.wanted, w.keep, f.at_once
    from unnest($2::int[], $3::int[], $4::int[]) as w(subscription, wanted, keep)
    -- Without a limit (any more) it is what is wanted.
    left join {schema}.flow_limit f on f.subscription = w.subscription
    where exists (
        select from {schema}.worker o where o.id = $1 and o.expires_at > pg_catalog.clock_timestamp()
    )
),
-- A worker that is silent for too long still holds what it had: until it is taken over, its handlers may run.
others as materialized (
    select w.subscription, coalesce(pg_catalog.sum(p.permits), 0::bigint)::int as held,
        coalesce(pg_catalog.bool_or(p.wanted > p.permits and w.at_once is not null), false) as short,
        -- The same for all who want, rounded up.
        (coalesce(pg_catalog.max(w.at_once), 0) + pg_catalog.count(p.worker)::int) / (pg_catalog.count(p.worker)::int + 1) as fair
    from wish w
    left join {schema}.permit p on p.subscription = w.subscription and p.worker <> $1
        and exists (select from {schema}.worker o where o.id = p.worker)
    group by w.subscription
),
gone as (
    delete from {schema}.permit p using wish w
    where p.subscription = w.subscription and not exists (select from {schema}.worker o where o.id = p.worker)
),
granted as (
    insert into {schema}.permit as p (subscription, worker, wanted, permits)
    select w.subscription, $1, w.wanted,
        greatest(w.keep, least(w.wanted, coalesce(w.at_once - o.held, w.wanted),
            case when o.short then o.fair else w.wanted end))
    from wish w join others o on o.subscription = w.subscription
    on conflict (subscription, worker) do update set wanted = excluded.wanted, permits = excluded.permits
    returning p.subscription, p.permits
)
select g.subscription, g.permits, case when o.short then o.fair end as fair
from granted g join others o on o.subscription = g.subscription
