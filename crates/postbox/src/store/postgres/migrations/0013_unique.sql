-- At most one unfinished delivery of a key for a subscription that says so (docs/unique.md, decision 0031).
lock table {schema}.routing, {schema}.dedup, {schema}.message in access exclusive mode;

-- A row for each subscription that takes one delivery of a key at a time, and what becomes of another.
create table {schema}.one_per_key (
    subscription int  primary key,
    policy       text not null check (policy in ('coalesce', 'refuse'))
);

-- Which delivery has a key. Whether it is still unfinished is what the delivery itself tells, so a row may
-- stay behind: nothing depends on its going. The row of an ended one is taken over by the next.
create table {schema}.key_holder (
    subscription int    not null,
    key          text   not null,
    delivery     bigint not null,
    -- Those that were unfinished beside it when the subscription began to take one at a time.
    others       bigint[],
    -- The transaction that took the key: whoever saw another one has seen something that is over.
    taken_by     xid8   not null default pg_catalog.pg_current_xact_id(),
    primary key (subscription, key)
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 5000);
create index key_holder_delivery on {schema}.key_holder (delivery);

-- Messages for which a subscription has no delivery of their own, and the delivery that stood for it.
create table {schema}.coalesced (
    message      uuid        not null,
    subscription int         not null,
    delivery     bigint      not null,
    at           timestamptz not null default pg_catalog.clock_timestamp(),
    primary key (message, subscription)
);
create index coalesced_delivery on {schema}.coalesced (delivery);

-- The first of these deliveries that is neither done nor dead. All looks see what the caller's statement
-- sees, so that one on the move is in one place. Who calls it pins the plans: they are made once, of tables
-- that may have been empty then.
create function {schema}.unfinished(for_subscription int, of_deliveries bigint[]) returns bigint
language plpgsql stable
set search_path = pg_catalog, pg_temp as $unfinished$
declare
    one bigint;
    level smallint;
begin
    foreach one in array of_deliveries loop
        -- Level by level: of several at once, the index would be walked from one end to the other.
        foreach level in array array[0, -1, 1]::smallint[] loop
            perform from {schema}.ready r
            where r.subscription = for_subscription and r.priority = level
                and r.slot = ((one >> 20) & 3::bigint)::smallint and r.pos = one and r.delivery = one;
            if found then
                return one;
            end if;
        end loop;
        perform from {schema}.lease l
        cross join lateral unnest(l.deliveries, l.attempts) as i(delivery, attempt)
        where one = any (l.deliveries) and i.delivery = one
            and not exists (select from {schema}.outcome o where o.delivery = one and o.number = i.attempt + 1)
            and not exists (select from {schema}.outcome_part p where p.batch = l.batch
                and (one = any (p.deliveries) or one = any (p.released)));
        if found then
            return one;
        end if;
        perform from {schema}.scheduled s where s.delivery = one;
        if found then
            return one;
        end if;
        perform from {schema}.ready r where r.delivery = one and r.pos <> r.delivery;
        if found then
            return one;
        end if;
        perform from {schema}.doubt u where u.delivery = one;
        if found then
            return one;
        end if;
    end loop;
    return null;
end
$unfinished$;

