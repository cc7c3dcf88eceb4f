-- Lets go of the lanes that the worker $1 is to leave, of the subscription $2, when nothing of them is leased any
-- more. Its row is locked, so nothing is claimed at this moment.
update {schema}.lane n set owner = null, leaving = false
where n.subscription = $2 and n.owner = $1 and n.leaving
    and not exists (
        select from {schema}.lease l cross join lateral unnest(l.subscriptions, l.priorities) as i(subscription, level)
        where l.worker = $1 and i.subscription = n.subscription and i.level = n.level)
