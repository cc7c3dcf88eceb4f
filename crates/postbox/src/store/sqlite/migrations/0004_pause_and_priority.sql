-- Deliveries of a paused subscription wait.
alter table postbox_subscription add column paused_at integer;
