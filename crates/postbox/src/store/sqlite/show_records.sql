-- What else is on record about the delivery ?1, in order of time.
select at, 'resolution' as record, actor, answer as what, reason as detail
from postbox_resolution where delivery = ?1
union all
select o.at, 'observation', coalesce(w.name, lower(hex(o.worker))), o.kind, o.detail
from postbox_observation o left join postbox_worker w on w.id = o.worker where o.delivery = ?1
union all
select at, 'audit', actor, action, reason from postbox_audit where delivery = ?1
order by 1
