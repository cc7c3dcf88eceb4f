-- Fans out older messages to new subscriptions: those from seq ?1 (not included) to ?2 that match,
-- of an epoch below ?3, with an id of at least ?4; for the subscriptions in the JSON array ?5. With ?6,
-- only those that nobody was subscribed to. With ?7, by what they scan for.
insert into postbox_delivery (id, message, subscription, state, priority, pos, due_at, since)
select f.id, f.message, f.subscription, 'pending', f.priority, f.id, f.due_at, f.now
from (
    select x.message, x.subscription, c.now,
        coalesce((select m.priority from postbox_message m where m.seq = x.seq), 0) as priority,
        -- A message's own due time holds here too.
        case when x.due_at > c.now then x.due_at end as due_at,
        (select delivery from postbox_last) + row_number() over (order by x.seq, x.subscription) as id
    from postbox_match x cross join postbox_clock c
    where x.seq > ?1 and x.seq <= ?2 and x.epoch < ?3 and x.message >= ?4
        and x.subscription in (select value from json_each(?5)) and x.scan = ?7
        and (?6 = 0 or x.seq in (select u.seq from postbox_unrouted u))
        and not exists (
            select 1 from postbox_delivery d where d.message = x.message and d.subscription = x.subscription)
        and (x.subscription, x.message) not in (select h.subscription, h.message from postbox_held h)
        and (x.subscription, x.message) not in (
            select d.subscription, d.message from postbox_succeeded d
            where d.subscription in (select value from json_each(?5))
                and d.last_message >= (select min(m.id) from postbox_message m where m.seq > ?1 and m.seq <= ?2)
                and d.first_message <= (select max(m.id) from postbox_message m where m.seq > ?1 and m.seq <= ?2))
) f
