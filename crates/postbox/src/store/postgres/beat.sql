-- Renews a worker's life and tells what is leased to it. $1 worker, $2 lease in milliseconds.
update {schema}.worker w
set expires_at = pg_catalog.clock_timestamp() + interval '1 millisecond' * $2::bigint::double precision
where w.id = $1
returning array(select l.token from {schema}.lease l where l.worker = $1) as tokens
