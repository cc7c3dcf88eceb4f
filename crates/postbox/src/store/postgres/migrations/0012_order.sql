-- Order per key (decision 0030). A subscription that delivers in order, or limits how many of a key run at
-- once, has its deliveries in lanes: levels of `ready`, one for each hash of a key.
lock table {schema}.routing, {schema}.dedup, {schema}.message in access exclusive mode;

alter table {schema}.subscription
    -- How many of a key run at once; null: it does not go by lanes.
    add column per_key int check (per_key > 0),
    add column ordered boolean not null default false,
    -- What becomes of a key in order whose delivery has died: it is blocked, goes on, or is parked.
    add column on_dead text not null default 'block' check (on_dead in ('block', 'skip', 'park')),
    add check (not ordered or per_key = 1);

-- The lanes of a subscription. Whoever owns one, until its lease ends, is the only one that claims from it.
create table {schema}.lane (
    subscription int      not null,
    level        smallint not null,
    owner        uuid,
    -- Somebody else is to have it: no more is claimed, and it is free when nothing of it is leased.
    leaving      boolean  not null default false,
    primary key (subscription, level)
) with (fillfactor = 50);
create index lane_owner on {schema}.lane (owner);

-- Keys that wait for one of their deliveries, which comes before all others of them. Those that wait are in
-- `ready`, at the level of `held_of`.
create table {schema}.key_state (
    subscription int         not null,
    key          text        not null,
    -- Null: an operator has parked it, and nothing of it has failed.
    head         bigint,
    state        text        not null check (state in ('retrying', 'in_doubt', 'blocked', 'parked', 'draining')),
    -- While it drains: what comes up to here is let through.
    upto         bigint,
    since        timestamptz not null default pg_catalog.clock_timestamp(),
    cause        text        not null,
    primary key (subscription, key),
    check ((state = 'draining') = (upto is not null))
);
create index key_state_head on {schema}.key_state (head);

-- A UUIDv7 that goes on within a millisecond: 48 bits of milliseconds, 12 bits of fractions of one, the rest random
-- (RFC 9562, 5.7 and 6.2, method 3), so that history comes in the order in which it was published. One look at
-- the clock, and inlined.
create or replace function {schema}.uuid7() returns uuid
language sql volatile parallel safe as $$
    select (pg_catalog.substr(pg_catalog.overlay(pg_catalog.encode(pg_catalog.int8send(
            (extract(epoch from pg_catalog.clock_timestamp()) * 65536000::numeric)::bigint), 'hex'), '7', 13, 0), 1, 16)
        || pg_catalog.substr(pg_catalog.replace(pg_catalog.gen_random_uuid()::pg_catalog.text, '-', ''), 17))::pg_catalog.uuid
$$;

-- Inlined where it is used: no SET. What has no key is in no order, and spread over the lanes.
create function {schema}.lane_of(key text, delivery bigint) returns smallint
language sql immutable parallel safe as $$
    select ({lanes} + (coalesce(pg_catalog.hashtextextended(key, 0), delivery) & {of_lanes}))::smallint
$$;

-- Several keys may share a level.
create function {schema}.held_of(key text) returns smallint
language sql immutable parallel safe as $$
    select ({held} + ((pg_catalog.hashtextextended(key, 0) >> 5) & {of_held}))::smallint
$$;

-- For those who want a stricter order: who holds it publishes alone until its transaction ends.
create function {schema}.lock_key(key text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $lock_key$
begin
    if lock_key.key is null or lock_key.key = '' then
        raise exception using errcode = '22023', message = 'postbox: lock_key needs a key';
    end if;
    perform pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('{schema}.key ' || lock_key.key, 0));
end
$lock_key$;

create or replace function {schema}.publish_batch(
    topics text[], keys text[], payloads text[], headers text[], occurred_us bigint[],
    sources text[], external_ids text[], correlation_ids text[], causation_ids text[],
    max_attempts int[], delay_ms bigint[], due_us bigint[], dedup_keys text[], dedup_ms bigint[],
    bodies bytea[], content_types text[], priorities smallint[] default null
) returns table (ord bigint, id uuid, stored boolean)
language sql volatile
set search_path = pg_catalog, pg_temp as $publish_batch$
{publish}
$publish_batch$;

do $clauses$
declare
    one record;
    clause record;
    stands pg_catalog.text;
begin
    for one in
        select p.oid, p.proname as name, p.oid::pg_catalog.regprocedure::pg_catalog.text as function
        from pg_catalog.pg_proc p
        where p.pronamespace = '{schema}'::pg_catalog.regnamespace::pg_catalog.oid
            and p.proname = any (array['publish_checked', 'next']::pg_catalog.name[])
    loop
        stands := pg_catalog.pg_get_functiondef(one.oid);
        for clause in
            select c.before, c.after from (values
                (1, 'publish_checked', $a$select f.subscription, 0, (f.delivery >> 20) & 3::bigint$a$,
                    $b$select pg_catalog.abs(f.subscription), case when f.subscription > 0 then 0::smallint else {schema}.lane_of(nullif(publish_checked.key, ''), f.delivery) end,
        (f.delivery >> 20) & 3::bigint$b$),
                (2, 'publish_checked', $a$select d.subscription, 0, (d.delivery >> 20) & 3::bigint$a$,
                    $b$select pg_catalog.abs(d.subscription), case when d.subscription > 0 then 0::smallint else {schema}.lane_of(nullif(publish_checked.key, ''), d.delivery) end,
        (d.delivery >> 20) & 3::bigint$b$),
                (3, 'next', $a$    if exists (select from {schema}.subscription s where s.id = wanted and s.paused_at is not null) then
$a$, $b$    if exists (select from {schema}.subscription s where s.id = wanted and s.per_key is not null) then
        raise exception using errcode = '22023', message = pg_catalog.format(
            'postbox: `%s` delivers by key; only workers keep an order or a limit per key, so it cannot be pulled from', subscription);
    end if;
    if exists (select from {schema}.subscription s where s.id = wanted and s.paused_at is not null) then
$b$)
            ) as c(place, function, before, after)
            where c.function::pg_catalog.name = one.name
            order by c.place
        loop
            if pg_catalog.strpos(stands, clause.before) = 0 then
                raise exception 'postbox: the function % is not the one that this migration knows: there is no `%` in it', one.function, clause.before;
            end if;
            stands := pg_catalog.replace(stands, clause.before, clause.after);
        end loop;
        execute stands;
    end loop;
end
$clauses$;

{roles}
