//! Worker processes that are really killed (SIGKILL), at named points, on both stores.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use postbox::admin::Filter;
use postbox::lifecycle::State;
use postbox::{Envelope, Error, Postbox, Postgres, PublishError};
use postbox_testkit::{Fresh, Remote, Testable, WorkerProcess, on_both_stores};

on_both_stores!(
    killed_at_each_point,
    the_honest_batch,
    a_chain_of_three_killed_between_its_steps,
    nothing_is_stranded,
    a_signal_stops_gracefully,
    a_second_signal_stops_at_once,
    a_puller_killed_in_its_transaction,
    a_limit_holds_while_workers_are_killed,
    batches_killed_at_each_point,
    batches_get_through_while_workers_are_killed,
    a_key_has_one_delivery_while_workers_are_killed,
);

const WORKER: &str = env!("CARGO_BIN_EXE_postbox-test-worker");

async fn publish<Db: Testable>(postbox: &Postbox<Db>, topic: &str, count: usize) {
    postbox.publish_now((0..count).map(|n| Envelope::json(topic, &n))).await.expect("publish");
}

/// How many deliveries stand where.
async fn standing<Db: Testable>(fresh: &Fresh<Db>) -> BTreeMap<State, usize> {
    let mut counts = BTreeMap::new();
    for row in fresh.postbox.admin().list(&Filter::default(), 10_000).await.expect("list") {
        *counts.entry(row.state).or_default() += 1;
    }
    counts
}

/// Looks until it is so, a minute at most.
async fn until<Db: Testable>(fresh: &Fresh<Db>, what: &str, so: impl Fn(&BTreeMap<State, usize>) -> bool) {
    within(Duration::from_secs(60), fresh, what, so).await;
}

async fn within<Db: Testable>(
    most: Duration,
    fresh: &Fresh<Db>,
    what: &str,
    so: impl Fn(&BTreeMap<State, usize>) -> bool,
) {
    let looking = async {
        while !so(&standing(fresh).await) {
            tokio::task::yield_now().await;
        }
    };
    if tokio::time::timeout(most, looking).await.is_err() {
        panic!("not {what} within {most:?}: {:?}", standing(fresh).await);
    }
}

fn settled(counts: &BTreeMap<State, usize>) -> bool {
    !counts.contains_key(&State::Pending) && !counts.contains_key(&State::Running)
}

async fn projection<Db: Testable>(fresh: &Fresh<Db>) {
    let sql = format!("create table {} (message text primary key)", fresh.table("projected"));
    Db::execute(fresh, &sql).await;
}

async fn killed_at_each_point<Db: Testable>() {
    let mut hits = BTreeMap::new();
    for point in ["claimed", "attempt-committed", "request-sent", "outcome-commit-sent"] {
        for topic in ["op.charge", "plain.note", "tx.project"] {
            // A plain handler has no record before its call, and a transactional one makes no call.
            if topic != "op.charge" && !["claimed", "outcome-commit-sent"].contains(&point) {
                continue;
            }
            let (fresh, remote) = (Db::fresh().await, Remote::start().await);
            projection(&fresh).await;
            let remote_at = ("TEST_REMOTE", remote.address());
            publish(&fresh.postbox, topic, 3).await;
            let doomed = WorkerProcess::start(
                WORKER,
                &fresh,
                &[remote_at, ("TEST_CONCURRENCY", "1"), ("POSTBOX_CRASH_POINT", point)],
            );
            doomed.kill_at(point).await;
            *hits.entry(point).or_insert(0) += 1;
            let _heir = WorkerProcess::start(WORKER, &fresh, &[remote_at]);
            until(&fresh, "settled", |counts| settled(counts) && counts.values().sum::<usize>() == 3).await;

            let counts = standing(&fresh).await;
            let calls = remote.calls();
            let doubts = counts.get(&State::InDoubt).copied().unwrap_or(0);
            let done = counts.get(&State::Succeeded).copied().unwrap_or(0);
            let told = format!("{topic} killed at {point}: {counts:?}, calls {calls:?}");
            assert_eq!(doubts + done, 3, "{told}");
            match (topic, point) {
                ("op.charge", "claimed") => assert_eq!((doubts, calls.len()), (0, 3), "{told}"),
                ("op.charge", "attempt-committed") => assert_eq!((doubts, calls.len()), (1, 2), "{told}"),
                ("op.charge", "request-sent") => assert_eq!((doubts, calls.len()), (1, 3), "{told}"),
                // The COMMIT was sent and its answer never read: it counts, or it does not. It also
                // put the next attempt on record, whose call was never made.
                ("op.charge", _) => assert!(doubts <= 1 && calls.len() >= done, "{told}"),
                ("plain.note", _) => assert!(doubts == 0 && calls.len() == 3, "{told}"),
                _ => assert_eq!(done, 3, "{told}"),
            }
            if topic == "op.charge" {
                assert!(calls.values().all(|n| *n == 1), "an operation was repeated by itself: {told}");
            }
            if topic == "tx.project" {
                let rows = Db::count(&fresh, &format!("select count(*) from {}", fresh.table("projected"))).await;
                assert_eq!(rows, 3, "effects and outcomes commit together: {told}");
            }
        }
    }
    // Written past the test runner's capture: a run shows its hits also when it passes.
    writeln!(std::io::stderr(), "crash points on {}: {hits:?}", <Db as Testable>::NAME).ok();
    assert_eq!(hits.len(), 4, "a point without a hit proves nothing");
}

