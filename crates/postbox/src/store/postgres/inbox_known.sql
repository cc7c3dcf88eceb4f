-- Which of these ids has the source brought before? $1 source, $2 identities.
select i.identity, i.message, i.body_hash
from {schema}.inbox i
where i.source = $1 and i.identity = any ($2::pg_catalog.text[]) and i.expires_at > pg_catalog.statement_timestamp()
