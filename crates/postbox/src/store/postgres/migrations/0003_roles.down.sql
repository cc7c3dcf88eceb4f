-- Takes back what 0003_roles gave. A role that has members, or rights anywhere else, stays.
do $down$
declare
    kind pg_catalog.text;
    named pg_catalog.text;
    door pg_catalog.text;
begin
    foreach kind in array array['publisher', 'worker', 'operator', 'viewer'] loop
        named := pg_catalog.concat('{schema}_', kind);
        continue when not exists (select from pg_catalog.pg_roles r where r.rolname = named::pg_catalog.name);
        execute pg_catalog.format('revoke all on all tables in schema {schema} from %I', named);
        execute pg_catalog.format('revoke all on all sequences in schema {schema} from %I', named);
        execute pg_catalog.format('revoke all on all functions in schema {schema} from %I', named);
        execute pg_catalog.format('revoke all on schema {schema} from %I', named);
        if exists (select from pg_catalog.pg_auth_members m join pg_catalog.pg_roles r on r.oid = m.roleid
                where r.rolname = named::pg_catalog.name and not m.admin_option) then
            raise notice 'postbox: the role % has members, and stays, without rights on {schema}', named;
        else
            begin
                execute pg_catalog.format('drop role %I', named);
            exception when dependent_objects_still_exist or insufficient_privilege then
                raise notice 'postbox: the role % stays, without rights on {schema}: %', named, sqlerrm;
            end;
        end if;
    end loop;
    for door in
        select p.oid::pg_catalog.regprocedure::pg_catalog.text from pg_catalog.pg_proc p
        where p.pronamespace = '{schema}'::pg_catalog.regnamespace::pg_catalog.oid
            and p.proname in ('publish_checked', 'retain')
    loop
        execute pg_catalog.format('alter function %s security invoker', door);
    end loop;
end
$down$;

drop function {schema}.record_action;
drop function {schema}.schema_version;
