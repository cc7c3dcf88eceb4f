-- Transactions that have written, or are about to write, to message: they may commit a message of
-- an older routing epoch. Their own locks tell, whatever their snapshots are.
select distinct l.virtualtransaction as holder
from pg_catalog.pg_locks l
where l.locktype = 'relation' and l.mode = 'RowExclusiveLock' and l.granted
    and l.relation = '{schema}.message'::pg_catalog.regclass::pg_catalog.oid
    and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
    and l.pid is distinct from pg_catalog.pg_backend_pid()
