-- Back to one table of messages and one of what is ready. Messages of which some deliveries were removed
-- by retention stay for good: the earlier shape counted those, this one does not.
lock table {schema}.routing, {schema}.dedup, {schema}.message, {schema}.ready in access exclusive mode;

drop view {schema}.delivery;
drop view {schema}.reference;
drop function {schema}.retain;
drop function {schema}.forget;
drop function {schema}.sift_window;
drop function {schema}.open_windows;
drop function {schema}.cut_window;
drop function {schema}.window_width;
drop function {schema}.rotate;
drop trigger forget_routes on {schema}.routing;
drop function {schema}.forget_routes;
alter table {schema}.route drop constraint route_pkey;
alter table {schema}.route add primary key (topic, epoch);

alter table {schema}.message rename to message_windows;
alter table {schema}.message_windows rename constraint message_pkey to message_windows_pkey;
drop index {schema}.message_causation;
create table {schema}.message (
    id             uuid   primary key,
    epoch          bigint not null,
    topic          text   not null,
    key            text,
    payload        json,
    headers        json,
    occurred_at    timestamptz,
    due_at         timestamptz,
    source         text,
    external_id    text,
    correlation_id text,
    causation_id   text,
    max_attempts   int,
    deliveries     bigint[],
    body           bytea,
    content_type   text,
    check ((payload is null) = (body is not null) and (body is null) = (content_type is null))
);
insert into {schema}.message (id, epoch, topic, key, payload, headers, occurred_at, due_at, source, external_id,
    correlation_id, causation_id, max_attempts, deliveries, body, content_type)
select m.id, m.epoch, m.topic, m.key, m.payload, m.headers, m.occurred_at, m.due_at, m.source, m.external_id,
    m.correlation_id, m.causation_id, m.max_attempts,
    coalesce(m.deliveries, pg_catalog.array_remove(array[m.delivery], null)), m.body, m.content_type
from {schema}.message_windows m order by m.id;
drop table {schema}.message_windows;
drop table {schema}.message_window;
create index message_causation on {schema}.message (causation_id) where causation_id is not null;
create index message_external on {schema}.message (external_id) where external_id is not null;

create table {schema}.thinned (
    message    uuid primary key,
    deliveries int  not null
);

alter table {schema}.ready rename to ready_ring;
drop index {schema}.ready_moved;
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
insert into {schema}.ready (subscription, priority, pos, delivery, message, attempt, lost, rev)
select r.subscription, r.priority, r.pos, r.delivery, r.message, r.attempt, r.lost, r.rev
from {schema}.ready_ring r order by r.pos;
drop table {schema}.ready_ring;
drop table {schema}.ring;

{retain}

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

-- The functions, as the earlier shape had them.
create or replace function {schema}.publish_batch(
    topics text[], keys text[], payloads text[], headers text[], occurred_us bigint[],
    sources text[], external_ids text[], correlation_ids text[], causation_ids text[],
    max_attempts int[], delay_ms bigint[], due_us bigint[], dedup_keys text[], dedup_ms bigint[],
    bodies bytea[], content_types text[]
) returns table (ord bigint, id uuid, stored boolean)
language sql volatile
set search_path = pg_catalog, pg_temp as $publish_batch$
{publish}
$publish_batch$;

drop function {schema}.publish_checked;
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

