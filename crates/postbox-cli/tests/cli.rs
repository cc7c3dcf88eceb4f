//! The command as it is run: real processes on SQLite files.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use sqlx::Connection;

use crate::place::{Place, Ran};

#[test]
fn usage_is_2_and_help_is_0() {
    let place = Place::new();
    place.run(&["--help"]).ends(0);
    place.run(&["fly"]).ends(2);
    place.run(&["publish"]).ends(2);
    place.run(&["publish", "a.b", "1", "--after", "soon"]).ends(2);
    place.run(&["publish", "a.b", "1", "--after", "1m", "--at", "2030-01-01T00:00:00Z"]).ends(2);
    place.run(&["publish", "a.b", "1", "--jsonl", "x"]).ends(2);
    place.run(&["resolve", "1", "--happened", "--abandon", "--reason", "x"]).ends(2);
    place.run(&["resolve", "1", "--reason", "x"]).ends(2);
    place.run(&["list", "state:asleep"]).ends(2);
    place.run(&["list", "colour:red"]).ends(2);
    place.run(&["show", "abc"]).ends(2);
    place.run(&["retry", "1", "2", "--rev", "3", "--reason", "x"]).ends(2);
    place.run(&["cancel", "1", "2", "--rev", "3", "--reason", "x"]).ends(2);
    place.run(&["replay", "--reason", "x"]).ends(2);
    place.run(&["replay", "1", "state:dead", "--reason", "x"]).ends(2);
    place.run(&["replay", "1", "2", "--irreversible", "--reason", "x"]).ends(2);
    place.run(&["replay", "state:dead", "--irreversible", "--reason", "x"]).ends(2);
    place.run(&["replay", "since:yesterday", "--reason", "x"]).ends(2);
    place.run(&["--config", "missing.toml", "status"]).ends(2);
    place.run(&["--database-url", "mysql://x", "status"]).ends(2);
    let mut without = place.command(&["status"]);
    let ran = Ran::of(&without.env_remove("DATABASE_URL").output().expect("runs")).ends(2);
    assert!(ran.err.contains("DATABASE_URL"), "{}", ran.err);
    let other = place.run(&["--database-url", "mysql://x", "--schema", "s", "status"]).ends(2);
    let next = "next: ".to_owned() + env!("CARGO_BIN_EXE_postbox") + " --schema s --database-url sqlite:shop.db status";
    assert!(other.err.contains(&next), "{}", other.err);
}

