-- Ids of a batch share their time and count on from one random number, so they are in its order, and cost less.
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

-- The same id as before, put together in half the time: 4096 of its units are a millisecond.
create or replace function {schema}.uuid7() returns uuid
language sql volatile parallel safe as $$
    select (pg_catalog.overlay(pg_catalog.lpad(pg_catalog.to_hex((pg_catalog.date_part('epoch', pg_catalog.clock_timestamp())
            * 4096000::double precision)::bigint), 15, '0'), '7', 13, 0)
        || pg_catalog.substr(pg_catalog.gen_random_uuid()::pg_catalog.text, 20))::pg_catalog.uuid
$$;