async fn the_honest_batch<Db: Testable>() {
    let (fresh, remote) = (Db::fresh().await, Remote::start().await);
    publish(&fresh.postbox, "op.charge", 100).await;
    let variables = [
        ("TEST_REMOTE", remote.address()),
        ("TEST_CONCURRENCY", "1"),
        ("TEST_BATCH", "100"),
        ("POSTBOX_CRASH_POINT", "request-sent"),
    ];
    WorkerProcess::start(WORKER, &fresh, &variables).kill_at("request-sent").await;
    let leased = fresh.postbox.admin().subscriptions().await.expect("subscriptions");
    let charge = leased.iter().find(|s| s.name == "charge").expect("the subscription");
    assert_eq!((charge.pending, charge.running), (99, 1), "claimed is not started, even before the takeover");

    // Somebody else's worker takes over; it has no handler for them, so they stay as they are.
    let other = postbox::Router::<Db>::new();
    let heir = fresh.postbox.worker(other).application("other").start().await.expect("start");
    until(&fresh, "taken over", |counts| counts.get(&State::InDoubt) == Some(&1)).await;
    assert_eq!(standing(&fresh).await, [(State::Pending, 99), (State::InDoubt, 1)].into());
    for row in fresh.postbox.admin().list(&Filter::default(), 200).await.expect("list") {
        let shown = fresh.postbox.admin().show(row.id).await.expect("show");
        match shown.row.state {
            State::InDoubt => {
                assert_eq!((shown.row.attempt, shown.attempts.len()), (1, 1));
                assert_eq!(shown.attempts[0].outcome.as_deref(), Some("in_doubt"));
                assert!(shown.row.last_error.is_some_and(|e| e.contains("lost")));
            }
            _ => assert_eq!((shown.row.attempt, shown.attempts.len()), (0, 0), "not an attempt, not a trace of one"),
        }
    }
    heir.stop(None).await.expect("stop");
}

