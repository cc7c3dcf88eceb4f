-- Which of the subscriptions $1 are paused.
select s.id from {schema}.subscription s where s.id = any ($1::int[]) and s.paused_at is not null
