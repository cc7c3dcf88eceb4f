-- Stores messages and fans them out, in order: ?1 is a JSON array of them. What the insert does is in
-- the trigger postbox_publish_insert.
insert into postbox_publish (id, topic, key, headers, occurred_us, source, external_id, correlation_id,
    causation_id, max_attempts, delay_ms, due_ms, dedup_key, dedup_ms, body_hash, content_type,
    payload, body)
select unhex(value ->> 'id'), value ->> 'topic', value ->> 'key', value ->> 'headers', value ->> 'occurred_us',
    value ->> 'source', value ->> 'external_id', value ->> 'correlation_id', value ->> 'causation_id',
    value ->> 'max_attempts', value ->> 'delay_ms', value ->> 'due_ms', value ->> 'dedup_key',
    value ->> 'dedup_ms', unhex(value ->> 'body_hash'), value ->> 'content_type',
    value ->> 'payload', unhex(value ->> 'body')
from json_each(?1)
