-- Stores what topics fan out to at the current epoch, whose row is locked. $1 topics.
insert into {schema}.route (topic, epoch, subscriptions)
select t.topic, r.epoch, array(
    select s.id from {schema}.subscription s
    where s.removed_at is null and t.topic ~ s.matcher order by s.id)
from pg_catalog.unnest($1::pg_catalog.text[]) as t(topic) cross join {schema}.routing r
on conflict do nothing