#[test]
fn the_demo_runs_unattended() {
    let place = Place::new();
    let ran = place.run(&["demo", "--for", "5s", "--json", "--keep", "demo.db"]).ends(0);
    let told = ran.json();
    assert_eq!(told["duplicates_at_provider"], 0);
    let number = |name: &str| told[name].as_u64().unwrap_or_else(|| panic!("no {name} in {told}"));
    for (name, least) in [("published", 7), ("succeeded", 10), ("retried", 1), ("dead", 2), ("in_doubt", 1)] {
        assert!(number(name) >= least, "{name} in {told}");
    }
    let database = told["database"].as_str().expect("a path");
    assert_eq!(Path::new(database), std::fs::canonicalize(place.file("demo.db")).expect("kept"));

    // What it left can be looked at and settled, by the commands that it told.
    let url = format!("sqlite:{database}");
    let on = |args: &[&str]| {
        let all: Vec<&str> = ["--database-url", &url].into_iter().chain(args.iter().copied()).collect();
        place.run(&all)
    };
    let doubts = on(&["list", "state:in_doubt", "--json"]).ends(0).json_lines();
    assert_eq!(doubts.len() as u64, number("in_doubt"));
    let doubt = &doubts[0];
    for field in ["attempt", "max_attempts", "next_due_at", "last_error", "last_error_at", "rev"] {
        assert!(doubt.get(field).is_some(), "no {field} in {doubt}");
    }
    let id = doubt["id"].to_string();
    let rev = doubt["rev"].to_string();
    let shown = on(&["show", &id]).ends(0);
    assert!(
        shown.out.contains("? IN-DOUBT") && shown.out.contains(&format!("resolve {id} --happened")),
        "{}",
        shown.out
    );
    assert!(shown.out.contains("attempt 1"), "{}", shown.out);
    let detail = on(&["show", &id, "--json"]).ends(0).json();
    assert_eq!(detail["attempts"][0]["outcome"], "in_doubt", "{detail}");
    let message = detail["message"].as_str().expect("a message").to_owned();
    let of_message = on(&["show", &message, "--json"]).ends(0).json();
    assert_eq!(of_message["deliveries"].as_array().map(Vec::len), Some(2), "{of_message}");

    let status = on(&["status"]).ends(0);
    assert!(status.out.contains("need") && status.out.contains("list state:in_doubt"), "{}", status.out);
    let status = on(&["status", "--json"]).ends(0).json();
    assert_eq!(status["subscriptions"].as_array().map(Vec::len), Some(3), "{status}");

    // In doubt is not retried; nobody is there to confirm; a reason is needed; an old version loses.
    on(&["retry", &id, "--reason", "impatient"]).ends(5);
    let unconfirmed = on(&["resolve", &id, "--happened", "--reason", "seen in the console"]).ends(5);
    assert!(unconfirmed.err.contains("--yes"), "{}", unconfirmed.err);
    on(&["resolve", &id, "--happened", "--yes"]).ends(5);
    on(&["resolve", &id, "--happened", "--reason", " ", "--yes"]).ends(5);
    on(&["resolve", &id, "--happened", "--reason", "x", "--rev", "999", "--yes"]).ends(4);
    let entry =
        on(&["resolve", &id, "--did-not-happen", "--reason", "not in the console", "--rev", &rev, "--yes", "--json"]);
    let entry = entry.ends(0).json();
    assert_eq!((entry["actor"].as_str(), entry["state_before"].as_str()), (Some("ana"), Some("in_doubt")), "{entry}");
    assert_eq!(entry["state_after"], "pending", "{entry}");
    on(&["resolve", &id, "--happened", "--reason", "again", "--yes"]).ends(4);

    let dead = on(&["list", "state:dead", "--json"]).ends(0).json_lines();
    assert_eq!(dead.len() as u64, number("dead"));
    let dead = dead[0]["id"].to_string();
    on(&["retry", &dead]).ends(5);
    let entry = on(&["--actor", "bo", "retry", &dead, "--reason", "mended", "--json"]).ends(0).json();
    assert_eq!((entry["actor"].as_str(), entry["state_after"].as_str()), (Some("bo"), Some("pending")), "{entry}");
    on(&["retry", &dead, "987654321", "--reason", "one of them is not there"]).ends(1);
    on(&["retry", "987654321", "--reason", "not there"]).ends(3);

    // Called off, and delivered again.
    let other = on(&["list", "state:dead", "--json"]).ends(0).json_lines();
    let (id, rev) = (other[0]["id"].to_string(), other[0]["rev"].to_string());
    on(&["cancel", &id]).ends(5);
    on(&["cancel", &id, "--reason", "an old version", "--rev", "999"]).ends(4);
    let entry = on(&["cancel", &id, "--reason", "not wanted", "--rev", &rev, "--json"]).ends(0).json();
    assert_eq!((entry["state_before"].as_str(), entry["state_after"].as_str()), (Some("dead"), Some("cancelled")));
    on(&["cancel", &id, "--reason", "twice"]).ends(5);
    on(&["cancel", "987654321", "--reason", "not there"]).ends(3);
    on(&["replay", &dead, "--reason", "it waits"]).ends(5);
    on(&["replay", "987654321", "--reason", "not there"]).ends(3);
    let mails = on(&["list", "state:succeeded", "subscription:send_mail", "--json"]).ends(0).json_lines();
    let mail = mails[0]["id"].to_string();
    on(&["replay", &mail]).ends(5);
    let replayed = on(&["replay", &mail, "--reason", "it went to spam", "--json"]).ends(0).json();
    assert_eq!(replayed["replay_of"].to_string(), mail, "{replayed}");
    let new = replayed["delivery"].to_string();
    assert_eq!(on(&["show", &new, "--json"]).ends(0).json()["replay_of"].to_string(), mail);
    assert!(on(&["show", &new]).ends(0).out.contains(&format!("replay of  delivery {mail}")));
    assert!(on(&["show", &mail]).ends(0).out.contains(&format!("replayed   as delivery {new}")));
    let charged = on(&["list", "state:succeeded", "--json"]).ends(0).json_lines();
    let charged = charged.iter().find(|d| d["kind"] == "operation").expect("a charge")["id"].to_string();
    let refused = on(&["replay", &charged, "--reason", "again"]).ends(5);
    assert!(refused.err.contains("--irreversible"), "{}", refused.err);
    let unconfirmed = on(&["replay", &charged, "--irreversible", "--reason", "asked for it"]).ends(5);
    assert!(unconfirmed.err.contains("new idempotency key"), "{}", unconfirmed.err);
    let charge = on(&["replay", &charged, "--irreversible", "--reason", "asked for it", "--yes", "--json"]).ends(0);
    assert!(charge.json()["idempotency_key"].is_string());
    let filter = ["replay", "state:succeeded", "subscription:send_mail", "since:1h"];
    let with = |more: &[&'static str]| on(&filter.iter().copied().chain(more.iter().copied()).collect::<Vec<_>>());
    let preview = with(&["--preview", "--json"]).ends(0).json();
    assert_eq!(preview["deliveries"].as_u64(), Some(mails.len() as u64), "{preview}");
    assert!(with(&["--preview"]).ends(0).err.contains("new deliver"));
    with(&["--reason", "nobody confirms"]).ends(5);
    with(&["--yes"]).ends(5);
    let done = with(&["--reason", "all of them", "--yes", "--json"]).ends(0).json();
    assert_eq!(done["replayed"].as_u64(), Some(mails.len() as u64), "{done}");
    on(&["replay", "state:in_doubt", "--reason", "x", "--yes"]).ends(5);

    let audit = on(&["audit", "--json"]).ends(0).json_lines();
    assert!(audit.len() >= 2, "{audit:?}");
    let gaps = audit.windows(2).filter(|w| w[0]["seq"].as_i64() != w[1]["seq"].as_i64().map(|s| s + 1)).count();
    assert_eq!(gaps, 0, "{audit:?}");
    assert!(audit.iter().all(|e| e["reason"].is_string()), "{audit:?}");

    on(&["subscriptions", "remove", "send_mail", "--reason", "no mails any more"]).ends(5);
    on(&["subscriptions", "remove", "send_mail", "--reason", "no mails any more", "--yes"]).ends(0);
    on(&["subscriptions", "remove", "send_mail", "--reason", "twice", "--yes"]).ends(3);
    on(&["subscriptions", "remove", "send_mail", "--application", "other", "--reason", "x", "--yes"]).ends(3);
    on(&["subscriptions", "list", "--json"]).ends(0).json_lines();
    place.run(&["demo", "--for", "1s", "--keep", "demo.db"]).ends(5);
}

#[test]
fn what_is_not_there_is_3() {
    let place = Place::new();
    let missing = place.run(&["status"]).ends(3);
    assert!(missing.err.contains("migrate up"), "{}", missing.err);
    assert!(!place.file("shop.db").exists(), "looking makes no file");
    place.run(&["migrate", "up"]).ends(0);
    place.run(&["show", "1"]).ends(3);
    place.run(&["show", "0198f3c2-0000-7000-8000-000000000000"]).ends(3);
    place.run(&["resolve", "1", "--happened", "--reason", "x", "--yes"]).ends(3);
    place.run(&["subscriptions", "remove", "nobody", "--reason", "x", "--yes"]).ends(3);
    place.run(&["publish", "--jsonl", "missing.jsonl"]).ends(3);
    assert_eq!(place.run(&["list", "--json"]).ends(0).out, "");
    assert_eq!(place.run(&["audit", "--json"]).ends(0).out, "");
    assert!(place.run(&["list"]).ends(0).err.contains("no deliveries yet\nnext: "));
    assert!(place.run(&["list", "subscription:x"]).ends(0).err.contains("subscriptions"));
    let nobody = place.run(&["--database-url", "postgres://127.0.0.1:1/shop", "status"]).ends(1);
    assert!(nobody.err.contains("start the server"), "{}", nobody.err);
    let no_file = place.run(&["--config", "missing.toml", "status"]).ends(2);
    assert!(no_file.err.contains("--config missing.toml config show"), "{}", no_file.err);
}

#[test]
fn a_message_is_published_and_shown_digit_for_digit() {
    let place = Place::new();
    let told = place.with_a_message();
    assert_eq!((told["topic"].as_str(), told["key"].as_str()), (Some("orders.placed"), Some("42")));
    assert_eq!(told["duplicate"], false);
    let id = told["id"].as_str().expect("an id");
    for args in [["show", id].as_slice(), &["show", id, "--json"]] {
        let shown = place.run(args).ends(0);
        assert!(shown.out.contains("1.10000000000000000001"), "{}", shown.out);
    }
    let status = place.run(&["status", "--json"]).ends(0).json();
    assert_eq!(status["unrouted"], 1);
    let from_stdin =
        place.feed(&["publish", "orders.placed", "-", "--header", "a=b=c", "--json"], b" [1, 2]\n").ends(0).json();
    assert_eq!((&from_stdin["payload"][1], from_stdin["headers"]["a"].as_str()), (&Value::from(2), Some("b=c")));
    place.feed(&["publish", "orders.placed", "-"], b"\"\xff\"").ends(2);
    place.run(&["publish", "orders.placed", "{"]).ends(2);
    place.run(&["publish", "orders placed", "{}"]).ends(2);
    place.run(&["publish", "a.b", "--max-attempts", "0"]).ends(2);
    place.run(&["publish", "a.b", "--after", "99999d"]).ends(2);
    place.run(&["publish", "a.b", "--file", "."]).ends(2);
    let again = ["publish", "a.b", "1", "--dedup", "k", "--dedup-window", "1d", "--json"];
    assert_eq!(place.run(&again).ends(0).json()["duplicate"], false);
    assert_eq!(place.run(&again).ends(0).json()["duplicate"], true);
    let other = place.run(&["publish", "a.b", "2", "--dedup", "k"]).ends(4);
    assert!(other.err.contains("another body") && other.err.contains("next: "), "{}", other.err);
    assert!(other.err.contains(" show 0"), "{}", other.err);
}

#[test]
fn bytes_come_from_a_file_and_are_shown_inert() {
    let place = Place::new();
    std::fs::write(place.file("a.png"), b"\x89PNG\0\xff").expect("a file");
    let args = ["publish", "images.added", "--file", "a.png", "--content-type", "image/png", "--json"];
    let told = place.run(&args).ends(0).json();
    assert_eq!((told["datacontenttype"].as_str(), told["data_base64"].as_str()), (Some("image/png"), Some("iVBORwD/")));
    let id = told["id"].as_str().expect("an id");
    let shown = place.run(&["show", id]).ends(0).out;
    assert!(shown.contains("content    image/png, 6 bytes\npayload    89 50 4e 47 00 ff\n"), "{shown}");
    assert_eq!(place.run(&["show", id, "--json"]).ends(0).json()["message"]["data_base64"], "iVBORwD/");

    let text = ["publish", "a.b", "-", "--content-type", "text/plain; charset=utf-8", "--json"];
    let told = place.feed(&text, "é\u{1b}[31m\n".as_bytes()).ends(0).json();
    let shown = place.run(&["show", told["id"].as_str().expect("an id")]).ends(0).out;
    assert!(shown.contains("payload    é\\u{1b}[31m\\n\n"), "{shown}");

    // Without a content type a file is JSON.
    std::fs::write(place.file("a.json"), "[1.10]\n").expect("a file");
    place.run(&["publish", "a.b", "--file", "a.json"]).ends(0);
    let no_json = place.run(&["publish", "a.b", "--file", "a.png"]).ends(2);
    assert!(no_json.err.contains("bytes need a --content-type"), "{}", no_json.err);
    let no_type = place.run(&["publish", "a.b", "x", "--content-type", "png"]).ends(2);
    assert!(no_type.err.contains("media type"), "{}", no_type.err);
    place.run(&["publish", "a.b", "--content-type", "a/b"]).ends(2);
    place.run(&["publish", "a.b", "1", "--file", "a.json"]).ends(2);
    place.run(&["publish", "a.b", "--file", "missing.png", "--content-type", "a/b"]).ends(3);

    let lines = br#"{"topic":"a.b","data_base64":"iVBORwD/","content_type":"image/png"}
{"topic":"a.b","data_base64":"!","content_type":"image/png"}"#;
    let ran = place.feed(&["publish", "--jsonl", "-", "--json"], lines).ends(1);
    assert_eq!(ran.json(), serde_json::json!({"published": 1, "duplicates": 0, "bad": 1}));
    assert!(ran.err.contains("line 2") && ran.err.contains("no base64"), "{}", ran.err);
}

#[test]
fn bad_lines_are_told_by_number_and_stop_nobody() {
    let place = Place::new();
    let mut lines: Vec<Vec<u8>> =
        (0..1200).map(|n| format!(r#"{{"id":"e{n}","topic":"a.b","payload":{n}}}"#).into_bytes()).collect();
    let bad: [(usize, &[u8], &str); 10] = [
        (0, br#"{"topic":"a.b","payload":"\u0000"}"#, "\\u0000"),
        (1, b"{\"topic\":\"a.b\",\"payload\":\"\xff\"}", "UTF-8"),
        (2, br#"{"payload":1}"#, "missing field `topic`"),
        (3, br#"{"topic":"a.b","payload":1,"colour":"red"}"#, "unknown field `colour`"),
        (4, br#"{"topic":"a b","payload":1}"#, "the topic"),
        (600, b"{nonsense", "no message"),
        (601, br#"{"id":"","topic":"a.b","payload":1}"#, "dedup key must not be empty"),
        (602, br#"{"id":"e5","topic":"a.b","payload":"other"}"#, "another body"),
        (603, br#"{"topic":"a.b","payload":"\ud800"}"#, "surrogate"),
        (1199, br#"{"topic":"a.b"}"#, "missing field `payload`"),
    ];
    for (at, line, _) in bad {
        lines[at] = line.to_vec();
    }
    lines[604] = br#"{"id":"e5","topic":"a.b","payload":5}"#.to_vec();
    let file = lines.join(&b'\n');
    std::fs::write(place.file("events.jsonl"), &file).expect("writes");
    let first = place.run(&["publish", "--jsonl", "events.jsonl", "--json"]).ends(1);
    assert_eq!(first.json(), serde_json::json!({"published": 1189, "duplicates": 1, "bad": 10}));
    for (at, _, why) in bad {
        let number = format!("line {}: ", at + 1);
        let line =
            first.err.lines().find(|l| l.starts_with(&number)).unwrap_or_else(|| panic!("{number} in {}", first.err));
        assert!(line.contains(why), "{line}");
    }
    assert!(first.err.lines().next().is_some_and(|l| l.starts_with("opening it made the file")), "{}", first.err);
    assert_eq!(first.err.lines().count(), bad.len() + 1, "{}", first.err);
    let second = place.feed(&["publish", "--jsonl", "-"], &file).ends(1);
    assert_eq!(second.out, "published 0, duplicates 1190, bad 10\n");
    let good = place
        .feed(&["publish", "--jsonl", "-", "--json"], b"\n{\"topic\":\"a.b\",\"payload\":18446744073709551616}\n\n");
    assert_eq!(good.ends(0).json(), serde_json::json!({"published": 1, "duplicates": 0, "bad": 0}));
}

#[test]
fn nothing_from_outside_acts_on_the_terminal() {
    let place = Place::new();
    let evil = "\u{1b}[31mred\u{7}\r\nnext: rm -rf\u{9b}2J\u{202e}";
    let payload = serde_json::to_string(evil).expect("serializes");
    let line = format!(
        r#"{{"id":{payload},"topic":"a.b","key":{payload},"payload":{payload},"headers":{{{payload}:{payload}}}}}"#
    );
    let told = place.feed(&["publish", "--jsonl", "-"], line.as_bytes()).ends(0);
    told.is_inert();
    let raw = format!("\"{}\"", "\u{9b}2J\u{202e}");
    let told = place.run(&["publish", "a.b", &raw, "--json"]).ends(0);
    told.is_inert();
    let id = told.json()["id"].as_str().expect("an id").to_owned();
    assert_eq!(told.json()["payload"].as_str(), Some("\u{9b}2J\u{202e}"), "the same JSON");
    for args in [["show", &id].as_slice(), &["show", &id, "--json"], &["list"], &["status"], &["list", evil]] {
        place.run(args).is_inert();
    }
    let topic = place.run(&["publish", evil, "1"]);
    topic.is_inert();
    // What cannot be understood is repeated by the error.
    for args in [[evil].as_slice(), &["list", "--limit", evil], &["publish", "a.b", "1", "--at", evil]] {
        place.run(args).ends(2).is_inert();
    }
    let typed = place.run(&["a\nnext: rm -rf"]).ends(2);
    assert!(!typed.err.contains("\nnext:"), "{}", typed.err);
    place.run(&["--application", evil, "config", "show", "--origin"]).is_inert();
}

#[test]
fn settings_say_where_they_come_from() {
    let place = Place::new();
    std::fs::write(place.file("postbox.toml"), "lease = \"10s\"\nschema = \"from_file\"\nconcurrency = 7\n")
        .expect("writes");
    let mut command = place.command(&["--schema", "from_flag", "config", "show", "--origin", "--json"]);
    command
        .env("POSTBOX_LEASE", "20s")
        .env("POSTBOX_SCHEMA", "from_env")
        .env("DATABASE_URL", "postgres://ana:secret@db/shop");
    let ran = Ran::of(&command.output().expect("runs")).ends(0);
    assert!(!ran.out.contains("secret"), "{}", ran.out);
    let settings = ran.json_lines();
    let setting = |name: &str| settings.iter().find(|s| s["setting"] == name).cloned().unwrap_or_default();
    assert_eq!(
        (setting("schema")["value"].as_str(), setting("schema")["origin"].as_str()),
        (Some("from_flag"), Some("--schema"))
    );
    assert_eq!(
        (setting("lease")["value"].as_str(), setting("lease")["origin"].as_str()),
        (Some("20s"), Some("$POSTBOX_LEASE"))
    );
    assert_eq!(setting("concurrency")["origin"], "postbox.toml, line 3");
    assert_eq!(setting("poll_interval")["origin"], "default");
}

#[test]
fn migrations_are_applied_listed_and_printed() {
    let place = Place::new();
    let made = place.run(&["migrate", "up"]).ends(0);
    assert!(made.out.contains("0001 engine") && made.err.contains("opening it made the file"), "{}", made.err);
    let again = place.run(&["migrate", "up", "--json"]).ends(0).json();
    assert_eq!(again["applied"], serde_json::json!([]));
    let status = place.run(&["migrate", "status", "--json"]).ends(0).json();
    assert!(status["migrations"].as_array().is_some_and(|m| m.iter().all(|m| m["applied_at"].is_string())), "{status}");
    let sql = place.run(&["migrate", "print", "--schema", "shop_events"]).ends(0).out;
    assert!(sql.contains("create table shop_events.message") && !sql.contains("{schema}"), "{sql}");
    place.run(&["migrate", "print", "--schema", "x\"; drop"]).ends(2);
}

#[test]
fn a_reader_that_leaves_is_no_panic() {
    let place = Place::new();
    place.with_a_message();
    let mut child =
        place.command(&["config", "show"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    drop(child.stdout.take());
    let ran = Ran::of(&child.wait_with_output().expect("ends")).ends(0);
    assert_eq!(ran.err, "");
}

#[test]
fn migrations_are_taken_back() {
    let place = Place::new();
    place.with_a_message();
    // Not without being asked, and not with messages.
    place.run(&["migrate", "down", "--to", "0"]).ends(5);
    let refused = place.run(&["migrate", "down", "--to", "0", "--yes"]).ends(5);
    assert!(refused.err.contains("messages: 1,") && refused.err.contains("--and-lose-data"), "{}", refused.err);
    assert_eq!(place.run(&["status", "--json"]).ends(0).json()["unrouted"], 1);
    place.run(&["migrate", "down", "--to", "9", "--yes"]).ends(5);
    let nothing = place.run(&["migrate", "down", "--to", "1", "--yes", "--and-lose-data"]).ends(0);
    assert!(!nothing.err.contains("all messages"), "{}", nothing.err);
    let gone = place.run(&["migrate", "down", "--to", "0", "--yes", "--and-lose-data", "--json"]).ends(0).json();
    let last = gone["gone"].as_array().and_then(|all| all.last()).and_then(|name| name.as_str());
    assert_eq!((gone["version"].as_u64(), last), (Some(0), Some("0001 engine")));
    let sql = place.run(&["migrate", "print", "--down", "--schema", "shop_events"]).ends(0).out;
    assert!(sql.contains("drop table shop_events.audit") && !sql.contains("cascade"), "{sql}");
    assert!(place.run(&["migrate", "roles"]).ends(0).err.contains("no roles"));
}

#[test]
fn shells_can_complete_it() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = place.run(&["completions", shell]).ends(0).out;
        // Every verb that the help names.
        let help = place.run(&["--help"]).ends(0).out;
        let verbs = help.lines().skip_while(|l| *l != "Commands:").skip(1).take_while(|l| !l.is_empty());
        let mut seen = 0;
        for verb in verbs.filter_map(|line| line.split_whitespace().next()).filter(|v| *v != "help") {
            assert!(script.contains(verb), "{shell} does not know {verb}");
            seen += 1;
        }
        assert!(seen >= 10, "{help}");
    }
    let script = place.run(&["completions", "bash"]).out;
    let file = place.file("postbox.bash");
    std::fs::write(&file, script).expect("written");
    assert!(Command::new("bash").arg("-n").arg(&file).status().expect("bash runs").success());
    // What bash would offer.
    let offered = format!(
        "source {}; COMP_WORDS=(postbox migrate d); COMP_CWORD=2; _postbox postbox d migrate; echo \"${{COMPREPLY[@]}}\"",
        file.display()
    );
    let offered = Ran::of(&Command::new("bash").args(["-c", &offered]).output().expect("bash runs"));
    assert_eq!(offered.out.trim(), "down", "{}", offered.err);
    place.run(&["completions", "tcsh"]).ends(2);
    assert!(place.run(&["manual"]).ends(0).out.contains(".SH NAME"));
}

#[test]
fn subscriptions_are_declared_for_programs_that_pull() {
    let place = Place::new();
    place.with_a_message();
    let refused = place.run(&["subscriptions", "add", "reserve", "orders.placed"]).ends(2);
    assert!(refused.err.contains("--application"), "{}", refused.err);
    let refused = place.run(&["subscriptions", "add", "reserve", "orders..placed", "--application", "shop"]).ends(2);
    assert!(refused.err.contains("empty segment"), "{}", refused.err);
    place.run(&["subscriptions", "add", "reserve", "orders.placed", "--application", "shop", "--from", "soon"]).ends(2);
    let add = ["subscriptions", "add", "reserve", "orders.placed", "--application", "shop", "--max-attempts", "7"];
    let told = place.run(&add).ends(0);
    assert!(told.out.contains("reserve of shop listens to orders.placed"), "{}", told.out);
    let again = place.run(&add).ends(0);
    assert!(again.out.contains("it was there already"), "{}", again.out);
    let past: Vec<&str> = add.iter().copied().chain(["--from", "beginning"]).collect();
    let refused = place.run(&past).ends(5);
    assert!(refused.err.contains("stored already") && refused.err.contains("reserve_2"), "{}", refused.err);
    let rows = place.run(&["subscriptions", "list", "--json"]).ends(0).json_lines();
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (&rows[0]["max_attempts"], &rows[0]["pending"]),
        (&7.into(), &1.into()),
        "what nobody was subscribed to"
    );
    let mut by_setting = place.command(&["subscriptions", "add", "mail", "orders.placed", "--json"]);
    let by_setting = Ran::of(&by_setting.env("POSTBOX_APPLICATION", "post").output().expect("runs"));
    assert_eq!(by_setting.ends(0).json()["application"], "post");
}

#[test]
fn retention_is_previewed_and_confirmed() {
    let place = Place::new();
    place.with_a_message();
    let preview = place.run(&["retain", "--preview", "--json"]).ends(0).json();
    assert_eq!((preview["messages"].as_i64(), preview["deliveries"].as_array().map(Vec::len)), (Some(0), Some(0)));
    let ran = place.run(&["retain"]).ends(0);
    assert!(ran.out.contains("removed 0 deliveries and 0 messages"), "{}", ran.out);
    // A message that was recorded in 2001: nobody's, and kept for ever unless somebody says otherwise.
    let old = "update postbox_message set id = unhex('00e8d4a510007000800000000000abcd')";
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let url = format!("sqlite:{}", place.file("shop.db").display());
        let mut connection = sqlx::SqliteConnection::connect(&url).await.expect("the file");
        sqlx::query(old).execute(&mut connection).await.expect("an old message");
    });
    assert_eq!(place.run(&["retain", "--preview", "--json"]).ends(0).json()["messages"], 0);
    let short =
        |args: &[&str]| Ran::of(&place.command(args).env("POSTBOX_KEEP_UNROUTED", "52 weeks").output().expect("runs"));
    let shown = short(&["retain", "--preview"]).ends(0);
    assert!(shown.out.contains("1 message that nothing refers to"), "{}", shown.out);
    let refused = short(&["retain"]).ends(5);
    assert!(refused.err.contains("--yes"), "{}", refused.err);
    assert_eq!(short(&["retain", "--yes", "--json"]).ends(0).json()["messages"], 1);
    let audit = place.run(&["audit", "--json"]).ends(0).json();
    assert_eq!((audit["actor"].as_str(), audit["action"].as_str()), (Some("retention"), Some("retain")));
    let wrong = Ran::of(&place.command(&["retain"]).env("POSTBOX_KEEP_UNROUTED", "1mo").output().expect("runs"));
    assert!(wrong.code != 0 && wrong.err.contains("keep_unrouted"), "{}", wrong.err);
}
