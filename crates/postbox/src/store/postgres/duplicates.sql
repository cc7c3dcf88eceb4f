-- Who has a dedup key, and with the same body? $1 topics, $2 dedup keys, $3 keys, $4 payloads,
-- $5 bodies, $6 content types.
select i.ord, d.message, d.body_hash = {schema}.body_hash(i.key, i.payload, i.body, i.content_type) as same_body
from unnest($1::pg_catalog.text[], $2::pg_catalog.text[], $3::pg_catalog.text[], $4::pg_catalog.text[],
        $5::pg_catalog.bytea[], $6::pg_catalog.text[])
    with ordinality as i(topic, dedup_key, key, payload, body, content_type, ord)
join {schema}.dedup d on d.topic = i.topic and d.key = i.dedup_key
