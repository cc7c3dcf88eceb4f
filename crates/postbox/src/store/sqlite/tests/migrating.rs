use super::*;
use crate::admin::Filter;
use crate::store::sqlite::connect::{HEAD, MIGRATIONS};
use crate::store::{Guarded, Loss};

/// One worker that has died, and a delivery in each place, as version 1 kept them.
const FILLED: &str = "
    insert into postbox_subscription (id, application, name, pattern, segments, kind, idempotent, max_attempts,
        retry_base_ms, retry_cap_ms, timeout_ms, quiet_ms, keep_succeeded_ms, keep_dead_ms, reconciles, continues,
        start, epoch, backfilled, created_at)
    values (1, 'shop', 'mail', 'a', '[\"a\"]', 'plain', 0, 3, 1000, 1000, 60000, 1000, 2592000000, 2592000000, 0, 0, 'now', 1, 1, 1),
        (2, 'shop', 'charge', 'b', '[\"b\"]', 'operation', 0, 3, 1000, 1000, 60000, 1000, 2592000000, 2592000000, 0, 0, 'now', 1, 1, 1);
    insert into postbox_worker (id, name, application, subscriptions, idempotent, lease_ms, lock_file, started_at)
    values (x'01900000000070008000000000000001', 'host:1', 'shop', '[1,2]', '[]', 30000, 'gone.lock', 1);
    insert into postbox_lease (batch, token, worker, claimed_at)
    values (7, x'01900000000070008000000000000002', x'01900000000070008000000000000001', 1);
    with recursive n(n) as (select 1 union all select n + 1 from n where n < 9)
    insert into postbox_message (seq, id, epoch, topic, payload)
    select n, unhex(printf('0190000000007000800000000001%04x', n)), 1, 'a', printf('%d', n) from n;
    with now as materialized (select now from postbox_clock)
    insert into postbox_delivery (id, message, subscription, state, pos, due_at, attempt, begun, lost, rev, token, since, note, quiet_at, ask_at)
    select d.column1, (select id from postbox_message where seq = d.column1), d.column2, d.column3, d.column1,
        case when d.column3 = 'pending' and d.column4 > 0 then now + 3600000 end, d.column4, d.column5, 0, d.column6,
        case when d.column3 = 'running' then x'01900000000070008000000000000002' end, now,
        case when d.column3 in ('in_doubt', 'dead', 'cancelled') then 'why' end,
        case when d.column3 = 'in_doubt' then 1 end, case when d.column3 = 'in_doubt' then 1 end
    from now cross join (values
        (1, 1, 'pending', 0, 0, 0), (2, 1, 'pending', 1, 0, 2), (3, 1, 'running', 0, 0, 1),
        (4, 2, 'running', 1, 1, 1), (5, 2, 'in_doubt', 1, 0, 2), (6, 1, 'dead', 3, 0, 6),
        (7, 1, 'cancelled', 0, 0, 1), (8, 1, 'succeeded', 1, 0, 2), (9, 1, 'succeeded', 2, 0, 4)) d;
    insert into postbox_attempt (delivery, number, batch, worker, started_at)
    values (4, 1, 7, x'01900000000070008000000000000001', 1);
    insert into postbox_outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker, started_at, finished_at, error)
    select d.column1, d.column2, d.column3, d.column4, 2 * d.column2, 1, (select id from postbox_message where seq = d.column1),
        1, x'01900000000070008000000000000001', 5, 9, d.column5
    from (values (8, 1, 'succeeded', 'succeeded', null), (9, 1, 'failed', 'pending', 'no'), (9, 2, 'succeeded', 'succeeded', null)) d;";

async fn listed(store: &SqliteStore) -> Vec<(i64, State, u32, i32)> {
    let list = store.list(&Filter::default(), 100).await.expect("lists");
    list.iter().rev().map(|d| (d.id, d.state, d.attempt, d.rev)).collect()
}

