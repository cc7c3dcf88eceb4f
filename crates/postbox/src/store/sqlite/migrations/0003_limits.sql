-- Limits that hold across all workers. A row for each subscription that has any: how many attempts may run at
-- once, and a token bucket for how many begin in a time.
create table postbox_flow_limit (
    subscription integer primary key,
    at_once      integer check (at_once > 0),
    -- A token comes every so many microseconds; the bucket holds up to burst.
    token_us     real check (token_us > 0),
    burst        integer check (burst > 0),
    tokens       real    not null,
    refilled_at  integer not null,
    check ((token_us is null) = (burst is null))
) strict;

-- The permits that a worker holds of a subscription's limit: they are its own until it gives them back, or is
-- not alive any more.
create table postbox_permit (
    subscription integer not null,
    worker       blob    not null,
    wanted       integer not null,
    permits      integer not null check (permits >= 0),
    primary key (subscription, worker)
) strict, without rowid;
