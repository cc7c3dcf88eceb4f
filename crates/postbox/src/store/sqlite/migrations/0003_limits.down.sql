drop table postbox_permit;
drop table postbox_flow_limit;
