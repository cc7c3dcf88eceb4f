-- Moves what is due from scheduled to the end of ready. $1 milliseconds: only what came due since then;
-- null: all.
with due as materialized (
    select s.ctid as place from {schema}.scheduled s
    where s.due_at <= pg_catalog.statement_timestamp()
        and s.due_at > coalesce(
            pg_catalog.statement_timestamp() - interval '1 millisecond' * $1::bigint::double precision,
            timestamp with time zone '-infinity')
    order by s.due_at
    limit 1000
    for update skip locked
),
gone as (
    -- As in claim.sql.
    delete from {schema}.scheduled s where s.ctid = any (array(select d.place from due d)) returning s.*
)
insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
select g.subscription, g.priority, (g.pos >> 20) & 3::bigint,
    -- In a lane each keeps its own place.
    case when g.priority < {lanes} then g.pos else g.delivery end, g.delivery, g.message, g.attempt, g.lost, g.rev
from (
    select o.*, pg_catalog.nextval('{schema}.delivery_id') as pos
    from (select * from gone order by due_at, delivery) o
) g
