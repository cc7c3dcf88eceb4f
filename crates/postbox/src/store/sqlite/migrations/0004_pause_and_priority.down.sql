-- What is paused is handed out again.
alter table postbox_subscription drop column paused_at;
