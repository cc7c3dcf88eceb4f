-- Messages live in windows of time, so that old ones go by dropping a table (decision 0023); what is
-- ready lives in a ring of tables, so that a drained one can be emptied at once whatever old snapshots
-- might still want to see in it (decision 0024). What is there is carried over; {schema} is the schema's name.

lock table {schema}.routing, {schema}.dedup, {schema}.message, {schema}.ready in access exclusive mode;

-- What a topic fans out to, of the present epoch only: a publisher looks up one row, and nothing else.
delete from {schema}.route t where t.epoch < (select r.epoch from {schema}.routing r);
alter table {schema}.route drop constraint route_pkey;
alter table {schema}.route add primary key (topic);
create function {schema}.forget_routes() returns trigger
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $forget_routes$
begin
    delete from {schema}.route t where t.epoch < new.epoch;
    return null;
end
$forget_routes$;
create trigger forget_routes after update of epoch on {schema}.routing
for each row execute function {schema}.forget_routes();

-- One row a window: from_id inclusive, to_id exclusive; the last one is open. The table of a window is
-- message_<number>.
create table {schema}.message_window (
    number         int         primary key,
    from_id        uuid        not null unique,
    to_id          uuid        unique,
    -- Holds only what was still referred to when its time had come.
    sifted         boolean     not null default false,
    -- Its messages, and the lowest and highest delivery that their fan-out made; null: not counted yet.
    messages       bigint,
    first_delivery bigint,
    last_delivery  bigint,
    -- How many of its messages were still referred to when it was last looked through.
    held           bigint,
    look_at        timestamptz not null default '-infinity'
);

-- What was stored so far is the first window.
alter table {schema}.message rename to message_1;
alter table {schema}.message_1 rename constraint message_pkey to message_1_pkey;
alter index {schema}.message_causation rename to message_1_causation;
drop index {schema}.message_external;
-- Whoever writes messages checks this; a check of the table is parsed anew by each statement.
alter table {schema}.message_1 drop constraint message_check;
alter table {schema}.message_1 add column delivery bigint;

create table {schema}.message (
    id             uuid   not null,
    epoch          bigint not null,
    -- The one delivery that its fan-out made, or all of them if there are several; later ones are in
    -- late_delivery.
    delivery       bigint,
    deliveries     bigint[],
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
    body           bytea,
    content_type   text,
    primary key (id)
) partition by range(id);
create index message_causation on {schema}.message (causation_id) where causation_id is not null;

-- How long a window is: a quarter of the shortest time that something is kept, an hour at least, thirty
-- days at most. A message stays until its window is over and nothing in it is wanted any more.
create function {schema}.window_width() returns interval
language sql stable
set search_path = pg_catalog, pg_temp as $window_width$
    select interval '1 millisecond' * greatest(3600000::bigint, least(2592000000::bigint,
        coalesce(pg_catalog.min(s.keep_succeeded_ms), 2592000000::bigint) / 4::bigint))::double precision
    from {schema}.subscription s where s.removed_at is null
$window_width$;

do $windows$
declare
    newest pg_catalog.uuid := (select m.id from {schema}.message_1 m order by m.id desc limit 1);
    boundary pg_catalog.uuid := {schema}.uuid_at(case
        when newest is null then pg_catalog.clock_timestamp() + {schema}.window_width()
        else greatest({schema}.minted_at(newest), pg_catalog.clock_timestamp()) + interval '1 hour' end);
begin
    execute pg_catalog.format('alter table {schema}.message attach partition {schema}.message_1 for values from (%L) to (%L)',
        '00000000-0000-0000-0000-000000000000', boundary);
    execute 'create table {schema}.message_2 (like {schema}.message)';
    execute pg_catalog.format('alter table {schema}.message attach partition {schema}.message_2 for values from (%L) to (maxvalue)', boundary);
    insert into {schema}.message_window (number, from_id, to_id)
    values (1, '00000000-0000-0000-0000-000000000000', boundary), (2, boundary, null);
end
$windows$;

