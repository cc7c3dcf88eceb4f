//! Planted bugs that stand in a statement: another clause in the place of the right one.

use std::borrow::Cow;

use crate::planted::is;

/// The bug, its statement, the right clause and the wrong one.
const CLAUSES: [(&str, &str, &str, &str); 3] = [
    (
        "settle-without-lease",
        "settle_part",
        "select l.batch from {schema}.lease l where l.token = $1 and l.batch = $2 for share",
        "select $2::bigint as batch where $1::pg_catalog.uuid is not null",
    ),
    (
        "sequence-as-cursor",
        "claim",
        "where r.subscription = w.subscription\n",
        "where r.subscription = w.subscription
            and r.pos > coalesce((select pg_catalog.max(p.highest) from {schema}.outcome_part p), 0::bigint)\n",
    ),
    (
        "claim-without-life",
        "claim",
        "select w.id from {schema}.worker w
    where w.id = $1 and w.expires_at > pg_catalog.clock_timestamp()
    for key share",
        "select $1::pg_catalog.uuid as id",
    ),
];

/// The statement as it is, or with a bug in it.
pub(super) fn vary<'a>(statement: &str, sql: &'a str) -> Cow<'a, str> {
    let mut sql = Cow::Borrowed(sql);
    for (bug, planted_in, right, wrong) in CLAUSES {
        if planted_in == statement {
            assert_eq!(sql.matches(right).count(), 1, "the clause that `{bug}` replaces is not in `{statement}`");
            if is(bug) {
                sql = Cow::Owned(sql.replace(right, wrong));
            }
        }
    }
    sql
}
