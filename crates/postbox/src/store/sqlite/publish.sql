-- Stores messages and fans them out, in order: ?1 is a JSON array of them. What the insert does is in
-- the trigger postbox_publish_insert. Only what one of them has is read: each look costs.
insert into postbox_publish ({columns})
select {values}
from json_each(?1)