-- The ring: the table ready_<slot> holds the places of which 2^20 in a row belong to one slot, and then the
-- next 2^20 to the next of the four.
drop view {schema}.delivery;
alter table {schema}.ready rename to ready_before;
alter table {schema}.ready_before rename constraint ready_pkey to ready_before_pkey;
drop index {schema}.ready_moved;
create table {schema}.ready (
    subscription int      not null,
    priority     smallint not null,
    slot         smallint not null,
    pos          bigint   not null,
    delivery     bigint   not null,
    message      uuid     not null,
    attempt      int      not null,
    lost         int      not null,
    rev          int      not null
) partition by list (slot);
create index ready_order on {schema}.ready (subscription, priority, pos);
create index ready_moved on {schema}.ready (delivery) where pos <> delivery;
do $slots$
begin
    for slot in 0 .. 3 loop
        execute pg_catalog.format('create table {schema}.ready_%s partition of {schema}.ready for values in (%s)
            with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
                autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0.5)', slot, slot);
    end loop;
end
$slots$;
insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
select r.subscription, r.priority, (r.pos >> 20) & 3::bigint, r.pos, r.delivery, r.message, r.attempt, r.lost, r.rev
from {schema}.ready_before r order by r.pos;
drop table {schema}.ready_before;

create table {schema}.ring (
    slot    smallint    primary key,
    -- A look at it may walk over all that is dead: not before this.
    look_at timestamptz not null default '-infinity'
);
insert into {schema}.ring (slot) select pg_catalog.generate_series(0, 3);

-- Truncates the slots of the ring that are drained and not written to now: what is dead in them goes at
-- once, whatever old snapshots might still want to see of it. How many are left with something in them.
create function {schema}.rotate() returns int
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms' as $rotate$
declare
    written_to smallint;
    left_over int := 0;
    there boolean;
    looked timestamp with time zone;
    one record;
begin
    select (d.last_value >> 20) & 3::bigint into written_to from {schema}.delivery_id d;
    for one in select r.slot, r.look_at from {schema}.ring r where r.slot <> written_to order by r.slot for update skip locked loop
        continue when pg_catalog.pg_relation_size(pg_catalog.concat('{schema}.ready_', one.slot)::pg_catalog.regclass) = 0;
        left_over := left_over + 1;
        looked := pg_catalog.clock_timestamp();
        continue when one.look_at > looked;
        begin
            execute pg_catalog.format('select exists (select from {schema}.ready_%s)', one.slot) into there;
            if not there then
                execute pg_catalog.format('lock table {schema}.ready_%s in access exclusive mode', one.slot);
                -- Locked first, looked at second: nobody has written to it meanwhile, and nobody can.
                execute pg_catalog.format('select exists (select from {schema}.ready_%s)', one.slot) into there;
                if not there then
                    execute pg_catalog.format('truncate {schema}.ready_%s', one.slot);
                    left_over := left_over - 1;
                    continue;
                end if;
            end if;
        exception when lock_not_available then
            -- Somebody has it in an open transaction: later.
            null;
        end;
        update {schema}.ring r set look_at = pg_catalog.clock_timestamp()
            + greatest(interval '1 second', (pg_catalog.clock_timestamp() - looked) * 20::double precision)
        where r.slot = one.slot;
    end loop;
    return left_over;
end
$rotate$;

-- Ends the window that this time is in, and begins another one there. The time lies ahead, or is made to.
-- False: it could not be locked for a moment, or one begins there already.
create function {schema}.cut_window(at timestamptz) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms' as $cut_window$
declare
    old {schema}.message_window;
    boundary pg_catalog.uuid;
    fresh int;
    bound constant pg_catalog.text := 'alter table {schema}.message attach partition {schema}.message_%s for values from (%L) to (%s)';
