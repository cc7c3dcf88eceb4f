-- Ids that have come in are forgotten, and with them what could not become a message.
drop table postbox_relay;
drop table postbox_quarantine;
drop table postbox_inbox;
drop table postbox_source;