create or replace function {schema}.publish(
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

create or replace function {schema}.next(subscription text, application text default null)
returns table (
    delivery bigint, id uuid, topic text, key text, payload jsonb, headers jsonb, attempt int, max_attempts int,
    occurred_at timestamptz, source text, external_id text, correlation_id text, causation_id text,
    body bytea, content_type text
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $next$
#variable_conflict use_variable
declare
    wanted int := {schema}.pulled_subscription(subscription, application);
    ready_priority smallint;
    ready_since timestamp with time zone;
    due_priority smallint;
    due_since timestamp with time zone;
    due_first boolean;
    taken_message pg_catalog.uuid;
    taken_priority smallint;
    taken_rev int;
begin
    loop
        -- Whichever has waited longest. What is due is not moved to ready, where it would stay locked.
        select r.priority, {schema}.minted_at(r.message) into ready_priority, ready_since
        from {schema}.ready r where r.subscription = wanted order by r.priority, r.pos limit 1;
        select s.priority, s.due_at into due_priority, due_since
        from {schema}.scheduled s where s.subscription = wanted and s.due_at <= pg_catalog.statement_timestamp()
        order by s.due_at limit 1;
        due_first := due_since is not null and (ready_since is null
            or due_priority < ready_priority or due_priority = ready_priority and due_since < ready_since);
        for round in 1 .. 2 loop
            if due_first = (round = 1) then
                delete from {schema}.scheduled g
                where g.delivery = (
                    select s.delivery from {schema}.scheduled s
                    where s.subscription = wanted and s.due_at <= pg_catalog.statement_timestamp()
                    order by s.due_at limit 1 for update skip locked)
                returning g.delivery, g.message, g.priority, g.attempt + 1, g.rev + 2
                into delivery, taken_message, taken_priority, attempt, taken_rev;
            else
                delete from {schema}.ready g
                where g.ctid = any (array(
                    select r.ctid from {schema}.ready r where r.subscription = wanted
                    order by r.priority, r.pos limit 1 for update skip locked))
                returning g.delivery, g.message, g.priority, g.attempt + 1, g.rev + 2
                into delivery, taken_message, taken_priority, attempt, taken_rev;
            end if;
            exit when delivery is not null;
        end loop;
        if delivery is null then
            return;
        end if;
        select m.id, m.topic, m.key, m.payload::pg_catalog.jsonb, m.headers::pg_catalog.jsonb,
            coalesce(m.max_attempts, s.max_attempts), coalesce(m.occurred_at, {schema}.minted_at(m.id)),
            m.source, m.external_id, m.correlation_id, m.causation_id, m.body, m.content_type
        into id, topic, key, payload, headers, max_attempts, occurred_at, source, external_id, correlation_id, causation_id,
            body, content_type
        from {schema}.message m join {schema}.subscription s on s.id = wanted
        where m.id = taken_message;
        if found then
            insert into {schema}.outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker, started_at, finished_at)
            values (delivery, attempt, 'succeeded', 'succeeded', taken_rev, wanted, taken_message, 0,
                '00000000-0000-0000-0000-000000000000', pg_catalog.clock_timestamp(), pg_catalog.clock_timestamp());
            return next;
            return;
        end if;
        -- Its message is gone: dead, loudly.
        insert into {schema}.outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker, started_at, finished_at, error)
        values (delivery, attempt, 'failed', 'dead', taken_rev, wanted, taken_message, 0,
            '00000000-0000-0000-0000-000000000000', pg_catalog.clock_timestamp(), pg_catalog.clock_timestamp(),
            'its message is gone: retention or a restore took it before it was delivered');
        insert into {schema}.dead_letter (delivery, message, subscription, priority, attempt, rev, state, reason)
        values (delivery, taken_message, wanted, taken_priority, attempt, taken_rev, 'dead',
            'its message is gone: retention or a restore took it before it was delivered');
    end loop;
end
$next$;

create or replace function {schema}.failed(
    delivery bigint, error text, retry_after interval default null, attempt int default null
) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $failed$
#variable_conflict use_variable
declare
    nobody constant pg_catalog.uuid := '00000000-0000-0000-0000-000000000000';
    words pg_catalog.text;
    attempt_number int;
    next_rev int;
    wanted int;
    taken_message pg_catalog.uuid;
    taken_priority smallint := 0;
    finished timestamp with time zone;
    was pg_catalog.text;
    written_by bigint;
    mine boolean := false;
    current_xid bigint;
    policy_kind pg_catalog.text;
    max_attempts int;
    ceiling_ms bigint;
    wait_ms bigint;
