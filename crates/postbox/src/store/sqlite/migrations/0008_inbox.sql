-- What comes in: sources, which ids they have brought, and what could not become a message.
create table postbox_source (
    id          integer primary key,
    application text    not null,
    name        text    not null,
    kind        text    not null,
    paused_at   integer,
    -- Everything up to here is acknowledged: where to go on from if the broker forgets who has read what.
    checkpoint  text,
    -- As whoever receives from it has told last.
    lag         integer,
    trouble     text,
    seen_at     integer,
    received    integer not null default 0,
    duplicate   integer not null default 0,
    conflict    integer not null default 0,
    quarantined integer not null default 0,
    lost        integer not null default 0,
    last_at     integer,
    unique (application, name)
) strict;

-- Ids that a source has brought, and the message that each became.
create table postbox_inbox (
    source     integer not null,
    identity   text    not null,
    message    blob    not null,
    body_hash  blob    not null,
    expires_at integer not null,
    primary key (source, identity)
) strict, without rowid;
create index postbox_inbox_expiry on postbox_inbox (expires_at);

-- What could not become a message, byte for byte.
create table postbox_quarantine (
    id        integer primary key autoincrement,
    source    integer not null,
    kind      text    not null check (kind in ('malformed', 'conflict', 'undeliverable', 'lost')),
    position  text    not null,
    identity  text,
    reason    text    not null,
    -- The message that has the id, where two bodies have come with one.
    message   blob,
    -- Names and values beside the body.
    fields    text,
    body      blob,
    at        integer not null,
    -- An operator wants it read again, and what came of that.
    retry_at  integer,
    retried   text,
    -- It became a message after all.
    ended_at  integer,
    -- What comes again after a crash is recorded once.
    unique (source, kind, position)
) strict;
create index postbox_quarantine_retries on postbox_quarantine (source) where retry_at is not null;

-- Which subscriptions are relays, and how much their sinks have confirmed.
create table postbox_relay (
    subscription integer primary key,
    kind         text    not null,
    target       text    not null,
    sent         integer not null default 0,
    retried      integer not null default 0
) strict;
