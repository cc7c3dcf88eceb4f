//! The operator: settles doubts that nobody else can, by what the remote really did, tries some dead
//! letters again, calls deliveries off, and has some repeated.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use postbox::admin::{Admin, AuditEntry, Cancel, DeliveryRow, Filter, Replay, Resolution, Retry};
use postbox::lifecycle::Answer;
use postbox::{Error, Postbox, Settings};

use crate::child::handlers::find;
use crate::child::{LEASE, QUIET, TIMEOUT};
use crate::history::Acted;
use crate::round::Round;
use crate::site::{SCHEMA, Site};

/// Until then, a call of a worker that is only paused may still come.
const OLD_ENOUGH: Duration =
    LEASE.saturating_add(TIMEOUT).saturating_add(QUIET).saturating_add(Duration::from_millis(300));

/// Works until it is dropped.
pub(crate) async fn operate<Db: Site>(round: Arc<Round>, url: String, remote: String) {
    let settings = Settings::defaults()
        .url(&url)
        .set("schema", SCHEMA)
        .set("application", "torture")
        .set("pool_size", 4)
        .set("wake_ups", false);
    let postbox = loop {
        match Postbox::<Db>::open(settings.clone()).await {
            Ok(postbox) => break postbox,
            Err(_) => tokio::time::sleep(Duration::from_millis(300)).await,
        }
    };
    let admin = postbox.admin();
    let mut dice = fastrand::Rng::with_seed(round.seed ^ 0x0b5e);
    let mut looked_at = HashSet::new();
    loop {
        tokio::time::sleep(Duration::from_millis(400)).await;
        let turn = async {
            doubts(&round, &admin, &remote, &mut dice).await?;
            if round.world.hostile() {
                dead(&admin, &mut dice, &mut looked_at).await?;
            }
            Ok::<(), Error>(())
        };
        // A database that is away is asked again.
        tokio::time::timeout(Duration::from_secs(10), turn).await.ok();
        if round.world.hostile() {
            // One or the other: where one writer is fought for, both would not come to their end.
            let turn = async {
                match dice.bool() {
                    true => call_off(&round, &admin, &mut dice).await,
                    false => repeat(&round, &admin, &mut dice).await,
                }
            };
            tokio::time::timeout(Duration::from_secs(10), turn).await.ok();
        }
    }
}

async fn doubts<Db: Site>(
    round: &Round,
    admin: &Admin<Db>,
    remote: &str,
    dice: &mut fastrand::Rng,
) -> Result<(), Error> {
    let filter = "state:in_doubt subscription:blind,repeat".parse()?;
    for row in admin.list(&filter, 200).await? {
        let Some(since) = row.since else { continue };
        let age = std::time::SystemTime::now().duration_since(since.into()).unwrap_or_default();
        if age < OLD_ENOUGH {
            continue;
        }
        let shown = admin.show(row.id).await?;
        let Ok(applied) = find(remote, &shown.idempotency_key).await else { continue };
        let answer = match applied {
            true => Answer::Happened,
            false => Answer::DidNotHappen,
        };
        let answer = if dice.u32(..100) < 8 { Answer::Abandoned } else { answer };
        let word = |who: &str| Resolution {
            rev: Some(row.rev),
            answer,
            evidence: Some("the remote's own log".into()),
            actor: who.into(),
            reason: "asked the remote".into(),
        };
        if dice.u32(..5) == 0 {
            let (one, other) = (word("ana"), word("ben"));
            let (one, other) = tokio::join!(admin.resolve(row.id, &one), admin.resolve(row.id, &other));
            if one.is_ok() && other.is_ok() {
                round
                    .world
                    .broken(format!("I6: two operators both resolved delivery {} at revision {}", row.id, row.rev));
            }
        } else {
            admin.resolve(row.id, &word("ana")).await.ok();
        }
    }
    Ok(())
}

/// Some dead letters, once each.
async fn dead<Db: Site>(
    admin: &Admin<Db>,
    dice: &mut fastrand::Rng,
    looked_at: &mut HashSet<(i64, i32)>,
) -> Result<(), Error> {
    let rows: Vec<DeliveryRow> = admin.list(&"state:dead".parse()?, 50).await?;
    for row in rows {
        if !looked_at.insert((row.id, row.rev)) || dice.u32(..3) != 0 {
            continue;
        }
        let retry = Retry { rev: Some(row.rev), actor: "ana".into(), reason: "the remote is well again".into() };
        admin.retry(row.id, &retry).await.ok();
    }
    Ok(())
}

/// What the operator has to have done in a run, as the counts name it.
pub(crate) const DEEDS: &[&str] = &[
    "operator:cancel-pending",
    "operator:cancel-dead",
    "operator:cancel-refused",
    "operator:replay",
    "operator:replay-operation",
];

