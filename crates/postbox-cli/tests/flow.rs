//! When deliveries are handed out, as operators and publishers say it: pauses and priorities.

use crate::place::Place;

#[test]
fn a_subscription_is_paused_and_resumed() {
    let place = Place::new();
    place.with_a_message();
    place.run(&["subscriptions", "add", "crm", "orders.*", "--application", "shop"]).ends(0);
    let refused = place.run(&["subscriptions", "pause", "crm"]).ends(5);
    assert!(refused.err.contains("subscriptions pause crm") && refused.err.contains("--reason"), "{}", refused.err);
    let told = place.run(&["subscriptions", "pause", "crm", "--reason", "it is down"]).ends(0);
    assert!(told.out.contains("paused by ana, audit 1"), "{}", told.out);
    assert!(told.err.contains("1 delivery waits") && told.err.contains("subscriptions resume crm"), "{}", told.err);

    let status = place.run(&["status"]).ends(0);
    assert!(status.out.contains("crm (paused)"), "{}", status.out);
    assert!(status.out.contains("1 delivery waits for shop/crm, paused for"), "{}", status.out);
    assert!(status.out.contains(" by ana: it is down; go on: "), "{}", status.out);
    assert!(status.out.contains("next: ") && !status.out.contains("stranded"), "{}", status.out);
    let status = place.run(&["status", "--json"]).ends(0).json();
    assert!(status["subscriptions"][0]["paused_at"].is_string(), "{status}");
    let table = place.run(&["subscriptions"]).ends(0);
    assert!(table.out.contains("paused for") && table.out.contains(" by ana: it is down"), "{}", table.out);
    assert!(!table.out.contains("LIMITS"), "there are none: {}", table.out);
    let row = &place.run(&["subscriptions", "--json"]).ends(0).json_lines()[0];
    assert!(row["paused_at"].is_string() && row["limits"].is_null(), "{row}");
    assert_eq!((&row["paused_by"], &row["paused_reason"]), (&"ana".into(), &"it is down".into()));

    let again = place.run(&["subscriptions", "pause", "crm", "--reason", "still"]).ends(0);
    assert!(again.out.contains("paused for") && again.out.contains("already"), "{}", again.out);
    let resumed = place.run(&["subscriptions", "resume", "crm", "--reason", "it is back", "--json"]).ends(0).json();
    assert_eq!((resumed["action"].as_str(), resumed["seq"].as_i64()), (Some("resume subscription"), Some(3)));
    let again = place.run(&["subscriptions", "resume", "crm", "--reason", "it is back"]).ends(0);
    assert!(again.out.contains("it was not paused"), "{}", again.out);
    assert!(!place.run(&["status"]).ends(0).out.contains("paused"));
    place.run(&["subscriptions", "pause", "nobody", "--reason", "x"]).ends(3);
    place.run(&["subscriptions", "add", "crm", "orders.*", "--application", "other"]).ends(0);
    let refused = place.run(&["subscriptions", "pause", "crm", "--reason", "x"]).ends(2);
    assert!(refused.err.contains("subscriptions pause crm --application"), "{}", refused.err);
}

#[test]
fn a_message_is_published_with_a_priority() {
    let place = Place::new();
    place.run(&["publish", "orders.placed", "1", "--priority", "high"]).ends(0);
    let refused = place.run(&["publish", "orders.placed", "1", "--priority", "9"]).ends(2);
    assert!(refused.err.contains("high, normal and low"), "{}", refused.err);
    let line = br#"{"topic": "orders.placed", "payload": 1, "priority": "low"}"#;
    place.feed(&["publish", "--jsonl", "-"], line).ends(0);
    let refused = place.feed(&["publish", "--jsonl", "-"], br#"{"topic": "t", "payload": 1, "priority": "urgent"}"#);
    assert!(refused.code != 0 && refused.err.contains("high, normal and low"), "{}", refused.err);
    place.run(&["subscriptions", "add", "crm", "orders.*", "--application", "shop"]).ends(0);
    let table = place.run(&["subscriptions"]).ends(0);
    assert!(table.out.contains("2 (1 high, 1 low)"), "{}", table.out);
    let rows = place.run(&["list", "--json"]).ends(0).json_lines();
    let mut words: Vec<&str> = rows.iter().filter_map(|row| row["priority"].as_str()).collect();
    words.sort_unstable();
    assert_eq!(words, ["high", "low"]);
    let low = rows.iter().find(|row| row["priority"] == "low").expect("it is there");
    let shown = place.run(&["show", &low["id"].to_string()]).ends(0);
    assert!(shown.out.contains("priority   low"), "{}", shown.out);
}
