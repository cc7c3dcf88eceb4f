-- A doubt was asked about, and nothing was learnt: the next ask waits, not longer than until a "no" can be
-- believed. Nothing happens when it has moved on, or when another worker has told of this ask.
-- $1 delivery, $2 revision, $3 asks before, $4 milliseconds to wait.
update {schema}.doubt
set asks = asks + 1,
    ask_at = least(
        pg_catalog.clock_timestamp() + interval '1 millisecond' * $4::bigint::double precision,
        case when quiet_at > pg_catalog.clock_timestamp() then quiet_at end)
where delivery = $1 and rev = $2 and asks = $3
