-- The subscriptions with their counts; what there can be much of is counted up to 100001. Live
-- workers are in the JSON array ?1, as arrays of the subscriptions that they stand behind.
with held as materialized (select subscription, count(*) as deliveries from postbox_held group by 1)
select s.id, s.application, s.name, s.pattern, s.kind, s.idempotent, s.max_attempts, s.removed_at, s.paused_at,
    b.actor as paused_by, b.reason as paused_reason,
    not s.backfilled and s.removed_at is null as backfilling,
    f.at_once, f.token_us, f.burst,
    coalesce((select sum(p.permits) from postbox_permit p
        where p.subscription = s.id and p.worker in (select w.id from postbox_worker w)), 0) as held,
    cast(min(f.burst, f.tokens + max(0, c.now - f.refilled_at) * 1000.0 / f.token_us) as real) as tokens,
    (select count(*) from json_each(?1) w where s.id in (select value from json_each(w.value))) as workers,
    (select count(*) from (select 1 from postbox_delivery d
        where d.subscription = s.id and d.state = 'pending' and d.due_at is null limit 100001))
    + (select count(*) from (select 1 from postbox_delivery d
        where d.subscription = s.id and d.state = 'pending' and d.due_at is not null and d.due_at <= c.now limit 100001))
    + (select count(*) from postbox_delivery d
        where d.token is not null and d.subscription = s.id and s.kind = 'operation' and not d.begun)
    + coalesce((select h.deliveries from held h where h.subscription = s.id and s.kind = 'operation'), 0) as pending,
    (select count(*) from (select 1 from postbox_delivery d
        where d.subscription = s.id and d.state = 'pending' and d.due_at is null and d.priority = -1 limit 100001)) as pending_high,
    (select count(*) from (select 1 from postbox_delivery d
        where d.subscription = s.id and d.state = 'pending' and d.due_at is null and d.priority = 1 limit 100001)) as pending_low,
    (select count(*) from (select 1 from postbox_delivery d
        where d.subscription = s.id and d.state = 'pending' and d.due_at is not null and d.due_at > c.now limit 100001)) as scheduled,
    (select count(*) from postbox_delivery d
        where d.token is not null and d.subscription = s.id and (s.kind <> 'operation' or d.begun))
    + coalesce((select h.deliveries from held h where h.subscription = s.id and s.kind <> 'operation'), 0) as running,
    (select count(*) from (select 1 from postbox_delivery d
        where d.subscription = s.id and d.state = 'in_doubt' limit 100001)) as in_doubt,
    (select count(*) from (select 1 from postbox_delivery d
        where d.subscription = s.id and d.state = 'dead' and d.state in ('dead', 'cancelled') limit 100001)) as dead,
    min(100001, (select count(*) from (select 1 from postbox_delivery d
            where d.subscription = s.id and d.state = 'succeeded' and d.since > c.now - 3600000 limit 100001))
        + coalesce((select sum(p.deliveries) from postbox_success p
            where p.subscription = s.id and p.at > c.now - 3600000), 0)) as succeeded_last_hour,
    (c.now - min(
        coalesce((select d.since from postbox_delivery d
            where d.subscription = s.id and d.state = 'pending' and d.due_at is null
            order by d.priority, d.pos, d.id limit 1), c.now + 1),
        coalesce((select min(d.due_at) from postbox_delivery d
            where d.subscription = s.id and d.state = 'pending' and d.due_at is not null), c.now + 1))) / 1000.0 as oldest_age_s
from postbox_subscription s cross join postbox_clock c
left join postbox_flow_limit f on f.subscription = s.id
-- A pause counts from the first who paused.
left join postbox_audit b on b.seq = (select min(a.seq) from postbox_audit a
    where s.paused_at is not null and a.subscription = s.id and a.action = 'pause subscription' and a.at >= s.paused_at)
order by s.application, s.name, s.id
