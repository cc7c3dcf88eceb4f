-- Nothing is in order any more, and no key has a limit: what waits for its key is handed out with the others.
update postbox_delivery set priority = 0, pos = id where priority >= 64;
drop view postbox_publish;
create view postbox_publish as
    select null as id, null as topic, null as key, null as headers, null as occurred_us, null as source,
        null as external_id, null as correlation_id, null as causation_id, null as max_attempts,
        null as delay_ms, null as due_ms, null as dedup_key, null as dedup_ms, null as body_hash, null as content_type,
        null as payload, null as body, null as priority
    where false;

create trigger postbox_publish_insert instead of insert on postbox_publish
begin
    -- A window that has run out is taken over.
    insert into postbox_dedup (topic, key, message, body_hash, expires_at)
    select new.topic, new.dedup_key, new.id, new.body_hash, (select now from postbox_clock) + new.dedup_ms
    where new.dedup_key is not null
    on conflict (topic, key) do update
        set message = excluded.message, body_hash = excluded.body_hash, expires_at = excluded.expires_at
        where postbox_dedup.expires_at <= (select now from postbox_clock);

    insert into postbox_message (id, epoch, topic, key, headers, occurred_us, due_at, source, external_id,
        correlation_id, causation_id, max_attempts, content_type, payload, body, priority)
    select new.id, r.epoch, new.topic, new.key, new.headers, new.occurred_us,
        case when new.due_ms > (select now from postbox_clock) then new.due_ms
            when new.delay_ms > 0 then (select now from postbox_clock) + new.delay_ms end,
        new.source, new.external_id, new.correlation_id, new.causation_id, new.max_attempts, new.content_type,
        new.payload, new.body, nullif(new.priority, 0)
    from postbox_routing r
    where new.dedup_key is null or exists (
        select 1 from postbox_dedup d
        where d.topic = new.topic and d.key = new.dedup_key and d.message = new.id);

    -- A duplicate has no message, and so no deliveries. They come after all that are there: their numbers
    -- are higher than those at the same place.
    insert into postbox_delivery (message, subscription, state, priority, pos, due_at, since)
    select x.message, x.subscription, 'pending', coalesce(new.priority, 0), (select delivery from postbox_last), x.due_at,
        (select now from postbox_clock)
    from postbox_match x
    where x.message = new.id and x.removed_at is null and not x.scan
    order by x.subscription;

    insert into postbox_unrouted (seq, topic, epoch)
    select m.seq, m.topic, m.epoch from postbox_message m
    where m.id = new.id and not exists (select 1 from postbox_delivery d where d.message = m.id);
end;

drop table postbox_key_state;
drop table postbox_lane;
alter table postbox_subscription drop column on_dead;
alter table postbox_subscription drop column ordered;
alter table postbox_subscription drop column per_key;
