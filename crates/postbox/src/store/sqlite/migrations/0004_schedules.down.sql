-- The schedules go with their table.
drop table postbox_schedule;
