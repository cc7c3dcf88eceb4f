-- Takes tokens out of a subscription's bucket, which is refilled first. $1 subscription, $2 how many are wanted.
update {schema}.flow_limit f
set tokens = n.tokens - n.taken, taken = n.taken, refilled_at = n.now
from (
    select b.subscription, b.now, b.tokens, least($2::int, pg_catalog.floor(b.tokens)::int) as taken
    from (
        select l.subscription, l.now,
            least(l.burst::double precision, l.tokens
                + extract(epoch from l.now - l.refilled_at)::double precision * 1000000::double precision / l.token_us) as tokens
        from (
            select k.*, greatest(k.refilled_at, pg_catalog.clock_timestamp()) as now
            from {schema}.flow_limit k where k.subscription = $1 and k.token_us is not null
            for update
        ) l
    ) b
) n
where f.subscription = n.subscription
returning f.taken, pg_catalog.ceil(greatest(0::double precision, 1::double precision - f.tokens) * f.token_us)::bigint as wait_us
