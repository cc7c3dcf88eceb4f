-- Every delivery and outcome gets its row again; then drops what 0002_successes made.
insert into postbox_delivery (id, message, subscription, state, pos, attempt, rev, token, since)
select id, message, subscription, state, id, attempt, rev, token, since from postbox_every
where id not in (select id from postbox_delivery);
insert into postbox_outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker,
    started_at, finished_at)
select id, 1, 'succeeded', 'succeeded', 2, subscription, message, batch, worker, started_at, finished_at
from postbox_succeeded;
drop view postbox_expired_success;
drop view postbox_ended;
drop view postbox_unfinished;
drop view postbox_every;
drop view postbox_succeeded;
drop view postbox_held;
drop table postbox_success;
drop trigger postbox_lease_holds;
alter table postbox_lease drop column items;
