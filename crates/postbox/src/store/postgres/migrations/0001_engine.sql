-- The engine: messages, the ready queue, leases, attempts and their outcomes.
-- What each table is for: docs/architecture.md. {schema} is the schema's name.

create table {schema}.routing (
    only_one  boolean primary key default true check (only_one),
    epoch     bigint  not null,
    channel   text    not null,
    -- System id and timeline of the server that the last worker registered at.
    cluster   text
);
insert into {schema}.routing (epoch, channel) values (1, '{channel}');

create table {schema}.subscription (
    id             int generated always as identity primary key,
    application    text not null,
    name           text not null,
    pattern        text not null,
    matcher        text not null,
    kind           text not null check (kind in ('plain', 'transactional', 'operation')),
    -- Of an operation: declared to be harmless when it is repeated under one idempotency key.
    idempotent     boolean not null,
    max_attempts   int  not null,
    retry_base_ms  bigint not null,
    retry_cap_ms   bigint not null,
    timeout_ms     bigint not null,
    quiet_ms       bigint not null,
    -- How long deliveries stay on record once they have ended.
    keep_succeeded_ms bigint not null,
    keep_dead_ms   bigint not null,
    reconciles     boolean not null,
    continues      boolean not null,
    start          text not null check (start in ('unrouted', 'now', 'beginning', 'time')),
    start_at       timestamptz,
    -- Publishers that read this routing epoch or a later one fan out to it; older ones are backfilled.
    epoch          bigint not null,
    backfilled     boolean not null,
    backfill_after uuid,
    -- Transactions that may still commit a message of an older epoch; null: not looked up yet.
    backfill_waits text[],
    -- The history that it was registered with: messages of older epochs that match this go to it, even
    -- if its pattern has changed since. Null: there is none, or it is done.
    scan_matcher   text,
    scan_epoch     bigint,
    created_at     timestamptz not null default pg_catalog.clock_timestamp(),
    removed_at     timestamptz
);
create unique index subscription_name on {schema}.subscription (application, name) where removed_at is null;

-- What a topic fans out to at an epoch; written by workers, so that publishers look it up by key.
create table {schema}.route (
    topic         text   not null,
    epoch         bigint not null,
    subscriptions int[]  not null,
    primary key (topic, epoch)
);

create sequence {schema}.delivery_id;

-- Insert-only: the record. The id is a UUIDv7 minted here, so it sorts by time.
create table {schema}.message (
    id             uuid   primary key,
    epoch          bigint not null,
    topic          text   not null,
    key            text,
    -- Either JSON, or a body of bytes with its content type.
    payload        json,
    headers        json,
    occurred_at    timestamptz,
    due_at         timestamptz,
    source         text,
    external_id    text,
    correlation_id text,
    causation_id   text,
    max_attempts   int,
    -- The deliveries that its fan-out made; later ones are in late_delivery.
    deliveries     bigint[],
    body           bytea,
    content_type   text,
    check ((payload is null) = (body is not null) and (body is null) = (content_type is null))
);
create index message_causation on {schema}.message (causation_id) where causation_id is not null;
create index message_external on {schema}.message (external_id) where external_id is not null;

create table {schema}.late_delivery (
    message      uuid   not null,
    delivery     bigint not null,
    subscription int    not null,
    -- The delivery that an operator had repeated as this one.
    replay_of    bigint,
    primary key (message, delivery)
);
create index late_delivery_id on {schema}.late_delivery (delivery);
create index late_delivery_replay on {schema}.late_delivery (replay_of) where replay_of is not null;

create table {schema}.unrouted (
    message uuid   primary key,
    topic   text   not null,
    epoch   bigint not null
);

create table {schema}.dedup (
    topic      text        not null,
    key        text        not null,
    message    uuid        not null,
    body_hash  bytea       not null,
    expires_at timestamptz not null,
    primary key (topic, key)
);
create index dedup_expiry on {schema}.dedup (expires_at);

-- A delivery is in exactly one of: ready, scheduled, a lease, doubt, dead_letter, or finished.
create table {schema}.ready (
    subscription int      not null,
    priority     smallint not null,
    pos          bigint   not null,
    delivery     bigint   not null,
    message      uuid     not null,
    attempt      int      not null,
    lost         int      not null,
    rev          int      not null,
    primary key (subscription, priority, pos)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0.5);
create index ready_moved on {schema}.ready (delivery) where pos <> delivery;