async fn a_chain_of_three_killed_between_its_steps<Db: Testable>() {
    for nth in 1..=3 {
        for point in ["attempt-committed", "request-sent", "outcome-commit-sent"] {
            let (fresh, remote) = (Db::fresh().await, Remote::start().await);
            let remote_at = ("TEST_REMOTE", remote.address());
            publish(&fresh.postbox, "chain.one", 1).await;
            let crash = format!("{point}:{nth}");
            WorkerProcess::start(WORKER, &fresh, &[remote_at, ("POSTBOX_CRASH_POINT", &crash)]).kill_at(point).await;
            let _heir = WorkerProcess::start(WORKER, &fresh, &[remote_at]);
            let told = format!("killed at {crash}");
            if point == "attempt-committed" {
                // The call was never made; the remote's "nothing" is believed only when the old
                // worker's call can no longer be on its way, so a person says it here.
                until(&fresh, &told, |counts| counts.contains_key(&State::InDoubt)).await;
                let doubts =
                    fresh.postbox.admin().list(&"state:in_doubt".parse().expect("a filter"), 10).await.expect("list");
                let word = postbox::admin::Resolution {
                    rev: None,
                    answer: postbox::lifecycle::Answer::DidNotHappen,
                    evidence: None,
                    actor: "ana".into(),
                    reason: "the worker is dead and the remote has nothing".into(),
                };
                fresh.postbox.admin().resolve(doubts[0].id, &word).await.expect("resolve");
            }
            until(&fresh, &told, |counts| counts.get(&State::Succeeded) == Some(&3)).await;
            let calls = remote.calls();
            assert_eq!(calls.len(), 3, "{told}: {calls:?}");
            assert!(calls.values().all(|n| *n == 1), "{told}: each step once: {calls:?}");
        }
    }
}

async fn nothing_is_stranded<Db: Testable>() {
    let (fresh, remote) = (Db::fresh().await, Remote::start().await);
    let remote_at = ("TEST_REMOTE", remote.address());
    // Published before any worker ever ran.
    publish(&fresh.postbox, "plain.note", 2).await;
    let first = WorkerProcess::start(WORKER, &fresh, &[remote_at]);
    until(&fresh, "handled", |counts| counts.get(&State::Succeeded) == Some(&2)).await;
    first.kill().await;
    // Published while nobody runs, then the handler has another name and another configuration.
    publish(&fresh.postbox, "plain.note", 3).await;
    let renamed = [remote_at, ("TEST_RENAMED", "1"), ("TEST_CONCURRENCY", "2"), ("TEST_BATCH", "1")];
    let second = WorkerProcess::start(WORKER, &fresh, &renamed);
    until(&fresh, "handled", |counts| counts.get(&State::Succeeded) == Some(&5)).await;
    second.kill().await;
    assert!(remote.calls().values().all(|n| *n == 1) && remote.calls().len() == 5, "{:?}", remote.calls());

    // The old name again, without a word of the renaming: what waits for the other is told, loudly.
    publish(&fresh.postbox, "plain.note", 1).await;
    let third = WorkerProcess::start(WORKER, &fresh, &[remote_at]);
    let told = async {
        loop {
            let status = fresh.postbox.admin().status().await.expect("status");
            if let [stranded] = status.stranded.as_slice()
                && status.workers.iter().any(|w| w.alive)
                && status.workers.len() == 1
            {
                break stranded.clone();
            }
            tokio::task::yield_now().await;
        }
    };
    let stranded = tokio::time::timeout(Duration::from_secs(60), told).await.expect("told within a minute");
    assert_eq!((stranded.subscription.as_str(), stranded.waiting), ("noted", 1));
    third.kill().await;
}

async fn a_signal_stops_gracefully<Db: Testable>() {
    let (fresh, remote) = (Db::fresh().await, Remote::start().await);
    publish(&fresh.postbox, "op.charge", 50).await;
    let variables = [("TEST_REMOTE", remote.address()), ("TEST_CONCURRENCY", "2"), ("TEST_BATCH", "50")];
    let mut worker = WorkerProcess::start(WORKER, &fresh, &variables);
    until(&fresh, "at work", |counts| counts.contains_key(&State::Succeeded)).await;
    terminate(&worker);
    assert_eq!(worker.ended().await, Some(0));
    let counts = standing(&fresh).await;
    assert!(!counts.contains_key(&State::InDoubt) && !counts.contains_key(&State::Running), "{counts:?}");
    assert_eq!(counts.values().sum::<usize>(), 50);
    assert_eq!(counts.get(&State::Succeeded).copied().unwrap_or(0), remote.calls().len(), "what was called is settled");
    let status = fresh.postbox.admin().status().await.expect("status");
    assert!(status.workers.is_empty(), "it retired: {:?}", status.workers);
}

