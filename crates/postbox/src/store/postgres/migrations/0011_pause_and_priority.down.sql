-- What is paused is handed out again, and all messages are as urgent as each other.
lock table {schema}.routing, {schema}.dedup, {schema}.message, {schema}.ready, {schema}.scheduled in access exclusive mode;
drop function {schema}.publish_batch;
create function {schema}.publish_batch(
    topics text[], keys text[], payloads text[], headers text[], occurred_us bigint[],
    sources text[], external_ids text[], correlation_ids text[], causation_ids text[],
    max_attempts int[], delay_ms bigint[], due_us bigint[], dedup_keys text[], dedup_ms bigint[],
    bodies bytea[], content_types text[]
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
            and p.proname = any (array['publish', 'publish_checked', 'publish_many', 'next', 'failed']::pg_catalog.name[])
    loop
        stands := pg_catalog.pg_get_functiondef(one.oid);
        for clause in
            select c.before, c.after from (values
                (1, 'publish_checked', 'content_type text DEFAULT NULL::text, priority text DEFAULT NULL::text, OUT id uuid', 'content_type text DEFAULT NULL::text, OUT id uuid'),
                (2, 'publish_checked', $a$    told pg_catalog.text;
    level smallint := 0;
$a$, $b$    told pg_catalog.text;
$b$),
                (3, 'publish_checked', $a$    if priority is not null then
        level := case priority when 'high' then -1 when 'normal' then 0 when 'low' then 1 end;
        if level is null then
            raise exception using errcode = '22023', message = pg_catalog.format(
                'postbox: `%s` is no priority; there are high, normal and low', pg_catalog.left(priority, 255));
        end if;
    end if;
    if at is not null and after is not null then
$a$, $b$    if at is not null and after is not null then
$b$),
                (4, 'publish_checked', $a$after is null and at is null and level = 0 then$a$, $b$after is null and at is null then$b$),
                (5, 'publish_checked', $a$array[body], array[content_type], array[level]) b;$a$, $b$array[body], array[content_type]) b;$b$),
                (6, 'publish', 'content_type text DEFAULT NULL::text, priority text DEFAULT NULL::text)', 'content_type text DEFAULT NULL::text)'),
                (7, 'publish', $a$occurred_at, body, content_type, priority);$a$, $b$occurred_at, body, content_type);$b$),
                (8, 'publish_many', $a$'content_type', 'priority']) then$a$, $b$'content_type']) then$b$),
                (9, 'publish_many', $a$            if not one ->> 'priority' in ('high', 'normal', 'low') then
                raise exception using errcode = '22023', message = pg_catalog.format(
                    'postbox: `%s` is no priority; there are high, normal and low', pg_catalog.left(one ->> 'priority', 255));
            end if;
            if one ->> 'at' is not null and one ->> 'after' is not null then
$a$, $b$            if one ->> 'at' is not null and one ->> 'after' is not null then
$b$),
                (10, 'publish_many', $a$as content_types,
            pg_catalog.array_agg(case g.value ->> 'priority' when 'high' then -1::smallint when 'low' then 1::smallint end order by g.ord) as priorities
$a$, $b$as content_types
$b$),
                (11, 'publish_many', $a$c.bodies, c.content_types, c.priorities) b;$a$, $b$c.bodies, c.content_types) b;$b$),
                (12, 'next', $a$    place tid;
    draw double precision := pg_catalog.random();
    -- One in eight begins with a lower level: a steady stream of higher ones keeps nobody waiting for ever.
    from_level smallint := case when draw < 0.0625 then 1 when draw < 0.125 then 0 else -1 end;
begin
    if exists (select from {schema}.subscription s where s.id = wanted and s.paused_at is not null) then
        return;
    end if;
    loop
$a$, $b$    place tid;
begin
    loop
$b$),
                (13, 'next', $a$where r.subscription = wanted and r.priority >= from_level order by r.priority, r.pos limit 1;$a$, $b$where r.subscription = wanted order by r.priority, r.pos limit 1;$b$),
                (14, 'next', $a$            or from_level < 0 and (due_priority < ready_priority or due_priority = ready_priority and due_since < ready_since));$a$, $b$            or due_priority < ready_priority or due_priority = ready_priority and due_since < ready_since);$b$),
                (15, 'next', $a$r where r.subscription = wanted and r.priority >= from_level
$a$, $b$r where r.subscription = wanted
$b$),
                (16, 'next', $a$        if delivery is null and from_level >= 0 then
            from_level := -1;
            continue;
        elsif delivery is null then
            return;
$a$, $b$        if delivery is null then
            return;
$b$),
                (17, 'failed', $a$l.priority = any (array[-1, 0, 1]::smallint[])$a$, $b$l.priority = 0::smallint$b$)
            ) as c(place, function, before, after)
            where c.function::pg_catalog.name = one.name
            order by c.place
        loop
            if pg_catalog.strpos(stands, clause.before) = 0 then
                raise exception 'postbox: the function % is not the one that this migration knows: there is no `%` in it', one.function, clause.before;
            end if;
            stands := pg_catalog.replace(stands, clause.before, clause.after);
        end loop;
        -- Those have another argument now; who was given the right to run them keeps it.
        if one.name = any (array['publish', 'publish_checked']::pg_catalog.name[]) then
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

-- Nobody claims now, so these rows may move.
update {schema}.ready r set priority = 0 where r.priority <> 0;
update {schema}.scheduled s set priority = 0 where s.priority <> 0;
alter table {schema}.message drop column priority;
alter table {schema}.subscription drop column paused_at;

{roles}
