-- Whether a flush is on record. In a statement of its own: it must see what committed meanwhile.
select exists (select from {schema}.outcome_part p where p.batch = $1 and p.part = $2) as found