-- Takes keys for deliveries that are about to be made. Those that are not to be made are returned, with
-- the one that has the key; or it is refused, where that is wanted and the subscription says so. In the
-- order of the keys, so that two that take several wait for each other in one direction only.
create function {schema}.take_keys(
    for_subscriptions int[], of_keys text[], of_messages uuid[], fresh bigint[], refuses boolean
) returns table (message uuid, delivery bigint, holder bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set jit = off set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $take_keys$
#variable_conflict use_column
declare
    one record;
    seen record;
    has_it bigint;
    last_subscription int;
    last_key pg_catalog.text;
    last_holder bigint;
begin
    for one in
        select w.subscription, w.key, w.message, w.fresh, u.policy
        from unnest(for_subscriptions, of_keys, of_messages, fresh) as w(subscription, key, message, fresh)
        join {schema}.one_per_key u on u.subscription = w.subscription
        where w.key is not null
        order by w.subscription, w.key collate "C", w.fresh
    loop
        if one.subscription = last_subscription and one.key = last_key then
            -- Its delivery is not there to be seen before this statement has ended.
            has_it := last_holder;
        else
            loop
                -- Each statement sees what was committed while the one before waited.
                select h.taken_by, {schema}.unfinished(h.subscription, h.delivery || h.others) as unfinished into seen
                from {schema}.key_holder h where h.subscription = one.subscription and h.key = one.key;
                has_it := seen.unfinished;
                exit when has_it is not null;
                if seen.taken_by is null then
                    insert into {schema}.key_holder (subscription, key, delivery)
                    values (one.subscription, one.key, one.fresh)
                    on conflict do nothing;
                else
                    update {schema}.key_holder h
                    set delivery = one.fresh, others = null, taken_by = pg_catalog.pg_current_xact_id()
                    where h.subscription = one.subscription and h.key = one.key and h.taken_by = seen.taken_by;
                end if;
                exit when found;
            end loop;
            last_subscription := one.subscription;
            last_key := one.key;
            last_holder := coalesce(has_it, one.fresh);
        end if;
        continue when has_it is null;
        if refuses and one.policy = 'refuse'
            and pg_catalog.current_setting('postbox.refusals', true) is distinct from 'coalesce'
        then
            raise exception using errcode = 'PB001', message = (
                    select pg_catalog.format('postbox: the subscription `%s` takes one delivery of a key at a time, and delivery %s has the key `%s`; nothing was published',
                        s.name, has_it, one.key)
                    from {schema}.subscription s where s.id = one.subscription),
                detail = (
                    select pg_catalog.json_build_object('application', s.application, 'subscription', s.name, 'key', one.key, 'delivery', has_it)::pg_catalog.text
                    from {schema}.subscription s where s.id = one.subscription);
        end if;
        insert into {schema}.coalesced (message, subscription, delivery)
        values (one.message, one.subscription, has_it)
        on conflict do nothing;
        message := one.message;
        delivery := one.fresh;
        holder := has_it;
        return next;
    end loop;
end
$take_keys$;

-- The same for one delivery that was there before and is to wait again: who has its key, if somebody has.
create function {schema}.take_key_again(for_subscription int, of_message uuid, again bigint) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $take_key_again$
#variable_conflict use_variable
declare
    of_key pg_catalog.text;
    has_it bigint;
begin
    if exists (select from {schema}.one_per_key u where u.subscription = for_subscription) then
        select m.key into of_key from {schema}.message m where m.id = of_message;
        select t.holder into has_it
        from {schema}.take_keys(array[for_subscription], array[of_key], array[of_message], array[again], false) t;
    end if;
    return has_it;
end
$take_key_again$;

-- What ended is let go. It waits for nobody: whoever has a row locked takes it over.
create function {schema}.free_keys(ended bigint[]) returns void
language sql volatile
set search_path = pg_catalog, pg_temp
set jit = off set enable_seqscan = off as $free_keys$
    delete from {schema}.key_holder h
    where h.others is null and (h.subscription, h.key) in (
        select f.subscription, f.key from {schema}.key_holder f
        where f.delivery = any (ended) and f.others is null
        for update skip locked)
$free_keys$;

-- Lets go of what stayed behind, of a page of those that have keys, by their numbers. The last one looked
-- at; null when there are no more.
create function {schema}.tidy_keys(above bigint, most int) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set jit = off set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $tidy_keys$
#variable_conflict use_variable
declare
    one record;
    last bigint;
begin
    for one in
        select h.subscription, h.key, h.delivery, h.taken_by, {schema}.unfinished(h.subscription, h.delivery || h.others) as unfinished
        from {schema}.key_holder h where h.delivery > above order by h.delivery limit most
    loop
        last := one.delivery;
        continue when one.unfinished is not null;
        delete from {schema}.key_holder h
        where (h.subscription, h.key) in (
            select f.subscription, f.key from {schema}.key_holder f
            where f.subscription = one.subscription and f.key = one.key and f.taken_by = one.taken_by
            for update skip locked)
            and h.taken_by = one.taken_by;
    end loop;
    return last;
end
$tidy_keys$;

-- Says what a subscription does about a second delivery of a key; null: nothing. Whether publishers must
-- fan out anew. The caller has the routing row locked, and moves its epoch on then.
create function {schema}.declare_unique(for_subscription int, wanted text) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $declare_unique$
#variable_conflict use_variable
declare
    was pg_catalog.text;
begin
    select u.policy into was from {schema}.one_per_key u where u.subscription = for_subscription;
    if wanted is null then
        delete from {schema}.one_per_key u where u.subscription = for_subscription;
        delete from {schema}.key_holder h where h.subscription = for_subscription;
        return was is not null;
    end if;
    insert into {schema}.one_per_key (subscription, policy) values (for_subscription, wanted)
    on conflict (subscription) do update set policy = excluded.policy;
    if was is not null then
        return false;
    end if;
    -- What is unfinished stays: as long as one of them is, a key is not free.
    insert into {schema}.key_holder (subscription, key, delivery, others)
    select for_subscription, k.key, k.deliveries[1], nullif(k.deliveries[2:], '{}')
    from (
        select m.key, pg_catalog.array_agg(w.delivery order by w.delivery) as deliveries
        from (
            select r.delivery, r.message from {schema}.ready r where r.subscription = for_subscription
            union all
            select s.delivery, s.message from {schema}.scheduled s where s.subscription = for_subscription
            union all
            select d.delivery, d.message from {schema}.doubt d where d.subscription = for_subscription
            union all
            select l.delivery, l.message from {schema}.leased l where l.subscription = for_subscription
        ) w
        join {schema}.message m on m.id = w.message
        where m.key is not null
        group by m.key
    ) k
    on conflict do nothing;
    return true;
end
$declare_unique$;

-- The same from SQL, for a subscription that `subscribe` has made: `coalesce`, `refuse`, or null.
create function {schema}.unique_in_flight(name text, policy text default 'coalesce', application text default null)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $unique_in_flight$
#variable_conflict use_variable
begin
    if not policy in ('coalesce', 'refuse') then
        raise exception using errcode = '22023', message = pg_catalog.format(
            'postbox: `%s` is not what becomes of a second delivery of a key; there are coalesce, refuse and null', pg_catalog.left(policy, 255));
    end if;
    if exists (select from {schema}.subscription s
            where s.id = {schema}.pulled_subscription(name, application) and s.per_key is not null) then
        raise exception using errcode = '22023', message = pg_catalog.format(
            'postbox: `%s` delivers by key, with an order or a limit for each; such a subscription has no use for one delivery of a key at a time', name);
    end if;
    perform from {schema}.routing r for update;
    if {schema}.declare_unique({schema}.pulled_subscription(name, application), policy) then
        update {schema}.routing r set epoch = r.epoch + 1;
    end if;
end
$unique_in_flight$;

-- Which of the subscriptions of a topic take one delivery of a key at a time; null: none. Filled in here,
-- so that whoever stores a route need not know of it.
alter table {schema}.route add column uniques int[];
create function {schema}.route_uniques() returns trigger
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $route_uniques$
begin
    new.uniques := (
        select pg_catalog.array_agg(u.subscription) from {schema}.one_per_key u where u.subscription = any (new.subscriptions));
    return new;
end
$route_uniques$;
create trigger route_uniques before insert on {schema}.route
for each row execute function {schema}.route_uniques();

-- A message that has no delivery of its own stays as long as the one that stood for it.
create or replace view {schema}.reference as
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
    select u.message, null::bigint, 0::bigint, 9223372036854775807::bigint from {schema}.unrouted u
    union all
    select c.message, c.delivery, 0::bigint, 9223372036854775807::bigint from {schema}.coalesced c;

drop function {schema}.publish_batch;
create function {schema}.publish_batch(
    topics text[], keys text[], payloads text[], headers text[], occurred_us bigint[],
    sources text[], external_ids text[], correlation_ids text[], causation_ids text[],
    max_attempts int[], delay_ms bigint[], due_us bigint[], dedup_keys text[], dedup_ms bigint[],
    bodies bytea[], content_types text[], priorities smallint[] default null, refuses boolean default true
) returns table (ord bigint, id uuid, stored boolean, coalesced bigint[])
language sql volatile
set search_path = pg_catalog, pg_temp as $publish_batch$
{publish}
$publish_batch$;

-- The other functions stay as they are but for some clauses: each is taken as it stands, and those are changed.
do $clauses$
declare
    one record;
    clause record;
    holder record;
    stands pg_catalog.text;
begin
    for one in
        select p.oid, p.proname as name, p.oid::pg_catalog.regprocedure::pg_catalog.text as function, p.proacl as acl, p.proowner as owner
        from pg_catalog.pg_proc p
        where p.pronamespace = '{schema}'::pg_catalog.regnamespace::pg_catalog.oid
            and p.proname = any (array['publish_checked', 'failed', 'forget']::pg_catalog.name[])
    loop
        stands := pg_catalog.pg_get_functiondef(one.oid);
        for clause in
            select c.before, c.after from (values
                (1, 'publish_checked', 'OUT same_body boolean)', 'OUT same_body boolean, OUT coalesced bigint[])'),
                (2, 'publish_checked', $a$        and pg_catalog.cardinality(t.subscriptions) = 1
$a$, $b$        and pg_catalog.cardinality(t.subscriptions) = 1
        and t.uniques is null
$b$),
                (3, 'publish_checked', $a$        and pg_catalog.cardinality(t.subscriptions) > 1
$a$, $b$        and pg_catalog.cardinality(t.subscriptions) > 1
        and t.uniques is null
$b$),
                (4, 'publish_checked', $a$select b.id, b.stored into new_id, is_stored
$a$, $b$select b.id, b.stored, b.coalesced into new_id, is_stored, coalesced
$b$),
                (5, 'failed', $a$    if mine then
        update$a$, $b$    -- What was published meanwhile in this transaction may have the key: `next` had finished this one.
    if mine and attempt_number < max_attempts and {schema}.take_key_again(wanted, taken_message, delivery) is not null then
        raise exception using errcode = 'PB001', message = pg_catalog.format(
            'postbox: delivery %s cannot wait again: its key went to another delivery in this transaction; roll it back', delivery);
    end if;
    if mine then
        update$b$),
                (6, 'forget', $a$    delete from {schema}.late_delivery l$a$, $b$    delete from {schema}.coalesced c where c.delivery = any (gone_deliveries);
    delete from {schema}.late_delivery l$b$)
            ) as c(place, function, before, after)
            where c.function::pg_catalog.name = one.name
            order by c.place
        loop
            if pg_catalog.strpos(stands, clause.before) = 0 then
                raise exception 'postbox: the function % is not the one that this migration knows: there is no `%` in it', one.function, clause.before;
            end if;
            stands := pg_catalog.replace(stands, clause.before, clause.after);
        end loop;
        -- It has another result now; who was given the right to run it keeps it.
        if one.name = 'publish_checked'::pg_catalog.name then
            execute pg_catalog.format('drop function %s', one.function);
        end if;
        execute stands;
        for holder in
            select p.oid::pg_catalog.regprocedure::pg_catalog.text as function,
                case when a.grantee = 0::pg_catalog.oid then 'public' else pg_catalog.quote_ident(r.rolname) end as grantee
            from pg_catalog.pg_proc p
            cross join lateral pg_catalog.aclexplode(one.acl) a
            left join pg_catalog.pg_roles r on r.oid = a.grantee
            where p.pronamespace = '{schema}'::pg_catalog.regnamespace::pg_catalog.oid and p.proname = one.name
                and a.grantee <> one.owner
        loop
            execute pg_catalog.format('grant execute on function %s to %s', holder.function, holder.grantee);
        end loop;
    end loop;
end
$clauses$;

{roles}
