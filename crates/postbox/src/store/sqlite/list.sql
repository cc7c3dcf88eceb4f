-- Deliveries with what lists show, newest first. ?1 limit; JSON arrays or null: ?2 states,
-- ?3 subscriptions, ?4 segments of topic patterns, ?5 keys; the rest is in filter.sql. What stands for
-- `from` and `which` narrows it to what an index finds.
select d.id, d.rev, d.message, coalesce(m.topic, '(gone)') as topic, m.key, m.external_id, s.application,
    s.name as subscription, s.kind, d.attempt, coalesce(m.max_attempts, s.max_attempts) as max_attempts,
    d.due_at, d.since, w.name as worker, l.worker as worker_id,
    -- An operation that has not begun has not started: it waits in its worker's hands.
    case when d.state = 'running' and s.kind = 'operation' and not d.begun then 'pending' else d.state end as state,
    case when d.state = 'running' and s.kind = 'operation' and not d.begun then 'claimed, not begun' else d.note end as note,
    e.error as last_error, e.finished_at as last_error_at, d.replay_of,
    coalesce(m.priority, d.priority) as priority
from {from} d
join postbox_subscription s on s.id = d.subscription
left join postbox_message m on m.id = d.message
left join postbox_lease l on l.token = d.token
left join postbox_worker w on w.id = l.worker
left join postbox_outcome e on e.delivery = d.id and e.number = (
    select max(o.number) from postbox_outcome o where o.delivery = d.id and o.kind <> 'succeeded')
where {which}
    {filter}
order by d.id desc
limit ?1