begin
    begin
        lock table only {schema}.message in access exclusive mode;
        -- Nobody stores anything now: all that is there is older than this.
        boundary := {schema}.uuid_at(greatest(at, pg_catalog.clock_timestamp() + interval '2 milliseconds'));
        select w.* into old from {schema}.message_window w
        where w.from_id < boundary and (w.to_id > boundary or w.to_id is null) for update;
        if not found then
            return false;
        end if;
        select pg_catalog.max(w.number) + 1 into fresh from {schema}.message_window w;
        execute pg_catalog.format('alter table {schema}.message detach partition {schema}.message_%s', old.number);
        execute pg_catalog.format(bound, old.number, old.from_id, pg_catalog.quote_literal(boundary));
        execute pg_catalog.format('create table {schema}.message_%s (like {schema}.message)', fresh);
        execute pg_catalog.format(bound, fresh, boundary, coalesce(pg_catalog.quote_literal(old.to_id), 'maxvalue'));
    -- A clock that was set back: there are ids above the boundary.
    exception when lock_not_available or check_violation then
        return false;
    end;
    update {schema}.message_window w set to_id = null where w.number = old.number;
    insert into {schema}.message_window (number, from_id, to_id) values (fresh, boundary, old.to_id);
    update {schema}.message_window w set to_id = boundary where w.number = old.number;
    return true;
end
$cut_window$;

-- Keeps a whole window ahead of the clock, so that there is plenty of time to find a moment for the lock.
create function {schema}.open_windows() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $open_windows$
declare
    width interval := {schema}.window_width();
    begins timestamp with time zone;
begin
    select {schema}.minted_at(w.from_id) into begins from {schema}.message_window w where w.to_id is null;
    if begins < pg_catalog.clock_timestamp() + width then
        perform {schema}.cut_window(greatest(begins, pg_catalog.clock_timestamp()) + width);
    end if;
end
$open_windows$;

-- Who still refers to a message, and by which delivery; the bounds say where that can be, for a look at
-- some only. What has no delivery from the fan-out, or a later one, is within all bounds.
create view {schema}.reference as
    select r.message, r.delivery, r.delivery as lowest, r.delivery as highest from {schema}.ready r
    union all
    select s.message, s.delivery, s.delivery, s.delivery from {schema}.scheduled s
    union all
    select i.message, i.delivery, i.delivery, i.delivery
    from {schema}.lease l cross join lateral unnest(l.messages, l.deliveries) as i(message, delivery)
    union all
    select d.message, d.delivery, d.delivery, d.delivery from {schema}.doubt d
    union all
    select d.message, d.delivery, d.delivery, d.delivery from {schema}.dead_letter d
    union all
    select o.message, o.delivery, o.delivery, o.delivery from {schema}.outcome o
    union all
    select r.message, r.delivery, r.delivery, r.delivery from {schema}.resolution r
    union all
    select i.message, i.delivery, p.lowest, p.highest
    from {schema}.outcome_part p cross join lateral unnest(p.messages, p.deliveries) as i(message, delivery)
    where p.highest is not null
    union all
    select l.message, l.delivery, 0::bigint, 9223372036854775807::bigint from {schema}.late_delivery l
    union all
    select u.message, null::bigint, 0::bigint, 9223372036854775807::bigint from {schema}.unrouted u;

-- Looks through the oldest window that is over and was not looked through lately, and lets go of what
-- nothing refers to: what is still referred to is moved to a new table in the place of the old one. If that
-- is more than three quarters of it, or a million, the window stays as it is for now. The caller holds the row of `retention`, so nobody makes new references.
create function {schema}.sift_window(unrouted_ms bigint, keep_at_least_ms bigint, out gone bigint, out more boolean)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms' as $sift_window$
declare
    over_before pg_catalog.uuid := (
        select {schema}.uuid_at(pg_catalog.statement_timestamp() - interval '1 millisecond' * greatest(keep_at_least_ms,
            least(unrouted_ms, pg_catalog.min(s.keep_succeeded_ms), pg_catalog.min(s.keep_dead_ms)))::double precision)
        from {schema}.subscription s);
    old {schema}.message_window;
    before {schema}.message_window;
    began timestamp with time zone := pg_catalog.clock_timestamp();
    most bigint;
    wanted bigint;
    fresh int;
    tries int := 0;
