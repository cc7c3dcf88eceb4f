-- Nothing is in order any more, and no key has a limit: what waits for its key is handed out with the others.
lock table {schema}.routing, {schema}.dedup, {schema}.message, {schema}.ready, {schema}.scheduled in access exclusive mode;
-- Routes name those that go by lanes with a minus.
delete from {schema}.route t where exists (select from pg_catalog.unnest(t.subscriptions) s where s < 0);
update {schema}.ready r set priority = 0, pos = r.delivery where r.priority >= {lanes};
update {schema}.scheduled s set priority = 0 where s.priority >= {lanes};
update {schema}.doubt d set priority = 0 where d.priority >= {lanes};
update {schema}.dead_letter d set priority = 0 where d.priority >= {lanes};
update {schema}.lease l set priorities = array(select case when p >= {lanes} then 0 else p end from pg_catalog.unnest(l.priorities) with ordinality as u(p, n) order by n)
where exists (select from pg_catalog.unnest(l.priorities) p where p >= {lanes});
create or replace function {schema}.publish_batch(
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
    stands pg_catalog.text;
begin
    for one in
        select p.oid, p.proname as name, p.oid::pg_catalog.regprocedure::pg_catalog.text as function
        from pg_catalog.pg_proc p
        where p.pronamespace = '{schema}'::pg_catalog.regnamespace::pg_catalog.oid
            and p.proname = any (array['publish_checked', 'next']::pg_catalog.name[])
    loop
        stands := pg_catalog.pg_get_functiondef(one.oid);
        for clause in
            select c.before, c.after from (values
                (1, 'publish_checked', $b$select pg_catalog.abs(f.subscription), case when f.subscription > 0 then 0::smallint else {schema}.lane_of(nullif(publish_checked.key, ''), f.delivery) end,
        (f.delivery >> 20) & 3::bigint$b$,
                    $a$select f.subscription, 0, (f.delivery >> 20) & 3::bigint$a$),
                (2, 'publish_checked', $b$select pg_catalog.abs(d.subscription), case when d.subscription > 0 then 0::smallint else {schema}.lane_of(nullif(publish_checked.key, ''), d.delivery) end,
        (d.delivery >> 20) & 3::bigint$b$,
                    $a$select d.subscription, 0, (d.delivery >> 20) & 3::bigint$a$),
                (3, 'next', $b$    if exists (select from {schema}.subscription s where s.id = wanted and s.per_key is not null) then
        raise exception using errcode = '22023', message = pg_catalog.format(
            'postbox: `%s` delivers by key; only workers keep an order or a limit per key, so it cannot be pulled from', subscription);
    end if;
    if exists (select from {schema}.subscription s where s.id = wanted and s.paused_at is not null) then
$b$, $a$    if exists (select from {schema}.subscription s where s.id = wanted and s.paused_at is not null) then
$a$)
            ) as c(place, function, before, after)
            where c.function::pg_catalog.name = one.name
            order by c.place
        loop
            if pg_catalog.strpos(stands, clause.before) = 0 then
                raise exception 'postbox: the function % is not the one that this migration knows: there is no `%` in it', one.function, clause.before;
            end if;
            stands := pg_catalog.replace(stands, clause.before, clause.after);
        end loop;
        execute stands;
    end loop;
end
$clauses$;

create or replace function {schema}.uuid7() returns uuid
language sql volatile parallel safe as $$
    select pg_catalog.encode(
        pg_catalog.set_bit(pg_catalog.set_bit(
            pg_catalog.overlay(pg_catalog.uuid_send(pg_catalog.gen_random_uuid()),
                pg_catalog.substring(pg_catalog.int8send(
                    (extract(epoch from pg_catalog.clock_timestamp()) * 1000::numeric)::bigint), 3),
                1, 6),
            52, 1), 53, 1), 'hex')::pg_catalog.uuid
$$;
drop function {schema}.lock_key, {schema}.lane_of, {schema}.held_of;
drop table {schema}.key_state, {schema}.lane;
alter table {schema}.subscription drop column per_key, drop column ordered, drop column on_dead;
