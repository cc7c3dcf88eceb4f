-- Pulling in SQL takes a row of ready by its place: no plan can read the whole table for it.

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