begin
    gone := 0;
    more := false;
    select w.* into old from {schema}.message_window w
    where w.to_id <= over_before and w.look_at <= pg_catalog.statement_timestamp()
    order by w.from_id limit 1;
    if not found then
        return;
    end if;
    more := true;
    begin
        -- Whoever has stored something there and has not committed is waited for, and tried again later.
        execute pg_catalog.format('lock table {schema}.message_%s in share mode', old.number);
        if old.messages is null then
            execute pg_catalog.format('select pg_catalog.count(*), least(pg_catalog.min(m.delivery), pg_catalog.min(m.deliveries[1])),
                    greatest(pg_catalog.max(m.delivery), pg_catalog.max(m.deliveries[pg_catalog.cardinality(m.deliveries)]))
                from {schema}.message_%s m', old.number)
            into old.messages, old.first_delivery, old.last_delivery;
        end if;
        most := least(1000000::bigint, old.messages * 3::bigint / 4::bigint);
        select pg_catalog.count(*) into wanted from (
            select distinct r.message from {schema}.reference r
            where r.message >= old.from_id and r.message < old.to_id
                and r.highest >= coalesce(old.first_delivery, 0) and r.lowest <= coalesce(old.last_delivery, 0)
            limit most + 1
        ) r;
        -- The one before, if it was sifted and is small beside this one: the two become one.
        select w.* into before from {schema}.message_window w
        where w.to_id = old.from_id and w.sifted and w.messages <= greatest(wanted, 10000::bigint);
        if before.number is not null then
            execute pg_catalog.format('lock table {schema}.message_%s in share mode', before.number);
        end if;
        if wanted > most or old.sifted and old.messages = 0 and before.number is null then
            update {schema}.message_window w
            set messages = old.messages, first_delivery = old.first_delivery, last_delivery = old.last_delivery, held = wanted,
                look_at = pg_catalog.clock_timestamp()
                    + greatest(interval '1 hour', (pg_catalog.clock_timestamp() - began) * 20::double precision)
            where w.number = old.number;
            return;
        end if;
        select pg_catalog.max(w.number) + 1 into fresh from {schema}.message_window w;
        execute pg_catalog.format('create table {schema}.message_%s (like {schema}.message)', fresh);
        execute pg_catalog.format('insert into {schema}.message_%s select m.* from {schema}.message m
            where m.id >= $1 and m.id < $2 and m.id in (select r.message from {schema}.reference r
                where r.message >= $1 and r.message < $2 and r.highest >= $3 and r.lowest <= $4)', fresh)
        using coalesce(before.from_id, old.from_id), old.to_id,
            coalesce(least(before.first_delivery, old.first_delivery), 0), coalesce(greatest(before.last_delivery, old.last_delivery), 0);
        get diagnostics wanted = row_count;
        execute pg_catalog.format('alter table {schema}.message_%s add primary key (id)', fresh);
        execute pg_catalog.format('create index on {schema}.message_%s (causation_id) where causation_id is not null', fresh);
        -- So that attaching need not look.
        execute pg_catalog.format('alter table {schema}.message_%s add constraint bounds check (id >= %L and id < %L)',
            fresh, coalesce(before.from_id, old.from_id), old.to_id);
        loop
            begin
                lock table only {schema}.message in access exclusive mode;
                exit;
            exception when lock_not_available then
                tries := tries + 1;
                if tries = 20 then
                    raise;
                end if;
                perform pg_catalog.pg_sleep(0.05::double precision);
            end;
        end loop;
        execute pg_catalog.format('alter table {schema}.message detach partition {schema}.message_%s', old.number);
        execute pg_catalog.format('drop table {schema}.message_%s', old.number);
        if before.number is not null then
            execute pg_catalog.format('alter table {schema}.message detach partition {schema}.message_%s', before.number);
            execute pg_catalog.format('drop table {schema}.message_%s', before.number);
        end if;
        execute pg_catalog.format('alter table {schema}.message attach partition {schema}.message_%s for values from (%L) to (%L)',
            fresh, coalesce(before.from_id, old.from_id), old.to_id);
        execute pg_catalog.format('alter table {schema}.message_%s drop constraint bounds', fresh);
    exception when lock_not_available then
        update {schema}.message_window w
        set look_at = pg_catalog.clock_timestamp()
            + greatest(interval '1 minute', (pg_catalog.clock_timestamp() - began) * 20::double precision)
        where w.number = old.number;
        return;
    end;
    gone := old.messages + coalesce(before.messages, 0) - wanted;
    delete from {schema}.message_window w where w.number in (old.number, before.number);
    insert into {schema}.message_window (number, from_id, to_id, sifted, messages, first_delivery, last_delivery, held, look_at)
    values (fresh, coalesce(before.from_id, old.from_id), old.to_id, true, wanted,
        least(before.first_delivery, old.first_delivery), greatest(before.last_delivery, old.last_delivery), wanted,
        pg_catalog.clock_timestamp() + greatest(interval '1 hour', (pg_catalog.clock_timestamp() - began) * 20::double precision));
end
$sift_window$;

drop function {schema}.forget;
drop function {schema}.retain;
drop table {schema}.thinned;
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

-- The functions that write and take: the same to their callers, on the new tables.
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
    occurred_at timestamptz default null, body bytea default null, content_type text default null,
    out id uuid, out stored boolean, out same_body boolean
)
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
        and (pg_catalog.octet_length(text_payload) <= 256
            or pg_catalog.octet_length(text_payload) <= 1048576
                and pg_catalog.length(text_payload) - pg_catalog.length(pg_catalog.translate(text_payload, '[{', '')) <= 128)
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
            return;
        end if;
    end loop;
    raise exception using errcode = '40001', message = 'postbox: the dedup key keeps changing hands; try again';
end
$publish_checked$;

-- Without a search path of its own: it names nothing that could be found elsewhere.
create or replace function {schema}.publish(
    topic text, payload jsonb default null, key text default null, headers jsonb default null,
    after interval default null, at timestamptz default null,
    dedup_key text default null, dedup_window interval default '1 day',
    max_attempts int default null, external_id text default null, source text default null,
    correlation_id text default null, causation_id text default null,
    occurred_at timestamptz default null, body bytea default null, content_type text default null
) returns uuid
language plpgsql volatile as $publish$
#variable_conflict use_variable
declare
    told record;
begin
    told := {schema}.publish_checked(topic, payload, key, headers, after, at, dedup_key, dedup_window,
        max_attempts, external_id, source, correlation_id, causation_id, occurred_at, body, content_type);
    if told.stored or told.same_body then
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
    of_slot oid;
    place tid;
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
                -- Locked first, taken second: by its place, so that no plan reads more than one row.
                select r.tableoid, r.ctid into of_slot, place
                from {schema}.ready r where r.subscription = wanted
                order by r.priority, r.pos limit 1 for update skip locked;
                if found then
                    delete from {schema}.ready g where g.tableoid = of_slot and g.ctid = place
                    returning g.delivery, g.message, g.priority, g.attempt + 1, g.rev + 2
                    into delivery, taken_message, taken_priority, attempt, taken_rev;
                end if;
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
    of_slot oid;
    place tid;
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
        select l.tableoid, l.ctid into of_slot, place from {schema}.ready l
        where l.delivery = failed.delivery and l.pos <> l.delivery
            and l.attempt = coalesce(failed.attempt - 1, l.attempt)
        for update skip locked;
        if not found then
            select l.tableoid, l.ctid into of_slot, place from {schema}.ready l
            where l.subscription = any (array(select s.id from {schema}.subscription s))
                and l.priority = 0::smallint and l.pos = failed.delivery and l.delivery = failed.delivery
                and l.attempt = coalesce(failed.attempt - 1, l.attempt)
            for update skip locked;
        end if;
        if found then
            delete from {schema}.ready g where g.tableoid = of_slot and g.ctid = place
            returning g.attempt + 1, g.rev + 2, g.subscription, g.message, g.priority
            into attempt_number, next_rev, wanted, taken_message, taken_priority;
        else
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
        insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
        select wanted, taken_priority, (n.pos >> 20) & 3::bigint, n.pos, delivery, taken_message, attempt_number, 0, next_rev
        from (select pg_catalog.nextval('{schema}.delivery_id') as pos) n;
        perform pg_catalog.pg_notify(r.channel, '') from {schema}.routing r
        where exists (select from {schema}.worker w where w.asleep);
    end if;
    return true;
end
$failed$;

{roles}
