-- The engine on SQLite: the tables and words of the PostgreSQL store, with one row a delivery.
-- What each table is for: docs/architecture.md. Times are milliseconds since 1970, from the clock below.

create view postbox_clock as select cast(unixepoch('subsec') * 1000 as integer) as now;

create table postbox_routing (
    only_one integer primary key check (only_one = 1),
    epoch    integer not null
) strict;
insert into postbox_routing (only_one, epoch) values (1, 1);

create table postbox_subscription (
    id             integer primary key autoincrement,
    application    text    not null,
    name           text    not null,
    pattern        text    not null,
    -- The pattern's segments as a JSON array, for matching below.
    segments       text    not null,
    kind           text    not null check (kind in ('plain', 'transactional', 'operation')),
    -- Of an operation: declared to be harmless when it is repeated under one idempotency key.
    idempotent     integer not null,
    max_attempts   integer not null,
    retry_base_ms  integer not null,
    retry_cap_ms   integer not null,
    timeout_ms     integer not null,
    -- How long a call that was sent may still be on its way to the remote.
    quiet_ms       integer not null,
    -- How long deliveries stay on record once they have ended.
    keep_succeeded_ms integer not null,
    keep_dead_ms   integer not null,
    reconciles     integer not null,
    continues      integer not null,
    start          text    not null check (start in ('unrouted', 'now', 'beginning', 'time')),
    start_at       integer,
    -- Messages of this routing epoch or a later one are fanned out to it; older ones are backfilled.
    epoch          integer not null,
    backfilled     integer not null,
    -- How far the backfill has come: a message's seq.
    backfill_after integer not null default 0,
    -- The history that it was registered with: messages of older epochs that match this go to it, even
    -- if its pattern has changed since. Null: there is none, or it is done.
    scan_pattern   text,
    scan_segments  text,
    scan_epoch     integer,
    scan_after     integer not null default 0,
    created_at     integer not null,
    removed_at     integer
) strict;
create unique index postbox_subscription_name on postbox_subscription (application, name) where removed_at is null;

-- Insert-only: the record. The payload or body comes last, so that the rest is read without it.
create table postbox_message (
    seq            integer primary key,
    id             blob    not null unique,
    epoch          integer not null,
    topic          text    not null,
    key            text,
    headers        text,
    occurred_us    integer,
    due_at         integer,
    source         text,
    external_id    text,
    correlation_id text,
    causation_id   text,
    max_attempts   integer,
    -- Either JSON, or a body of bytes with its content type.
    content_type   text,
    payload        text,
    body           blob,
    check ((payload is null) = (body is not null) and (body is null) = (content_type is null))
) strict;
create index postbox_message_causation on postbox_message (causation_id) where causation_id is not null;
create index postbox_message_external on postbox_message (external_id) where external_id is not null;

create table postbox_unrouted (
    seq   integer primary key,
    topic text    not null,
    epoch integer not null
) strict;

create table postbox_dedup (
    topic      text    not null,
    key        text    not null,
    message    blob    not null,
    body_hash  blob    not null,
    expires_at integer not null,
    primary key (topic, key)
) strict, without rowid;
create index postbox_dedup_expiry on postbox_dedup (expires_at);

-- Where each delivery stands. It moves by guarded updates, and each move adds one to rev.
create table postbox_delivery (
    id           integer primary key autoincrement,
    message      blob    not null,
    subscription integer not null,
    state        text    not null check (state in ('pending', 'running', 'in_doubt', 'succeeded', 'dead', 'cancelled')),
    priority     integer not null default 0,
    -- Its place among those that are due; a retry or a release takes a fresh one.
    pos          integer not null,
    -- Pending: not before this; null is now.
    due_at       integer,
    attempt      integer not null default 0,
    -- The running attempt is on record, and counted in attempt.
    begun        integer not null default 0,
    lost         integer not null default 0,
    rev          integer not null default 0,
    -- Running: under this lease.
    token        blob,
    since        integer not null,
    note         text,
    -- In doubt: before this, an answer "did not happen" may come too early to be believed.
    quiet_at     integer,
    ask_at       integer,
    asks         integer not null default 0,
    -- An operator's "happened" that a worker must carry out, because follow-ups hang on it.
    word         text,
    receipt      text,
    -- The delivery that an operator had repeated as this one.
    replay_of    integer,
    check ((state = 'running') = (token is not null))
) strict;
create index postbox_delivery_ready on postbox_delivery (subscription, priority, pos, id, due_at) where state = 'pending' and due_at is null;
create index postbox_delivery_scheduled on postbox_delivery (subscription, due_at) where state = 'pending' and due_at is not null;
create index postbox_delivery_leased on postbox_delivery (token) where token is not null;
create index postbox_delivery_doubt on postbox_delivery (subscription, ask_at) where state = 'in_doubt';
create index postbox_delivery_dead on postbox_delivery (subscription, state, since) where state in ('dead', 'cancelled');
create index postbox_delivery_succeeded on postbox_delivery (subscription, since) where state = 'succeeded';
create index postbox_delivery_message on postbox_delivery (message);
create index postbox_delivery_replay on postbox_delivery (replay_of) where replay_of is not null;

