-- The lanes of the worker $1, of the subscriptions $2, and whether there are deliveries that are in no lane:
-- published before the subscription went by lanes, or by who does not know of them.
select w.subscription,
    array(select n.level from {schema}.lane n
        where n.subscription = w.subscription and n.owner = $1 and not n.leaving order by n.level) as levels,
    exists (select from {schema}.ready r where r.subscription = w.subscription and r.priority < {lanes}) as strays
from pg_catalog.unnest($2::int[]) as w(subscription)
