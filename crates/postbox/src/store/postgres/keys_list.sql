-- Keys that wait, those that wait the longest first: of the application $1, the subscription $2, the key $3, or of
-- all where null; at most $4.
select s.application, s.name as subscription, k.key, k.state, k.head, k.cause,
    (extract(epoch from k.since) * 1000000::numeric)::bigint as since_us,
    (select pg_catalog.count(*) from (
        select from {schema}.ready r join {schema}.message m on m.id = r.message
        where r.subscription = k.subscription and r.priority = {schema}.held_of(k.key) and m.key = k.key
        limit 10001
    ) w) as waiting
from {schema}.key_state k join {schema}.subscription s on s.id = k.subscription
where ($1::pg_catalog.text is null or s.application = $1) and ($2::pg_catalog.text is null or s.name = $2)
    and ($3::pg_catalog.text is null or k.key = $3) and (s.removed_at is null or k.head is not null)
order by k.since, k.subscription, k.key
limit $4
