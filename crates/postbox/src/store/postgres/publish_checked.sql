-- One message through the function: for a role that may do nothing else. $1 topic, $2 payload, $3 key,
-- $4 headers, $5 delay in milliseconds, $6 due and $14 occurred in microseconds, $7 dedup key, $8 its
-- window in milliseconds, $9 max attempts, $10 external id, $11 source, $12 correlation id, $13 causation
-- id, $15 bytes instead of a payload, $16 their content type, $17 priority.
select p.id, p.stored, p.same_body, p.coalesced
from {schema}.publish_checked(
    topic => $1, payload => $2::pg_catalog.jsonb, key => $3, headers => $4::pg_catalog.jsonb,
    after => interval '1 millisecond' * $5::bigint::double precision,
    at => pg_catalog.to_timestamp($6::bigint::double precision / 1000000::double precision),
    dedup_key => $7, dedup_window => interval '1 millisecond' * coalesce($8::bigint, 0)::double precision,
    max_attempts => $9, external_id => $10, source => $11, correlation_id => $12, causation_id => $13,
    occurred_at => pg_catalog.to_timestamp($14::bigint::double precision / 1000000::double precision),
    body => $15, content_type => $16, priority => $17) p
