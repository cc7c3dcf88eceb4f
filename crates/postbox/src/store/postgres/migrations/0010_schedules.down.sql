-- The schedules go with their table.
drop table {schema}.schedule;
