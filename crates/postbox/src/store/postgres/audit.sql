-- One operator's action, with a number that leaves no gap. $1 actor, $2 action, $3 delivery,
-- $4 subscription, $5 rev before, $6 rev after, $7 state before, $8 state after, $9 reason, $10 detail.
select r.seq, (extract(epoch from r.at) * 1000000::numeric)::bigint as at_us, session_user::pg_catalog.text as login,
    (select s.name from {schema}.subscription s where s.id = $4) as subscription
from {schema}.record_action($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::pg_catalog.json) r
