//! Schedules: each tick is published once, whoever looks; what was missed goes by the policy; and what
//! operators change counts from the next tick on. Nobody waits for a tick here that can be made due.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use postbox::admin::{Filter, ScheduleEdit};
use postbox::lifecycle::Kind;
use postbox::store::{Store, Ticked};
use postbox::{Envelope, Error, Missed, Postbox, Router, Schedule, ScheduleRow, Scheduled};
use postbox_testkit::{Fresh, Testable, hand, on_both_stores};

on_both_stores!(
    many_who_look_at_once_publish_each_tick_once,
    what_was_missed_goes_by_the_policy,
    daylight_saving_time_neither_loses_nor_doubles_a_day,
    an_edit_counts_from_the_next_tick_on,
    paused_and_resumed_it_has_missed_nothing,
    a_run_is_one_message_beside_the_ticks,
    what_programs_declare_does_not_undo_what_operators_want,
    a_running_worker_hears_of_a_schedule_at_once,
    bad_schedules_are_refused_by_name,
    schedules_are_not_lost_unasked,
);

const MINUTE: SignedDuration = SignedDuration::from_secs(60);

fn table<Db: Testable>(fresh: &Fresh<Db>, name: &str) -> String {
    match <Db as Testable>::NAME {
        "postgres" => format!("{}.{name}", fresh.schema()),
        _ => format!("postbox_{name}"),
    }
}

/// Somebody takes what schedules publish, so that it can be listed.
async fn listened<Db: Testable>() -> Fresh<Db> {
    let fresh = Db::fresh().await;
    let declared = [hand::declared("all", ">", Kind::Plain)];
    fresh.postbox.store().declare("test", &declared).await.expect("declare");
    fresh
}

/// As if nobody had looked since then.
async fn waits_since<Db: Testable>(fresh: &Fresh<Db>, name: &str, since: Timestamp) {
    let value = match <Db as Testable>::NAME {
        "postgres" => format!("'{since}'"),
        _ => since.as_millisecond().to_string(),
    };
    let sql = format!("update {} set next_at = {value} where name = '{name}'", table(fresh, "schedule"));
    Db::execute(fresh, &sql).await;
}

/// What was published, by name: its tick and its payload, the oldest first.
async fn published<Db: Testable>(fresh: &Fresh<Db>, name: &str) -> Vec<(Timestamp, String)> {
    let admin = fresh.postbox.admin();
    let mut found = Vec::new();
    for row in admin.list(&Filter::default(), 10_000).await.expect("list").into_iter().rev() {
        let (envelope, _) = admin.message(row.message).await.expect("there");
        if envelope.headers.get("postbox-schedule").map(String::as_str) != Some(name) {
            continue;
        }
        assert_eq!(envelope.headers["postbox-schedule-tick"], envelope.occurred_at.to_string());
        found.push((envelope.occurred_at, envelope.payload_json().unwrap_or_default().to_owned()));
    }
    found
}

async fn ticks<Db: Testable>(fresh: &Fresh<Db>, name: &str) -> Vec<Timestamp> {
    published(fresh, name).await.into_iter().map(|(tick, _)| tick).collect()
}

/// Looks until nothing is due.
async fn tick<Db: Testable>(postbox: &Postbox<Db>) -> Ticked {
    loop {
        let ticked = postbox.store().tick().await.expect("tick");
        if ticked.next != Some(Duration::ZERO) {
            return ticked;
        }
    }
}

async fn row<Db: Testable>(fresh: &Fresh<Db>, name: &str) -> ScheduleRow {
    let rows = fresh.postbox.admin().schedules().await.expect("schedules");
    rows.into_iter().find(|row| row.name == name).unwrap_or_else(|| panic!("no schedule {name}"))
}

fn minutely(name: &str) -> Schedule {
    Schedule::cron(name, "* * * * *").publishes("every.minute")
}

/// The whole minute that began so long ago.
fn minutes_ago(minutes: i64) -> Timestamp {
    let second = Timestamp::now().as_second() - minutes * 60;
    Timestamp::from_second(second - second.rem_euclid(60)).expect("a time")
}

