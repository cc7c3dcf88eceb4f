-- Makes what is due ready to claim, the longest due first: for the subscriptions in the JSON array
-- ?1, at most ?2. A bare parameter as the limit would have it planned anew each time.
update postbox_delivery
set due_at = null, since = due_at,
    -- In a lane, the number is the place.
    pos = case when priority < 64 then (select delivery from postbox_last) else 0 end
where id in (
    select d.id from json_each(?1) w
    join postbox_delivery d on d.subscription = w.value and d.state = 'pending' and d.due_at is not null
    where d.due_at <= (select now from postbox_clock)
    order by d.due_at limit ?2 + 0)
