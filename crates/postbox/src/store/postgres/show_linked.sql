-- What came of a delivery, up to a hundred of each: messages it has caused, its replays, and the messages
-- that it stands for. $1 delivery, $2 its message as text.
select 'effect' as what, e.id as message, e.topic, null::bigint as delivery
from (select m.id, m.topic from {schema}.message m where m.causation_id = $2 order by m.id limit 100) e
union all
select 'replay', null, null, r.delivery
from (select l.delivery from {schema}.late_delivery l where l.replay_of = $1 order by l.delivery limit 100) r
union all
select 'coalesced', s.message, null, null
from (select c.message from {schema}.coalesced c where c.delivery = $1 order by c.message limit 100) s
