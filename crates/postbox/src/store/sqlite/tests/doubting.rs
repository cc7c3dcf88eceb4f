use super::*;
use crate::lifecycle::Answer;
use crate::store::{Answered, Evidence, Observation, Speaker};

/// One operation whose attempt is in doubt.
async fn in_doubt(shop: &Shop, declared: Declared) -> (Item, LeaseRef) {
    let (claimed, lease) = shop.claimed(declared, 1).await;
    let item = claimed.items[0].clone();
    shop.store.settle(&Settle { starts: vec![(item.delivery, 1)], ..flush(lease, 0) }).await.expect("begins");
    let settle = Settle { moves: vec![moved(&item, State::InDoubt, 1, "in_doubt")], close: true, ..flush(lease, 1) };
    shop.store.settle(&settle).await.expect("settles");
    (item, lease)
}

fn answered(item: &Item, answer: Answer) -> Answered {
    Answered {
        delivery: item.delivery,
        rev: item.rev + 1,
        answer,
        speaker: Speaker::Reconcile,
        actor: "reconcile".into(),
        reason: None,
        receipt: Some(serde_json::json!({ "id": 7 })),
        follow_ups: vec![draft("paid", 1)],
        draw: 1.0,
    }
}

#[tokio::test]
async fn a_doubt_is_asked_about_by_one_at_a_time() {
    let shop = Shop::new().await;
    let (item, _) = in_doubt(&shop, operation()).await;
    let hold = Duration::from_secs(60);
    let ask = async || shop.store.doubts(&[item.subscription], 10, hold).await.expect("looks");
    let wait = async || shop.count("select ask_at - now from postbox_delivery cross join postbox_clock").await;
    let due = ask().await;
    assert_eq!(due.len(), 1);
    assert_eq!((due[0].attempts, due[0].asks, due[0].quiet, due[0].rev), (1, 0, false, item.rev + 1));
    assert!(due[0].envelope.is_some() && due[0].word.is_none());
    assert!(ask().await.is_empty());
    assert!((30_001..=60_000).contains(&wait().await));
    // That worker dies: nothing grows by it.
    shop.run("update postbox_delivery set ask_at = 0").await;
    assert_eq!(ask().await[0].asks, 0);
    assert!((30_001..=60_000).contains(&wait().await));
    assert!(shop.store.doubts(&[], 10, hold).await.expect("looks").is_empty());
}

#[tokio::test]
async fn an_ask_that_taught_nothing_puts_off_the_next_one_once() {
    let shop = Shop::new().await;
    let (item, _) = in_doubt(&shop, operation()).await;
    let ask = async || shop.store.doubts(&[item.subscription], 10, Duration::from_secs(60)).await.expect("looks");
    let wait = async || shop.count("select ask_at - now from postbox_delivery cross join postbox_clock").await;
    let quiet = async || shop.count("select quiet_at - ask_at from postbox_delivery").await;
    let due = ask().await.remove(0);
    let later = Duration::from_secs(300);
    shop.store.unanswered(&due, later).await.expect("waits");
    assert_eq!(quiet().await, 0, "not past the quiet period, after which a no is believed");
    shop.run("update postbox_delivery set ask_at = 0, quiet_at = 0").await;
    let due = ask().await.remove(0);
    assert!(due.asks == 1 && due.quiet);
    shop.store.unanswered(&due, later).await.expect("waits");
    assert!((200_000..=300_000).contains(&wait().await));
    shop.store.unanswered(&due, 2 * later).await.expect("looks");
    assert!(wait().await <= 300_000, "another worker that asked at the same time tells nothing new");
    shop.run("update postbox_delivery set ask_at = 0").await;
    let due = ask().await.remove(0);
    assert_eq!(due.asks, 2);
    shop.store.answer(&Answered { rev: due.rev, ..answered(&item, Answer::Happened) }).await.expect("answers");
    shop.store.unanswered(&due, later).await.expect("looks");
    assert_eq!(shop.state(item.delivery).await, State::Succeeded);
}

#[tokio::test]
async fn an_answer_ends_a_doubt_once() {
    for (answer, state, follow_ups) in [
        (Answer::Happened, State::Succeeded, 1),
        (Answer::DidNotHappen, State::Pending, 0),
        (Answer::Abandoned, State::Dead, 0),
    ] {
        let shop = Shop::new().await;
        let (item, _) = in_doubt(&shop, operation()).await;
        let wrong = Answered { rev: item.rev, ..answered(&item, answer) };
        assert!(!shop.store.answer(&wrong).await.expect("looks"));
        assert!(shop.store.answer(&answered(&item, answer)).await.expect("answers"));
        assert!(!shop.store.answer(&answered(&item, answer)).await.expect("looks"));
        let detail = shop.store.show(item.delivery).await.expect("shows").expect("is there");
        assert_eq!((detail.row.state, detail.row.rev, detail.row.attempt), (state, item.rev + 2, 1));
        assert_eq!(detail.row.next_due_at.is_some(), state == State::Pending, "with the backoff");
        assert_eq!(detail.records[0].what, answer.as_str());
        assert_eq!(shop.count("select count(*) from postbox_message where topic = 'paid'").await, follow_ups);
    }
}

