-- Limits that hold across all workers. A row for each subscription that has any: how many attempts may run at
-- once, and a token bucket for how many begin in a time.
create table {schema}.flow_limit (
    subscription int primary key,
    at_once      int check (at_once > 0),
    -- A token comes every so many microseconds; the bucket holds up to burst.
    token_us     double precision check (token_us > 0),
    burst        int check (burst > 0),
    tokens       double precision not null default 0,
    refilled_at  timestamp with time zone not null default pg_catalog.clock_timestamp(),
    -- What the last claim took out of it.
    taken        int not null default 0,
    check ((token_us is null) = (burst is null))
) with (fillfactor = 50);

-- The permits that a worker holds of a subscription's limit: they are its own until it gives them back, or is
-- not alive any more. All that shares them out happens under the row lock of flow_limit.
create table {schema}.permit (
    subscription int not null,
    worker       pg_catalog.uuid not null,
    wanted       int not null,
    permits      int not null check (permits >= 0),
    primary key (subscription, worker)
) with (fillfactor = 50);

{roles}
