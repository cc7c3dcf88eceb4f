-- Retention, as functions: part of the migration, so that a role can run it without the right to
-- delete from the record. Nothing here takes anything unfinished: only what ended is looked at.

-- Removes the history of ended deliveries. The caller holds the row of `retention`.
create function {schema}.forget(gone_deliveries bigint[], gone_messages uuid[]) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $forget$
begin
    delete from {schema}.attempt a where a.delivery = any (gone_deliveries);
    delete from {schema}.outcome o where o.delivery = any (gone_deliveries);
    delete from {schema}.resolution r where r.delivery = any (gone_deliveries);
    delete from {schema}.observation o where o.delivery = any (gone_deliveries);
    delete from {schema}.late_delivery l
    using unnest(gone_deliveries, gone_messages) as g(delivery, message)
    where l.message = g.message and l.delivery = g.delivery;
end
$forget$;

-- One batch of about `most` deliveries, the oldest first. `unrouted_ms`: how long a message that
-- nobody is subscribed to is kept. `tell`: what was removed goes on record now, not once an hour.
-- Messages go when nothing else is left to remove, with the window they are in, and one window at a time.
-- Busy: another one is at it, or new deliveries of old messages are being made.
create function {schema}.retain(unrouted_ms bigint, most int, tell boolean)
returns table (busy boolean, deliveries bigint, messages bigint, more boolean)
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $retain$
#variable_conflict use_column
declare
    own {schema}.retention;
    page int := 0;
    taken bigint[] := '{}';
    of_messages pg_catalog.uuid[] := '{}';
    freed bigint;
    batches bigint[] := '{}';
    parts int[] := '{}';
    found_deliveries bigint[];
    found_messages pg_catalog.uuid[];
    found_up_to timestamp with time zone;
    latest timestamp with time zone;
    shortest bigint;
    part record;
    gone_messages bigint := 0;
    was {schema}.retention;
