-- Roles for the programs that use a postbox: docs/roles.md. What they may do is in roles.sql, which is
-- run again by `postbox migrate roles`; a later migration that makes tables or functions names them
-- there and ends with that text, too.

-- Which migrations were applied: for roles that may not read the table.
create function {schema}.schema_version() returns table (version int, name text, applied_at timestamptz)
language sql stable security definer
set search_path = pg_catalog, pg_temp as $schema_version$
    select m.version, m.name, m.applied_at from {schema}.migration m
$schema_version$;

-- The one way into the audit for a role that does not own it: the number comes from the counter, the
-- time and the login from the server.
create function {schema}.record_action(
    actor text, action text, delivery bigint, subscription int, rev_before int, rev_after int,
    state_before text, state_after text, reason text, detail json
) returns table (seq bigint, at timestamptz)
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $record_action$
    with counted as (
        update {schema}.audit_counter c set seq = c.seq + 1 returning c.seq
    )
    insert into {schema}.audit (seq, actor, action, delivery, subscription, rev_before, rev_after, state_before, state_after, reason, detail)
    select c.seq, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10 from counted c
    returning audit.seq, audit.at
$record_action$;

{roles}
