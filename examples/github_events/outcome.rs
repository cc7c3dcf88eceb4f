//! What came of it, beside what should have.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use postbox::admin::{DeliveryRow, Filter};
use postbox::lifecycle::State;
use postbox::{Postbox, Settings};

use crate::input::{Counts, Expected, name};
use crate::server::{Entry, Journal, Script};
use crate::tables::{Names, Tables};
use crate::{APPLICATION, Problem};

/// What the database and the server say.
pub(crate) struct Actual {
    repositories: BTreeMap<String, Counts>,
    audit: Vec<(String, String)>,
    journal: Vec<Entry>,
    deliveries: Vec<DeliveryRow>,
    /// Releases whose doubt was ended by the server's answer.
    reconciled: BTreeSet<String>,
}

/// Reads it through connections of its own, and from the server's journal.
pub(crate) async fn read<Db: Tables>(
    settings: &Settings,
    names: &Names,
    expected: &Expected,
    journal: &Path,
) -> Result<Actual, Problem> {
    let pool = Db::open(settings).await?;
    let postbox = Postbox::<Db>::open(settings.clone()).await?;
    let admin = postbox.admin();
    let mut deliveries = admin.list(&Filter::default(), u32::MAX).await?;
    deliveries.retain(|d| d.application == APPLICATION);
    let mut reconciled = BTreeSet::new();
    for delivery in &deliveries {
        let event = name_of(delivery);
        if delivery.subscription == "announce" && expected.releases.get(&event) == Some(&Script::AcceptSilently) {
            let records = admin.show(delivery.id).await?.records;
            if records.iter().any(|r| r.record == "resolution" && r.what == "happened") {
                reconciled.insert(event);
            }
        }
    }
    let actual = Actual {
        repositories: Db::counts(&pool, names).await?,
        audit: Db::noted(&pool, names).await?,
        journal: Journal::open(journal)?.entries()?,
        deliveries,
        reconciled,
    };
    postbox.close().await;
    pool.close().await;
    Ok(actual)
}

fn name_of(delivery: &DeliveryRow) -> String {
    name(&delivery.topic, delivery.external_id.as_deref().unwrap_or_default())
}

impl Actual {
    fn deliveries(&self, subscription: &str, state: State) -> impl Iterator<Item = &DeliveryRow> {
        self.deliveries.iter().filter(move |d| d.subscription == subscription && d.state == state)
    }

    fn dead(&self, subscription: &str) -> i64 {
        self.deliveries(subscription, State::Dead).count() as i64
    }

    fn announced(&self) -> impl Iterator<Item = &Entry> {
        self.journal.iter().filter(|e| e.did.announced())
    }

    fn repository(&self, name: &str) -> Counts {
        self.repositories.get(name).copied().unwrap_or_default()
    }
}

/// Prints both side by side; whether they are equal.
pub(crate) fn compare(expected: &Expected, actual: &Actual) -> bool {
    let rows = rows(expected, actual);
    let width = rows.iter().map(|(what, ..)| what.chars().count()).max().unwrap_or_default();
    println!("{:width$}  expected  actual", "");
    for (what, expected, actual) in &rows {
        let mark = if expected == actual { "" } else { "  DIFFERS" };
        println!("{what:width$}  {expected:8}  {actual:6}{mark}");
    }
    let wrong = rows.iter().filter(|(_, expected, actual)| expected != actual).count();
    match wrong {
        0 => println!("all {} are equal", rows.len()),
        _ => println!("{wrong} of {} differ", rows.len()),
    }
    wrong == 0
}

fn rows(expected: &Expected, actual: &Actual) -> Vec<(String, i64, i64)> {
    let mut rows = Vec::new();
    let mut row = |what: &str, expected: i64, actual: i64| rows.push((what.to_owned(), expected, actual));
    let count = |n: usize| n as i64;

    let repositories: BTreeSet<&String> = expected.repositories.keys().chain(actual.repositories.keys()).collect();
    for name in repositories {
        let (should, is) = (expected.repositories.get(name).copied().unwrap_or_default(), actual.repository(name));
        row(&format!("projection: issues of {name}"), should.issues, is.issues);
        row(&format!("projection: pull requests of {name}"), should.pull_requests, is.pull_requests);
    }
    row("projection: dead letters", 0, actual.dead("projection"));

    let noted: BTreeMap<&str, &str> = actual.audit.iter().map(|(e, p)| (e.as_str(), p.as_str())).collect();
    let kept = expected.audit.iter().filter(|(event, payload)| noted.get(event.as_str()) == Some(&payload.as_str()));
    row("audit: entries", count(expected.audit.len()), count(actual.audit.len()));
    row("audit: events", count(expected.audit.len()), count(noted.len()));
    row("audit: payloads kept to the last digit", count(expected.audit.len()), count(kept.count()));
    row("audit: dead letters", 0, actual.dead("audit"));

    let should = expected.scripted(&[Script::Accept, Script::FailFirst, Script::AcceptSilently]);
    let events: BTreeSet<&str> = actual.announced().map(|e| e.event.as_str()).collect();
    let keys: BTreeSet<&str> = actual.journal.iter().map(|e| e.key.as_str()).collect();
    row("announce: calls that the server carried out", should, count(actual.announced().count()));
    row("announce: releases that it announced", should, count(events.len()));
    row("announce: idempotency keys that it saw", count(expected.releases.len()), count(keys.len()));
    row("announce: succeeded", should, count(actual.deliveries("announce", State::Succeeded).count()));
    let scripted = |script: Script| move |d: &&DeliveryRow| expected.releases.get(&name_of(d)) == Some(&script);
    let retried = actual.deliveries("announce", State::Succeeded).filter(scripted(Script::FailFirst));
    let retried = retried.filter(|d| d.attempt > 1).count();
    row("announce: failed first, tried again", expected.scripted(&[Script::FailFirst]), count(retried));
    let reconciled = actual.reconciled.len();
    row("announce: in doubt, found at the server", expected.scripted(&[Script::AcceptSilently]), count(reconciled));
    let refused = actual.deliveries("announce", State::Dead).filter(scripted(Script::Refuse)).count();
    row("announce: refused, dead letters", expected.scripted(&[Script::Refuse]), count(refused));
    row("announce: other dead letters", 0, actual.dead("announce") - count(refused));
    rows
}
