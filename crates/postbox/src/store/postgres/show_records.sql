-- What else is on record about a delivery. $1 delivery.
select (extract(epoch from r.at) * 1000000::numeric)::bigint as at_us, r.record, r.actor, r.what, r.detail
from (
    select at, 'resolution' as record, actor, answer as what, reason as detail
    from {schema}.resolution where delivery = $1
    union all
    select o.at, 'observation', coalesce(w.name, o.worker::pg_catalog.text), o.kind, o.detail
    from {schema}.observation o left join {schema}.worker w on w.id = o.worker where o.delivery = $1
    union all
    select at, 'audit', actor, action, reason from {schema}.audit where delivery = $1
) r
order by r.at
