-- Every message is delivered, however many of its key there are.
lock table {schema}.routing, {schema}.dedup, {schema}.message in access exclusive mode;
drop function {schema}.publish_batch;
create function {schema}.publish_batch(
    topics text[], keys text[], payloads text[], headers text[], occurred_us bigint[],
    sources text[], external_ids text[], correlation_ids text[], causation_ids text[],
    max_attempts int[], delay_ms bigint[], due_us bigint[], dedup_keys text[], dedup_ms bigint[],
    bodies bytea[], content_types text[], priorities smallint[] default null
) returns table (ord bigint, id uuid, stored boolean)
language sql volatile
set search_path = pg_catalog, pg_temp as $publish_batch$
{publish}
$publish_batch$;

do $clauses$
declare
    one record;
    clause record;
    holder record;
    stands pg_catalog.text;
begin
    for one in
        select p.oid, p.proname as name, p.oid::pg_catalog.regprocedure::pg_catalog.text as function, p.proacl as acl, p.proowner as owner
        from pg_catalog.pg_proc p
        where p.pronamespace = '{schema}'::pg_catalog.regnamespace::pg_catalog.oid
            and p.proname = any (array['publish_checked', 'failed', 'forget']::pg_catalog.name[])
    loop
        stands := pg_catalog.pg_get_functiondef(one.oid);
        for clause in
            select c.before, c.after from (values
                (1, 'publish_checked', 'OUT same_body boolean, OUT coalesced bigint[])', 'OUT same_body boolean)'),
                (2, 'publish_checked', $a$        and t.uniques is null
$a$, ''),
                (3, 'publish_checked', $a$select b.id, b.stored, b.coalesced into new_id, is_stored, coalesced
$a$, $b$select b.id, b.stored into new_id, is_stored
$b$),
                (4, 'failed', $a$    -- What was published meanwhile in this transaction may have the key: `next` had finished this one.
    if mine and attempt_number < max_attempts and {schema}.take_key_again(wanted, taken_message, delivery) is not null then
        raise exception using errcode = 'PB001', message = pg_catalog.format(
            'postbox: delivery %s cannot wait again: its key went to another delivery in this transaction; roll it back', delivery);
    end if;
$a$, ''),
                (5, 'forget', $a$    delete from {schema}.coalesced c where c.delivery = any (gone_deliveries);
$a$, '')
            ) as c(place, function, before, after)
            where c.function::pg_catalog.name = one.name
            order by c.place
        loop
            if pg_catalog.strpos(stands, clause.before) = 0 then
                raise exception 'postbox: the function % is not the one that this migration knows: there is no `%` in it', one.function, clause.before;
            end if;
            stands := pg_catalog.replace(stands, clause.before, clause.after);
        end loop;
        if one.name = 'publish_checked'::pg_catalog.name then
            execute pg_catalog.format('drop function %s', one.function);
        end if;
        execute stands;
        for holder in
            select p.oid::pg_catalog.regprocedure::pg_catalog.text as function,
                case when a.grantee = 0::pg_catalog.oid then 'public' else pg_catalog.quote_ident(r.rolname) end as grantee
            from pg_catalog.pg_proc p
            cross join lateral pg_catalog.aclexplode(one.acl) a
            left join pg_catalog.pg_roles r on r.oid = a.grantee
            where p.pronamespace = '{schema}'::pg_catalog.regnamespace::pg_catalog.oid and p.proname = one.name
                and a.grantee <> one.owner
        loop
            execute pg_catalog.format('grant execute on function %s to %s', holder.function, holder.grantee);
        end loop;
    end loop;
end
$clauses$;

create or replace view {schema}.reference as
    select r.message, r.delivery, r.delivery as lowest, r.delivery as highest from {schema}.ready r
    union all
    select s.message, s.delivery, s.delivery, s.delivery from {schema}.scheduled s
    union all
    select i.message, i.delivery, i.delivery, i.delivery
    from {schema}.lease l cross join lateral unnest(l.messages, l.deliveries) as i(message, delivery)
    union all
    select d.message, d.delivery, d.delivery, d.delivery from {schema}.doubt d
    union all
    select d.message, d.delivery, d.delivery, d.delivery from {schema}.dead_letter d
    union all
    select o.message, o.delivery, o.delivery, o.delivery from {schema}.outcome o
    union all
    select r.message, r.delivery, r.delivery, r.delivery from {schema}.resolution r
    union all
    select i.message, i.delivery, p.lowest, p.highest
    from {schema}.outcome_part p cross join lateral unnest(p.messages, p.deliveries) as i(message, delivery)
    where p.highest is not null
    union all
    select l.message, l.delivery, 0::bigint, 9223372036854775807::bigint from {schema}.late_delivery l
    union all
    select u.message, null::bigint, 0::bigint, 9223372036854775807::bigint from {schema}.unrouted u;

drop trigger route_uniques on {schema}.route;
drop function {schema}.route_uniques;
alter table {schema}.route drop column uniques;
drop function {schema}.unique_in_flight;
drop function {schema}.declare_unique;
drop function {schema}.tidy_keys;
drop function {schema}.free_keys;
drop function {schema}.take_key_again;
drop function {schema}.take_keys;
drop function {schema}.unfinished;
drop table {schema}.coalesced;
drop table {schema}.key_holder;
drop table {schema}.one_per_key;

{roles}