create table {schema}.scheduled (
    delivery     bigint      primary key,
    due_at       timestamptz not null,
    subscription int         not null,
    priority     smallint    not null,
    message      uuid        not null,
    attempt      int         not null,
    lost         int         not null,
    rev          int         not null
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
create index scheduled_due on {schema}.scheduled (due_at);
-- For those that pull from one subscription.
create index scheduled_subscription on {schema}.scheduled (subscription, due_at);

create table {schema}.worker (
    id            uuid        primary key,
    name          text        not null,
    application   text        not null,
    subscriptions int[]       not null,
    -- Those of them that it runs as declared-idempotent: its attempts are judged by that.
    idempotent    int[]       not null,
    lease_ms      bigint      not null,
    started_at    timestamptz not null default pg_catalog.clock_timestamp(),
    expires_at    timestamptz not null,
    asleep        boolean     not null default false
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

create sequence {schema}.batch_id;

-- One row a claimed batch, never updated.
create table {schema}.lease (
    token         uuid        primary key,
    batch         bigint      not null,
    worker        uuid        not null,
    claimed_at    timestamptz not null default pg_catalog.clock_timestamp(),
    deliveries    bigint[]    not null,
    messages      uuid[]      not null,
    subscriptions int[]       not null,
    priorities    smallint[]  not null,
    attempts      int[]       not null,
    losts         int[]       not null,
    revs          int[]       not null
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
create index lease_worker on {schema}.lease (worker);

-- Attempts that are on record as begun before the handler is called.
create table {schema}.attempt (
    delivery   bigint      not null,
    number     int         not null,
    batch      bigint      not null,
    worker     uuid        not null,
    started_at timestamptz not null default pg_catalog.clock_timestamp(),
    primary key (delivery, number)
);

-- How an attempt ended; successes at the first attempt of plain handlers are in outcome_part.
create table {schema}.outcome (
    delivery     bigint      not null,
    number       int         not null,
    kind         text        not null check (kind in ('succeeded', 'failed', 'in_doubt', 'panicked', 'timed_out', 'snoozed', 'discarded', 'lost')),
    state_after  text        not null,
    rev          int         not null,
    subscription int         not null,
    message      uuid        not null,
    batch        bigint      not null,
    worker       uuid        not null,
    started_at   timestamptz not null,
    finished_at  timestamptz not null,
    error        text,
    receipt      json,
    primary key (delivery, number)
);
create index outcome_succeeded on {schema}.outcome (subscription, finished_at) where state_after = 'succeeded';

-- One row a flush of a batch: what succeeded at its first attempt, and what was handed back.
create table {schema}.outcome_part (
    batch         bigint      not null,
    part          int         not null,
    worker        uuid        not null,
    finished_at   timestamptz not null default pg_catalog.clock_timestamp(),
    lowest        bigint,
    highest       bigint,
    deliveries    bigint[]    not null,
    messages      uuid[]      not null,
    subscriptions int[]       not null,
    durations_us  bigint[]    not null,
    released      bigint[]    not null,
    primary key (batch, part)
);
create index outcome_part_range on {schema}.outcome_part (highest, lowest) where highest is not null;
create index outcome_part_finished on {schema}.outcome_part (finished_at);

create table {schema}.doubt (
    delivery     bigint      primary key,
    message      uuid        not null,
    subscription int         not null,
    priority     smallint    not null,
    attempt      int         not null,
    rev          int         not null,
    since        timestamptz not null default pg_catalog.clock_timestamp(),
    cause        text        not null,
    receipt      json,
    -- Before this, an answer "did not happen" may come too early to be believed.
    quiet_at     timestamptz not null,
    ask_at       timestamptz not null,
    asks         int         not null default 0,
    -- An operator's "happened" that a worker must carry out, because follow-ups hang on it.
    word         json
);
create index doubt_ask on {schema}.doubt (ask_at);

create table {schema}.dead_letter (
    delivery     bigint      primary key,
    message      uuid        not null,
    subscription int         not null,
    priority     smallint    not null,
    attempt      int         not null,
    rev          int         not null,
    state        text        not null check (state in ('dead', 'cancelled')),
    at           timestamptz not null default pg_catalog.clock_timestamp(),
    reason       text        not null
);
create index dead_letter_at on {schema}.dead_letter (subscription, at);

-- The word on a doubt: by an operator, a reconcile hook, or a late outcome.
create table {schema}.resolution (
    delivery     bigint      not null,
    rev          int         not null,
    number       int         not null,
    subscription int         not null,
    message      uuid        not null,
    answer       text        not null check (answer in ('happened', 'did_not_happen', 'abandoned')),
    source       text        not null check (source in ('operator', 'reconcile', 'evidence')),
    actor        text        not null,
    reason       text,
    receipt      json,
    state_after  text        not null,
    at           timestamptz not null default pg_catalog.clock_timestamp(),
    primary key (delivery, rev)
);
create index resolution_succeeded on {schema}.resolution (subscription, at) where state_after = 'succeeded';

-- What was seen and changed no state: late outcomes of fenced workers, workers that died.
create table {schema}.observation (
    id       bigint generated always as identity primary key,
    delivery bigint      not null,
    number   int         not null,
    worker   uuid        not null,
    kind     text        not null,
    detail   text,
    at       timestamptz not null default pg_catalog.clock_timestamp()
);
create index observation_delivery on {schema}.observation (delivery);

create table {schema}.audit_counter (
    only_one boolean primary key default true check (only_one),
    seq      bigint  not null
);
insert into {schema}.audit_counter (seq) values (0);

create table {schema}.audit (
    seq          bigint      primary key,
    at           timestamptz not null default pg_catalog.clock_timestamp(),
    actor        text        not null,
    action       text        not null,
    delivery     bigint,
    subscription int,
    rev_before   int,
    rev_after    int,
    state_before text,
    state_after  text,
    reason       text,
    detail       json,
    -- Who was logged in to the database: the actor is what they said.
    login        text        not null default session_user
);
create index audit_delivery on {schema}.audit (delivery) where delivery is not null;

-- One row: what retention has removed since its last word in the audit, and how far it has looked
-- through the parts. Retention locks it; whoever makes new deliveries of messages that are there
-- already (a new subscription's history, a replay) shares it first, and looks for the messages after that.
create table {schema}.retention (
    only_one    boolean primary key default true check (only_one),
    deliveries  bigint  not null default 0,
    messages    bigint  not null default 0,
    up_to       timestamptz,
    told_at     timestamptz,
    parts_after timestamptz,
    swept_at    timestamptz,
    -- Whatever workers declare, nothing goes earlier than this after its end. Only the owner sets it.
    keep_at_least_ms bigint not null default 0 check (keep_at_least_ms >= 0)
);
insert into {schema}.retention default values;

-- Messages of which retention has removed some deliveries, and how many of those that their fan-out made.
create table {schema}.thinned (
    message    uuid primary key,
    deliveries int  not null
);

-- What runs for a caller must not depend on what is in the caller's search path: functions and types
-- are named with their schema, and operators have operands that pg_catalog has an operator for, so
-- that no better match in another schema can take its place. The small functions have no SET, which
-- would keep them from being inlined.

-- A UUIDv7: 48 bits of milliseconds, the rest random (RFC 9562, 5.7).
create function {schema}.uuid7() returns uuid
language sql volatile parallel safe as $$
    select pg_catalog.encode(
        pg_catalog.set_bit(pg_catalog.set_bit(
            pg_catalog.overlay(pg_catalog.uuid_send(pg_catalog.gen_random_uuid()),
                pg_catalog.substring(pg_catalog.int8send(
                    (extract(epoch from pg_catalog.clock_timestamp()) * 1000::numeric)::bigint), 3),
                1, 6),
            52, 1), 53, 1), 'hex')::pg_catalog.uuid
$$;

-- What dedup compares: the key and the payload, however its JSON is spelled. Bytes are told apart from
-- JSON, the key and the content type from each other, by zero bytes, which a text cannot have.
create function {schema}.body_hash(key text, payload text, body bytea, content_type text) returns bytea
language sql immutable parallel safe as $$
    select pg_catalog.sha256(case
        when body is null then pg_catalog.convert_to(
            coalesce(key, '') || e'\n' || payload::pg_catalog.jsonb::pg_catalog.text, 'UTF8')
        else pg_catalog.decode('00', 'hex') || pg_catalog.convert_to(coalesce(key, ''), 'UTF8')
            || pg_catalog.decode('00', 'hex') || pg_catalog.convert_to(content_type, 'UTF8')
            || pg_catalog.decode('00', 'hex') || body
        end)
$$;

create function {schema}.minted_at(id uuid) returns timestamptz
language sql immutable parallel safe as $$
    select pg_catalog.to_timestamp(
        ('x' || pg_catalog.translate(pg_catalog.left(id::pg_catalog.text, 13), '-', ''))::bit(48)::bigint::double precision
            / 1000::double precision)
$$;

-- The one text that publishes; the library runs the same inline.
create function {schema}.publish_batch(
    topics text[], keys text[], payloads text[], headers text[], occurred_us bigint[],
    sources text[], external_ids text[], correlation_ids text[], causation_ids text[],
    max_attempts int[], delay_ms bigint[], due_us bigint[], dedup_keys text[], dedup_ms bigint[],
    bodies bytea[], content_types text[]
) returns table (ord bigint, id uuid, stored boolean)
language sql volatile
set search_path = pg_catalog, pg_temp as $publish_batch$
{publish}
$publish_batch$;

-- The second look, at the dedup keys that were taken.
create function {schema}.publish_duplicates(
    topics text[], dedup_keys text[], keys text[], payloads text[], bodies bytea[], content_types text[]
) returns table (ord bigint, message uuid, same_body boolean)
language sql stable
set search_path = pg_catalog, pg_temp as $publish_duplicates$
{duplicates}
$publish_duplicates$;

-- One message, checked as the library checks it, in the caller's transaction. The only door that the
-- publisher role has; who has the dedup key is told in the row, so that it costs no transaction.
create function {schema}.publish_checked(
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
begin
    perform {schema}.check_message(topic, payload, key, headers, after, dedup_key, dedup_window,
        max_attempts, external_id, source, correlation_id, causation_id, body, content_type);
    if at is not null and after is not null then
        raise exception using errcode = '22023', message = 'postbox: give `after` or `at`, not both';
    end if;
    -- What the library can show: jiff ends with the year 9999.
    foreach asked in array array[at, occurred_at] loop
        if asked < '0001-01-01 00:00:00+00' or asked >= '9999-12-30 22:00:00+00' then
            raise exception using errcode = '22008', message = pg_catalog.format(
                'postbox: the %s is %s; it must be from the year 1 to the end of the year 9999',
                case when asked = at then 'due time' else 'time of occurrence' end, asked);
        end if;
    end loop;
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
            return query select new_id, true, true;
            return;
        end if;
        select d.message, d.body_hash = {schema}.body_hash(nullif(publish_checked.key, ''), text_payload,
            publish_checked.body, publish_checked.content_type)
        into first_id, same
        from {schema}.dedup d where d.topic = publish_checked.topic and d.key = publish_checked.dedup_key;
        if first_id is not null then
            return query select first_id, false, same;
            return;
        end if;
    end loop;
    raise exception using errcode = '40001', message = 'postbox: the dedup key keeps changing hands; try again';
end
$publish_checked$;

-- The same for any language: the message's id, or that of the one with this dedup key and the same body.
create function {schema}.publish(
    topic text, payload jsonb default null, key text default null, headers jsonb default null,
    after interval default null, at timestamptz default null,
    dedup_key text default null, dedup_window interval default '1 day',
    max_attempts int default null, external_id text default null, source text default null,
    correlation_id text default null, causation_id text default null,
    occurred_at timestamptz default null, body bytea default null, content_type text default null
) returns uuid
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $publish$
#variable_conflict use_variable
declare
    told record;
begin
    select p.id, p.stored or p.same_body as kept into told
    from {schema}.publish_checked(topic, payload, key, headers, after, at, dedup_key, dedup_window,
        max_attempts, external_id, source, correlation_id, causation_id, occurred_at, body, content_type) p;
    if told.kept then
        return told.id;
    end if;
    raise exception using errcode = '23505',
        message = pg_catalog.format('postbox: the dedup key `%s` of topic `%s` is taken by message %s, which has another body; nothing was published',
            dedup_key, topic, told.id);
end
$publish$;

create function {schema}.check_message(
    topic text, payload jsonb, key text, headers jsonb, after interval, dedup_key text,
    dedup_window interval, max_attempts int, external_id text, source text,
    correlation_id text, causation_id text, body bytea, content_type text
) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp as $check$
#variable_conflict use_variable
declare
    what pg_catalog.text;
    content pg_catalog.text;
    brackets int;
    depth int := 0;
begin
    if topic is null or topic = '' then
        raise exception using errcode = '22023', message = 'postbox: a topic must not be empty; write it like `orders.placed`';
    elsif pg_catalog.octet_length(topic) > 255 then
        raise exception using errcode = '22023', message = pg_catalog.format('postbox: the topic is %s bytes long; the limit is 255', pg_catalog.octet_length(topic));
    elsif topic !~ '^[A-Za-z0-9_:/@+-]+([.][A-Za-z0-9_:/@+-]+)*$' then
        raise exception using errcode = '22023', message = 'postbox: the topic has an empty segment or a character other than letters, digits and _ - : / @ + between the dots';
    end if;
    if payload is null and body is null then
        raise exception using errcode = '22004', message = 'postbox: the payload must not be null; pass ''null'' for a JSON null, or bytes as `body` with their `content_type`';
    elsif payload is not null and body is not null then
        raise exception using errcode = '22023', message = 'postbox: give `payload` or `body`, not both';
    elsif pg_catalog.num_nonnulls(body, content_type) = 1 then
        raise exception using errcode = '22023', message = 'postbox: `body` and `content_type` go together; JSON in `payload` needs none';
    elsif pg_catalog.octet_length(body) > 1048576 then
        raise exception using errcode = '22023', message = pg_catalog.format('postbox: the payload is %s bytes; the limit is 1048576', pg_catalog.octet_length(body));
    elsif pg_catalog.octet_length(content_type) > 255 then
        raise exception using errcode = '22023', message = pg_catalog.format('postbox: the content type is %s bytes long; the limit is 255', pg_catalog.octet_length(content_type));
    -- As check_content_type in content.rs: type/subtype; name=value; name="text". An e'' string reads
    -- the same whatever standard_conforming_strings says.
    elsif content_type !~ e'^[A-Za-z0-9!#$%&''*+.^_`|~-]+/[A-Za-z0-9!#$%&''*+.^_`|~-]+( *; *[A-Za-z0-9!#$%&''*+.^_`|~-]+=([A-Za-z0-9!#$%&''*+.^_`|~-]+|"([] !#-[^-~]|\\\\[ -~])*"))*$' then
        raise exception using errcode = '22023', message = 'postbox: the content type is no media type: write it like `image/png` or `text/plain; charset=utf-8`, 1 to 255 bytes of visible ASCII';
    end if;
    content := coalesce(payload::pg_catalog.text, '');
    if pg_catalog.octet_length(content) > 1048576 then
        raise exception using errcode = '22023', message = pg_catalog.format('postbox: the payload is %s bytes; the limit is 1048576', pg_catalog.octet_length(content));
    end if;
    -- Only a text with more than 128 opening brackets can be deeper than 128.
    brackets := pg_catalog.length(content) - pg_catalog.length(pg_catalog.translate(content, '[{', ''));
    if brackets > 128 then
        with recursive nested as (
            select payload as value, 1 as level
            union all
            select c.value, n.level + 1
            from nested n cross join lateral (
                select a.value from pg_catalog.jsonb_array_elements(case pg_catalog.jsonb_typeof(n.value) when 'array' then n.value else '[]' end) a
                union all
                select o.value from pg_catalog.jsonb_each(case pg_catalog.jsonb_typeof(n.value) when 'object' then n.value else '{}' end) o
            ) c
            where pg_catalog.jsonb_typeof(c.value) in ('array', 'object') and n.level <= 128
        )
        select pg_catalog.max(n.level) into depth from nested n;
        if depth > 128 then
            raise exception using errcode = '22023', message = 'postbox: the payload is nested deeper than 128 levels';
        end if;
    end if;
    for what, content in
        values ('key', key), ('dedup key', dedup_key), ('external id', external_id), ('source', source),
            ('correlation id', correlation_id), ('causation id', causation_id)
    loop
        if pg_catalog.octet_length(content) > 255 then
            raise exception using errcode = '22023', message = pg_catalog.format('postbox: the %s is %s bytes long; the limit is 255', what, pg_catalog.octet_length(content));
        end if;
    end loop;
    if dedup_key = '' then
        raise exception using errcode = '22023', message = 'postbox: the dedup key must not be empty; leave it null for a message that may repeat';
    end if;
    if after < interval '0' or after > interval '3660 days' then
        raise exception using errcode = '22023', message = 'postbox: the delay must be between 0 and 10 years';
    end if;
    if dedup_window is null or dedup_window < interval '0' or dedup_window > interval '3660 days' then
        raise exception using errcode = '22023', message = 'postbox: the dedup window must be between 0 and 10 years';
    end if;
    if max_attempts not between 1 and 1000 then
        raise exception using errcode = '22023', message = pg_catalog.format('postbox: max_attempts is %s; it must be 1 to 1000', max_attempts);
    end if;
    if headers is not null then
        if pg_catalog.jsonb_typeof(headers) <> 'object'
            or exists (select from pg_catalog.jsonb_each(headers) h where pg_catalog.jsonb_typeof(h.value) <> 'string' or h.key = '' or pg_catalog.octet_length(h.key) > 255) then
            raise exception using errcode = '22023', message = 'postbox: headers must be a JSON object of strings, with names of 1 to 255 bytes';
        elsif pg_catalog.octet_length(headers::pg_catalog.text) > 32768 then
            raise exception using errcode = '22023', message = pg_catalog.format('postbox: the headers are %s bytes together; the limit is 32768', pg_catalog.octet_length(headers::pg_catalog.text));
        end if;
    end if;
end
$check$;

{retain}

-- Every attempt, one row each, whichever way it is kept.
create view {schema}.attempts as
    select o.delivery, o.number, o.kind, o.state_after, o.subscription, o.message, o.worker,
        o.started_at, o.finished_at, o.error, o.receipt
    from {schema}.outcome o
    union all
    select a.delivery, a.number, null, null, null, null, a.worker, a.started_at, null, null, null
    from {schema}.attempt a
    where not exists (select from {schema}.outcome o where o.delivery = a.delivery and o.number = a.number)
    union all
    select d.delivery, 1, 'succeeded', 'succeeded', d.subscription, d.message, p.worker,
        p.finished_at - interval '1 microsecond' * d.duration_us::double precision, p.finished_at, null, null
    from {schema}.outcome_part p
    cross join lateral unnest(p.deliveries, p.messages, p.subscriptions, p.durations_us)
        as d(delivery, message, subscription, duration_us)
    where p.highest is not null;

-- What a lease still holds: its items, less what was settled or handed back.
create view {schema}.leased as
    select l.token, l.batch, l.worker, l.claimed_at, i.delivery, i.message, i.subscription,
        i.priority, i.attempt, i.lost, i.rev,
        exists (select from {schema}.attempt a where a.delivery = i.delivery and a.number = i.attempt + 1) as begun
    from {schema}.lease l
    cross join lateral unnest(l.deliveries, l.messages, l.subscriptions, l.priorities, l.attempts, l.losts, l.revs)
        as i(delivery, message, subscription, priority, attempt, lost, rev)
    where not exists (select from {schema}.outcome o where o.delivery = i.delivery and o.number = i.attempt + 1)
        and not exists (select from {schema}.outcome_part p where p.batch = l.batch
            and (i.delivery = any (p.deliveries) or i.delivery = any (p.released)));

-- Where each delivery stands.
create view {schema}.delivery as
    select r.delivery, 'pending'::pg_catalog.text as state, r.subscription, r.message,
        r.priority, r.attempt, r.lost, r.rev,
        null::timestamp with time zone as due_at, null::timestamp with time zone as since,
        null::pg_catalog.uuid as worker, null::pg_catalog.text as note
    from {schema}.ready r
    union all
    select s.delivery, 'pending', s.subscription, s.message, s.priority, s.attempt, s.lost, s.rev, s.due_at, null, null, null
    from {schema}.scheduled s
    union all
    -- An operation that has not begun has not started: it waits in its worker's hands.
    select l.delivery, case when l.begun or s.kind <> 'operation' then 'running' else 'pending' end,
        l.subscription, l.message, l.priority, l.attempt + l.begun::int, l.lost, l.rev, null, l.claimed_at, l.worker, null
    from {schema}.leased l join {schema}.subscription s on s.id = l.subscription
    union all
    select d.delivery, 'in_doubt', d.subscription, d.message, d.priority, d.attempt, 0, d.rev, null, d.since, null, d.cause
    from {schema}.doubt d
    union all
    select d.delivery, d.state, d.subscription, d.message, d.priority, d.attempt, 0, d.rev, null, d.at, null, d.reason
    from {schema}.dead_letter d
    union all
    select o.delivery, 'succeeded', o.subscription, o.message, 0, o.number, 0, o.rev, null, o.finished_at, o.worker, null
    from {schema}.outcome o where o.state_after = 'succeeded'
    union all
    select r.delivery, 'succeeded', r.subscription, r.message, 0, r.number, 0, r.rev, null, r.at, null, null
    from {schema}.resolution r where r.state_after = 'succeeded'
    union all
    select d.delivery, 'succeeded', d.subscription, d.message, 0, 1, 0, 2, null, p.finished_at, p.worker, null
    from {schema}.outcome_part p
    cross join lateral unnest(p.deliveries, p.messages, p.subscriptions) as d(delivery, message, subscription)
    where p.highest is not null;
