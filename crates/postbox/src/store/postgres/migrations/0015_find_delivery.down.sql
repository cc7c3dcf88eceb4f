drop index {schema}.outcome_part_delivery;