async fn many_who_look_at_once_publish_each_tick_once<Db: Testable>() {
    let fresh = listened::<Db>().await;
    let names: Vec<String> = (0..8).map(|n| format!("s{n}")).collect();
    let since = minutes_ago(5);
    for name in &names {
        let made = fresh.postbox.schedule(minutely(name).missed(Missed::All)).await.expect("made");
        assert_eq!(made, Scheduled::Made);
        waits_since(&fresh, name, since).await;
    }
    // Three workers' stores, each of which looks from several tasks.
    let mut looks = tokio::task::JoinSet::new();
    let mut stores = Vec::new();
    for _ in 0..3 {
        let postbox: Postbox<Db> = Postbox::open(fresh.settings.clone()).await.expect("open");
        for _ in 0..4 {
            let store = postbox.store().clone();
            looks.spawn(async move {
                let mut published = 0;
                // Whoever finds nothing left that is not in others' hands has done what it could.
                loop {
                    let ticked = store.tick().await.expect("tick");
                    published += ticked.published;
                    if ticked.next != Some(Duration::ZERO) {
                        return published;
                    }
                }
            });
        }
        stores.push(postbox);
    }
    let mut told = 0;
    while let Some(look) = looks.join_next().await {
        told += look.expect("no panic");
    }
    // What was in a dying hand, if anything.
    told += tick(&fresh.postbox).await.published;
    let mut all = 0;
    for name in &names {
        let ticks = ticks(&fresh, name).await;
        assert_eq!(ticks.first(), Some(&since), "{name}");
        assert!(ticks.windows(2).all(|pair| pair[1] == pair[0] + MINUTE), "{name}: {ticks:?}");
        assert!(ticks.len() >= 6, "{name}: {ticks:?}");
        let row = row(&fresh, name).await;
        assert_eq!(row.last_at, ticks.last().copied(), "{name}");
        assert_eq!(row.next_at, ticks.last().map(|last| *last + MINUTE), "{name}");
        all += ticks.len();
    }
    assert_eq!(told, all, "what the looks told is what there is");
    // And even if the row were forgotten, a tick's dedup key is not.
    waits_since(&fresh, "s0", since).await;
    let again = fresh.postbox.store().tick().await.expect("tick");
    let fresh_ticks = ticks(&fresh, "s0").await;
    assert_eq!(fresh_ticks.iter().collect::<BTreeSet<_>>().len(), fresh_ticks.len(), "{again:?}");
    for postbox in stores {
        postbox.close().await;
    }
}

async fn what_was_missed_goes_by_the_policy<Db: Testable>() {
    let fresh = listened::<Db>().await;
    let since = minutes_ago(30);
    for missed in [Missed::Skip, Missed::Once, Missed::All] {
        let name = missed.as_str();
        fresh.postbox.schedule(minutely(name).missed(missed)).await.expect("made");
        waits_since(&fresh, name, since).await;
    }
    tick(&fresh.postbox).await;
    let (skip, once, all) = (ticks(&fresh, "skip").await, ticks(&fresh, "once").await, ticks(&fresh, "all").await);
    let newest = *all.last().expect("some");
    // A minute may begin in the middle of it.
    assert!((31..=32).contains(&all.len()) && all[0] == since, "{all:?}");
    assert!((1..=2).contains(&once.len()) && once[0] >= newest - MINUTE, "{once:?}");
    assert!((1..=2).contains(&skip.len()) && skip[0] >= newest - MINUTE, "{skip:?}");
    for name in ["skip", "once", "all"] {
        let row = row(&fresh, name).await;
        assert!(row.next_at.expect("one to come") >= newest + MINUTE, "{row:?}");
    }
    // Nothing is left of it.
    assert_eq!(fresh.postbox.store().tick().await.expect("tick").published, 0);

    // A thousand of them at most, the oldest first.
    fresh
        .postbox
        .schedule(Schedule::cron("many", "* * * * * *").publishes("many").missed(Missed::All))
        .await
        .expect("made");
    let since = minutes_ago(60);
    waits_since(&fresh, "many", since).await;
    let ticked = fresh.postbox.store().tick().await.expect("tick");
    assert_eq!(ticked.published, 1000);
    let messages = table(&fresh, "message");
    assert!(
        (1000..1100)
            .contains(&Db::count(&fresh, &format!("select count(*) from {messages} where topic = 'many'")).await)
    );
    assert!(row(&fresh, "many").await.last_at >= Some(since + SignedDuration::from_secs(999)));
}

