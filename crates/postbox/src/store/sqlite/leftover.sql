-- What the leases of the worker ?1 still hold, with what the decision needs; of one lease only if ?2 is not null.
select d.id, d.message, d.subscription, d.priority, d.attempt, d.lost, d.rev, d.begun, l.batch, l.token, s.kind,
    coalesce(m.max_attempts, s.max_attempts) as max_attempts, s.retry_base_ms, s.retry_cap_ms, s.quiet_ms,
    c.now - coalesce(a.started_at, l.claimed_at) as ran_ms
from postbox_lease l
cross join postbox_clock c
join postbox_delivery d on d.token = l.token
join postbox_subscription s on s.id = d.subscription
left join postbox_message m on m.id = d.message
left join postbox_attempt a on d.begun and a.delivery = d.id and a.number = d.attempt
where l.worker = ?1 and (?2 is null or l.token = ?2)
order by d.id