-- The highest number that a delivery ever had, which also ends the order of those that are due. In a
-- trigger, sqlite_sequence lags behind its own statement; the table forgets what is removed.
create view postbox_last as
    select max(coalesce((select max(d.id) from postbox_delivery d), 0),
        coalesce((select q.seq from sqlite_sequence q where q.name = 'postbox_delivery'), 0)) as delivery;

create table postbox_worker (
    id            blob    primary key,
    name          text    not null,
    application   text    not null,
    -- A JSON array of ids.
    subscriptions text    not null,
    -- Those of them that it runs as declared-idempotent: its attempts are judged by that.
    idempotent    text    not null,
    lease_ms      integer not null,
    -- The file beside the database that a living worker's process holds a lock on.
    lock_file     text    not null,
    started_at    integer not null
) strict, without rowid;

-- One row a claimed batch, never updated. Batch numbers do not come again.
create table postbox_lease (
    batch      integer primary key autoincrement,
    token      blob    not null unique,
    worker     blob    not null,
    claimed_at integer not null
) strict;
create index postbox_lease_worker on postbox_lease (worker);

-- Flushes that are committed: a repeated one changes nothing.
create table postbox_part (
    batch integer not null,
    part  integer not null,
    at    integer not null,
    primary key (batch, part)
) strict, without rowid;
create index postbox_part_at on postbox_part (at);

-- Attempts that are on record as begun before the handler is called.
create table postbox_attempt (
    delivery   integer not null,
    number     integer not null,
    batch      integer not null,
    worker     blob    not null,
    started_at integer not null,
    primary key (delivery, number)
) strict, without rowid;

create table postbox_outcome (
    delivery     integer not null,
    number       integer not null,
    kind         text    not null check (kind in ('succeeded', 'failed', 'in_doubt', 'panicked', 'timed_out', 'snoozed', 'discarded', 'lost')),
    state_after  text    not null,
    rev          integer not null,
    subscription integer not null,
    message      blob    not null,
    batch        integer not null,
    worker       blob    not null,
    started_at   integer not null,
    finished_at  integer not null,
    error        text,
    receipt      text,
    primary key (delivery, number)
) strict, without rowid;

-- The word on a doubt: by an operator, a reconcile hook, or a late outcome.
create table postbox_resolution (
    delivery     integer not null,
    rev          integer not null,
    number       integer not null,
    subscription integer not null,
    message      blob    not null,
    answer       text    not null check (answer in ('happened', 'did_not_happen', 'abandoned')),
    source       text    not null check (source in ('operator', 'reconcile', 'evidence')),
    actor        text    not null,
    reason       text,
    receipt      text,
    state_after  text    not null,
    at           integer not null,
    primary key (delivery, rev)
) strict, without rowid;

-- What was seen and changed no state: late outcomes of fenced workers, workers that died.
create table postbox_observation (
    id       integer primary key autoincrement,
    delivery integer not null,
    number   integer not null,
    worker   blob    not null,
    kind     text    not null,
    detail   text,
    at       integer not null
) strict;
create index postbox_observation_delivery on postbox_observation (delivery);

create table postbox_audit_counter (
    only_one integer primary key check (only_one = 1),
    seq      integer not null
) strict;
insert into postbox_audit_counter (only_one, seq) values (1, 0);

create table postbox_audit (
    seq          integer primary key,
    at           integer not null,
    actor        text    not null,
    action       text    not null,
    delivery     integer,
    subscription integer,
    rev_before   integer,
    rev_after    integer,
    state_before text,
    state_after  text,
    reason       text,
    detail       text
) strict;
create index postbox_audit_delivery on postbox_audit (delivery) where delivery is not null;

