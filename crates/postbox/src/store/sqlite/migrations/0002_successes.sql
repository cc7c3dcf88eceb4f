-- Deliveries that go the straight way, claimed once and succeeded at once, cost no row while they are
-- leased and none when they have succeeded: the lease holds them, then a flush's row of successes does.

-- What the lease holds that has no row in postbox_delivery: [delivery, message, subscription] each. All of
-- them are leased for the first time, and their attempt is not on record as begun.
alter table postbox_lease add column items text not null default '[]';

-- A program that does not know of the items must not end a lease that has some.
create trigger postbox_lease_holds before delete on postbox_lease when old.items <> '[]'
begin
    select raise(abort, 'postbox: a lease that still holds deliveries cannot end');
end;

-- What succeeded at its first attempt: a row for each flush and subscription.
create table postbox_success (
    id            integer primary key,
    subscription  integer not null,
    batch         integer not null,
    worker        blob    not null,
    at            integer not null,
    -- What it is found by.
    lowest        integer not null,
    highest       integer not null,
    first_message blob    not null,
    last_message  blob    not null,
    deliveries    integer not null,
    -- [delivery, message, milliseconds it ran] each.
    items         text    not null
) strict;
create index postbox_success_kept on postbox_success (subscription, at, deliveries);
create index postbox_success_delivery on postbox_success (highest, lowest);
create index postbox_success_message on postbox_success (first_message, last_message);

create view postbox_held as
    select i.value ->> 0 as id, unhex(i.value ->> 1) as message, i.value ->> 2 as subscription, l.batch, l.token,
        l.worker, l.claimed_at
    from postbox_lease l cross join json_each(l.items) i;

create view postbox_succeeded as
    select i.value ->> 0 as id, unhex(i.value ->> 1) as message, p.subscription, p.batch, p.worker,
        p.at - (i.value ->> 2) as started_at, p.at as finished_at, p.lowest, p.highest, p.first_message, p.last_message
    from postbox_success p cross join json_each(p.items) i;

-- Every delivery, wherever it is kept. Who looks for a number says so of lowest and highest too, and who
-- looks for a message of first_message and last_message: successes are found by these.
create view postbox_every as
    select id, message, subscription, state, priority, due_at, attempt, begun, lost, rev, token, since, note, replay_of,
        id as lowest, id as highest, message as first_message, message as last_message
    from postbox_delivery
    union all
    select id, message, subscription, 'running', 0, null, 0, 0, 0, 1, token, claimed_at, null, null,
        id, id, message, message
    from postbox_held
    union all
    select id, message, subscription, 'succeeded', 0, null, 1, 0, 0, 2, null, finished_at, null, null,
        lowest, highest, first_message, last_message
    from postbox_succeeded;

-- Those that have not succeeded, each from an index.
create view postbox_unfinished as
    select id, message, subscription, state, priority, due_at, attempt, begun, lost, rev, token, since, note, replay_of,
        message as first_message, message as last_message
    from postbox_delivery
    where id in (
        select id from postbox_delivery where state = 'pending' and due_at is null
        union all select id from postbox_delivery where state = 'pending' and due_at is not null
        union all select id from postbox_delivery where token is not null
        union all select id from postbox_delivery where state = 'in_doubt'
        union all select id from postbox_delivery where state in ('dead', 'cancelled'))
    union all
    select id, message, subscription, 'running', 0, null, 0, 0, 0, 1, token, claimed_at, null, null, message, message
    from postbox_held;

-- How attempts ended, wherever it is kept.
create view postbox_ended as
    select delivery, number, kind, state_after, rev, subscription, message, batch, worker, started_at, finished_at,
        error, receipt, delivery as lowest, delivery as highest
    from postbox_outcome
    union all
    select id, 1, 'succeeded', 'succeeded', 2, subscription, message, batch, worker, started_at, finished_at,
        null, null, lowest, highest
    from postbox_succeeded;

-- Beside postbox_expired: rows whose deliveries were all kept long enough.
create view postbox_expired_success as
    select p.id, p.subscription, p.at, p.deliveries, p.items
    from postbox_clock c cross join postbox_subscription s cross join postbox_success p
    where p.subscription = s.id and p.at < c.now - s.keep_succeeded_ms;

-- Publishing as before, with less for each message: SQLite numbers the deliveries itself, and no view is
-- joined where one value of it will do.
drop trigger postbox_publish_insert;
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
        correlation_id, causation_id, max_attempts, content_type, payload, body)
    select new.id, r.epoch, new.topic, new.key, new.headers, new.occurred_us,
        case when new.due_ms > (select now from postbox_clock) then new.due_ms
            when new.delay_ms > 0 then (select now from postbox_clock) + new.delay_ms end,
        new.source, new.external_id, new.correlation_id, new.causation_id, new.max_attempts, new.content_type,
        new.payload, new.body
    from postbox_routing r
    where new.dedup_key is null or exists (
        select 1 from postbox_dedup d
        where d.topic = new.topic and d.key = new.dedup_key and d.message = new.id);

    -- A duplicate has no message, and so no deliveries. They come after all that are there: their numbers
    -- are higher than those at the same place.
    insert into postbox_delivery (message, subscription, state, pos, due_at, since)
    select x.message, x.subscription, 'pending', (select delivery from postbox_last), x.due_at,
        (select now from postbox_clock)
    from postbox_match x
    where x.message = new.id and x.removed_at is null and not x.scan
    order by x.subscription;

    insert into postbox_unrouted (seq, topic, epoch)
    select m.seq, m.topic, m.epoch from postbox_message m
    where m.id = new.id and not exists (select 1 from postbox_delivery d where d.message = m.id);
end;
