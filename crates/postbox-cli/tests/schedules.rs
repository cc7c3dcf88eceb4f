//! `postbox schedules`, as it is run: real processes on SQLite files.

use crate::place::Place;

/// One schedule of the application `shop`.
fn with_one() -> Place {
    let place = Place::new();
    place.run(&["migrate", "up"]).ends(0);
    let add = ["schedules", "add", "nightly", "30 2 * * *", "--topic", "reports.nightly", "--application", "shop"];
    let more =
        ["--time-zone", "Europe/Berlin", "--payload", r#"{"n": 1.10}"#, "--key", "k", "--header", "a=b", "--json"];
    let entry = place.run(&[add.as_slice(), &more].concat()).ends(0).json();
    assert_eq!((entry["action"].as_str(), entry["actor"].as_str()), (Some("add schedule shop/nightly"), Some("ana")));
    place
}

#[test]
fn what_is_listed_is_what_was_added() {
    let place = with_one();
    let row = &place.run(&["schedules", "--json"]).ends(0).json();
    for (field, value) in [
        ("application", "shop"),
        ("name", "nightly"),
        ("cron", "30 2 * * *"),
        ("time_zone", "Europe/Berlin"),
        ("topic", "reports.nightly"),
        ("key", "k"),
        ("missed", "once"),
        ("made_by", "ana"),
        ("edited_by", "ana"),
    ] {
        assert_eq!(row[field], value, "{field} in {row}");
    }
    assert_eq!((&row["headers"]["a"], &row["rev"]), (&"b".into(), &1.into()));
    assert!(row["next_at"].is_string() && row["last_at"].is_null() && row["paused_at"].is_null(), "{row}");
    assert!(place.run(&["schedules", "--json"]).out.contains(r#"{"n": 1.10}"#), "digit for digit");
    let table = place.run(&["schedules"]).ends(0);
    for word in ["APPLICATION", "nightly", "30 2 * * *", "Europe/Berlin", "02:30:00 +0", "once"] {
        assert!(table.out.contains(word), "{word} in {}", table.out);
    }
    assert_eq!(place.run(&["schedules", "list", "--application", "other", "--json"]).ends(0).out, "");
    let none = place.run(&["schedules", "--application", "other"]).ends(0);
    assert!(none.err.contains("next: ") && none.err.contains("schedules add"), "{}", none.err);

    // A year of nights: both changes of the clock are in it.
    let nights = place.run(&["schedules", "next", "nightly", "--count", "366", "--json"]).ends(0).json_lines();
    let at: Vec<&str> = nights.iter().map(|night| night["local"].as_str().expect("a time")).collect();
    assert_eq!((at.len(), row["next_at"].as_str()), (366, nights[0]["tick"].as_str()));
    assert!(at.iter().any(|t| t.ends_with("+01:00")) && at.iter().any(|t| t.ends_with("02:30:00+02:00")), "{at:?}");
    assert_eq!(
        at.iter().filter(|t| t.ends_with("T03:00:00+02:00")).count(),
        1,
        "the night without half past two: {at:?}"
    );
    assert!(at.windows(2).all(|pair| pair[0][..10] < pair[1][..10]), "one a day");
    let few = place.run(&["schedules", "next", "nightly"]).ends(0);
    assert_eq!(few.out.lines().count(), 6, "{}", few.out);
}

#[test]
fn it_is_edited_paused_resumed_run_and_removed_on_record() {
    let place = with_one();
    let edit = ["schedules", "edit", "nightly", "--cron", "0 4 * * *", "--missed", "all", "--key", ""];
    place.run(&edit).ends(5);
    place.run(&[edit.as_slice(), &["--reason", "x", "--rev", "7"]].concat()).ends(4);
    let entry = place.run(&[edit.as_slice(), &["--reason", "later", "--rev", "1", "--json"]].concat()).ends(0).json();
    assert_eq!((entry["rev_after"].as_i64(), entry["reason"].as_str()), (Some(2), Some("later")));
    let row = place.run(&["schedules", "--json"]).ends(0).json();
    assert_eq!((&row["cron"], &row["missed"], &row["key"]), (&"0 4 * * *".into(), &"all".into(), &().into()));
    place.run(&["schedules", "edit", "nightly", "--reason", "nothing"]).ends(2);

    place.run(&["schedules", "pause", "nightly"]).ends(5);
    place.run(&["schedules", "resume", "nightly", "--reason", "x"]).ends(5);
    place.run(&["schedules", "pause", "nightly", "--reason", "too many"]).ends(0);
    place.run(&["schedules", "pause", "nightly", "--reason", "twice"]).ends(5);
    assert!(place.run(&["schedules"]).ends(0).out.contains("paused"));
    assert!(place.run(&["schedules", "next", "nightly"]).ends(0).err.contains("schedules resume nightly"));
    let ran = place.run(&["schedules", "run", "nightly", "--reason", "just once"]).ends(0);
    assert!(ran.out.contains("to be run by a worker"), "{}", ran.out);
    assert!(place.run(&["schedules"]).ends(0).out.contains("to be run"));
    place.run(&["schedules", "resume", "nightly", "--reason", "enough"]).ends(0);

    place.run(&["schedules", "remove", "nightly", "--yes"]).ends(5);
    let unconfirmed = place.run(&["schedules", "remove", "nightly", "--reason", "gone"]).ends(5);
    assert!(unconfirmed.err.contains("--yes"), "{}", unconfirmed.err);
    place.run(&["schedules", "remove", "nightly", "--reason", "gone", "--yes"]).ends(0);
    place.run(&["schedules", "remove", "nightly", "--reason", "twice", "--yes"]).ends(3);
    let audit = place.run(&["audit", "--json"]).ends(0).json_lines();
    let actions: Vec<&str> = audit.iter().rev().map(|e| e["action"].as_str().expect("an action")).collect();
    assert_eq!(
        actions,
        ["add", "edit", "pause", "run", "resume", "remove"].map(|word| format!("{word} schedule shop/nightly"))
    );
}

#[test]
fn what_cannot_be_meant_is_2_and_says_what_can() {
    let place = with_one();
    let add = |args: &[&str]| {
        let all = [&["schedules", "add"], args, &["--topic", "t", "--application", "shop"]].concat();
        place.run(&all)
    };
    for (words, args) in [
        ("has 1 fields", ["x", "hourly"].as_slice()),
        ("is no cron expression", &["x", "0 99 * * *"]),
        ("no such day", &["x", "0 0 31 4 *"]),
        ("no time zone", &["x", "@daily", "--time-zone", "Berlin"]),
        ("the payload cannot be stored", &["x", "@daily", "--payload", "{"]),
        ("the schedule name", &["x y", "@daily"]),
        ("no policy", &["x", "@daily", "--missed", "never"]),
    ] {
        let ran = add(args).ends(2);
        assert!(ran.err.contains(words), "{words}: {}", ran.err);
        ran.is_inert();
    }
    assert!(add(&["nightly", "@daily"]).ends(5).err.contains("schedules edit"));
    let whose = place.run(&["schedules", "add", "x", "@daily", "--topic", "t"]).ends(2);
    assert!(whose.err.contains("--application shop"), "{}", whose.err);
    place.run(&["schedules", "next", "nobody"]).ends(3);
    place.run(&["schedules", "next", "nightly", "--count", "0"]).ends(2);
    // Of two applications: it has to be said whose.
    place.run(&["schedules", "add", "nightly", "@daily", "--topic", "t", "--application", "other"]).ends(0);
    let which = place.run(&["schedules", "pause", "nightly", "--reason", "x"]).ends(2);
    assert!(which.err.contains("--application"), "{}", which.err);
    place.run(&["schedules", "pause", "nightly", "--reason", "x", "--application", "other"]).ends(0);
}

#[test]
fn status_tells_of_the_next_ticks() {
    let place = with_one();
    let status = place.run(&["status"]).ends(0);
    assert!(status.out.contains("next tick") && status.out.contains("nightly  in "), "{}", status.out);
    place.run(&["schedules", "pause", "nightly", "--reason", "holidays"]).ends(0);
    let status = place.run(&["status"]).ends(0);
    assert!(status.out.contains("nightly  paused for"), "{}", status.out);
    let row = &place.run(&["status", "--json"]).ends(0).json()["schedules"][0];
    assert_eq!(
        (&row["application"], &row["name"], &row["missed"]),
        (&"shop".into(), &"nightly".into(), &"once".into())
    );
    assert!(row["next_at"].is_null() && row["last_at"].is_null() && row["paused_at"].is_string(), "{row}");
    for name in ["a", "b", "c", "d", "e"] {
        place.run(&["schedules", "add", name, "0 4 * * *", "--topic", "t", "--application", "shop"]).ends(0);
    }
    let status = place.run(&["status"]).ends(0);
    assert!(!status.out.contains("nightly") && status.out.contains("1 more schedule: "), "{}", status.out);
}
