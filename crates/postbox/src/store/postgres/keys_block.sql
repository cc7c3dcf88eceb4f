-- Deliveries that go on before all others of their key: $1 subscriptions, $2 deliveries, $3 messages, $4 their states,
-- $5 why. Their lanes are held.
insert into {schema}.key_state as k (subscription, key, head, state, cause)
select distinct on (u.subscription, m.key) u.subscription, m.key, u.delivery,
    case u.state when 'in_doubt' then u.state when 'dead' then case s.on_dead when 'park' then 'parked' else 'blocked' end else 'retrying' end,
    u.cause
from unnest($1::int[], $2::bigint[], $3::pg_catalog.uuid[], $4::pg_catalog.text[], $5::pg_catalog.text[])
    as u(subscription, delivery, message, state, cause)
join {schema}.subscription s on s.id = u.subscription and s.ordered
join {schema}.message m on m.id = u.message
where m.key is not null and not (u.state = 'dead' and s.on_dead = 'skip')
order by u.subscription, m.key, u.delivery
on conflict (subscription, key) do update
    set head = excluded.head, cause = excluded.cause, upto = null,
        state = case k.state when 'parked' then 'parked' else excluded.state end,
        since = case when k.head = excluded.head then k.since else excluded.since end
    -- The first of those that were taken from one worker goes first.
    where k.state = 'draining' or k.head is null or k.head >= excluded.head