/// What it was told is done is held against the audit.
fn done(round: &Round, deed: &str, entry: &AuditEntry) {
    round.world.counts.add(deed, 1);
    if let (Ok(mut acted), Some(delivery)) = (round.acted.lock(), entry.delivery) {
        acted.push(Acted { seq: entry.seq, action: entry.action.clone(), delivery });
    }
}

/// In one turn of `turns`; what was never done goes before.
fn is_due(round: &Round, dice: &mut fastrand::Rng, turns: u32, deed: &str) -> bool {
    dice.u32(..turns) == 0 || round.world.counts.of(deed) == 0
}

/// One of those that match, if the deed is due.
async fn some<Db: Site>(
    round: &Round,
    admin: &Admin<Db>,
    dice: &mut fastrand::Rng,
    (turns, deed): (u32, &str),
    filter: &str,
) -> Result<Option<DeliveryRow>, Error> {
    if !is_due(round, dice, turns, deed) {
        return Ok(None);
    }
    let rows = admin.list(&filter.parse()?, 50).await?;
    Ok(dice.choice(rows))
}

/// Some that wait, some that are dead; what is in doubt cannot be called off. Some are tried again
/// after that.
async fn call_off<Db: Site>(round: &Round, admin: &Admin<Db>, dice: &mut fastrand::Rng) -> Result<(), Error> {
    let cancel = |row: &DeliveryRow| Cancel {
        rev: Some(row.rev),
        actor: "ana".into(),
        reason: "nobody wants it any more".into(),
    };
    if let Some(row) = some(round, admin, dice, (1, "operator:cancel-pending"), "state:pending").await?
        && let Ok(entry) = admin.cancel(row.id, &cancel(&row)).await
    {
        done(round, "operator:cancel-pending", &entry);
    }
    if let Some(row) = some(round, admin, dice, (5, "operator:cancel-dead"), "state:dead").await?
        && let Ok(entry) = admin.cancel(row.id, &cancel(&row)).await
    {
        done(round, "operator:cancel-dead", &entry);
    }
    if let Some(row) = some(round, admin, dice, (2, "operator:cancel-refused"), "state:in_doubt").await? {
        match admin.cancel(row.id, &cancel(&row)).await {
            Ok(_) => {
                round.world.broken(format!("I6: delivery {} was called off while it was in doubt", row.id));
            }
            Err(Error::Refused(_)) => round.world.counts.add("operator:cancel-refused", 1),
            Err(_) => {}
        }
    }
    if let Some(row) = some(round, admin, dice, (10, "operator:retry-cancelled"), "state:cancelled").await? {
        let retry = Retry { rev: Some(row.rev), actor: "ben".into(), reason: "it is wanted after all".into() };
        if let Ok(entry) = admin.retry(row.id, &retry).await {
            done(round, "operator:retry-cancelled", &entry);
        }
    }
    Ok(())
}

/// The latest ended ones of the subscriptions that call no remote, by filter; an operation singly, and
/// only with the word that it is meant. Not what keeps no history: its original may be gone.
async fn repeat<Db: Site>(round: &Round, admin: &Admin<Db>, dice: &mut fastrand::Rng) -> Result<(), Error> {
    let ended = "state:succeeded,dead,cancelled subscription:";
    let wish = |irreversible| Replay { actor: "ana".into(), reason: "it is wanted twice".into(), irreversible };
    if let Some(row) =
        some(round, admin, dice, (3, "operator:replay-operation"), &format!("{ended}charge,blind,repeat,chain_one"))
            .await?
    {
        if dice.u32(..3) == 0 && admin.replay(row.id, &wish(false)).await.is_ok() {
            round.world.broken(format!("I7: operation {} was replayed without the word that it is meant", row.id));
        }
        if let Ok(replayed) = admin.replay(row.id, &wish(true)).await {
            done(round, "operator:replay-operation", &replayed.audit);
        }
    }
    if is_due(round, dice, 4, "operator:replay") {
        let plain = "note,late,project,pair_note,pair_project,chain_two,chain_three,pulled,pulled_in_sql";
        let filter: Filter = format!("{ended}{plain}").parse()?;
        // Bounded by where it begins: what is older than the latest few is left.
        let latest = admin.list(&filter, 6).await?;
        let Some(first) = latest.iter().map(|row| row.id).min() else { return Ok(()) };
        let mut replaying = admin.replay_all(&filter, &wish(false), first - 1).await?;
        while let Some(so_far) = replaying.next().await? {
            round.world.counts.add("operator:replay", so_far.replayed);
        }
    }
    Ok(())
}
