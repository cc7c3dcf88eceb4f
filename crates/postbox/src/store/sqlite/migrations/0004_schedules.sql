-- Schedules: when a message is published, and what it says. Who publishes ticks moves next_at on in the same
-- transaction.
create table postbox_schedule (
    application text    not null,
    name        text    not null,
    cron        text    not null,
    -- An IANA name.
    time_zone   text    not null,
    topic       text    not null,
    key         text,
    payload     text    not null,
    headers     text    not null,
    -- What becomes of ticks that nobody could publish in time.
    missed      text    not null check (missed in ('skip', 'once', 'all')),
    -- Null: paused, or none is to come.
    next_at     integer,
    last_at     integer,
    paused_at   integer,
    -- Somebody wants a message now.
    run_at      integer,
    rev         integer not null,
    made_by     text    not null,
    -- An operator added or edited it: what programs declare does not change it any more.
    edited_by   text,
    primary key (application, name)
) strict, without rowid;
