-- Where `next` begins with a lower level, what is due of that one or one below keeps its place before
-- what came later.
do $clause$
declare
    one constant pg_catalog.regprocedure := '{schema}.next(text, text)'::pg_catalog.regprocedure;
    stands pg_catalog.text := pg_catalog.pg_get_functiondef(one);
    before constant pg_catalog.text := 'or from_level < 0 and (due_priority < ready_priority or due_priority = ready_priority and due_since < ready_since));';
begin
    if pg_catalog.strpos(stands, before) = 0 then
        raise exception 'postbox: the function % is not the one that this migration knows: there is no `%` in it', one, before;
    end if;
    execute pg_catalog.replace(stands, before,
        'or due_priority >= from_level and (due_priority < ready_priority or due_priority = ready_priority and due_since < ready_since));');
end
$clause$;
