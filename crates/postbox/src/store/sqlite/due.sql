-- Whether something is due for the subscriptions in the JSON array ?1, and how many milliseconds from
-- now the next scheduled one is. Those that are paused do not count.
with open as materialized (
    select s.id from json_each(?1) w join postbox_subscription s on s.id = w.value where s.paused_at is null
)
select exists (
        select 1 from open o
        join postbox_delivery d on d.subscription = o.id and d.state = 'pending' and d.due_at is null
            -- What waits for others of its key is not due.
            and d.priority < 1024)
    or coalesce(n.due_at <= c.now, false) as due,
    n.due_at - c.now as wait
from postbox_clock c
cross join (
    select min((select min(d.due_at) from postbox_delivery d
        where d.subscription = o.id and d.state = 'pending' and d.due_at is not null)) as due_at
    from open o
) n