#[tokio::test]
async fn a_late_outcome_is_evidence_for_its_own_attempt_only() {
    let shop = Shop::new().await;
    let (item, lease) = in_doubt(&shop, operation()).await;
    let seen = |number| Observation {
        delivery: item.delivery,
        number,
        worker: lease.worker,
        kind: "succeeded",
        detail: Some("late".into()),
        evidence: Some(Evidence { answer: Answer::Happened, receipt: None, follow_ups: vec![draft("paid", 1)] }),
    };
    shop.store.observe(&[seen(2)]).await.expect("observes");
    assert_eq!(shop.state(item.delivery).await, State::InDoubt);
    shop.store.observe(&[seen(1), seen(1)]).await.expect("observes");
    assert_eq!(shop.state(item.delivery).await, State::Succeeded);
    assert_eq!(shop.count("select count(*) from postbox_message where topic = 'paid'").await, 1);
    assert_eq!(shop.count("select count(*) from postbox_observation").await, 3);
    assert_eq!(shop.count("select count(*) from postbox_resolution where source = 'evidence'").await, 1);
}

#[tokio::test]
async fn an_operators_word_is_carried_out_by_a_worker_where_follow_ups_hang_on_it() {
    let shop = Shop::new().await;
    let continues = Declared { continues: true, reconciles: false, ..operation() };
    let (item, _) = in_doubt(&shop, continues).await;
    let ask = async || shop.store.doubts(&[item.subscription], 10, Duration::from_secs(1)).await.expect("looks");
    assert!(ask().await.is_empty(), "there is nobody to ask");
    let resolution = crate::admin::Resolution {
        rev: Some(item.rev + 1),
        answer: Answer::Happened,
        evidence: Some("pi_3".into()),
        actor: "ana".into(),
        reason: "seen".into(),
    };
    let entry = shop.store.resolve(item.delivery, &resolution).await.expect("resolves");
    assert_eq!((entry.seq, entry.state_after.as_deref(), entry.rev_after), (1, Some("in_doubt"), Some(item.rev + 2)));
    assert_eq!(shop.state(item.delivery).await, State::InDoubt);
    let second = crate::admin::Resolution { rev: None, ..resolution };
    let denied = crate::admin::Resolution { answer: Answer::DidNotHappen, ..second.clone() };
    for other in [second, denied] {
        let error = shop.store.resolve(item.delivery, &other).await.expect_err("it was resolved");
        assert!(matches!(&error, crate::Error::Conflict(words) if words.contains("carries it out")), "{error}");
    }
    let due = ask().await;
    let word = due[0].word.clone().expect("a word");
    assert_eq!((word.actor.as_str(), word.receipt), ("ana", Some(serde_json::json!({ "evidence": "pi_3" }))));
    let carried_out = Answered { rev: due[0].rev, speaker: Speaker::Operator, ..answered(&item, Answer::Happened) };
    assert!(shop.store.answer(&carried_out).await.expect("answers"));
    assert_eq!(shop.state(item.delivery).await, State::Succeeded);
    assert_eq!(shop.count("select count(*) from postbox_message where topic = 'paid'").await, 1);
}

#[tokio::test]
async fn a_word_that_nobody_carries_out_can_be_given_up() {
    let shop = Shop::new().await;
    let (item, _) = in_doubt(&shop, Declared { continues: true, ..operation() }).await;
    let says = |answer| crate::admin::Resolution {
        rev: None,
        answer,
        evidence: None,
        actor: "ana".into(),
        reason: "the handler is gone".into(),
    };
    shop.store.resolve(item.delivery, &says(Answer::Happened)).await.expect("waits for a worker");
    let entry = shop.store.resolve(item.delivery, &says(Answer::Abandoned)).await.expect("at once");
    assert_eq!((entry.state_after.as_deref(), entry.rev_after), (Some("dead"), Some(item.rev + 3)));
    assert_eq!(shop.count("select count(*) from postbox_delivery where state = 'dead' and word is null").await, 1);
    // A worker that has the word in hand comes too late with it.
    let late = Answered { rev: item.rev + 2, ..answered(&item, Answer::Happened) };
    assert!(!shop.store.answer(&late).await.expect("looks"));
    assert_eq!(shop.count("select count(*) from postbox_message where topic = 'paid'").await, 0);
}
