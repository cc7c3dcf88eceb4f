-- Finds the flush that a delivery succeeded in. An index on both ends is read from one of them to the end of
-- the queue: as slow as there are flushes, and a quiet service has one for each message.
create index outcome_part_delivery on {schema}.outcome_part
    using gist (pg_catalog.int8range(lowest, highest, '[]')) where highest is not null;