-- One row: what retention has removed since its last word in the audit.
create table postbox_retention (
    only_one   integer primary key check (only_one = 1),
    deliveries integer not null default 0,
    messages   integer not null default 0,
    up_to      integer,
    told_at    integer
) strict;
insert into postbox_retention (only_one) values (1);

-- Deliveries that have ended and were kept long enough, per subscription the oldest first, so that a
-- reader that wants a few stops early.
create view postbox_expired as
    select d.id, d.message, d.subscription, d.state, d.since
    from postbox_clock c cross join postbox_subscription s cross join postbox_delivery d
    where d.subscription = s.id and d.state = 'succeeded' and d.since < c.now - s.keep_succeeded_ms
    union all
    select d.id, d.message, d.subscription, d.state, d.since
    from postbox_clock c cross join postbox_subscription s cross join postbox_delivery d
    where d.subscription = s.id and d.state in ('dead', 'cancelled') and d.since < c.now - s.keep_dead_ms;

-- What subscriptions listen to, and (scan) what is left of the history that they were registered with.
create view postbox_listening as
    select id as subscription, pattern, segments, removed_at, 0 as scan from postbox_subscription
    union all
    select id, scan_pattern, scan_segments, removed_at, 1 from postbox_subscription where scan_pattern is not null;

-- Which message belongs to which subscription: the one place where patterns are matched in SQL, as
-- `Pattern::matches` does. `*` is one segment; `>` is one or more, and comes last.
create view postbox_match as
    select m.seq, m.id as message, m.epoch, m.due_at, s.subscription, s.removed_at, s.scan
    from postbox_message m cross join postbox_listening s
    where s.pattern = m.topic
        or (case when substr(s.pattern, -1) = '>'
                then json_array_length(s.segments) <= length(m.topic) - length(replace(m.topic, '.', '')) + 1
                else json_array_length(s.segments) = length(m.topic) - length(replace(m.topic, '.', '')) + 1
            end
            and not exists (
                select 1 from json_each(s.segments) p
                where p.value not in ('*', '>')
                    and p.value <> json_extract('["' || replace(m.topic, '.', '","') || '"]', '$[' || p.key || ']')));

-- Publishing is one insert here: whole and atomic, also outside of a transaction.
create view postbox_publish as
    select null as id, null as topic, null as key, null as headers, null as occurred_us, null as source,
        null as external_id, null as correlation_id, null as causation_id, null as max_attempts,
        null as delay_ms, null as due_ms, null as dedup_key, null as dedup_ms, null as body_hash, null as content_type,
        null as payload, null as body
    where false;

create trigger postbox_publish_insert instead of insert on postbox_publish
begin
    -- A window that has run out is taken over.
    insert into postbox_dedup (topic, key, message, body_hash, expires_at)
    select new.topic, new.dedup_key, new.id, new.body_hash, c.now + new.dedup_ms
    from postbox_clock c where new.dedup_key is not null
    on conflict (topic, key) do update
        set message = excluded.message, body_hash = excluded.body_hash, expires_at = excluded.expires_at
        where postbox_dedup.expires_at <= (select now from postbox_clock);

    insert into postbox_message (id, epoch, topic, key, headers, occurred_us, due_at, source, external_id,
        correlation_id, causation_id, max_attempts, content_type, payload, body)
    select new.id, r.epoch, new.topic, new.key, new.headers, new.occurred_us,
        case when new.due_ms > c.now then new.due_ms when new.delay_ms > 0 then c.now + new.delay_ms end,
        new.source, new.external_id, new.correlation_id, new.causation_id, new.max_attempts, new.content_type,
        new.payload, new.body
    from postbox_routing r cross join postbox_clock c
    where new.dedup_key is null or exists (
        select 1 from postbox_dedup d
        where d.topic = new.topic and d.key = new.dedup_key and d.message = new.id);

    -- A duplicate has no message, and so no deliveries.
    insert into postbox_delivery (id, message, subscription, state, pos, due_at, since)
    select f.id, f.message, f.subscription, 'pending', f.id, f.due_at, f.now
    from (
        select x.message, x.subscription, x.due_at, c.now,
            (select delivery from postbox_last) + row_number() over (order by x.subscription) as id
        from postbox_match x cross join postbox_clock c
        where x.message = new.id and x.removed_at is null and not x.scan
    ) f;

    insert into postbox_unrouted (seq, topic, epoch)
    select m.seq, m.topic, m.epoch from postbox_message m
    where m.id = new.id and not exists (select 1 from postbox_delivery d where d.message = m.id);
end;
