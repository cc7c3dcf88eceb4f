-- Makes the four roles where it may, and gives them what they need and no more; may be run again.
-- Nobody else may run the functions; those that act for their owner are marked here.
do $roles$
declare
    kind pg_catalog.text;
    named pg_catalog.text;
    made pg_catalog.text[] := '{}';
    given pg_catalog.text[];
    thing pg_catalog.text;
    door record;
    holder pg_catalog.text;
    records constant pg_catalog.text[] := array['attempt', 'outcome', 'outcome_part', 'resolution', 'observation'];
begin
    foreach kind in array array['publisher', 'worker', 'operator', 'viewer'] loop
        named := pg_catalog.concat('{schema}_', kind);
        if not exists (select from pg_catalog.pg_roles r where r.rolname = named::pg_catalog.name) then
            begin
                execute pg_catalog.format('create role %I nologin', named);
            exception
                when duplicate_object or unique_violation then
                    null; -- Somebody else made it meanwhile.
                when insufficient_privilege then
                    raise notice 'postbox: % may not create the role %; when it is there, run `postbox migrate roles`', current_user, named;
            end;
        end if;
        if exists (select from pg_catalog.pg_roles r where r.rolname = named::pg_catalog.name) then
            made := pg_catalog.array_append(made, kind);
            execute pg_catalog.format('grant usage on schema {schema} to %I', named);
        end if;
    end loop;

    -- The functions: whether each acts for its owner, and who may run it.
    for door in
        select p.oid::pg_catalog.regprocedure as name, f.definer, f.kinds
        from pg_catalog.pg_proc p
        join (values
            ('publish', false, array['publisher', 'worker']),
            ('publish_checked', true, array['publisher', 'worker']),
            ('publish_many', true, array['publisher', 'worker']),
            ('schema_version', true, array['publisher', 'worker', 'operator', 'viewer']),
            ('record_action', true, array['operator']),
            ('retain', true, array['worker', 'operator']),
            -- Removes whatever it is given: through `retain` only.
            ('forget', false, array[]::pg_catalog.text[]),
            ('sift_window', false, array[]::pg_catalog.text[]),
            ('rotate', true, array['worker']),
            ('forget_routes', true, array[]::pg_catalog.text[]),
            ('open_windows', true, array['worker']),
            ('take_keys', true, array['worker', 'operator']),
            ('take_key_again', true, array['worker', 'operator']),
            ('free_keys', true, array['worker']),
            ('tidy_keys', true, array['worker']),
            ('declare_unique', true, array['worker']),
            ('unique_in_flight', false, array['worker']),
            ('route_uniques', true, array[]::pg_catalog.text[]),
            ('unfinished', false, array[]::pg_catalog.text[]),
            ('cut_window', false, array[]::pg_catalog.text[]),
            ('window_width', false, array[]::pg_catalog.text[]),
            ('uuid_at', false, array['worker', 'operator', 'viewer']),
            ('next', false, array['worker']),
            -- It turns a success that its own transaction has just written into a failure.
            ('failed', true, array['worker']),
            ('forgo_attempts', true, array['worker']),
            ('pulled_subscription', false, array['worker']),
            ('pattern_matcher', false, array['worker']),
            ('backoff_ceiling_ms', false, array['worker']),
            ('subscribe', false, array['worker']),
            ('uuid7', false, array['worker']),
            ('body_hash', false, array['worker']),
            ('minted_at', false, array['worker', 'operator', 'viewer']),
            ('publish_batch', false, array[]::pg_catalog.text[]),
            ('publish_duplicates', false, array[]::pg_catalog.text[]),
            ('lane_of', false, array['worker', 'operator']),
            ('held_of', false, array['worker', 'operator', 'viewer']),
            ('lock_key', false, array['publisher', 'worker']),
            ('check_message', false, array[]::pg_catalog.text[])
        ) as f(name, definer, kinds) on p.proname = f.name::pg_catalog.name
        where p.pronamespace = '{schema}'::pg_catalog.regnamespace::pg_catalog.oid
    loop
        execute pg_catalog.format('revoke execute on function %s from public', door.name);
        if door.definer then
            execute pg_catalog.format('alter function %s security definer', door.name);
        end if;
        foreach kind in array door.kinds loop
            if kind = any (made) then
                execute pg_catalog.format('grant execute on function %s to %I', door.name, pg_catalog.concat('{schema}_', kind));
            end if;
        end loop;
    end loop;

    if 'worker' = any (made) then
        given := array[
            'select on {schema}.migration, {schema}.leased',
            'usage on sequence {schema}.delivery_id, {schema}.batch_id',
            'select, update on {schema}.routing',
            'select, insert on {schema}.subscription',
            'select, insert, delete on {schema}.route, {schema}.unrouted',
            'select, insert, update, delete on {schema}.dedup, {schema}.worker, {schema}.doubt',
            'select, insert on {schema}.message, {schema}.late_delivery, {schema}.dead_letter',
            -- A row lock needs the right to update some column.
            'select, update (told_at) on {schema}.retention',
            'select, insert, delete, update (rev) on {schema}.ready, {schema}.scheduled',
            'select, insert, delete, update (claimed_at) on {schema}.lease'];
        -- What later migrations make: they run this again.
        if pg_catalog.to_regclass('{schema}.flow_limit') is not null then
            given := pg_catalog.array_append(given,
                'select, insert, update, delete on {schema}.flow_limit, {schema}.permit');
        end if;
        if pg_catalog.to_regclass('{schema}.schedule') is not null then
            given := pg_catalog.array_append(given, 'select, insert, update on {schema}.schedule');
        end if;
        if pg_catalog.to_regclass('{schema}.lane') is not null then
            given := pg_catalog.array_append(given,
                'select, insert, update, delete on {schema}.lane, {schema}.key_state');
        end if;
        if pg_catalog.to_regclass('{schema}.one_per_key') is not null then
            given := pg_catalog.array_append(given, 'select on {schema}.one_per_key, {schema}.coalesced');
        end if;
        if pg_catalog.to_regclass('{schema}.source') is not null then
            given := given || array[
                'select, insert, update (kind, checkpoint, lag, trouble, seen_at) on {schema}.source',
                'select, insert, update on {schema}.source_tally, {schema}.relay, {schema}.relay_tally',
                'select, insert, update, delete on {schema}.inbox',
                'select, insert, delete, update (message, retry_at, retried, ended_at) on {schema}.quarantine'];
        end if;
        -- A subscription may be declared anew; whether it is paused is an operator's word.
        execute pg_catalog.format('revoke update on {schema}.subscription from %I', '{schema}_worker');
        select pg_catalog.concat('update (', pg_catalog.string_agg(pg_catalog.quote_ident(a.attname), ', '), ') on {schema}.subscription')
        into thing
        from pg_catalog.pg_attribute a
        where a.attrelid = '{schema}.subscription'::pg_catalog.regclass::pg_catalog.oid and a.attnum > 0
            and not a.attisdropped and a.attname <> 'paused_at'::pg_catalog.name;
        given := pg_catalog.array_append(given, thing);
        -- The record: written once.
        foreach thing in array records loop
            given := pg_catalog.array_append(given, pg_catalog.concat('select, insert on {schema}.', thing));
        end loop;
        foreach thing in array given loop
            execute pg_catalog.format('grant %s to %I', thing, '{schema}_worker');
        end loop;
    end if;

    if 'operator' = any (made) then
        if pg_catalog.to_regclass('{schema}.schedule') is not null then
            execute pg_catalog.format('grant insert, update, delete on {schema}.schedule to %I', '{schema}_operator');
        end if;
        if pg_catalog.to_regclass('{schema}.lane') is not null then
            execute pg_catalog.format('grant insert, update, delete on {schema}.key_state to %I', '{schema}_operator');
            -- A row lock needs the right to update some column.
            execute pg_catalog.format('grant update (leaving) on {schema}.lane to %I', '{schema}_operator');
            execute pg_catalog.format('grant update (name) on {schema}.worker to %I', '{schema}_operator');
        end if;
        if pg_catalog.to_regclass('{schema}.source') is not null then
            execute pg_catalog.format('grant update (paused_at) on {schema}.source to %I', '{schema}_operator');
            execute pg_catalog.format('grant delete, update (retry_at) on {schema}.quarantine to %I', '{schema}_operator');
        end if;
        foreach thing in array array[
            'usage on sequence {schema}.delivery_id',
            'update (epoch) on {schema}.routing',
            'update (removed_at) on {schema}.subscription',
            'insert, delete on {schema}.ready, {schema}.scheduled, {schema}.dead_letter',
            -- A replay holds what it repeats; a row lock needs the right to update some column.
            'update (rev) on {schema}.dead_letter',
            'insert, update, delete on {schema}.doubt',
            'update (told_at) on {schema}.retention',
            'insert on {schema}.late_delivery, {schema}.resolution, {schema}.observation']
        loop
            execute pg_catalog.format('grant %s to %I', thing, '{schema}_operator');
        end loop;
        if exists (
            select from pg_catalog.pg_attribute a
            where a.attrelid = '{schema}.subscription'::pg_catalog.regclass::pg_catalog.oid
                and a.attname = 'paused_at'::pg_catalog.name and not a.attisdropped
        ) then
            execute pg_catalog.format('grant update (paused_at) on {schema}.subscription to %I', '{schema}_operator');
        end if;
    end if;

    -- Reading everything.
    foreach holder in array array['operator', 'viewer'] loop
        continue when not holder = any (made);
        for door in
            select c.oid::pg_catalog.regclass as name from pg_catalog.pg_class c
            where c.relnamespace = '{schema}'::pg_catalog.regnamespace::pg_catalog.oid
                and c.relname = any (array['migration', 'routing', 'subscription', 'route', 'message', 'late_delivery',
                    'unrouted', 'dedup', 'ready', 'scheduled', 'worker', 'lease', 'attempt', 'outcome', 'outcome_part',
                    'doubt', 'dead_letter', 'resolution', 'observation', 'audit_counter', 'audit', 'retention', 'thinned',
                    'message_window', 'ring', 'reference', 'flow_limit', 'permit', 'schedule', 'lane', 'key_state',
                    'one_per_key', 'key_holder', 'coalesced', 'source', 'source_tally', 'inbox', 'quarantine', 'relay', 'relay_tally',
                    'attempts', 'leased', 'delivery']::pg_catalog.name[])
        loop
            execute pg_catalog.format('grant select on %s to %I', door.name, pg_catalog.concat('{schema}_', holder));
        end loop;
    end loop;
end
$roles$;