fn terminate(worker: &WorkerProcess) {
    let id = worker.id().expect("it lives");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id as i32), nix::sys::signal::Signal::SIGTERM).expect("SIGTERM");
}

async fn a_second_signal_stops_at_once<Db: Testable>() {
    let (fresh, remote) = (Db::fresh().await, Remote::silent().await);
    publish(&fresh.postbox, "op.charge", 3).await;
    let variables = [("TEST_REMOTE", remote.address()), ("TEST_CONCURRENCY", "1"), ("TEST_BATCH", "3")];
    let mut worker = WorkerProcess::start(WORKER, &fresh, &variables);
    until(&fresh, "at work", |counts| counts.contains_key(&State::Running) && !remote.calls().is_empty()).await;
    terminate(&worker);
    // The first signal: what has not begun is handed back, what runs is waited for.
    until(&fresh, "handed back", |counts| counts.get(&State::Pending) == Some(&2)).await;
    let released = async {
        loop {
            let rows = fresh.postbox.admin().list(&"state:pending".parse().expect("a filter"), 10).await.expect("list");
            if rows.iter().all(|r| r.note.is_none()) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), released).await.expect("handed back within a minute");
    assert_eq!(standing(&fresh).await.get(&State::Running), Some(&1));
    terminate(&worker);
    assert_eq!(worker.ended().await, Some(0));
    assert_eq!(standing(&fresh).await, [(State::Pending, 2), (State::InDoubt, 1)].into());
    assert_eq!(remote.calls().len(), 1);
}

async fn a_puller_killed_in_its_transaction<Db: Testable>() {
    let fresh = Db::fresh().await;
    let poison = fresh.postbox.subscription("poison").pattern("poison.>").max_attempts(3);
    poison.declare().await.expect("declare");
    publish(&fresh.postbox, "poison.pill", 1).await;
    // Once with the attempt on record and not yet in the caller's transaction, then in it.
    for point in ["pull-leased", "pulled", "pulled"] {
        let variables = [("TEST_PULL", "poison"), ("POSTBOX_LEASE", "1s"), ("POSTBOX_CRASH_POINT", point)];
        WorkerProcess::start(WORKER, &fresh, &variables).kill_at(point).await;
    }
    // The last one is taken over by whoever lives.
    let heir = fresh.postbox.worker(postbox::Router::<Db>::new()).start().await.expect("start");
    until(&fresh, "dead", |counts| *counts == [(State::Dead, 1)].into()).await;
    let row = fresh.postbox.admin().list(&Filter::default(), 1).await.expect("list").remove(0);
    let shown = fresh.postbox.admin().show(row.id).await.expect("show");
    let lost: Vec<_> = shown.attempts.iter().map(|a| (a.number, a.outcome.as_deref())).collect();
    assert_eq!(lost, [(1, Some("lost")), (2, Some("lost")), (3, Some("lost"))], "poison ends as a dead letter");
    heir.stop(None).await.expect("stop");
}

/// What came before it was at work counts: it starts, and stops.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_during_the_start_is_not_lost() {
    let (fresh, remote) = (Postgres::fresh().await, Remote::start().await);
    // A new subscription waits for the routing row.
    let mut held = fresh.pool.begin().await.expect("begin");
    let lock = format!("select 1 from {}.routing for update", fresh.schema());
    sqlx::query(sqlx::AssertSqlSafe(lock)).execute(&mut *held).await.expect("lock");
    let mut worker = WorkerProcess::start(WORKER, &fresh, &[("TEST_REMOTE", remote.address())]);
    let waits = format!(
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%{}.%'",
        fresh.schema()
    );
    let starting = async {
        while Postgres::count(&fresh, &waits).await == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), starting).await.expect("it waits for the lock");
    terminate(&worker);
    held.rollback().await.expect("rollback");
    assert_eq!(worker.ended().await, Some(0), "it has ended by itself");
    assert!(fresh.postbox.admin().status().await.expect("status").workers.is_empty(), "and retired");
}

