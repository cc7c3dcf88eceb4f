use uuid::Uuid;

use super::*;
use crate::message::Envelope;

fn statements() -> Statements {
    Statements::new("shop").expect("a plain name")
}

fn row(ord: i64, yes: bool) -> (i64, String, bool) {
    (ord, Uuid::from_u128(ord as u128).to_string(), yes)
}

fn dedup(key: &str) -> Draft {
    Envelope::bytes("t", "a/b", *b"\x00\xff").dedup(key)
}

#[test]
fn every_bind_is_named_once_and_cast() {
    let publishing = statements().publish([dedup("k")]).expect("checked");
    let Statement { text, binds } = publishing.statement().expect("a statement").clone();
    assert_eq!(binds.len(), 17);
    for n in 1..=17 {
        assert_eq!(text.matches(&format!("${n}::pg_catalog.text::")).count(), 1, "{text}");
    }
    assert_eq!((binds[2].as_str(), binds[14].as_str(), binds[15].as_str()), ("{NULL}", r#"{"\\x00ff"}"#, r#"{"a/b"}"#));
    assert_eq!(array([Some("a\"\\,{}"), None, Some("")].into_iter()), r#"{"a\"\\,{}",NULL,""}"#);
}

#[test]
fn nothing_is_run_for_nothing_or_for_a_refused_message() {
    let none = statements().publish(Vec::<Draft>::new()).expect("nothing to check");
    assert_eq!(none.statement(), None);
    assert!(none.finish().expect("nothing").is_empty());
    let small = statements().max_payload_bytes(1);
    assert!(matches!(small.publish([dedup("k")]), Err(PublishError::PayloadTooLarge { bytes: 2, limit: 1 })));
    assert!(Statements::new("x\"; drop").is_err());
}

#[test]
fn more_than_one_statement_takes_come_in_order() {
    let drafts = (0..1001).map(|n| Envelope::json("t", &n)).chain([Ok(dedup("k")), Ok(dedup("k"))]);
    let mut publishing = statements().publish(drafts).expect("checked");
    // 1000; then the rest up to the key that comes again.
    for count in [1000, 2, 1] {
        assert!(publishing.statement().is_some());
        publishing.read((1..=count).rev().map(|ord| row(ord, true))).expect("fits");
    }
    assert_eq!(publishing.statement(), None);
    assert_eq!(publishing.finish().expect("all there").len(), 1003);
}

#[test]
fn a_taken_key_is_looked_at_again() {
    let mut publishing = statements().publish([dedup("a"), dedup("b"), dedup("c")]).expect("checked");
    publishing.read([row(1, false), row(2, true), row(3, false)]).expect("fits");
    let look = publishing.statement().expect("a second look");
    assert!(look.text.contains("shop.publish_duplicates(") && look.binds[1] == r#"{"a","c"}"#, "{look:?}");
    // The first is there with the same body; the window of the other has just run out.
    publishing.read([row(1, true)]).expect("fits");
    let again = publishing.statement().expect("published after all");
    assert_eq!(again.binds[12], r#"{"c"}"#);
    publishing.read([row(1, true)]).expect("fits");
    let published = publishing.finish().expect("all there");
    assert_eq!(published.iter().map(|p| p.is_duplicate()).collect::<Vec<_>>(), [true, false, false]);

    let mut publishing = statements().publish([dedup("a")]).expect("checked");
    publishing.read([row(1, false)]).expect("fits");
    publishing.read([row(1, false)]).expect("fits");
    assert!(
        matches!(publishing.finish(), Err(PublishError::DedupConflict { existing, .. }) if existing.as_u128() == 1)
    );
}

#[test]
fn a_key_that_keeps_changing_hands_ends_with_an_error() {
    let mut publishing = statements().publish([dedup("a")]).expect("checked");
    let mut reads = 0;
    let error = loop {
        let taken = if reads % 2 == 0 { vec![row(1, false)] } else { Vec::new() };
        reads += 1;
        if let Err(error) = publishing.read(taken) {
            break error;
        }
        assert!(reads < 100, "it has an end");
    };
    assert!(error.to_string().contains("try again"), "{error}");
}

#[test]
fn rows_that_do_not_answer_are_told() {
    let refused = |rows: Vec<(i64, String, bool)>| {
        let mut publishing = statements().publish([dedup("a"), dedup("b")]).expect("checked");
        let error = publishing.read(rows).expect_err("refused").to_string();
        assert!(publishing.finish().is_err());
        error
    };
    assert!(refused(vec![row(1, true)]).contains("1 rows were read of 2"));
    assert!(refused(vec![row(0, true)]).contains("`ord` 0"));
    assert!(refused(vec![row(3, true)]).contains("`ord` 3"));
    assert!(refused(vec![(1, "x".into(), true)]).contains("no UUID"));
    let unread = statements().publish([dedup("a")]).expect("checked");
    assert!(unread.finish().expect_err("unread").to_string().contains("left to run"));
}
