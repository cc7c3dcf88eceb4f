-- What is stored stays as it is: every server that could write it can read it.
do $heavier$
declare
    place record;
begin
    for place in
        select c.oid::pg_catalog.regclass as relation, a.attname as name
        from pg_catalog.pg_attribute a
        join pg_catalog.pg_class c on c.oid = a.attrelid
        where c.oid in ('{schema}.lease'::pg_catalog.regclass, '{schema}.outcome_part'::pg_catalog.regclass)
            and a.attnum > 0 and not a.attisdropped and a.attstorage in ('x', 'e')
    loop
        execute pg_catalog.format('alter table %s alter %I set storage extended', place.relation, place.name);
        execute pg_catalog.format('alter table %s alter %I set compression default', place.relation, place.name);
    end loop;
end
$heavier$;
