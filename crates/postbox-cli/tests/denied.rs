//! On PostgreSQL: what the server refuses to a login, and who was logged in.

use crate::place::{Place, Ran};
use postbox_testkit::{Login, Testable};

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_may_not_is_told_the_role() {
    let fresh = postbox::Postgres::fresh().await;
    let place = Place::new();
    let viewer = Login::with(&fresh, &["viewer"]).await;
    let operator = Login::with(&fresh, &["operator"]).await;
    let schema = fresh.schema();
    let run = |url: String, args: &[&str]| {
        let mut command = place.command(args);
        Ran::of(&command.env("DATABASE_URL", url).env("POSTBOX_SCHEMA", &schema).output().expect("runs"))
    };
    let owner = |args: &[&str]| run(fresh.url(), args);
    owner(&["subscriptions", "add", "crm", "a.*", "--application", "shop"]).ends(0);
    for n in ["1", "2", "3"] {
        owner(&["publish", "a.b", n]).ends(0);
    }
    for (args, role) in [
        (["publish", "a.b", "1"].as_slice(), "publisher"),
        (&["cancel", "subscription:crm", "--reason", "x", "--yes", "--limit", "1"], "operator"),
        (&["subscriptions", "add", "b", "a.*", "--application", "shop"], "worker"),
    ] {
        let refused = run(viewer.url(), args).ends(5);
        assert!(refused.err.contains(&format!("{schema}_{role}")), "{}", refused.err);
    }
    let refused = run(viewer.url(), &["migrate", "down", "--yes"]).ends(5);
    assert!(refused.err.contains("owns the schema"), "{}", refused.err);

    let args = ["cancel", "subscription:crm", "--reason", "over", "--yes", "--json", "--rate", "100"];
    let done = run(operator.url(), &args).ends(0).json_lines();
    assert_eq!(done.last().map(|s| s["done"].clone()), Some(3.into()), "{done:?}");
    let login = done[0]["login"].as_str().expect("a login").to_owned();
    let args = ["replay", "state:cancelled", "--limit", "1", "--above", "1", "--reason", "x", "--yes"];
    let made = run(operator.url(), &args).ends(0);
    assert!(made.out.contains("replayed 1, left out 0"), "{} {}", made.out, made.err);
    let args = ["replay", "state:cancelled", "--above", "987654321", "--dry-run", "--json"];
    assert_eq!(run(operator.url(), &args).ends(0).json()["deliveries"], 0);
    let audit = run(viewer.url(), &["audit", "--json"]).ends(0).json_lines();
    assert!(audit.iter().all(|entry| entry["login"] == login.as_str()), "{audit:?}");
    assert!(operator.url().contains(&login), "{login}");
    assert!(run(viewer.url(), &["audit"]).ends(0).out.contains(&login));
    let down = owner(&["migrate", "down", "--to", "2", "--and-lose-data"]).ends(5);
    assert!(down.err.contains("takes back 0003") && down.err.contains("stay: only version 0"), "{}", down.err);
    let down = owner(&["migrate", "down", "--to", "0", "--and-lose-data"]).ends(5);
    assert!(down.err.contains("all messages and deliveries go"), "{}", down.err);
    assert_eq!(run(operator.url(), &["publish", "a b", "1"]).ends(2).code, 2);
}