/// Four processes share three permits; two of them are killed, and what they held comes back.
async fn a_limit_holds_while_workers_are_killed<Db: Testable>() {
    let (fresh, remote) = (Db::fresh().await, Remote::start().await);
    projection(&fresh).await;
    publish(&fresh.postbox, "plain.work", 200).await;
    let mut workers: Vec<WorkerProcess> =
        (0..4).map(|_| WorkerProcess::start(WORKER, &fresh, &[("TEST_REMOTE", remote.address())])).collect();
    for seen in [40, 80] {
        let called = async {
            while remote.calls().len() < seen {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), called).await.expect("they work");
        workers.remove(0).kill().await;
    }
    until(&fresh, "settled", settled).await;
    let counts = standing(&fresh).await;
    assert_eq!(counts.get(&State::Succeeded), Some(&200), "{counts:?}");
    assert_eq!(remote.calls().len(), 200);
    assert!((2..=3).contains(&remote.most_at_once()), "{} at once", remote.most_at_once());
}

/// In the middle of a batch: nothing of it is lost, nothing of it counts twice, and what is transactional has its
/// effect once.
async fn batches_killed_at_each_point<Db: Testable>() {
    for point in ["claimed", "batch-done", "outcome-commit-sent"] {
        for topic in ["batch.note", "batch.project"] {
            let (fresh, remote) = (Db::fresh().await, Remote::start().await);
            projection(&fresh).await;
            let remote_at = ("TEST_REMOTE", remote.address());
            publish(&fresh.postbox, topic, 25).await;
            WorkerProcess::start(WORKER, &fresh, &[remote_at, ("POSTBOX_CRASH_POINT", point)]).kill_at(point).await;
            let _heir = WorkerProcess::start(WORKER, &fresh, &[remote_at]);
            until(&fresh, "settled", |counts| settled(counts) && counts.values().sum::<usize>() == 25).await;
            let told = format!("{topic} killed at {point}: {:?}", standing(&fresh).await);
            assert_eq!(standing(&fresh).await, [(State::Succeeded, 25)].into(), "{told}");
            for row in fresh.postbox.admin().list(&Filter::default(), 100).await.expect("list") {
                let attempts = fresh.postbox.admin().show(row.id).await.expect("show").attempts;
                let done = attempts.iter().filter(|a| a.outcome.as_deref() == Some("succeeded")).count();
                assert_eq!(done, 1, "one success on record: {told}: {attempts:?}");
                let numbers: Vec<u32> = attempts.iter().map(|a| a.number).collect();
                assert!(numbers.is_sorted() && numbers.len() <= 2, "one by one: {told}: {attempts:?}");
            }
            match topic {
                "batch.note" => {
                    let calls = remote.calls();
                    // What was called before the kill may be called once more, and not after its success.
                    assert_eq!(calls.len(), 25, "{told}");
                    assert!(calls.values().all(|n| *n <= 2), "{told}: {calls:?}");
                    assert!(point != "claimed" || calls.values().all(|n| *n == 1), "{told}: {calls:?}");
                }
                _ => {
                    let rows = Db::count(&fresh, &format!("select count(*) from {}", fresh.table("projected"))).await;
                    assert_eq!(rows, 25, "effects and outcomes commit together: {told}");
                }
            }
        }
    }
}

/// Four processes, of which two are killed somewhere in their work.
async fn batches_get_through_while_workers_are_killed<Db: Testable>() {
    let (fresh, remote) = (Db::fresh().await, Remote::start().await);
    projection(&fresh).await;
    publish(&fresh.postbox, "batch.note", 300).await;
    publish(&fresh.postbox, "batch.project", 300).await;
    let mut workers: Vec<WorkerProcess> =
        (0..4).map(|_| WorkerProcess::start(WORKER, &fresh, &[("TEST_REMOTE", remote.address())])).collect();
    for seen in [60, 120] {
        let called = async {
            while remote.calls().len() < seen {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), called).await.expect("they work");
        workers.remove(0).kill().await;
    }
    until(&fresh, "settled", |counts| settled(counts) && counts.values().sum::<usize>() == 600).await;
    assert_eq!(standing(&fresh).await, [(State::Succeeded, 600)].into());
    let calls = remote.calls();
    assert_eq!(calls.len(), 300);
    // Two deaths: what their calls were for may have been called once more for each.
    assert!(calls.values().all(|n| *n <= 3), "{calls:?}");
    let rows = Db::count(&fresh, &format!("select count(*) from {}", fresh.table("projected"))).await;
    assert_eq!(rows, 300, "effects and outcomes commit together");
}

