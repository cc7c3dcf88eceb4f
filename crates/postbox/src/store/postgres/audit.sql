-- One operator's action, with a number that leaves no gap. $1 actor, $2 action, $3 delivery,
-- $4 subscription, $5 rev before, $6 rev after, $7 state before, $8 state after, $9 reason, $10 detail.
with counted as (
    update {schema}.audit_counter set seq = seq + 1 returning seq
)
insert into {schema}.audit (seq, actor, action, delivery, subscription, rev_before, rev_after, state_before, state_after, reason, detail)
select c.seq, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10::pg_catalog.json from counted c
returning seq, (extract(epoch from at) * 1000000::numeric)::bigint as at_us
