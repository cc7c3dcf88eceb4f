-- Remembers ids. One that another transaction has brought meanwhile is not written, which the count tells. Without the
-- `on conflict` clause it takes half the time, and fails with 23505 if one of them is there.
-- $1 source, $2 identities in their order, $3 messages, $4 hashes, $5 for how long, in microseconds.
insert into {schema}.inbox as b (source, identity, message, body_hash, expires_at)
select $1, i.identity, i.message, i.body_hash,
    pg_catalog.clock_timestamp() + interval '1 microsecond' * $5::bigint::double precision
from unnest($2::pg_catalog.text[], $3::pg_catalog.uuid[], $4::pg_catalog.bytea[]) with ordinality
    as i(identity, message, body_hash, ord)
order by i.ord
-- {known
on conflict (source, identity) do update
    set message = excluded.message, body_hash = excluded.body_hash, expires_at = excluded.expires_at
    where b.expires_at <= pg_catalog.statement_timestamp()
-- known}