/// Publishers go on about the same keys while workers are killed, at points and at random: at no time are two
/// deliveries of a key unfinished, and in the end each key is free.
async fn a_key_has_one_delivery_while_workers_are_killed<Db: Testable>() {
    let (fresh, remote) = (Db::fresh().await, Remote::start().await);
    projection(&fresh).await;
    let remote_at = ("TEST_REMOTE", remote.address());
    let start = |point: Option<&'static str>| {
        let mut variables = vec![remote_at, ("TEST_CONCURRENCY", "2")];
        variables.extend(point.map(|point| ("POSTBOX_CRASH_POINT", point)));
        WorkerProcess::start(WORKER, &fresh, &variables)
    };
    let mut survivor = start(None);
    let only = |topic: &'static str, n: usize| Envelope::json(topic, &n).expect("a draft").key(format!("k{}", n % 5));
    let publish_some = async |from: usize| {
        let (mut stored, mut coalesced) = (0, 0);
        for n in from..from + 20 {
            let published = fresh.postbox.publish_now([only("plain.only", n)]).await.expect("publishes");
            stored += 1;
            coalesced += published.iter().filter(|p| !p.coalesced_into().is_empty()).count();
            match fresh.postbox.publish_now([only("op.only", n)]).await {
                Ok(_) => stored += 1,
                Err(Error::Publish(PublishError::KeyInFlight { .. })) => {}
                Err(error) => panic!("{error}"),
            }
            assert_eq!(doubled(&fresh).await, [""; 0]);
        }
        (stored, coalesced)
    };
    // They are there before anything is published, so that what is published is theirs.
    let subscribed = async {
        while fresh.postbox.admin().subscriptions().await.expect("listed").iter().all(|s| s.name != "only-op") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), subscribed).await.expect("they start");
    let (mut stored, mut coalesced) = (0, 0);
    let points = ["claimed", "attempt-committed", "request-sent", "outcome-commit-sent"];
    for (turn, point) in points.into_iter().enumerate() {
        // The one that is to die at a point has the work to itself.
        survivor.kill().await;
        let doomed = start(Some(point));
        let (sent, ()) = tokio::join!(publish_some(turn * 100), doomed.kill_at(point));
        survivor = start(None);
        for (stored_now, coalesced_now) in [sent, publish_some(turn * 100 + 50).await] {
            stored += stored_now;
            coalesced += coalesced_now;
        }
    }
    // A doubt may end with another attempt; and who was killed asking about one has put it off for a minute.
    let over = |counts: &BTreeMap<State, usize>| settled(counts) && !counts.contains_key(&State::InDoubt);
    within(Duration::from_secs(180), &fresh, "settled", over).await;
    assert_eq!(
        standing(&fresh).await.values().sum::<usize>() + coalesced,
        stored,
        "each has one, or one stands for it"
    );
    assert!(coalesced > 0, "no two of a key met");
    let last = (0..5).flat_map(|n| [only("plain.only", n), only("op.only", n)]);
    let last = fresh.postbox.publish_now(last).await.expect("all are free");
    assert!(last.iter().all(|p| p.coalesced_into().is_empty()));
    drop(survivor);
}

/// Keys of a subscription of which more than one delivery is unfinished.
async fn doubled<Db: Testable>(fresh: &Fresh<Db>) -> Vec<String> {
    let mut seen = BTreeMap::new();
    for row in fresh.postbox.admin().list(&Filter::default(), 10_000).await.expect("list") {
        if matches!(row.state, State::Pending | State::Running | State::InDoubt)
            && let Some(key) = row.key
        {
            *seen.entry(format!("{} {key}", row.subscription)).or_insert(0) += 1;
        }
    }
    seen.into_iter().filter(|(_, many)| *many > 1).map(|(key, _)| key).collect()
}
