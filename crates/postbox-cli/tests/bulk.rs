//! What is done to many deliveries: `retry`, `cancel` and `replay` with a filter.

use std::process::{Command, Stdio};

use crate::place::{Place, Ran};
use serde_json::Value;
use sqlx::Connection;

/// Two applications with five deliveries each: those of `crm` are odd, those of `mail` even.
fn shop() -> Place {
    let place = Place::new();
    place.run(&["migrate", "up"]).ends(0);
    place.run(&["subscriptions", "add", "crm", "orders.*", "--application", "shop"]).ends(0);
    place.run(&["subscriptions", "add", "mail", "orders.*", "--application", "other"]).ends(0);
    for n in 1..=5 {
        place.run(&["publish", "orders.placed", &n.to_string()]).ends(0);
    }
    place
}

fn sql(place: &Place, statement: &'static str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let url = format!("sqlite:{}", place.file("shop.db").display());
        let mut connection = sqlx::SqliteConnection::connect(&url).await.expect("the file");
        sqlx::query(statement).execute(&mut connection).await.expect("done");
    });
}

#[track_caller]
fn ids(place: &Place, filter: &str) -> Vec<i64> {
    let rows = place.run(&["list", filter, "--json"]).ends(0).json_lines();
    rows.iter().map(|row| row["id"].as_i64().expect("a number")).collect()
}

fn summary(ran: &Ran) -> Value {
    ran.json_lines().last().cloned().unwrap_or_default()
}

/// What a run leaves that Ctrl-C ends, once so many deliveries match.
fn interrupted(place: &Place, args: &[&str], filter: &str, many: usize) -> Ran {
    let mut command = place.command(args);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    while ids(place, filter).len() < many {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("runs").success());
    Ran::of(&child.wait_with_output().expect("ends"))
}

#[test]
fn ctrl_c_says_where_to_go_on() {
    let place = shop();
    let slow = ["--rate", "0.01", "--reason", "over", "--yes", "--json"];
    let args = [&["cancel", "subscription:crm"], slow.as_slice()].concat();
    let ran = interrupted(&place, &args, "state:cancelled", 1).ends(1);
    assert_eq!(summary(&ran), serde_json::json!({"action": "cancel", "done": 1, "refused": 0}));
    assert!(ran.err.contains("cancel subscription:crm --rate 0.01 --reason over --yes"), "{}", ran.err);
    place.run(&["cancel", "subscription:crm", "--reason", "over", "--yes"]).ends(0);

    let args = [&["replay", "subscription:crm"], slow.as_slice()].concat();
    let ran = interrupted(&place, &args, "subscription:crm state:pending", 1).ends(1);
    assert_eq!(summary(&ran)["replayed"], 1, "{}", ran.out);
    let next = ran.err.rsplit("next: ").next().unwrap_or_default().trim_end();
    let above = format!("--above {}", summary(&ran)["upto"]);
    assert!(next.contains(&above) && next.contains("--rate 0.01"), "{}", ran.err);
}

