-- What keeps vacuum from removing the rows that are dead by now: of the transactions, snapshots, prepared
-- transactions, replication slots and standbys the one that goes back furthest, if it is as old as $1
-- seconds. Of others' sessions a role may not see how old their transactions are: then it counts from
-- $2 transactions on.
select h.kind, h.pid, h.name, h.login, h.state, h.age_s, h.transactions,
    (select pg_catalog.sum(t.n_dead_tup)::bigint
        from pg_catalog.pg_inherits i join pg_catalog.pg_stat_all_tables t on t.relid = i.inhrelid
        where i.inhparent = '{schema}.ready'::pg_catalog.regclass::pg_catalog.oid) as dead_rows
from (
    select case a.backend_type when 'walsender' then 'standby' else 'transaction' end as kind, a.pid,
        nullif(a.application_name, '') as name, a.usename::pg_catalog.text as login, a.state,
        extract(epoch from pg_catalog.clock_timestamp() - a.xact_start)::double precision as age_s,
        greatest(pg_catalog.age(a.backend_xmin), pg_catalog.age(a.backend_xid)) as transactions
    from pg_catalog.pg_stat_activity a
    where (a.datname = pg_catalog.current_database() or a.backend_type = 'walsender')
        and a.pid <> pg_catalog.pg_backend_pid() and a.backend_type is distinct from 'autovacuum worker'
        -- Vacuums do not hold each other back.
        and not exists (select from pg_catalog.pg_stat_progress_vacuum v where v.pid = a.pid)
    union all
    select 'prepared transaction', null, x.gid, x.owner::pg_catalog.text, null,
        extract(epoch from pg_catalog.clock_timestamp() - x.prepared)::double precision, pg_catalog.age(x.transaction)
    from pg_catalog.pg_prepared_xacts x where x.database = pg_catalog.current_database()
    union all
    select 'replication slot', s.active_pid, s.slot_name::pg_catalog.text, null,
        case when s.active then 'active' else 'inactive' end, null, pg_catalog.age(s.xmin)
    from pg_catalog.pg_replication_slots s
) h
where h.transactions is not null and coalesce(h.age_s >= $1, h.transactions >= $2)
order by h.transactions desc, h.age_s desc nulls last
limit 1
