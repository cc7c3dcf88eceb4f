-- Order per key (decision 0030). A subscription that delivers in order, or limits how many of a key run at
-- once, has its deliveries in lanes: levels, one for each hash of a key.

-- How many of a key run at once; null: it does not go by lanes.
alter table postbox_subscription add column per_key integer check (per_key > 0);
alter table postbox_subscription add column ordered integer not null default 0;
-- What becomes of a key in order whose delivery has died: it is blocked, goes on, or is parked.
alter table postbox_subscription add column on_dead text not null default 'block' check (on_dead in ('block', 'skip', 'park'));

-- The lanes of a subscription. Whoever owns one is the only one that claims from it.
create table postbox_lane (
    subscription integer not null,
    level        integer not null,
    owner        blob,
    -- Somebody else is to have it: no more is claimed, and it is free when nothing of it is leased.
    leaving      integer not null default 0,
    primary key (subscription, level)
) strict, without rowid;

-- Keys that wait for one of their deliveries, which comes before all others of them. Those that wait are
-- pending at a level of their own.
create table postbox_key_state (
    subscription integer not null,
    key          text    not null,
    -- The levels of the key: its lane, and where those that wait are.
    lane         integer not null,
    held         integer not null,
    -- Null: an operator has parked it, and nothing of it has failed.
    head         integer,
    state        text    not null check (state in ('retrying', 'in_doubt', 'blocked', 'parked', 'draining')),
    -- While it drains: what comes up to here is let through.
    upto         integer,
    since        integer not null,
    cause        text    not null,
    primary key (subscription, key),
    check ((state = 'draining') = (upto is not null))
) strict, without rowid;
create index postbox_key_state_head on postbox_key_state (head);

drop view postbox_publish;
create view postbox_publish as
    select null as id, null as topic, null as key, null as headers, null as occurred_us, null as source,
        null as external_id, null as correlation_id, null as causation_id, null as max_attempts,
        null as delay_ms, null as due_ms, null as dedup_key, null as dedup_ms, null as body_hash, null as content_type,
        null as payload, null as body, null as priority, null as lane
    where false;

create trigger postbox_publish_insert instead of insert on postbox_publish
begin
    -- A window that has run out is taken over.
    insert into postbox_dedup (topic, key, message, body_hash, expires_at)
    select new.topic, new.dedup_key, new.id, new.body_hash, (select now from postbox_clock) + new.dedup_ms
    where new.dedup_key is not null
    on conflict (topic, key) do update
        set message = excluded.message, body_hash = excluded.body_hash, expires_at = excluded.expires_at
        where postbox_dedup.expires_at <= (select now from postbox_clock);

    insert into postbox_message (id, epoch, topic, key, headers, occurred_us, due_at, source, external_id,
        correlation_id, causation_id, max_attempts, content_type, payload, body, priority)
    select new.id, r.epoch, new.topic, new.key, new.headers, new.occurred_us,
        case when new.due_ms > (select now from postbox_clock) then new.due_ms
            when new.delay_ms > 0 then (select now from postbox_clock) + new.delay_ms end,
        new.source, new.external_id, new.correlation_id, new.causation_id, new.max_attempts, new.content_type,
        new.payload, new.body, nullif(new.priority, 0)
    from postbox_routing r
    where new.dedup_key is null or exists (
        select 1 from postbox_dedup d
        where d.topic = new.topic and d.key = new.dedup_key and d.message = new.id);

    -- A duplicate has no message, and so no deliveries. They come after all that are there: their numbers
    -- are higher than those at the same place.
    insert into postbox_delivery (message, subscription, state, priority, pos, due_at, since)
    select x.message, x.subscription, 'pending',
        case when s.per_key is null then coalesce(new.priority, 0) else coalesce(new.lane, 64) end,
        -- In a lane, the number is the place.
        case when s.per_key is null then (select delivery from postbox_last) else 0 end, x.due_at,
        (select now from postbox_clock)
    from postbox_match x join postbox_subscription s on s.id = x.subscription
    where x.message = new.id and x.removed_at is null and not x.scan
    order by x.subscription;

    insert into postbox_unrouted (seq, topic, epoch)
    select m.seq, m.topic, m.epoch from postbox_message m
    where m.id = new.id and not exists (select 1 from postbox_delivery d where d.message = m.id);
end;