#[test]
fn many_are_called_off_and_tried_again() {
    let place = shop();
    let shown = place.run(&["cancel", "subscription:crm", "--dry-run", "--limit", "2"]).ends(0);
    assert!(shown.out.contains("5  crm of shop  . PENDING"), "{}", shown.out);
    assert!(shown.err.contains("calls off the newest 2 of 5"), "{}", shown.err);
    assert!(shown.err.contains("cancel subscription:crm --limit 2 --reason"), "{}", shown.err);
    let shown = place.run(&["cancel", "subscription:crm", "--dry-run", "--json"]).ends(0).json();
    assert_eq!((shown["deliveries"].as_i64(), shown["sample"].as_array().map(Vec::len)), (Some(5), Some(5)));
    let shown = place.run(&["cancel", "subscription:crm", "--dry-run", "--limit", "2", "--json"]).ends(0).json();
    assert_eq!(shown["sample"].as_array().map(Vec::len), Some(2), "no more than it is done to");
    let unsaid = place.run(&["cancel", "subscription:crm", "--limit", "2", "--yes"]).ends(5);
    assert!(unsaid.err.contains("--limit 2 --yes --reason \"why\""), "{}", unsaid.err);
    let unconfirmed = place.run(&["cancel", "subscription:crm", "--limit", "2", "--reason", "over"]).ends(5);
    assert!(unconfirmed.err.contains("--limit 2 --reason over --yes"), "{}", unconfirmed.err);
    assert!(ids(&place, "state:cancelled").is_empty(), "nothing was done so far");

    let begun = std::time::Instant::now();
    let args = ["cancel", "subscription:crm", "--limit", "2", "--rate", "10", "--reason", "over", "--yes", "--json"];
    let done = place.run(&args).ends(0);
    assert!(begun.elapsed() >= std::time::Duration::from_millis(190), "no faster than it was told");
    assert_eq!(done.json_lines().len(), 3, "{}", done.out);
    assert_eq!(summary(&done), serde_json::json!({"action": "cancel", "done": 2, "refused": 0}));
    assert_eq!(ids(&place, "state:cancelled"), [9, 7]);
    // What was called off, and what waits, is tried again only if it is named.
    let none = place.run(&["retry", "--all", "--reason", "x", "--yes"]).ends(0);
    assert!(none.out.contains("retried 0"), "{}", none.out);
    let args = ["retry", "state:cancelled", "application:shop", "--reason", "wanted", "--yes"];
    assert!(place.run(&args).ends(0).out.contains("retried 2, refused 0"));
    assert!(ids(&place, "state:cancelled").is_empty());
    let all = place.run(&["cancel", "--all", "--reason", "over", "--yes", "--json"]).ends(0);
    assert_eq!(summary(&all)["done"], 10);
    let audit = place.run(&["audit", "--json"]).ends(0).json_lines();
    assert_eq!(audit.len(), 14, "one each");
    assert!(audit[0].get("login").is_some_and(Value::is_null), "SQLite has no logins: {}", audit[0]);

    // One is let through after the other, the rest is for the next run.
    let args = ["replay", "state:cancelled", "subscription:mail", "--limit", "2", "--rate", "1000"];
    let with = |more: &[&'static str]| place.run(&args.iter().copied().chain(more.iter().copied()).collect::<Vec<_>>());
    assert!(with(&["--dry-run"]).ends(0).err.contains("makes 2 of 5 new deliveries"));
    let done = with(&["--reason", "again", "--yes"]).ends(0);
    assert!(done.out.contains("replayed 2, left out 0"), "{}", done.out);
    assert!(done.err.contains("--limit 2 --rate 1000 --above 4 --reason again --yes"), "{}", done.err);
    let above = ["replay", "state:cancelled", "subscription:mail", "--above", "4", "--dry-run"];
    let shown = place.run(&above).ends(0);
    assert!(shown.err.contains("makes 3 new deliveries") && shown.err.contains("--above 4 --reason"), "{}", shown.err);
    let above = ["replay", "state:cancelled", "subscription:mail", "--above", "9", "--preview"];
    assert!(place.run(&above).ends(0).err.contains("makes 1 new delivery,"));
}

#[test]
fn what_cannot_be_done_to_many_is_said() {
    let place = shop();
    for verb in ["retry", "cancel", "replay"] {
        let run = |args: &[&str]| place.run(&[&[verb], args, &["--reason", "x", "--yes"]].concat());
        let doubt = run(&["state:in_doubt"]).ends(5);
        assert!(doubt.err.contains("resolve"), "{}", doubt.err);
        run(&["state:running"]).ends(5);
        run(&[""]).ends(5);
        run(&[]).ends(2);
        run(&["--all", "state:dead"]).ends(2);
        run(&["1", "state:dead"]).ends(2);
        run(&["1", "2", "--limit", "1"]).ends(2);
        run(&["1", "--rate", "1"]).ends(2);
        run(&["state:dead", "--rate", "0"]).ends(2);
        run(&["state:dead", "--limit", "0"]).ends(2);
        run(&["colour:red"]).ends(2);
    }
    place.run(&["cancel", "state:pending", "--rev", "1", "--reason", "x"]).ends(2);
    let long = "x".repeat(4097);
    let refused = place.run(&["cancel", "1", "--reason", &long]).ends(5);
    assert!(refused.err.contains("4096") && refused.err.len() < 1000, "{}", refused.err);
    let unsaid = place.run(&["cancel", "1", "--rev", "v0", "-y"]).ends(5);
    assert!(unsaid.err.contains("cancel 1 --rev 0 --yes --reason \"why\""), "{}", unsaid.err);
    place.run(&["cancel", "1", "--reason", &long[..4096]]).ends(0);
    let unsaid = place.run(&["--actor", "bo", "retry", "1"]).ends(5);
    assert!(unsaid.err.contains(" --actor bo retry 1 --reason"), "{}", unsaid.err);

    // By numbers: a look, and an object for each that failed.
    let shown = place.run(&["replay", "1", "2", "--dry-run"]).ends(0);
    assert!(shown.err.contains("delivery 2 is pending: it cannot be replayed"), "{}", shown.err);
    assert!(shown.err.contains(" replay 1 --reason"), "{}", shown.err);
    assert!(shown.out.contains("APPLICATION"), "two of them: {}", shown.out);
    assert!(!place.run(&["list", "application:shop"]).ends(0).out.contains("APPLICATION"));
    let mixed = place.run(&["cancel", "2", "987654321", "--reason", "x", "--json"]).ends(1).json_lines();
    assert_eq!((mixed[0]["delivery"].as_i64(), mixed[1]["id"].as_i64()), (Some(2), Some(987_654_321)));
    assert!(mixed[1]["error"].as_str().is_some_and(|e| e.contains("no delivery")), "{}", mixed[1]);
}

#[test]
fn an_operation_that_was_abandoned_is_not_retried_with_others() {
    let place = shop();
    sql(&place, "update postbox_subscription set kind = 'operation' where name = 'crm'");
    sql(&place, "update postbox_delivery set state = 'dead', note = 'no stock' where id in (1, 3)");
    sql(&place, "update postbox_delivery set state = 'dead', note = 'abandoned: outcome never known' where id = 5");
    let shown = place.run(&["retry", "subscription:crm", "--dry-run"]).ends(0);
    assert!(shown.out.contains("outcome never known; retry each"), "{}", shown.out);
    assert!(shown.err.contains("tries again 2 deliveries"), "{}", shown.err);
    place.run(&["retry", "subscription:crm", "--reason", "stock came", "--yes"]).ends(0);
    assert_eq!(ids(&place, "state:dead"), [5]);
}

#[test]
fn what_waits_for_a_removed_subscription_is_called_off() {
    let place = shop();
    let told = place.run(&["subscriptions", "remove", "crm", "--reason", "over", "--yes"]).ends(0);
    let advice = "cancel 'state:pending subscription:crm application:shop' --reason";
    assert!(told.err.contains(advice) && told.err.contains("5 waiting and 0 in doubt"), "{}", told.err);
    let status = place.run(&["status"]).ends(0);
    let line = status.out.lines().find(|l| l.contains("for shop/crm")).expect("stranded").to_owned();
    assert!(line.contains(advice) && !line.contains("renamed_from"), "{line}");
    assert!(status.out.lines().any(|l| l.contains("for other/mail") && l.contains("renamed_from")), "{}", status.out);
    let refused = place.run(&["retry", "1", "--reason", "x"]).ends(5);
    assert!(refused.err.contains("was removed"), "{}", refused.err);
    place.run(&["cancel", "state:pending subscription:crm application:shop", "--reason", "over", "--yes"]).ends(0);
    assert!(!place.run(&["status"]).ends(0).out.contains("for shop/crm"));
    // Refused to each, and told of each.
    let ran = place.run(&["retry", "state:cancelled", "--reason", "x", "--yes", "--json"]).ends(5);
    assert_eq!((ran.json_lines().len(), &summary(&ran)["refused"]), (6, &5.into()));
}

#[test]
fn what_is_due_later_is_told_apart() {
    let place = shop();
    assert!(!place.run(&["list"]).ends(0).out.contains("DUE"), "nothing waits for a time");
    sql(&place, "update postbox_delivery set due_at = (select now from postbox_clock) + 10800000 where id in (1, 3)");
    let listed = place.run(&["list"]).ends(0);
    let mut lines = listed.out.lines();
    assert!(lines.next().is_some_and(|headings| headings.contains("DUE")), "{}", listed.out);
    for line in lines {
        let id = line.split_whitespace().next().unwrap_or_default();
        assert_eq!(line.contains("in 3h"), ["1", "3"].contains(&id), "{line}");
    }
    for row in place.run(&["list", "--json"]).ends(0).json_lines() {
        let later = [Some(1), Some(3)].contains(&row["id"].as_i64());
        assert_eq!(row["next_due_at"].is_string(), later, "{row}");
    }
    let status = place.run(&["status"]).ends(0);
    let told = "3 deliveries wait, and 2 due later, for shop/crm";
    assert!(status.out.contains(told) && status.out.contains("5 deliveries wait for other/mail"), "{}", status.out);
    sql(&place, "update postbox_delivery set due_at = (select now from postbox_clock) + 10800000");
    let status = place.run(&["status"]).ends(0);
    assert!(!status.out.contains("stranded") && status.out.contains("nothing needs you"), "{}", status.out);
}
