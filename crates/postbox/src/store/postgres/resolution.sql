-- The word on a doubt. $1 delivery, $2 rev after, $3 attempt, $4 subscription, $5 message, $6 answer,
-- $7 source, $8 actor, $9 reason, $10 receipt, $11 state after.
with gone as (
    delete from {schema}.doubt d where d.delivery = $1
)
insert into {schema}.resolution (delivery, rev, number, subscription, message, answer, source, actor, reason, receipt, state_after)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::pg_catalog.json, $11)
