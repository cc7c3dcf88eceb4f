-- Every message is delivered, however many of its key there are.
drop trigger postbox_unrouted_is_coalesced;
drop trigger postbox_delivery_takes_its_key;
drop view postbox_key_in_flight;
drop table postbox_coalesced;
drop table postbox_key_holder;
drop table postbox_one_per_key;
