-- Takes back what 0002_pull made. Subscriptions that were declared through it stay.
drop function {schema}.failed(bigint, text, interval, int);
drop function {schema}.next(text, text);
drop function {schema}.forgo_attempts(uuid, uuid);
drop function {schema}.pulled_subscription(text, text);
drop function {schema}.subscribe(text, text, text, int, text);
drop function {schema}.backoff_ceiling_ms(bigint, bigint, int);
drop function {schema}.pattern_matcher(text);
