-- At most one unfinished delivery of a key for a subscription that says so (docs/unique.md, decision 0031).
create table postbox_one_per_key (
    subscription integer primary key,
    policy       text    not null check (policy in ('coalesce', 'refuse')),
    -- There is nobody to refuse to: for as long as one statement runs.
    lenient      integer not null default 0
) strict;

-- Which delivery has a key. Whether it is still unfinished is what the delivery itself tells, so a row may
-- stay behind: nothing depends on its going. The row of an ended one is taken over by the next.
create table postbox_key_holder (
    subscription integer not null,
    key          text    not null,
    delivery     integer not null,
    -- Those that were unfinished beside it when the subscription began to take one at a time: a JSON array.
    others       text,
    primary key (subscription, key)
) strict, without rowid;
create index postbox_key_holder_delivery on postbox_key_holder (delivery);

-- Messages for which a subscription has no delivery of their own, and the delivery that stood for it.
create table postbox_coalesced (
    message      blob    not null,
    subscription integer not null,
    delivery     integer not null,
    at           integer not null,
    primary key (message, subscription)
) strict, without rowid;
create index postbox_coalesced_delivery on postbox_coalesced (delivery);

-- Keys that are in flight, and by which delivery.
create view postbox_key_in_flight as
    select h.subscription, h.key, d.value as delivery
    from postbox_key_holder h cross join json_each(json_insert(coalesce(h.others, '[]'), '$[#]', h.delivery)) d
    where exists (
            select 1 from postbox_delivery p where p.id = d.value and p.state in ('pending', 'running', 'in_doubt'))
        or exists (select 1 from postbox_held l where l.id = d.value);

-- A new delivery takes its key, or goes again.
create trigger postbox_delivery_takes_its_key after insert on postbox_delivery
when new.state = 'pending' and new.rev = 0 and new.attempt = 0
    and exists (select 1 from postbox_one_per_key u where u.subscription = new.subscription)
begin
    select raise(abort, 'postbox: key in flight: ' || json_object(
        'application', s.application, 'subscription', s.name, 'key', f.key, 'delivery', f.delivery))
    from postbox_message m
    join postbox_key_in_flight f on f.subscription = new.subscription and f.key = m.key and f.delivery <> new.id
    join postbox_one_per_key u on u.subscription = new.subscription and u.policy = 'refuse' and not u.lenient
    join postbox_subscription s on s.id = new.subscription
    where m.id = new.message
    limit 1;

    insert into postbox_coalesced (message, subscription, delivery, at)
    select new.message, new.subscription, f.delivery, (select now from postbox_clock)
    from postbox_message m
    join postbox_key_in_flight f on f.subscription = new.subscription and f.key = m.key and f.delivery <> new.id
    where m.id = new.message
    limit 1
    on conflict do nothing;

    delete from postbox_delivery
    where id = new.id and exists (
        select 1 from postbox_message m
        join postbox_key_in_flight f on f.subscription = new.subscription and f.key = m.key and f.delivery <> new.id
        where m.id = new.message);

    insert into postbox_key_holder (subscription, key, delivery)
    select new.subscription, m.key, new.id
    from postbox_message m join postbox_delivery d on d.id = new.id
    where m.id = new.message and m.key is not null
    on conflict (subscription, key) do update set delivery = excluded.delivery, others = null;
end;

-- A message that another delivery stands for is not one that nobody is subscribed to.
create trigger postbox_unrouted_is_coalesced after insert on postbox_unrouted
when exists (
    select 1 from postbox_message m join postbox_coalesced c on c.message = m.id where m.seq = new.seq)
begin
    delete from postbox_unrouted where seq = new.seq;
end;
