-- A subscription can be paused: its deliveries wait (docs/pause.md).
alter table {schema}.subscription add column paused_at timestamptz;

-- The function that gives out one stays as it is but for a clause.
do $clauses$
declare
    one record;
    stands pg_catalog.text;
begin
    for one in
        select p.oid::pg_catalog.regprocedure as function, c.before, c.after
        from (values
            (1, 'next', $a$begin
    loop
$a$, $b$begin
    if exists (select from {schema}.subscription s where s.id = wanted and s.paused_at is not null) then
        return;
    end if;
    loop
$b$)
        ) as c(place, function, before, after)
        join pg_catalog.pg_proc p on p.proname = c.function::pg_catalog.name
            and p.pronamespace = '{schema}'::pg_catalog.regnamespace::pg_catalog.oid
        order by c.place
    loop
        stands := pg_catalog.pg_get_functiondef(one.function::pg_catalog.oid);
        if pg_catalog.strpos(stands, one.before) = 0 then
            raise exception 'postbox: the function % is not the one that this migration knows', one.function;
        end if;
        execute pg_catalog.replace(stands, one.before, one.after);
    end loop;
end
$clauses$;

{roles}