begin
    if pg_catalog.current_setting('transaction_isolation') <> 'read committed' then
        raise exception using errcode = '25001',
            message = 'postbox: retention locks first and reads second, and so runs at READ COMMITTED only';
    end if;
    select r.* into own from {schema}.retention r for update skip locked;
    if not found then
        return query select true, 0::bigint, 0::bigint, true;
        return;
    end if;
    was := own;

    -- What a live lease once held keeps its history: settling and takeover subtract it from the lease.
    with held as materialized (
        select i.delivery from {schema}.lease l cross join lateral pg_catalog.unnest(l.deliveries) as i(delivery)
    ),
    expired as materialized (
        select d.delivery
        from {schema}.subscription s
        cross join lateral (
            select x.delivery from {schema}.dead_letter x
            where x.subscription = s.id
                and x.at < pg_catalog.statement_timestamp() - interval '1 millisecond' * greatest(s.keep_dead_ms, own.keep_at_least_ms)::double precision
                and x.delivery not in (select h.delivery from held h)
            order by x.at
            limit most
            for update skip locked
        ) d
        limit most
    ),
    gone as (
        delete from {schema}.dead_letter d using expired e where d.delivery = e.delivery
        returning d.delivery, d.message, d.at
    )
    select pg_catalog.array_agg(g.delivery), pg_catalog.array_agg(g.message), pg_catalog.max(g.at)
    into found_deliveries, found_messages, found_up_to from gone g;
    taken := taken || found_deliveries;
    of_messages := of_messages || found_messages;
    latest := found_up_to;

    page := most - pg_catalog.cardinality(taken);
    with held as materialized (
        select i.delivery from {schema}.lease l cross join lateral pg_catalog.unnest(l.deliveries) as i(delivery)
    ),
    expired as (
        select d.delivery, d.message, d.at
        from {schema}.subscription s
        cross join lateral (
            select o.* from (
                select x.delivery, x.message, x.finished_at as at from {schema}.outcome x
                where x.subscription = s.id and x.state_after = 'succeeded'
                    and x.finished_at < pg_catalog.statement_timestamp() - interval '1 millisecond' * greatest(s.keep_succeeded_ms, own.keep_at_least_ms)::double precision
                    and x.delivery not in (select h.delivery from held h)
                order by x.finished_at
                limit page
            ) o
            union all
            select r.* from (
                select x.delivery, x.message, x.at from {schema}.resolution x
                where x.subscription = s.id and x.state_after = 'succeeded'
                    and x.at < pg_catalog.statement_timestamp() - interval '1 millisecond' * greatest(s.keep_succeeded_ms, own.keep_at_least_ms)::double precision
                    and x.delivery not in (select h.delivery from held h)
                order by x.at
                limit page
            ) r
        ) d
        limit page
    )
    select pg_catalog.array_agg(e.delivery), pg_catalog.array_agg(e.message), pg_catalog.max(e.at)
    into found_deliveries, found_messages, found_up_to from expired e;
    taken := taken || found_deliveries;
    of_messages := of_messages || found_messages;
    latest := greatest(latest, found_up_to);

    -- A part goes as a whole, so what is kept longest in it decides. A place is kept among the parts:
    -- those that stay are looked at again once an hour only.
    own.parts_after := coalesce(own.parts_after, '-infinity');
    page := 0;
    select greatest(pg_catalog.min(s.keep_succeeded_ms), own.keep_at_least_ms) into shortest from {schema}.subscription s;
    for part in
        select p.batch, p.part, p.finished_at, p.deliveries, p.messages,
            not exists (select from {schema}.lease l where l.batch = p.batch)
            and p.finished_at < pg_catalog.statement_timestamp() - interval '1 millisecond' * greatest(shortest,
                (select pg_catalog.max(s.keep_succeeded_ms) from {schema}.subscription s where s.id = any (p.subscriptions))
                )::double precision as expired
        from {schema}.outcome_part p
        where p.finished_at > own.parts_after
            and p.finished_at < pg_catalog.statement_timestamp() - interval '1 millisecond' * shortest::double precision
        order by p.finished_at
        limit 1000
    loop
        exit when pg_catalog.cardinality(taken) >= most;
        page := page + 1;
        own.parts_after := part.finished_at;
        if part.expired then
            taken := taken || part.deliveries;
            of_messages := of_messages || part.messages;
            batches := batches || part.batch;
            parts := parts || part.part;
            latest := greatest(latest, part.finished_at);
        end if;
    end loop;
    delete from {schema}.outcome_part p using unnest(batches, parts) as g(batch, part)
    where p.batch = g.batch and p.part = g.part;
    more := page = 1000 or pg_catalog.cardinality(taken) >= most;
    if not more and (own.swept_at is null or own.swept_at < pg_catalog.statement_timestamp() - interval '1 hour') then
        own.swept_at := pg_catalog.statement_timestamp();
        own.parts_after := '-infinity';
    end if;

    -- Not while a new subscription still looks for what it wants of them.
    if not exists (select from {schema}.subscription s where not s.backfilled and s.removed_at is null) then
        with expired as materialized (
            select u.message from {schema}.unrouted u
            where u.message < {schema}.uuid_at(pg_catalog.statement_timestamp() - interval '1 millisecond' * greatest(unrouted_ms, own.keep_at_least_ms)::double precision)
            order by u.message
            limit most
            for update skip locked
        ),
        gone as (
            delete from {schema}.unrouted u using expired e where u.message = e.message returning u.message
        )
        select pg_catalog.count(*) into freed from gone g;
        more := more or freed >= most;
    end if;

    perform {schema}.forget(taken, of_messages);
    if not more then
        select s.gone, s.more into gone_messages, more from {schema}.sift_window(unrouted_ms, own.keep_at_least_ms) s;
    end if;
    own.deliveries := own.deliveries + pg_catalog.cardinality(taken);
    own.messages := own.messages + gone_messages;
    own.up_to := greatest(own.up_to, latest);
    if own.deliveries + own.messages > 0
        and (tell or own.told_at is null or own.told_at < pg_catalog.statement_timestamp() - interval '1 hour') then
        with counted as (
            update {schema}.audit_counter set seq = seq + 1 returning seq
        )
        insert into {schema}.audit (seq, actor, action, reason, detail)
        select c.seq, 'retention', 'retain',
            pg_catalog.format('removed %s deliveries that ended by %s, and %s messages', own.deliveries,
                coalesce(pg_catalog.to_char(pg_catalog.timezone('UTC', own.up_to), 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), 'now'), own.messages),
            pg_catalog.json_build_object('deliveries', own.deliveries, 'messages', own.messages, 'up_to', own.up_to)
        from counted c;
        own.told_at := pg_catalog.statement_timestamp();
        own.deliveries := 0;
        own.messages := 0;
        own.up_to := null;
    end if;
    if own is distinct from was then
        update {schema}.retention r set deliveries = own.deliveries, messages = own.messages, up_to = own.up_to,
            told_at = own.told_at, parts_after = own.parts_after, swept_at = own.swept_at;
    end if;
    return query select false, pg_catalog.cardinality(taken)::bigint, gone_messages, more;
end
$retain$;
