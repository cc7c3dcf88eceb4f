-- Attempts that begin once this is committed. $1 deliveries, $2 numbers, $3 batch, $4 worker.
insert into {schema}.attempt (delivery, number, batch, worker)
select s.delivery, s.number, $3, $4
from unnest($1::bigint[], $2::int[]) as s(delivery, number)
