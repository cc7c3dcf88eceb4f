-- Counts what a transaction has brought. $1 source, $2 slot, then received, duplicate, conflict, quarantined, lost.
insert into {schema}.source_tally as t (source, slot, received, duplicate, conflict, quarantined, lost, last_at)
values ($1, $2, $3, $4, $5, $6, $7, pg_catalog.clock_timestamp())
on conflict (source, slot) do update
    set received = t.received + excluded.received, duplicate = t.duplicate + excluded.duplicate,
        conflict = t.conflict + excluded.conflict, quarantined = t.quarantined + excluded.quarantined,
        lost = t.lost + excluded.lost, last_at = excluded.last_at
