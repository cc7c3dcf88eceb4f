-- Schedules: when a message is published, and what it says. A worker that publishes ticks holds the row, and
-- moves next_at on in the same transaction.
create table {schema}.schedule (
    application text        not null,
    name        text        not null,
    cron        text        not null,
    -- An IANA name.
    time_zone   text        not null,
    topic       text        not null,
    key         text,
    payload     json        not null,
    headers     json        not null,
    -- What becomes of ticks that nobody could publish in time.
    missed      text        not null check (missed in ('skip', 'once', 'all')),
    -- Null: paused, or none is to come.
    next_at     timestamptz,
    last_at     timestamptz,
    paused_at   timestamptz,
    -- Somebody wants a message now.
    run_at      timestamptz,
    rev         int         not null,
    made_by     text        not null,
    -- An operator added or edited it: what programs declare does not change it any more.
    edited_by   text,
    primary key (application, name)
);

{roles}
