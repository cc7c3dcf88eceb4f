-- Ids that have come in are forgotten, and with them what could not become a message.
drop table {schema}.relay_tally, {schema}.relay, {schema}.quarantine, {schema}.inbox, {schema}.source_tally, {schema}.source;
