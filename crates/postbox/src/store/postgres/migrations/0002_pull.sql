-- Pulling from any language: a subscription is declared, its deliveries are taken and failed, all in
-- the caller's transaction.

-- A pattern as an anchored regular expression: the text that the library makes of it.
create function {schema}.pattern_matcher(pattern text) returns text
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp as $$
    select '^' || pg_catalog.string_agg(
        case s.segment when '*' then '[^.]+' when '>' then '.+' else pg_catalog.replace(s.segment, '+', e'\\+') end,
        e'\\.' order by s.place) || '$'
    from pg_catalog.unnest(pg_catalog.string_to_array(pattern, '.')) with ordinality as s(segment, place)
$$;

-- The longest wait in milliseconds after an attempt that failed: exponential, as the library has it.
create function {schema}.backoff_ceiling_ms(base_ms bigint, cap_ms bigint, attempt int) returns bigint
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp as $$
    select least(cap_ms::numeric,
        base_ms::numeric * pg_catalog.power(2::numeric, least(greatest(attempt - 1, 0), 31)::numeric))::bigint
$$;

-- Declares a subscription that is pulled from, or changes its pattern. Its number.
create function {schema}.subscribe(
    name text, pattern text, application text default 'sql', max_attempts int default null,
    start text default 'unrouted'
) returns int
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $subscribe$
#variable_conflict use_variable
declare
    start_at timestamp with time zone;
    now_epoch bigint;
    found_id int;
    found_kind pg_catalog.text;
    found_pattern pg_catalog.text;
begin
    if name is null or name = '' or pg_catalog.octet_length(name) > 255 or name ~ '[[:cntrl:][:space:]]' then
        raise exception using errcode = '22023', message = 'postbox: a subscription''s name must be 1 to 255 bytes without spaces or control characters';
    elsif application is null or pg_catalog.octet_length(application) > 63 or application ~ '[[:cntrl:]]' then
        raise exception using errcode = '22023', message = 'postbox: an application''s name must be at most 63 bytes without control characters';
    elsif pattern is null or pattern = '' then
        raise exception using errcode = '22023', message = 'postbox: a pattern must not be empty; write it like `orders.placed` or `orders.*`';
    elsif pg_catalog.octet_length(pattern) > 255 then
        raise exception using errcode = '22023', message = pg_catalog.format('postbox: the pattern is %s bytes long; the limit is 255', pg_catalog.octet_length(pattern));
    elsif pattern <> '>' and pattern !~ '^([A-Za-z0-9_:/@+-]+|[*])([.]([A-Za-z0-9_:/@+-]+|[*]))*([.]>)?$' then
        raise exception using errcode = '22023', message = 'postbox: the pattern has an empty segment, a misplaced wildcard (`*` is one whole segment, `>` the rest, and last) or a character other than letters, digits and _ - : / @ + between the dots';
    elsif max_attempts not between 1 and 1000 then
        raise exception using errcode = '22023', message = pg_catalog.format('postbox: max_attempts is %s; it must be 1 to 1000', max_attempts);
    end if;
    if start is null or start not in ('unrouted', 'now', 'beginning') then
        begin
            start_at := start::timestamp with time zone;
        exception when invalid_datetime_format or datetime_field_overflow or invalid_parameter_value then
            start_at := null;
        end;
        if start_at is null or start_at < '0001-01-01 00:00:00+00' or start_at >= '9999-12-30 22:00:00+00' then
            raise exception using errcode = '22023', message = 'postbox: start must be `unrouted`, `now`, `beginning` or a time like 2027-01-31 09:00+01';
        end if;
    end if;

    -- One registration at a time: the routing row is locked first.
    select r.epoch into now_epoch from {schema}.routing r for update;
    select s.id, s.kind, s.pattern into found_id, found_kind, found_pattern
    from {schema}.subscription s
    where s.application = subscribe.application and s.name = subscribe.name and s.removed_at is null;
    if found_kind = 'operation' then
        raise exception using errcode = '22023', message = pg_catalog.format('postbox: the subscription `%s` is an operation''s and cannot be pulled; take another name', name);
    elsif found_id is null then
        insert into {schema}.subscription (application, name, pattern, matcher, kind, max_attempts, retry_base_ms, retry_cap_ms,
            timeout_ms, quiet_ms, keep_succeeded_ms, keep_dead_ms, reconciles, continues, idempotent, start, start_at,
            epoch, backfilled, scan_matcher, scan_epoch)
        values (application, name, pattern, {schema}.pattern_matcher(pattern), 'transactional',
            coalesce(max_attempts, 4), 1000, 900000, 60000, 60000, 2592000000, 7776000000, false, false, false,
            case when start_at is null then start else 'time' end, start_at, now_epoch + 1, start = 'now',
            case when start_at is not null or start = 'beginning' then {schema}.pattern_matcher(pattern) end,
            case when start_at is not null or start = 'beginning' then now_epoch + 1 end)
        returning subscription.id into found_id;
    elsif found_pattern <> pattern then
        -- A changed pattern takes the unrouted messages that only the new one matches.
        update {schema}.subscription s
        set pattern = subscribe.pattern, matcher = {schema}.pattern_matcher(subscribe.pattern), epoch = now_epoch + 1,
            start = 'unrouted', backfilled = false, backfill_waits = null,
            max_attempts = coalesce(subscribe.max_attempts, s.max_attempts)
        where s.id = found_id;
    else
        update {schema}.subscription s set max_attempts = subscribe.max_attempts
        where s.id = found_id and s.max_attempts <> subscribe.max_attempts;
        return found_id;
    end if;
    update {schema}.routing set epoch = now_epoch + 1;
    return found_id;
