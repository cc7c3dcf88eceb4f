-- Publishing one message from SQL takes the short way, as the library does; the texts are planned once a
-- session, not once a call.

create or replace function {schema}.publish_batch(
    topics text[], keys text[], payloads text[], headers text[], occurred_us bigint[],
    sources text[], external_ids text[], correlation_ids text[], causation_ids text[],
    max_attempts int[], delay_ms bigint[], due_us bigint[], dedup_keys text[], dedup_ms bigint[],
    bodies bytea[], content_types text[]
) returns table (ord bigint, id uuid, stored boolean)
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $publish_batch$
#variable_conflict use_column
begin
    return query
{publish};
end
$publish_batch$;

create or replace function {schema}.publish_checked(
    topic text, payload jsonb default null, key text default null, headers jsonb default null,
    after interval default null, at timestamptz default null,
    dedup_key text default null, dedup_window interval default '1 day',
    max_attempts int default null, external_id text default null, source text default null,
    correlation_id text default null, causation_id text default null,
    occurred_at timestamptz default null, body bytea default null, content_type text default null
) returns table (id uuid, stored boolean, same_body boolean)
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $publish_checked$
#variable_conflict use_variable
declare
    text_payload pg_catalog.text := publish_checked.payload::pg_catalog.text;
    new_id pg_catalog.uuid;
    is_stored boolean;
    first_id pg_catalog.uuid;
    same boolean;
    asked timestamp with time zone;
    told pg_catalog.text;
begin
    -- Almost all messages are nothing but a small JSON payload and short names; whatever else there is,
    -- and whatever is wrong, is looked at one by one.
    if pg_catalog.octet_length(topic) <= 255 and topic ~ '^[A-Za-z0-9_:/@+-]+([.][A-Za-z0-9_:/@+-]+)*$'
        and pg_catalog.octet_length(text_payload) <= 1048576
        and pg_catalog.length(text_payload) - pg_catalog.length(pg_catalog.translate(text_payload, '[{', '')) <= 128
        and pg_catalog.num_nonnulls(headers, after, dedup_key, max_attempts, body, content_type) = 0
        and pg_catalog.octet_length(pg_catalog.concat_ws('', key, external_id, source, correlation_id, causation_id)) <= 255
        and dedup_window between interval '0' and interval '3660 days'
    then
        null;
    else
        perform {schema}.check_message(topic, payload, key, headers, after, dedup_key, dedup_window,
            max_attempts, external_id, source, correlation_id, causation_id, body, content_type);
    end if;
    if at is not null and after is not null then
        raise exception using errcode = '22023', message = 'postbox: give `after` or `at`, not both';
    end if;
    -- What the library can show: jiff ends with the year 9999.
    if pg_catalog.num_nonnulls(at, occurred_at) > 0 then
        foreach asked in array array[at, occurred_at] loop
            if asked < '0001-01-01 00:00:00+00' or asked >= '9999-12-30 22:00:00+00' then
                raise exception using errcode = '22008', message = pg_catalog.format(
                    'postbox: the %s is %s; it must be from the year 1 to the end of the year 9999',
                    case when asked = at then 'due time' else 'time of occurrence' end, asked);
            end if;
        end loop;
    end if;
    if dedup_key is null and after is null and at is null then
        {publish_one}
        if new_id is not null then
            id := new_id;
            stored := true;
            same_body := true;
            return next;
            return;
        end if;
    end if;
    for round in 1 .. 5 loop
        select b.id, b.stored into new_id, is_stored
        from {schema}.publish_batch(
            array[topic], array[nullif(key, '')], array[text_payload],
            array[headers::pg_catalog.text], array[(extract(epoch from occurred_at) * 1000000::numeric)::bigint],
            array[nullif(source, '')], array[nullif(external_id, '')],
            array[nullif(correlation_id, '')], array[nullif(causation_id, '')], array[max_attempts],
            array[(extract(epoch from after) * 1000::numeric)::bigint],
            array[(extract(epoch from at) * 1000000::numeric)::bigint],
            array[dedup_key], array[(extract(epoch from dedup_window) * 1000::numeric)::bigint],
            array[body], array[content_type]) b;
        if is_stored then
            id := new_id;
            stored := true;
            same_body := true;
            return next;
            return;
        end if;
        select d.message, d.body_hash = {schema}.body_hash(nullif(publish_checked.key, ''), text_payload,
            publish_checked.body, publish_checked.content_type)
        into first_id, same
        from {schema}.dedup d where d.topic = publish_checked.topic and d.key = publish_checked.dedup_key;
        if first_id is not null then
            id := first_id;
            stored := false;
            same_body := same;
            return next;
            return;
        end if;
    end loop;
    raise exception using errcode = '40001', message = 'postbox: the dedup key keeps changing hands; try again';
end
$publish_checked$;

{roles}
