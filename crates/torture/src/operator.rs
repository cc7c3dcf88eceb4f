//! The operator: settles doubts that nobody else can, by what the remote really did, and tries some
//! dead letters again.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use postbox::admin::{Admin, DeliveryRow, Resolution, Retry};
use postbox::lifecycle::Answer;
use postbox::{Error, Postbox, Settings};

use crate::child::handlers::find;
use crate::child::{LEASE, QUIET, TIMEOUT};
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
    }
}

async fn doubts<Db: Site>(
    round: &Round,
    admin: &Admin<Db>,
    remote: &str,
    dice: &mut fastrand::Rng,
) -> Result<(), Error> {
    let filter = "state:in_doubt subscription:blind".parse()?;
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
