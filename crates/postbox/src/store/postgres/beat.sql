-- Renews a worker's life and tells what is leased to it. $1 worker, $2 lease in milliseconds.
update {schema}.worker w
set expires_at = pg_catalog.clock_timestamp() + interval '1 millisecond' * $2::bigint::double precision
-- One that was taken over in part does not live on: what it holds is no longer all its own.
where w.id = $1 and w.expires_at > timestamp with time zone '-infinity'
returning array(select l.token from {schema}.lease l where l.worker = $1) as tokens
