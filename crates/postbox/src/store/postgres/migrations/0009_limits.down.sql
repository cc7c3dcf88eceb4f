drop table {schema}.permit;
drop table {schema}.flow_limit;
