-- The arrays of leases and successes are a tenth of what a message costs the server, and most of that is
-- their compression. Message ids cannot be compressed: they are stored as they are. For the others lz4 needs
-- a fraction of what pglz does; a server that was built without it goes on with pglz.
alter table {schema}.lease alter messages set storage external;
alter table {schema}.outcome_part alter messages set storage external;

do $lighter$
declare
    place record;
begin
    if not exists (
        select from pg_catalog.pg_settings s
        where s.name = 'default_toast_compression' and 'lz4' = any (s.enumvals)
    ) then
        return;
    end if;
    for place in
        select c.oid::pg_catalog.regclass as relation, a.attname as name
        from pg_catalog.pg_attribute a
        join pg_catalog.pg_class c on c.oid = a.attrelid
        where c.oid in ('{schema}.lease'::pg_catalog.regclass, '{schema}.outcome_part'::pg_catalog.regclass)
            and a.attnum > 0 and not a.attisdropped and a.attstorage = 'x'
    loop
        execute pg_catalog.format('alter table %s alter %I set compression lz4', place.relation, place.name);
    end loop;
end
$lighter$;
