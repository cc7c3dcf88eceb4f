-- What became of messages with a dedup key: ?1 is a JSON array of them.
select exists (select 1 from postbox_message m where m.id = unhex(i.value ->> 'id')) as stored,
    d.message as existing, d.body_hash = unhex(i.value ->> 'body_hash') as same_body
from json_each(?1) i
left join postbox_dedup d on d.topic = i.value ->> 'topic' and d.key = i.value ->> 'dedup_key'
order by i.key
