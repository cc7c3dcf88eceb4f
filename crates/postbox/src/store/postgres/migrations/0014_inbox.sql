-- What comes in: sources, which ids they have brought, and what could not become a message (decision 0032).
create table {schema}.source (
    id          int         generated always as identity primary key,
    application text        not null,
    name        text        not null,
    kind        text        not null,
    paused_at   timestamptz,
    -- Everything up to here is acknowledged: where to go on from if the broker forgets who has read what.
    checkpoint  text,
    -- As whoever receives from it has told last.
    lag         bigint,
    trouble     text,
    seen_at     timestamptz
);
create unique index source_by_name on {schema}.source (application, name);

-- How much a source has brought. Each process counts in one of several rows, so that they do not wait for each other.
create table {schema}.source_tally (
    source      int         not null,
    slot        smallint    not null,
    received    bigint      not null,
    duplicate   bigint      not null,
    conflict    bigint      not null,
    quarantined bigint      not null,
    lost        bigint      not null,
    last_at     timestamptz not null,
    primary key (source, slot)
) with (fillfactor = 40, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- Ids that a source has brought, and the message that each became.
create table {schema}.inbox (
    source     int         not null,
    identity   text        not null,
    message    uuid        not null,
    body_hash  bytea       not null,
    expires_at timestamptz not null,
    primary key (source, identity)
);
-- Rows lie about in the order in which they run out: a summary of each stretch is enough, and costs no entry a row.
create index inbox_expiry on {schema}.inbox using brin (expires_at) with (pages_per_range = 32, autosummarize = on);

-- What could not become a message, byte for byte.
create table {schema}.quarantine (
    id         bigint      generated always as identity primary key,
    source     int         not null,
    kind       text        not null check (kind in ('malformed', 'conflict', 'undeliverable', 'lost')),
    position   text        not null,
    identity   text,
    reason     text        not null,
    -- The message that has the id, where two bodies have come with one.
    message    uuid,
    -- Names and values beside the body.
    fields     json,
    body       bytea,
    at         timestamptz not null default pg_catalog.clock_timestamp(),
    -- An operator wants it read again, and what came of that.
    retry_at   timestamptz,
    retried    text,
    -- It became a message after all.
    ended_at   timestamptz
);
-- What comes again after a crash is recorded once.
create unique index quarantine_by_position on {schema}.quarantine (source, kind, position);
create index quarantine_retries on {schema}.quarantine (source) where retry_at is not null;

-- Which subscriptions are relays, and how much their sinks have confirmed.
create table {schema}.relay (
    subscription int    primary key,
    kind         text   not null,
    target       text   not null
);
create table {schema}.relay_tally (
    subscription int      not null,
    slot         smallint not null,
    sent         bigint   not null,
    retried      bigint   not null,
    primary key (subscription, slot)
) with (fillfactor = 40, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

{roles}
