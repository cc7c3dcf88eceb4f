-- Lets go of the keys of deliveries that end in this transaction. $1 deliveries.
select {schema}.free_keys($1)