end
$subscribe$;

-- The subscription that is meant: of the application that is named, or the only one of its name.
create function {schema}.pulled_subscription(name text, application text) returns int
language plpgsql stable
set search_path = pg_catalog, pg_temp as $pulled_subscription$
#variable_conflict use_variable
declare
    found_ids int[];
    kinds pg_catalog.text[];
    owners pg_catalog.text[];
begin
    select pg_catalog.array_agg(s.id order by s.application), pg_catalog.array_agg(s.kind order by s.application),
        pg_catalog.array_agg(s.application order by s.application)
    into found_ids, kinds, owners
    from {schema}.subscription s
    where s.name = pulled_subscription.name and s.removed_at is null
        and (pulled_subscription.application is null or s.application = pulled_subscription.application);
    if found_ids is null then
        raise exception using errcode = '42704',
            message = pg_catalog.format('postbox: there is no subscription `%s`%s', name, ' of application `' || application || '`'),
            hint = pg_catalog.format('declare it: select {schema}.subscribe(%L, ''orders.*''%s)', name, ', application => ' || pg_catalog.quote_literal(application));
    elsif pg_catalog.cardinality(found_ids) > 1 then
        raise exception using errcode = '22023',
            message = pg_catalog.format('postbox: several applications have a subscription `%s`: %s', name, pg_catalog.array_to_string(owners, ', ')),
            hint = pg_catalog.format('say whose: select * from {schema}.next(%L, application => %L)', name, owners[1]);
    elsif kinds[1] = 'operation' then
        raise exception using errcode = '22023',
            message = pg_catalog.format('postbox: the subscription `%s` is an operation''s: a worker calls its handler, and it cannot be pulled', name);
    end if;
    return found_ids[1];
end
$pulled_subscription$;

-- Takes back the start of what was pulled and never handed out: nothing was tried. Of live leases only,
-- of attempts that have no outcome, and never of an operation's.
create function {schema}.forgo_attempts(token uuid, worker uuid) returns void
language sql volatile
set search_path = pg_catalog, pg_temp as $forgo_attempts$
    delete from {schema}.attempt a
    using {schema}.lease l, {schema}.subscription s
    where l.token = forgo_attempts.token and l.worker = forgo_attempts.worker
        and a.batch = l.batch and a.worker = l.worker and a.delivery = any (l.deliveries)
        and s.id = l.subscriptions[pg_catalog.array_position(l.deliveries, a.delivery)] and s.kind <> 'operation'
        and not exists (select from {schema}.outcome o where o.delivery = a.delivery and o.number = a.number)
$forgo_attempts$;

-- The next delivery, or no row. It succeeds with the caller's commit; a rollback is no attempt.
create function {schema}.next(subscription text, application text default null)
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
                using (
                    select r.priority, r.pos from {schema}.ready r where r.subscription = wanted
                    order by r.priority, r.pos limit 1 for update skip locked) p
                where g.subscription = wanted and g.priority = p.priority and g.pos = p.pos
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

-- Counts a failed attempt at what `next` gave: in its transaction, or after that was rolled back.
-- False: the delivery has moved on, or somebody else has it now; nothing was counted. With `attempt`,
-- as `next` gave it, it counts that one only: somebody else may have failed at it since.
create function {schema}.failed(
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
        delete from {schema}.ready g
        using (
            select r.subscription, r.priority, r.pos from {schema}.ready r
            where r.delivery = failed.delivery and r.pos <> r.delivery
            union all
            select r.subscription, r.priority, r.pos from {schema}.ready r
            where r.delivery = failed.delivery and (r.subscription, r.priority, r.pos) in
                (select s.id, 0::smallint, failed.delivery from {schema}.subscription s)
        ) p
        where (g.subscription, g.priority, g.pos) in (
            select l.subscription, l.priority, l.pos from {schema}.ready l
            where l.subscription = p.subscription and l.priority = p.priority and l.pos = p.pos
                and l.attempt = coalesce(failed.attempt - 1, l.attempt)
            for update skip locked)
        returning g.attempt + 1, g.rev + 2, g.subscription, g.message, g.priority
        into attempt_number, next_rev, wanted, taken_message, taken_priority;
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