#[tokio::test]
async fn unfinished_work_and_the_record_come_along_from_version_1() {
    let folder = tempfile::tempdir().expect("a folder");
    let url = format!("sqlite:{}?mode=rwc", folder.path().join("shop.db").display());
    let mut old = SqliteConnection::connect(&url).await.expect("connects");
    let (name, up, _) = MIGRATIONS[0];
    for sql in [HEAD, up, FILLED] {
        sqlx::raw_sql(sql).execute(&mut old).await.expect("version 1");
    }
    let record = "insert into postbox_migration (version, name, applied_at) values (1, ?1, 1)";
    sqlx::query(record).bind(name).execute(&mut old).await.expect("version 1");
    old.close().await.expect("closes");

    let store = open(folder.path()).await;
    assert_eq!(store.migration_status().await.expect("status").migrations.len(), MIGRATIONS.len());
    use State::{Cancelled, Dead, InDoubt, Pending, Running, Succeeded};
    let all = [
        (1, Pending, 0, 0),
        (2, Pending, 1, 2),
        (3, Running, 0, 1),
        (4, Running, 1, 1),
        (5, InDoubt, 1, 2),
        (6, Dead, 3, 6),
        (7, Cancelled, 0, 1),
        (8, Succeeded, 1, 2),
        (9, Succeeded, 2, 4),
    ];
    assert_eq!(listed(&store).await, all);
    let shown = store.show(9).await.expect("shows").expect("is there");
    let outcomes: Vec<_> = shown.attempts.iter().map(|a| a.outcome.as_deref()).collect();
    assert_eq!((outcomes, shown.envelope.is_some()), (vec![Some("failed"), Some("succeeded")], true));

    // What its dead worker left is taken over as ever.
    let taken = store.take_over(0.5).await.expect("looks").expect("it is dead");
    assert_eq!((taken.pending, taken.in_doubt, taken.dead), (1, 1, 0));
    let (worker, ids) = register(&store, vec![declared("mail", "a")]).await;
    assert_eq!(ids, [1]);
    let (claimed, lease) = claim(&store, worker, 1, 10).await;
    let items: Vec<_> = claimed.items.iter().map(|i| (i.delivery, i.rev, i.lost)).collect();
    assert_eq!(items, [(1, 1, 0), (3, 3, 1)]);
    let settle = Settle {
        successes: vec![success(&claimed.items[0])],
        moves: vec![moved(&claimed.items[1], State::Succeeded, 1, "succeeded")],
        close: true,
        ..flush(lease, 0)
    };
    assert_eq!(store.settle(&settle).await.expect("settles"), Guarded::Done);
    let status = store.status().await.expect("status");
    assert_eq!(status.subscriptions.iter().find(|s| s.name == "mail").map(|s| s.succeeded_last_hour), Some(4));
    assert_eq!(listed(&store).await.iter().filter(|d| d.1 == State::Succeeded).count(), 4);
}

#[tokio::test]
async fn the_way_back_to_version_1_and_up_again_loses_nothing() {
    let shop = Shop::new().await;
    let (claimed, lease) = shop.claimed(declared("all", ">"), 5).await;
    let settle = Settle {
        successes: claimed.items[..2].iter().map(success).collect(),
        moves: vec![moved(&claimed.items[2], State::Dead, 1, "failed")],
        ..flush(lease, 0)
    };
    assert_eq!(shop.store.settle(&settle).await.expect("settles"), Guarded::Done);
    let before = listed(&shop.store).await;
    let attempts =
        async |delivery| format!("{:?}", shop.store.show(delivery).await.expect("shows").expect("is there").attempts);
    let first = attempts(claimed.items[0].delivery).await;
    assert!(
        matches!(shop.store.migrate_down(1, Loss::Refused).await, Err(crate::error::Error::Refused(_))),
        "it lives"
    );
    assert_eq!(
        shop.store.migrate_down(1, Loss::Accepted).await.expect("down"),
        [
            "0008 inbox",
            "0007 unique",
            "0006 order",
            "0005 pause_and_priority",
            "0004 schedules",
            "0003 limits",
            "0002 successes"
        ]
    );
    let states = "select group_concat(state, ' ') from (select state from postbox_delivery order by id)";
    let states: String = sqlx::query_scalar(states).fetch_one(&shop.store.reader).await.expect("version 1");
    assert_eq!(states, "succeeded succeeded dead running running");
    let up = [
        "0002 successes",
        "0003 limits",
        "0004 schedules",
        "0005 pause_and_priority",
        "0006 order",
        "0007 unique",
        "0008 inbox",
    ];
    assert_eq!(shop.store.migrate().await.expect("up"), up);
    assert_eq!(listed(&shop.store).await, before);
    assert_eq!(attempts(claimed.items[0].delivery).await, first);
    // The lease goes on with what it held.
    let rest = Settle { successes: claimed.items[3..].iter().map(success).collect(), close: true, ..flush(lease, 1) };
    assert_eq!(shop.store.settle(&rest).await.expect("settles"), Guarded::Done);
    assert_eq!(listed(&shop.store).await.iter().filter(|d| d.1 == State::Succeeded).count(), 4);
}
