-- Many messages at once, in the caller's transaction: a JSON array of objects with the names of
-- publish's arguments; `body` is base64. All are checked before any is stored. In the order given: each
-- one's id, or that of the message with its dedup key and the same body.
create function {schema}.publish_many(messages jsonb)
returns table (ord int, id uuid, duplicate boolean)
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $publish_many$
#variable_conflict use_column
declare
    many int;
    place int := 0;
    one pg_catalog.jsonb;
    word pg_catalog.text;
    said pg_catalog.text;
    state pg_catalog.text;
    asked timestamp with time zone;
    taken record;
    ids pg_catalog.uuid[];
    kept boolean[];
begin
    if messages is null or pg_catalog.jsonb_typeof(messages) <> 'array' then
        raise exception using errcode = '22023', message = 'postbox: publish_many takes a JSON array of objects like {"topic": "orders.placed", "payload": {"order_id": 42}}';
    end if;
    many := pg_catalog.jsonb_array_length(messages);
    if many > 10000 then
        raise exception using errcode = '22023', message = pg_catalog.format('postbox: these are %s messages; the limit of one call is 10000: call it again in the same transaction for the rest', many);
    end if;
    begin
        for one in select e.value from pg_catalog.jsonb_array_elements(messages) e loop
            place := place + 1;
            if pg_catalog.jsonb_typeof(one) <> 'object' then
                raise exception using errcode = '22023', message = 'postbox: it is no JSON object';
            end if;
            for word in select k.key from pg_catalog.jsonb_object_keys(one) as k(key) loop
                if not word = any (array['topic', 'payload', 'key', 'headers', 'after', 'at', 'dedup_key', 'dedup_window',
                        'max_attempts', 'external_id', 'source', 'correlation_id', 'causation_id', 'occurred_at', 'body',
                        'content_type']) then
                    raise exception using errcode = '22023', message = pg_catalog.format(
                        'postbox: there is no `%s`; the names are those of the arguments of `publish`', word);
                end if;
            end loop;
            perform {schema}.check_message(one ->> 'topic', one -> 'payload', one ->> 'key',
                nullif(one -> 'headers', 'null'), (one ->> 'after')::pg_catalog.interval, one ->> 'dedup_key',
                coalesce((one ->> 'dedup_window')::pg_catalog.interval, interval '1 day'), (one ->> 'max_attempts')::int,
                one ->> 'external_id', one ->> 'source', one ->> 'correlation_id', one ->> 'causation_id',
                pg_catalog.decode(one ->> 'body', 'base64'), one ->> 'content_type');
            if one ->> 'at' is not null and one ->> 'after' is not null then
                raise exception using errcode = '22023', message = 'postbox: give `after` or `at`, not both';
            end if;
            foreach word in array array['at', 'occurred_at'] loop
                asked := (one ->> word)::timestamp with time zone;
                -- What the library can show: jiff ends with the year 9999.
                if asked < '0001-01-01 00:00:00+00' or asked >= '9999-12-30 22:00:00+00' then
                    raise exception using errcode = '22008', message = pg_catalog.format(
                        'postbox: the %s is %s; it must be from the year 1 to the end of the year 9999',
                        case when word = 'at' then 'due time' else 'time of occurrence' end, asked);
                end if;
            end loop;
        end loop;
    exception when data_exception then
        get stacked diagnostics said = message_text, state = returned_sqlstate;
        raise exception using errcode = state, message = pg_catalog.format('postbox: message %s of %s: %s',
            place, many, pg_catalog.regexp_replace(said, '^postbox: ', ''));
    end;
    select e.value ->> 'topic' as topic, e.value ->> 'dedup_key' as key into taken
    from pg_catalog.jsonb_array_elements(messages) e where e.value ->> 'dedup_key' is not null
    group by 1, 2 having pg_catalog.count(*) > 1 limit 1;
    if taken.key is not null then
        raise exception using errcode = '22023', message = pg_catalog.format(
            'postbox: the dedup key `%s` of topic `%s` is there twice; one of them is enough', taken.key, taken.topic);
    end if;

    with given as materialized (
        select e.ord, e.value, e.value ->> 'topic' as topic, e.value ->> 'dedup_key' as dedup_key,
            nullif(e.value ->> 'key', '') as key, (e.value -> 'payload')::pg_catalog.text as payload,
            pg_catalog.decode(e.value ->> 'body', 'base64') as body, e.value ->> 'content_type' as content_type
        from pg_catalog.jsonb_array_elements(messages) with ordinality as e(value, ord)
    ),
    columns as materialized (
        select pg_catalog.array_agg(g.topic order by g.ord) as topics,
            pg_catalog.array_agg(g.key order by g.ord) as keys,
            pg_catalog.array_agg(g.payload order by g.ord) as payloads,
            pg_catalog.array_agg(nullif(g.value -> 'headers', 'null')::pg_catalog.text order by g.ord) as headers,
            pg_catalog.array_agg((extract(epoch from (g.value ->> 'occurred_at')::timestamp with time zone)
                * 1000000::numeric)::bigint order by g.ord) as occurred_us,
            pg_catalog.array_agg(nullif(g.value ->> 'source', '') order by g.ord) as sources,
            pg_catalog.array_agg(nullif(g.value ->> 'external_id', '') order by g.ord) as external_ids,
            pg_catalog.array_agg(nullif(g.value ->> 'correlation_id', '') order by g.ord) as correlation_ids,
            pg_catalog.array_agg(nullif(g.value ->> 'causation_id', '') order by g.ord) as causation_ids,
            pg_catalog.array_agg((g.value ->> 'max_attempts')::int order by g.ord) as max_attempts,
            pg_catalog.array_agg((extract(epoch from (g.value ->> 'after')::pg_catalog.interval)
                * 1000::numeric)::bigint order by g.ord) as delay_ms,
            pg_catalog.array_agg((extract(epoch from (g.value ->> 'at')::timestamp with time zone)
                * 1000000::numeric)::bigint order by g.ord) as due_us,
            pg_catalog.array_agg(g.dedup_key order by g.ord) as dedup_keys,
            pg_catalog.array_agg((extract(epoch from coalesce((g.value ->> 'dedup_window')::pg_catalog.interval, interval '1 day'))
                * 1000::numeric)::bigint order by g.ord) as dedup_ms,
            pg_catalog.array_agg(g.body order by g.ord) as bodies,
            pg_catalog.array_agg(g.content_type order by g.ord) as content_types
        from given g
        having pg_catalog.count(*) > 0
    )
    select pg_catalog.array_agg(b.id order by b.ord), pg_catalog.array_agg(b.stored order by b.ord) into ids, kept
    from columns c cross join lateral {schema}.publish_batch(c.topics, c.keys, c.payloads, c.headers, c.occurred_us,
        c.sources, c.external_ids, c.correlation_ids, c.causation_ids, c.max_attempts, c.delay_ms, c.due_us,
        c.dedup_keys, c.dedup_ms, c.bodies, c.content_types) b;
    for place in 1 .. many loop
        ord := place;
        id := ids[place];
        duplicate := not kept[place];
        if duplicate then
            one := messages -> (place - 1);
            -- A statement of its own: it sees what was committed while the one before waited for it.
            select d.message, d.body_hash = {schema}.body_hash(nullif(one ->> 'key', ''), (one -> 'payload')::pg_catalog.text,
                    pg_catalog.decode(one ->> 'body', 'base64'), one ->> 'content_type') as same_body into taken
            from {schema}.dedup d where d.topic = one ->> 'topic' and d.key = one ->> 'dedup_key';
            if taken.message is null then
                raise exception using errcode = '40001', message = 'postbox: the dedup key keeps changing hands; try again';
            elsif not taken.same_body then
                raise exception using errcode = '23505', message = pg_catalog.format(
                    'postbox: message %s of %s: the dedup key `%s` of topic `%s` is taken by message %s, which has another body; nothing was published',
                    place, many, one ->> 'dedup_key', one ->> 'topic', taken.message);
            end if;
            id := taken.message;
        end if;
        return next;
    end loop;
end
$publish_many$;

{roles}
