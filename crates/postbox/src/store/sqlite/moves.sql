-- Puts deliveries where they go next. ?1 is a JSON array of moves; ?2 the token of the lease that
-- holds them, or null: then each must still be at the revision that was decided on.
update postbox_delivery as d
set state = m.state, attempt = m.attempts, begun = 0, lost = m.lost, rev = m.rev, token = null, since = c.now,
    -- A retry or a release queues up again.
    pos = case when m.state = 'pending' and d.priority < 64 then (select delivery from postbox_last) else d.pos end,
    due_at = case when m.state = 'pending' and m.wait_ms > 0 then c.now + m.wait_ms end,
    note = case when m.state in ('in_doubt', 'dead', 'cancelled') then m.note end,
    quiet_at = case when m.state = 'in_doubt' then c.now + m.quiet_ms end,
    ask_at = case when m.state = 'in_doubt' then c.now end,
    asks = 0, word = null,
    receipt = case when m.state in ('in_doubt', 'succeeded') then m.receipt end
from (
    select value ->> 'delivery' as delivery, value ->> 'state' as state, value ->> 'attempts' as attempts,
        value ->> 'lost' as lost, value ->> 'rev' as rev, value ->> 'wait_ms' as wait_ms,
        value ->> 'quiet_ms' as quiet_ms, value ->> 'note' as note, value ->> 'receipt' as receipt
    from json_each(?1)
) m cross join postbox_clock c
where d.id = m.delivery and d.token is ?2 and (?2 is not null or d.rev = m.rev - 1)
