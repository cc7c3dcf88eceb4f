-- Whether something is ready, and milliseconds until something scheduled is due: for a worker that found
-- nothing the last time. $1 subscriptions, $2 to $4 the place after which each level begins, $5 milliseconds:
-- what has been due for longer was moved; null: look at all. $6 subscriptions that go by lanes.
select exists (
        select from unnest($1::int[], $2::bigint[], $3::bigint[], $4::bigint[]) as w(subscription, high, normal, low)
        cross join lateral (values (-1, w.high), (0, w.normal), (1, w.low)) as l(priority, after)
        cross join lateral (
            select from {schema}.ready r
            where r.subscription = w.subscription and r.priority = l.priority and r.pos > l.after
            limit 1
        ) p
        -- What waits behind a pause is no reason to claim.
        where (select s.paused_at is null from {schema}.subscription s where s.id = w.subscription)
    ) or exists (
        select from pg_catalog.unnest($6::int[]) as w(subscription)
        cross join lateral (
            select from {schema}.ready r
            where r.subscription = w.subscription and r.priority < {held}
            limit 1
        ) p
        where (select s.paused_at is null from {schema}.subscription s where s.id = w.subscription)
    ) as ready,
    (
        select greatest(0, extract(epoch from s.due_at - pg_catalog.clock_timestamp()) * 1000::numeric)::bigint
        from {schema}.scheduled s
        where s.due_at > coalesce(
            pg_catalog.statement_timestamp() - interval '1 millisecond' * $5::bigint::double precision,
            timestamp with time zone '-infinity')
        order by s.due_at
        limit 1
    ) as wait_ms
