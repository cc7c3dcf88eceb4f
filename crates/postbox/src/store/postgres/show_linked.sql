-- What came of a delivery, up to a hundred of each: messages it has caused, its replays, and the messages
-- that it stands for. $1 delivery, $2 its message as text.
(select 'effect' as what, m.id as message, m.topic, null::bigint as delivery
    from {schema}.message m where m.causation_id = $2 order by m.id limit 100)
union all
(select 'replay', null, null, l.delivery
    from {schema}.late_delivery l where l.replay_of = $1 order by l.delivery limit 100)
union all
(select 'coalesced', c.message, null, null
    from {schema}.coalesced c where c.delivery = $1 order by c.message limit 100)
