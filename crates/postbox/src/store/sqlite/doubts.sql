-- Doubts that it is time to ask about: of the subscriptions in the JSON array ?1, at most ?2.
select d.id, d.subscription, d.message, d.rev, d.attempt, d.asks, d.quiet_at <= c.now as quiet, d.word
from json_each(?1) w
cross join postbox_clock c
join postbox_subscription s on s.id = w.value
join postbox_delivery d on d.subscription = s.id and d.state = 'in_doubt'
where d.ask_at <= c.now and (s.reconciles or d.word is not null)
order by d.ask_at, d.id
limit ?2
