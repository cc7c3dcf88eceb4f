-- Each message has an id of its own time.
create or replace function {schema}.publish_batch(
    topics text[], keys text[], payloads text[], headers text[], occurred_us bigint[],
    sources text[], external_ids text[], correlation_ids text[], causation_ids text[],
    max_attempts int[], delay_ms bigint[], due_us bigint[], dedup_keys text[], dedup_ms bigint[],
    bodies bytea[], content_types text[], priorities smallint[] default null, refuses boolean default true
) returns table (ord bigint, id uuid, stored boolean, coalesced bigint[])
language sql volatile
set search_path = pg_catalog, pg_temp as $publish_batch$
{publish}
$publish_batch$;

create or replace function {schema}.uuid7() returns uuid
language sql volatile parallel safe as $$
    select (pg_catalog.substr(pg_catalog.overlay(pg_catalog.encode(pg_catalog.int8send(
            (extract(epoch from pg_catalog.clock_timestamp()) * 65536000::numeric)::bigint), 'hex'), '7', 13, 0), 1, 16)
        || pg_catalog.substr(pg_catalog.replace(pg_catalog.gen_random_uuid()::pg_catalog.text, '-', ''), 17))::pg_catalog.uuid
$$;
