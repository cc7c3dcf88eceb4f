//! Four workers deliver in order, and are killed and stopped. The remote tells in which order calls came, and which
//! ran beside each other.

pub(crate) mod check;
pub(crate) mod member;

use std::time::Duration;

use postbox::{Draft, Envelope, Postbox};
use tokio::time::Instant;

use super::crew::{Crew, Place, Trouble, each};
use super::place::{Ground, Remote};
use super::{Found, Part, Scenario, Setting};
use crate::fault::Kind;
use crate::site::{Site, number};
use crate::world::locked;

/// The subscription.
pub(crate) const STEPS: &str = "steps";
pub(crate) const TOPIC: &str = "ordered.step";
const KEYS: usize = 200;
const WORKERS: usize = 4;
/// Handlers at once in a worker.
pub(crate) const CONCURRENCY: usize = 8;
/// A long run has so many messages, a shorter one as many as it has time for.
const MESSAGES: usize = 50_000;
const EACH_SECOND: usize = 400;
/// Two publishers, each with its own half of the keys, a step of all of them at a time.
const PUBLISHERS: usize = 2;
/// So many steps follow each other at once, so that most that fail have others behind them, however fast the machine.
const BURST: usize = 4;
/// Between two bursts.
const REST: Duration = Duration::from_millis(400);
/// After the last fault, all is through within this; as much again for each message.
const HEALED_WITHIN: Duration = Duration::from_secs(60);
const FOR_EACH: Duration = Duration::from_millis(4);

const TROUBLE: Trouble =
    Trouble { rest: (400, 2500), stops: 3, stopped: (2000, 2700), points: &["claimed", "outcome-commit-sent"] };

pub(super) async fn play<Db: Site>(setting: &Setting<'_>) -> Result<Found, String> {
    let mut ground = Ground::<Db>::new().await?;
    ground.fresh(setting.folder, "order").await?;
    let mut remote = Remote::start(setting.kind, &ground.url, setting.folder).await?;
    let part = Part {
        scenario: Scenario::Order,
        kind: setting.kind,
        url: ground.url.clone(),
        remote: remote.address.clone(),
        name: String::new(),
        schedules: Vec::new(),
    };
    let crew = Crew::new(setting);
    let mut places: Vec<Place> = (0..WORKERS)
        .map(|n| Place::new(&crew, Part { name: format!("w{n}"), ..part.clone() }, setting.seed ^ (n as u64 + 1) << 32))
        .collect();
    let postbox = Postbox::<Db>::open(part.settings()).await.map_err(|e| e.to_string())?;
    each(&mut places, async |place| place.work().await).await?;

    let messages = MESSAGES.min(setting.span.as_secs() as usize * EACH_SECOND).max(KEYS * 5);
    let steps = messages.div_ceil(KEYS);
    let publishing: Vec<_> = (0..PUBLISHERS).map(|half| tokio::spawn(publish(postbox.clone(), half, steps))).collect();
    let until = Instant::now() + setting.span;
    each(&mut places, async |place| place.suffer(until, TROUBLE).await).await?;
    eprintln!("the faults were on for {:.1?}", setting.span);
    for half in publishing {
        half.await.map_err(|e| e.to_string())??;
    }
    let published = steps * KEYS;
    let begun = Instant::now();
    let deadline = begun + HEALED_WITHIN + FOR_EACH * published as u32;
    let mut found = Found::default();
    loop {
        let left = unfinished(&ground).await?;
        if left == 0 {
            break;
        }
        if Instant::now() > deadline {
            found
                .broken
                .push(format!("order: {left} of {published} are not through {:.1?} after the faults", begun.elapsed()));
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    found.measure("order, through after the faults within, s", begun.elapsed().as_secs_f64());

    let log = remote.seen().await?;
    let calls = check::calls(&log);
    let stops = locked(&crew.stops).clone();
    drop(places);
    postbox.close().await;
    found.messages = published as u64;
    found.measure("order, calls", calls.values().map(Vec::len).sum::<usize>() as f64);
    let repeated = calls.values().map(|calls| check::repeated(calls)).sum::<usize>();
    found.measure("order, calls that were repeated", repeated as f64);
    if calls.len() != KEYS && found.broken.is_empty() {
        found.broken.push(format!("order: {} of {KEYS} keys were called", calls.len()));
    }
    for (key, calls) in &calls {
        found.broken.extend(check::judge(key, calls, steps, &stops));
    }
    found.measure("order, keys at once at the most", check::side_by_side(&calls) as f64);
    if check::side_by_side(&calls) < 2 {
        found.broken.push("order: different keys did not run side by side".into());
    }
    for (what, id) in [("killed", "F1"), ("stopped", "F2")] {
        if setting.counts.of(id) == 0 {
            found.broken.push(format!("the run itself: nobody was {what}; let it run for longer"));
        }
    }
    if !found.broken.is_empty() {
        std::fs::write(setting.folder.join("history.txt"), format!("{stops:#?}\n{calls:#?}")).ok();
    }
    Ok(found)
}

/// A step of each of its keys in a transaction, and then the next.
async fn publish<Db: Site>(postbox: Postbox<Db>, half: usize, steps: usize) -> Result<(), String> {
    for step in 1..=steps {
        let drafts = (0..KEYS).filter(|key| key % PUBLISHERS == half).map(|key| {
            let key = format!("key{key}");
            Envelope::json(TOPIC, &step).map(|draft: Draft| draft.key(key))
        });
        postbox.publish_now(drafts).await.map_err(|e| format!("a publish: {e}"))?;
        if step % BURST == 0 {
            tokio::time::sleep(REST).await;
        }
    }
    Ok(())
}

/// Deliveries that are not through.
async fn unfinished<Db: Site>(ground: &Ground<Db>) -> Result<i64, String> {
    let sql = match Db::KIND {
        Kind::Postgres => {
            "select cast((select count(*) from postbox.ready) + (select count(*) from postbox.scheduled)
                 + (select count(*) from postbox.leased) + (select count(*) from postbox.dead_letter) as text)"
        }
        Kind::Sqlite => {
            "select cast((select count(*) from postbox_delivery where state <> 'succeeded')
                 + (select count(*) from postbox_held) as text)"
        }
    };
    Ok(number(&ground.rows(sql.into()).await?))
}
