drop function {schema}.publish_many;
