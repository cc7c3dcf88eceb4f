-- Successes at a first attempt: their outcomes. ?1 is a JSON array of [delivery, milliseconds it ran],
-- ?2 the batch, ?3 the worker, ?4 the token of the lease.
insert into postbox_outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker,
    started_at, finished_at)
select d.id, d.attempt + 1 - d.begun, 'succeeded', 'succeeded', d.rev + 1, d.subscription, d.message, ?2, ?3,
    c.now - (s.value ->> 1), c.now
from json_each(?1) s cross join postbox_clock c
join postbox_delivery d on d.id = s.value ->> 0
where d.token = ?4