async fn daylight_saving_time_neither_loses_nor_doubles_a_day<Db: Testable>() {
    let fresh = listened::<Db>().await;
    // From before the changes of 2025 on; a day is published once, whatever its clock did.
    for (name, zone, from, cron) in [
        ("berlin", "Europe/Berlin", "2025-03-28T01:30:00Z", "30 2 * * *"),
        ("york", "America/New_York", "2025-03-07T06:30:00Z", "30 1,2 * * *"),
    ] {
        let schedule = Schedule::cron(name, cron).time_zone(zone).publishes(name).missed(Missed::All);
        fresh.postbox.schedule(schedule).await.expect("made");
        waits_since(&fresh, name, from.parse().expect("a time")).await;
    }
    tick(&fresh.postbox).await;
    let of = async |topic: &str, from: &str, to: &str| {
        let (from, to): (Timestamp, Timestamp) = (from.parse().expect("a time"), to.parse().expect("a time"));
        let column = match <Db as Testable>::NAME {
            "postgres" => "cast(extract(epoch from occurred_at) * 1000000 as bigint)",
            _ => "occurred_us",
        };
        let sql = format!(
            "select count(*) from {} where topic = '{topic}' and {column} >= {} and {column} < {}",
            table(&fresh, "message"),
            from.as_microsecond(),
            to.as_microsecond()
        );
        Db::count(&fresh, &sql).await
    };
    // Spring in Berlin: 01:30Z, then at the jump (01:00Z), then 00:30Z.
    assert_eq!(of("berlin", "2025-03-29T01:30:00Z", "2025-03-29T01:30:01Z").await, 1);
    assert_eq!(of("berlin", "2025-03-30T00:00:00Z", "2025-03-31T00:00:00Z").await, 1);
    assert_eq!(of("berlin", "2025-03-30T01:00:00Z", "2025-03-30T01:00:01Z").await, 1);
    assert_eq!(of("berlin", "2025-03-31T00:30:00Z", "2025-03-31T00:30:01Z").await, 1);
    // Autumn: the first of the two half past two.
    assert_eq!(of("berlin", "2025-10-26T00:00:00Z", "2025-10-27T00:00:00Z").await, 1);
    assert_eq!(of("berlin", "2025-10-26T00:30:00Z", "2025-10-26T00:30:01Z").await, 1);
    assert_eq!(of("berlin", "2025-03-28T01:30:00Z", "2026-03-28T01:30:00Z").await, 365);
    // New York, two a day: in spring 01:30 and, at the jump, 02:30; in autumn 01:30 once.
    assert_eq!(of("york", "2025-03-09T05:00:00Z", "2025-03-10T04:00:00Z").await, 2);
    assert_eq!(of("york", "2025-03-09T07:00:00Z", "2025-03-09T07:00:01Z").await, 1);
    assert_eq!(of("york", "2025-11-02T04:00:00Z", "2025-11-03T05:00:00Z").await, 2);
    assert_eq!(of("york", "2025-11-02T05:30:00Z", "2025-11-02T05:30:01Z").await, 1);
    assert_eq!(of("york", "2025-03-08T05:00:00Z", "2026-03-08T05:00:00Z").await, 730);
}

