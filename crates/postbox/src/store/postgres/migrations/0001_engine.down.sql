-- Drops what 0001_engine made, and nothing else: what somebody put on top of it refuses.
drop view {schema}.delivery, {schema}.leased, {schema}.attempts;
drop function {schema}.retain;
drop function {schema}.forget;
drop function {schema}.uuid_at;
drop function {schema}.publish;
drop function {schema}.publish_checked;
drop function {schema}.publish_batch;
drop function {schema}.publish_duplicates;
drop function {schema}.check_message;
drop function {schema}.uuid7;
drop function {schema}.body_hash;
drop function {schema}.minted_at;
drop table {schema}.audit, {schema}.retention, {schema}.thinned, {schema}.audit_counter, {schema}.observation, {schema}.resolution, {schema}.dead_letter,
    {schema}.doubt, {schema}.outcome_part, {schema}.outcome, {schema}.attempt, {schema}.lease, {schema}.worker,
    {schema}.scheduled, {schema}.ready, {schema}.dedup, {schema}.unrouted, {schema}.late_delivery, {schema}.message,
    {schema}.route, {schema}.subscription, {schema}.routing;
drop sequence {schema}.delivery_id, {schema}.batch_id;
