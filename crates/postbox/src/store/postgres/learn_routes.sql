-- Stores what topics fan out to at the current epoch, whose row is locked; subscriptions that go by lanes as
-- negative numbers, so that a publisher need not look them up. $1 topics.
insert into {schema}.route (topic, epoch, subscriptions)
select t.topic, r.epoch, array(
    select case when s.per_key is null then s.id else -s.id end from {schema}.subscription s
    where s.removed_at is null and t.topic ~ s.matcher order by s.id)
from pg_catalog.unnest($1::pg_catalog.text[]) as t(topic) cross join {schema}.routing r
on conflict do nothing