begin
    if retry_after < interval '0' or retry_after > interval '3660 days' then
        raise exception using errcode = '22023', message = 'postbox: retry_after must be between 0 and 10 years';
    elsif attempt < 1 then
        raise exception using errcode = '22023',
            message = pg_catalog.format('postbox: attempt is %s; they count from 1, as `next` gave it', attempt);
    end if;
    -- Bounded, and without the password of a URL in it.
    words := pg_catalog.left(pg_catalog.regexp_replace(coalesce(nullif(error, ''), 'no reason was given'),
        '([a-z]+://[^:/@[:space:]]*):[^@[:space:]]*@', e'\\1:***@', 'g'), 1024);

    -- In the transaction of `next`: the success is there, and nobody else could see it. Written by a
    -- transaction that has not ended, which includes subtransactions of this one.
    select o.number, o.rev, o.subscription, o.message, o.finished_at, o.kind, o.xmin::pg_catalog.text::bigint
    into attempt_number, next_rev, wanted, taken_message, finished, was, written_by
    from {schema}.outcome o
    where o.delivery = failed.delivery and o.worker = nobody
    order by o.number desc limit 1;
    if finished >= pg_catalog.transaction_timestamp() then
        current_xid := pg_catalog.pg_current_xact_id()::pg_catalog.text::bigint;
        -- The 32 bits of a row's xmin, beside the current transaction's 64.
        written_by := current_xid
            + (written_by - current_xid % 4294967296::bigint + 6442450944::bigint) % 4294967296::bigint - 2147483648::bigint;
        mine := pg_catalog.pg_xact_status(written_by::pg_catalog.text::pg_catalog.xid8) = 'in progress';
        -- Counted already, and `next` has not given it again since.
        if mine and was <> 'succeeded' then
            return false;
        end if;
        mine := mine and attempt_number = coalesce(attempt, attempt_number);
    end if;

    if not mine then
        -- Rolled back: it waits again, unless somebody else has it.
        -- One that was moved before has a place of its own, a fresh one its delivery's number.
        delete from {schema}.ready g
        where g.ctid = any (array(
            select l.ctid from {schema}.ready l
            where l.delivery = failed.delivery and l.pos <> l.delivery
                and l.attempt = coalesce(failed.attempt - 1, l.attempt)
            for update skip locked))
        returning g.attempt + 1, g.rev + 2, g.subscription, g.message, g.priority
        into attempt_number, next_rev, wanted, taken_message, taken_priority;
        if not found then
            delete from {schema}.ready g
            where g.ctid = any (array(
                select l.ctid from {schema}.ready l
                where l.subscription = any (array(select s.id from {schema}.subscription s))
                    and l.priority = 0::smallint and l.pos = failed.delivery and l.delivery = failed.delivery
                    and l.attempt = coalesce(failed.attempt - 1, l.attempt)
                for update skip locked))
            returning g.attempt + 1, g.rev + 2, g.subscription, g.message, g.priority
            into attempt_number, next_rev, wanted, taken_message, taken_priority;
        end if;
        if not found then
            delete from {schema}.scheduled g
            where g.delivery = (
                select s.delivery from {schema}.scheduled s
                where s.delivery = failed.delivery and s.due_at <= pg_catalog.statement_timestamp()
                    and s.attempt = coalesce(failed.attempt - 1, s.attempt)
                for update skip locked)
            returning g.attempt + 1, g.rev + 2, g.subscription, g.message, g.priority
            into attempt_number, next_rev, wanted, taken_message, taken_priority;
        end if;
        if not found then
            return false;
        end if;
    end if;

    select s.kind, coalesce(m.max_attempts, s.max_attempts),
        {schema}.backoff_ceiling_ms(s.retry_base_ms, s.retry_cap_ms, attempt_number)
    into policy_kind, max_attempts, ceiling_ms
    from {schema}.subscription s left join {schema}.message m on m.id = taken_message
    where s.id = wanted;
    if policy_kind = 'operation' then
        raise exception using errcode = '22023',
            message = pg_catalog.format('postbox: delivery %s is an operation''s, which is not pulled; a worker settles it', delivery);
    end if;
    wait_ms := coalesce((extract(epoch from retry_after) * 1000::numeric)::bigint,
        pg_catalog.floor(pg_catalog.random() * ceiling_ms::double precision)::bigint);

    if mine then
        update {schema}.outcome o
        set kind = 'failed', state_after = case when attempt_number >= max_attempts then 'dead' else 'pending' end,
            error = words, finished_at = pg_catalog.clock_timestamp()
        where o.delivery = failed.delivery and o.number = attempt_number;
    else
        insert into {schema}.outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker, started_at, finished_at, error)
        values (delivery, attempt_number, 'failed', case when attempt_number >= max_attempts then 'dead' else 'pending' end,
            next_rev, wanted, taken_message, 0, nobody, pg_catalog.clock_timestamp(), pg_catalog.clock_timestamp(), words);
    end if;
    if attempt_number >= max_attempts then
        insert into {schema}.dead_letter (delivery, message, subscription, priority, attempt, rev, state, reason)
        values (delivery, taken_message, wanted, taken_priority, attempt_number, next_rev, 'dead', words);
    elsif wait_ms > 0 then
        insert into {schema}.scheduled (delivery, due_at, subscription, priority, message, attempt, lost, rev)
        values (delivery, pg_catalog.clock_timestamp() + interval '1 millisecond' * wait_ms::double precision,
            wanted, taken_priority, taken_message, attempt_number, 0, next_rev);
    else
        insert into {schema}.ready (subscription, priority, pos, delivery, message, attempt, lost, rev)
        values (wanted, taken_priority, pg_catalog.nextval('{schema}.delivery_id'), delivery, taken_message, attempt_number, 0, next_rev);
        perform pg_catalog.pg_notify(r.channel, '') from {schema}.routing r
        where exists (select from {schema}.worker w where w.asleep);
    end if;
    return true;
end
$failed$;

{roles}

