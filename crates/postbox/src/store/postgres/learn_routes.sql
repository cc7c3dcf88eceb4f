-- Stores what topics fan out to at the current epoch. $1 topics.
with stale as (
    delete from {schema}.route t using {schema}.routing r where t.epoch < r.epoch
)
insert into {schema}.route (topic, epoch, subscriptions)
select t.topic, r.epoch, array(
    select s.id from {schema}.subscription s
    where s.removed_at is null and t.topic ~ s.matcher order by s.id)
from pg_catalog.unnest($1::pg_catalog.text[]) as t(topic) cross join {schema}.routing r
on conflict do nothing