async fn an_edit_counts_from_the_next_tick_on<Db: Testable>() {
    let fresh = listened::<Db>().await;
    let admin = fresh.postbox.admin();
    let payload = serde_json::json!({ "version": 1 });
    fresh.postbox.schedule(minutely("m").payload(&payload).key("k").header("a", "b")).await.expect("made");
    waits_since(&fresh, "m", minutes_ago(0)).await;
    tick(&fresh.postbox).await;
    let before = row(&fresh, "m").await;
    // Digits are kept; the times stay, and so does the next tick.
    let edit = ScheduleEdit {
        rev: Some(before.rev),
        payload: Some(r#"{"version": 2.50}"#.into()),
        missed: Some(Missed::All),
        ..ScheduleEdit::default()
    };
    let entry = admin.edit_schedule("test", "m", &edit, "ana", "a new version").await.expect("edit");
    assert_eq!(
        (entry.action.as_str(), entry.actor.as_str(), entry.rev_after),
        ("edit schedule test/m", "ana", Some(2))
    );
    let after = row(&fresh, "m").await;
    assert_eq!((after.next_at, after.rev, after.edited_by.as_deref()), (before.next_at, 2, Some("ana")));
    assert!(matches!(admin.edit_schedule("test", "m", &edit, "bo", "late").await, Err(Error::Conflict(_))));
    // Other times: what is due by the former ones and not published yet is not published.
    waits_since(&fresh, "m", minutes_ago(3)).await;
    let edit = ScheduleEdit {
        cron: Some("0 3 * * *".into()),
        time_zone: Some("Asia/Tokyo".into()),
        ..ScheduleEdit::default()
    };
    admin.edit_schedule("test", "m", &edit, "ana", "at night").await.expect("edit");
    assert_eq!(tick(&fresh.postbox).await.published, 0);
    let next = row(&fresh, "m").await.next_at.expect("one to come");
    assert!(next.to_string().ends_with("T18:00:00Z"), "{next}");
    waits_since(&fresh, "m", next - SignedDuration::from_hours(24)).await;
    tick(&fresh.postbox).await;
    let published = published(&fresh, "m").await;
    assert_eq!(published[0].1, r#"{"version":1}"#);
    assert_eq!(published.last(), Some(&(next - SignedDuration::from_hours(24), r#"{"version": 2.50}"#.to_owned())));
    // A tick that was published is not published again when the times come back.
    let last = row(&fresh, "m").await.last_at.expect("published");
    let edit = ScheduleEdit { cron: Some("* * * * *".into()), ..ScheduleEdit::default() };
    admin.edit_schedule("test", "m", &edit, "ana", "as before").await.expect("edit");
    assert!(row(&fresh, "m").await.next_at > Some(last));

    // What is wrong changes nothing.
    let wrong = ScheduleEdit { cron: Some("0 3 * *".into()), ..ScheduleEdit::default() };
    assert!(matches!(admin.edit_schedule("test", "m", &wrong, "ana", "x").await, Err(Error::Settings(_))));
    assert!(matches!(admin.edit_schedule("test", "n", &edit, "ana", "x").await, Err(Error::NotFound(_))));
    assert!(matches!(admin.edit_schedule("other", "m", &edit, "ana", "x").await, Err(Error::NotFound(_))));
    assert_eq!(row(&fresh, "m").await.plan.cron, "* * * * *");
    let audit = admin.audit(10).await.expect("audit");
    assert_eq!(audit.iter().filter(|entry| entry.action == "edit schedule test/m").count(), 3);
}

async fn paused_and_resumed_it_has_missed_nothing<Db: Testable>() {
    let fresh = listened::<Db>().await;
    let admin = fresh.postbox.admin();
    fresh.postbox.schedule(minutely("m").missed(Missed::All)).await.expect("made");
    waits_since(&fresh, "m", minutes_ago(5)).await;
    admin.pause_schedule("test", "m", "ana", "too many").await.expect("pause");
    let paused = row(&fresh, "m").await;
    assert!(paused.paused_at.is_some() && paused.next_at.is_none());
    assert_eq!(tick(&fresh.postbox).await, Ticked { published: 0, next: None });
    assert!(matches!(admin.pause_schedule("test", "m", "ana", "twice").await, Err(Error::Refused(_))));
    // A program that starts meanwhile does not go on with it.
    let changed = fresh.postbox.schedule(minutely("m").missed(Missed::Skip)).await.expect("declare");
    assert_eq!((changed, row(&fresh, "m").await.next_at), (Scheduled::Changed, None));
    admin.resume_schedule("test", "m", "ana", "enough").await.expect("resume");
    assert!(matches!(admin.resume_schedule("test", "m", "ana", "twice").await, Err(Error::Refused(_))));
    let resumed = row(&fresh, "m").await;
    assert!(resumed.paused_at.is_none() && resumed.next_at > paused.paused_at, "{resumed:?}");
    assert_eq!(ticks(&fresh, "m").await, []);
    admin.remove_schedule("test", "m", "ana", "not wanted").await.expect("remove");
    assert!(admin.schedules().await.expect("schedules").is_empty());
    assert!(matches!(admin.remove_schedule("test", "m", "ana", "twice").await, Err(Error::NotFound(_))));
    let actions: Vec<String> = admin.audit(10).await.expect("audit").into_iter().map(|entry| entry.action).collect();
    assert_eq!(actions, ["remove schedule test/m", "resume schedule test/m", "pause schedule test/m"]);
}

async fn a_run_is_one_message_beside_the_ticks<Db: Testable>() {
    let fresh = listened::<Db>().await;
    let admin = fresh.postbox.admin();
    fresh.postbox.schedule(Schedule::cron("yearly", "0 0 1 1 *").publishes("y")).await.expect("made");
    let before = row(&fresh, "yearly").await;
    for paused in [false, true] {
        if paused {
            admin.pause_schedule("test", "yearly", "ana", "not this year").await.expect("pause");
        }
        admin.run_schedule("test", "yearly", "ana", "now").await.expect("run");
        admin.run_schedule("test", "yearly", "bo", "now").await.expect("run again");
        let asked = row(&fresh, "yearly").await.run_at.expect("asked for");
        assert_eq!(fresh.postbox.store().tick().await.expect("tick").published, 1);
        assert_eq!(ticks(&fresh, "yearly").await.last(), Some(&asked));
        let after = row(&fresh, "yearly").await;
        assert_eq!((after.run_at, after.last_at), (None, None), "no tick");
        assert_eq!(after.next_at, if paused { None } else { before.next_at });
    }
    assert_eq!(ticks(&fresh, "yearly").await.len(), 2);
}

async fn what_programs_declare_does_not_undo_what_operators_want<Db: Testable>() {
    let fresh = listened::<Db>().await;
    let admin = fresh.postbox.admin();
    let nightly = |hour: u32| Schedule::cron("nightly", format!("0 {hour} * * *")).publishes("reports.nightly");
    let app = || Router::new().on("reports.nightly", postbox::handler(async |_: Envelope| {}).named("report"));
    let start = async |hour: u32| {
        let worker = fresh.postbox.worker(app()).schedule(nightly(hour)).start().await.expect("start");
        worker.stop(None).await.expect("stop");
        row(&fresh, "nightly").await.plan.cron
    };
    assert_eq!(start(3).await, "0 3 * * *");
    assert_eq!(fresh.postbox.schedule(nightly(3)).await.expect("declare"), Scheduled::AsItWas);
    assert_eq!(start(4).await, "0 4 * * *", "nobody has edited it");
    let edit = ScheduleEdit { cron: Some("30 5 * * *".into()), ..ScheduleEdit::default() };
    admin.edit_schedule("test", "nightly", &edit, "ana", "later").await.expect("edit");
    assert_eq!(start(4).await, "30 5 * * *", "somebody has");
    assert_eq!(fresh.postbox.schedule(nightly(6)).await.expect("declare"), Scheduled::Edited);
    // Added by an operator, it is the operator's.
    let added = Schedule::cron("weekly", "@weekly").publishes("reports.weekly");
    admin.add_schedule("test", added, "ana", "wanted").await.expect("add");
    let again = Schedule::cron("weekly", "@daily").publishes("reports.weekly");
    assert_eq!(fresh.postbox.schedule(again).await.expect("declare"), Scheduled::Edited);
    let twice = Schedule::cron("weekly", "@daily").publishes("reports.weekly");
    assert!(matches!(admin.add_schedule("test", twice, "ana", "again").await, Err(Error::Refused(_))));
    // In another application it is another.
    let other = Schedule::cron("weekly", "@daily").publishes("reports.weekly");
    admin.add_schedule("other", other, "ana", "wanted there").await.expect("add");
    assert_eq!(admin.schedules().await.expect("schedules").len(), 3);
    // Many that start at once make one.
    let mut starts = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let postbox = fresh.postbox.clone();
        starts.spawn(async move { postbox.schedule(minutely("new")).await.expect("declare") });
    }
    let mut made = 0;
    while let Some(start) = starts.join_next().await {
        made += usize::from(start.expect("no panic") == Scheduled::Made);
    }
    assert_eq!(made, 1);
}

async fn a_running_worker_hears_of_a_schedule_at_once<Db: Testable>() {
    let fresh = listened::<Db>().await;
    let worker = fresh.postbox.worker(Router::new()).start().await.expect("start");
    let secondly = Schedule::cron("s", "* * * * * *").publishes("every.second");
    let admin = fresh.postbox.admin();
    admin.add_schedule("test", secondly, "ana", "wanted").await.expect("add");
    let first = async {
        while ticks(&fresh, "s").await.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    // Of a slow machine it is a matter of seconds.
    tokio::time::timeout(Duration::from_secs(60), first).await.expect("a tick");
    // While it runs, an edit takes hold, and a pause ends it.
    let edit = ScheduleEdit { payload: Some("2".into()), ..ScheduleEdit::default() };
    admin.edit_schedule("test", "s", &edit, "ana", "a new version").await.expect("edit");
    let second = async {
        while published(&fresh, "s").await.iter().all(|(_, payload)| payload != "2") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), second).await.expect("a tick of the new version");
    admin.pause_schedule("test", "s", "ana", "enough").await.expect("pause");
    let paused = ticks(&fresh, "s").await;
    let last = row(&fresh, "s").await.last_at;
    assert_eq!(paused.last().copied(), last);
    assert!(paused.windows(2).all(|pair| pair[0] < pair[1]), "each once: {paused:?}");
    worker.stop(None).await.expect("stop");
    assert_eq!(ticks(&fresh, "s").await, paused, "none since");
}

async fn bad_schedules_are_refused_by_name<Db: Testable>() {
    let fresh = Db::fresh().await;
    let refused = async |schedule: Schedule| {
        let error = fresh.postbox.schedule(schedule).await.expect_err("it cannot be used");
        assert!(matches!(error, Error::Settings(_) | Error::Publish(_)), "{error:?}");
        error.to_string()
    };
    let good = || Schedule::cron("s", "0 3 * * *").publishes("t");
    for (words, schedule) in [
        ("`0 3 * *` is no cron expression: it has 4 fields", Schedule::cron("s", "0 3 * *").publishes("t")),
        ("`0 25 * * *` is no cron expression", Schedule::cron("s", "0 25 * * *").publishes("t")),
        ("no such day", Schedule::cron("s", "0 0 31 2 *").publishes("t")),
        ("no time zone `Mars/Olympus`; give an IANA name, like Europe/Berlin", good().time_zone("Mars/Olympus")),
        ("no time zone ``", good().time_zone("")),
        ("names no topic; say `.publishes(", Schedule::cron("s", "0 3 * * *")),
        ("`a b`", good().publishes("a b")),
        ("the schedule name `` must be 1 to 128 bytes", Schedule::cron("", "0 3 * * *").publishes("t")),
        ("the schedule name `a b`", Schedule::cron("a b", "0 3 * * *").publishes("t")),
        ("the schedule name `a:b`", Schedule::cron("a:b", "0 3 * * *").publishes("t")),
        ("the schedule name", Schedule::cron("n".repeat(129), "0 3 * * *").publishes("t")),
        ("the payload cannot be stored", good().payload_json("{")),
        ("the limit is", good().payload(&"x".repeat(2 << 20))),
        ("the key is 256 bytes long", good().key("k".repeat(256))),
        ("the headers are", good().header("h", "v".repeat(40_000))),
        ("NUL", good().header("h", "\0")),
    ] {
        let said = refused(schedule).await;
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(fresh.postbox.admin().schedules().await.expect("schedules").is_empty());
    // A worker with one of these does not start.
    let bad = Schedule::cron("s", "soon").publishes("t");
    assert!(matches!(fresh.postbox.worker(Router::new()).schedule(bad).start().await, Err(Error::Settings(_))));
    assert!(fresh.postbox.admin().status().await.expect("status").workers.is_empty());

    // What is stored and not understood (by a later version, say) keeps nobody from the others.
    let longest = Schedule::cron("n".repeat(128), "* * * * *").publishes("t");
    fresh.postbox.schedule(longest).await.expect("made");
    fresh.postbox.schedule(minutely("odd")).await.expect("made");
    let sql = format!("update {} set time_zone = 'Mars/Olympus' where name = 'odd'", table(&fresh, "schedule"));
    Db::execute(&fresh, &sql).await;
    for name in ["odd".to_owned(), "n".repeat(128)] {
        waits_since(&fresh, &name, minutes_ago(0)).await;
    }
    let ticked = fresh.postbox.store().tick().await.expect("tick");
    assert_eq!(ticked.published, 1);
    let ticked = fresh.postbox.store().tick().await.expect("tick");
    assert!(ticked.published == 0 && ticked.next >= Some(Duration::from_secs(1)), "{ticked:?}");
}

async fn schedules_are_not_lost_unasked<Db: Testable>() {
    let fresh = Db::fresh().await;
    let status = fresh.postbox.migration_status().await.expect("status");
    let (version, ..) = status.migrations.iter().find(|(_, name, _)| name == "schedules").expect("it is there").clone();
    fresh.postbox.schedule(minutely("m")).await.expect("made");
    let error = fresh.postbox.migrate_down(version - 1).await.expect_err("it has a schedule").to_string();
    assert!(error.contains("has schedules (1)") && error.contains("--and-lose-data"), "{error}");
    fresh.postbox.migrate_down_and_lose_data(version - 1).await.expect("down");
    fresh.postbox.migrate_up().await.expect("up");
    assert!(fresh.postbox.admin().schedules().await.expect("schedules").is_empty());
}
