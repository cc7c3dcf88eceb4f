-- How many messages would go with the deliveries that were kept long enough: those of which nothing
-- else is left. ?1: below this id, one that nobody is subscribed to goes, too, unless ?2.
with gone as materialized (
    select message, count(*) as deliveries
    from (
        select message from postbox_expired
        union all
        select unhex(i.value ->> 1) from postbox_expired_success p cross join json_each(p.items) i
    )
    group by message
),
straight as materialized (
    select message, count(*) as deliveries
    from (
        select message from postbox_held
        union all
        select message from postbox_succeeded where first_message <= (select max(message) from gone)
    )
    group by message
)
select (select count(*) from gone g
        left join straight t on t.message = g.message
        where g.deliveries = coalesce(t.deliveries, 0)
                + (select count(*) from postbox_delivery d where d.message = g.message)
            and exists (select 1 from postbox_message m where m.id = g.message)
            and not exists (select 1 from postbox_unrouted u join postbox_message m on m.seq = u.seq
                where m.id = g.message))
    + (select count(*) from postbox_unrouted u join postbox_message m on m.seq = u.seq where m.id < ?1 and not ?2)
