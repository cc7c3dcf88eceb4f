-- The deliveries that the subscription ?1 has ready, at most ?2, in order, with their messages; of one level
-- only where `level` says so. What is small comes as one JSON array, because each column of a row costs more than
-- reading it from there. A bare parameter as the limit would have it planned anew each time (as statistics do, once
-- somebody has run ANALYZE).
select json_array(d.id, d.priority, d.pos, d.attempt, d.lost, d.rev, d.replay_of, hex(d.message),
        m.topic, m.key, m.headers, m.occurred_us, m.source, m.external_id, m.correlation_id, m.causation_id,
        m.max_attempts, m.content_type),
    m.payload, m.body
from postbox_delivery d left join postbox_message m on m.id = d.message
where d.subscription = ?1 and d.state = 'pending' and d.due_at is null {level}
order by d.priority, d.pos, d.id
limit ?2 + 0
