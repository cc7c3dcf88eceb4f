//! Four workers share limits, and are killed and stopped. The remote counts how many calls are in progress at
//! once, and how many begin in each window.

pub(crate) mod check;
pub(crate) mod member;

use std::path::PathBuf;
use std::time::Duration;

use postbox::{Draft, Envelope, Postbox, Priority};
use tokio::process::Command;
use tokio::time::Instant;

use super::crew::{Crew, Place, Stop, Trouble, each};
use super::place::{Ground, Remote};
use super::{APPLICATION, Found, Part, Scenario, Setting, now_us};
use crate::fault::Kind;
use crate::site::{Site, Texts};
use crate::world::locked;
use check::{Claim, Pass};

/// The subscription with a limit of how many run at once, and how long each of its calls takes.
pub(crate) const FEW: &str = "few";
pub(crate) const AT_ONCE: u32 = 10;
pub(crate) const WORK_MS: u64 = 200;
/// The one with a rate: nearly all that is published for it is of high priority.
pub(crate) const SLOW: &str = "slow";
pub(crate) const RATE: u32 = 60;
pub(crate) const PER: Duration = Duration::from_secs(1);
/// What comes in half a second: a machine that is busy with something else for less loses no token.
pub(crate) const BURST: u32 = 30;
pub(crate) const SLOW_MS: u64 = 5;
pub(crate) const LOW: &str = "paced.slow.low";
/// What its calls are named at the remote.
pub(crate) const HIGH: &str = "slow.high";
pub(crate) const LOWEST: &str = "slow.low";

const WORKERS: usize = 4;
/// Handlers at once in a worker: all together could do more than twice the limit.
pub(crate) const CONCURRENCY: usize = 6;

const TROUBLE: Trouble =
    Trouble { rest: (300, 1800), stops: 4, stopped: (2000, 2700), points: &["claimed", "outcome-commit-sent"] };
/// Until permits are shared out.
const SETTLES: Duration = Duration::from_secs(2);
/// How long it is measured how much of a limit is used: as long as the faults are on, within these.
const QUIET: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(20));
/// The machine may be busy with something else: it is measured again, so often at the most.
const MEASURED: usize = 3;
/// In runs as long as this, limits are fully used again when the faults are over. What was lost with its worker runs
/// one at a time in each worker, until that is through.
const LONG: Duration = Duration::from_secs(30);
const RECOVERS: Duration = Duration::from_secs(5);
const RECOVERED: usize = 24;
/// What a limit is used for at the least, while there is work enough.
const USED: f64 = 0.9;
/// How long a pause lasts; within the first second of it claims stop.
const PAUSE: Duration = Duration::from_secs(2);
const STOPS_WITHIN: u64 = 1_000_000;
/// After a resume, it goes on within this.
const GOES_ON_WITHIN: Duration = Duration::from_secs(2);
/// Of what is handed out a sixteenth is of the lowest level, while the highest fills all room; those who are killed
/// begin to count again.
const LOW_SHARE: f64 = 1.0 / 32.0;

pub(super) async fn play<Db: Site>(setting: &Setting<'_>) -> Result<Found, String> {
    let mut ground = Ground::<Db>::new().await?;
    ground.fresh(setting.folder, "limits").await?;
    ground.run(witness(setting.kind).into()).await?;
    let mut remote = Remote::start(setting.kind, &ground.url, setting.folder).await?;
    let part = Part {
        scenario: Scenario::Limits,
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
    // They make the subscriptions: what is published from then on is theirs.
    each(&mut places, async |place| place.work().await).await?;
    let filling = tokio::spawn(fill(postbox.clone()));

    tokio::time::sleep(SETTLES).await;
    let quiet = Used::measured(&mut remote, setting.span.clamp(QUIET.0, QUIET.1), MEASURED).await?;
    let by_command = Hand::command(&ground.url).unwrap_or_else(|| Hand::Library(postbox.clone()));
    let (few, slow) = tokio::try_join!(paused(Hand::Library(postbox.clone()), FEW), paused(by_command, SLOW))?;
    tokio::time::sleep(GOES_ON_WITHIN).await;
    let alive = places.iter_mut().all(Place::works);

    let until = Instant::now() + setting.span;
    each(&mut places, async |place| place.suffer(until, TROUBLE).await).await?;
    eprintln!("the faults were on for {:.1?}", setting.span);
    let healed = match setting.span >= LONG {
        true => Used::measured(&mut remote, RECOVERS, RECOVERED).await?,
        false => Vec::new(),
    };

    let mut found = Found::default();
    if !alive {
        found.broken.push("the run itself: a worker ended in the quiet time".into());
    }
    if filling.is_finished() {
        found.broken.push("the run itself: publishing ended".into());
    }
    filling.abort();
    let log = remote.seen().await?;
    let seen = Seen { passes: check::passes(&log), claims: claims(&ground).await?, stops: locked(&crew.stops).clone() };
    drop(places);
    postbox.close().await;
    found.messages = seen.passes.len() as u64;
    seen.judge(setting, &mut found);
    Used::judge(&quiet, "with no faults", &mut found);
    Used::judge(&healed, "after the faults", &mut found);
    seen.judge_pause(&few, &mut found);
    seen.judge_pause(&slow, &mut found);
    if !found.broken.is_empty() {
        let text = format!("{:#?}\n{:#?}\n{:#?}", seen.stops, seen.claims, seen.passes);
        std::fs::write(setting.folder.join("history.txt"), text).ok();
    }
    Ok(found)
}

/// Publishes more than the limits let through, for ever.
async fn fill<Db: Site>(postbox: Postbox<Db>) -> Result<(), postbox::Error> {
    let drafts = |topic: &'static str, priority, count: u32| {
        (0..count).map(move |n| Envelope::json(topic, &n).map(|draft: Draft| draft.priority(priority)))
    };
    // Work for ten seconds at once, and then for a second and a fifth each second.
    let few = AT_ONCE * 1000 / WORK_MS as u32;
    let mut seconds = 10.0;
    loop {
        let many = |each_second: u32| (f64::from(each_second) * seconds) as u32;
        let all = drafts("paced.few", Priority::Normal, many(few))
            .chain(drafts("paced.slow.high", Priority::High, many(RATE)))
            .chain(drafts(LOW, Priority::Low, many(RATE / 8)));
        postbox.publish_now(all).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        seconds = 1.2;
    }
}

/// Who pauses.
enum Hand<Db: Site> {
    Library(Postbox<Db>),
    /// The command, and its database.
    Command(PathBuf, String),
}

impl<Db: Site> Hand<Db> {
    /// The command, if it was built beside this program.
    fn command(url: &str) -> Option<Self> {
        let program = std::env::current_exe().ok()?.with_file_name("postbox");
        if !program.exists() {
            eprintln!("there is no {}: both pauses come from the library", program.display());
            return None;
        }
        Some(Hand::Command(program, url.to_owned()))
    }

    async fn set(&self, subscription: &str, paused: bool) -> Result<(), String> {
        let verb = if paused { "pause" } else { "resume" };
        match self {
            Hand::Library(postbox) => {
                let (admin, why) = (postbox.admin(), "to see that it holds");
                let entry = match paused {
                    true => admin.pause(APPLICATION, subscription, APPLICATION, why).await,
                    false => admin.resume(APPLICATION, subscription, APPLICATION, why).await,
                };
                entry.map(drop).map_err(|e| format!("{verb}: {e}"))
            }
            Hand::Command(program, url) => {
                let run = Command::new(program)
                    .args(["subscriptions", verb, subscription, "--reason", "to see that it holds"])
                    .args(["--database-url", url, "--application", APPLICATION, "--actor", APPLICATION])
                    .output();
                let run = run.await.map_err(|e| e.to_string())?;
                match run.status.success() {
                    true => Ok(()),
                    false => Err(format!("{verb}: {}", String::from_utf8_lossy(&run.stderr))),
                }
            }
        }
    }
}

/// A pause: when it was told to be done, when it was about to be ended, and when that was told to be done.
struct Paused {
    subscription: &'static str,
    by: &'static str,
    from: u64,
    to: u64,
    over: u64,
}

async fn paused<Db: Site>(hand: Hand<Db>, subscription: &'static str) -> Result<Paused, String> {
    let by = if matches!(hand, Hand::Library(_)) { "library" } else { "command" };
    hand.set(subscription, true).await?;
    let from = now_us();
    tokio::time::sleep(PAUSE).await;
    let to = now_us();
    hand.set(subscription, false).await?;
    Ok(Paused { subscription, by, from, to, over: now_us() })
}

/// How much of the limits is used, with work enough and no faults.
#[derive(Debug, Clone, Copy)]
struct Used {
    at_once: f64,
    rate: f64,
}

impl Used {
    /// Until it is enough, but so often at the most.
    async fn measured(remote: &mut Remote, time: Duration, most: usize) -> Result<Vec<Used>, String> {
        let mut used = Vec::new();
        while used.len() < most && !used.last().is_some_and(Used::is_enough) {
            let from = now_us();
            tokio::time::sleep(time).await;
            let window = (from, now_us());
            used.push(Used::of(&check::passes(&remote.seen().await?), window));
        }
        Ok(used)
    }

    fn of(passes: &[Pass], (from, to): (u64, u64)) -> Used {
        let begun = passes.iter().filter(|pass| pass.is_slow() && (from..to).contains(&pass.came)).count();
        let seconds = (to - from) as f64 / 1e6;
        Used {
            at_once: check::in_use(passes, (from, to)) / f64::from(AT_ONCE),
            rate: begun as f64 / (seconds * f64::from(RATE) / PER.as_secs_f64()),
        }
    }

    fn is_enough(&self) -> bool {
        self.at_once >= USED && self.rate >= USED
    }

    /// By the last time that it was measured.
    fn judge(all: &[Used], when: &str, found: &mut Found) {
        let Some(last) = all.last() else { return };
        found.measure(format!("limit, used of it {when}"), last.at_once);
        found.measure(format!("rate, used of it {when}"), last.rate);
        if !last.is_enough() {
            let told = format!("{all:.2?}");
            found.broken.push(format!("limits: not used to {USED} {when}, with work enough: {told}"));
        }
    }
}

/// What there is to judge by.
struct Seen {
    passes: Vec<Pass>,
    claims: Vec<Claim>,
    stops: Vec<Stop>,
}

impl Seen {
    fn judge(&self, setting: &Setting<'_>, found: &mut Found) {
        let Seen { passes, claims, stops } = self;
        let (most, too_many) = check::at_once(passes, setting.kind, stops);
        found.broken.extend(too_many);
        let metered: Vec<Claim> = claims.iter().filter(|claim| claim.subscription == SLOW).cloned().collect();
        found.broken.extend(check::overdrawn(&metered));
        let (most_soon, crowd) = check::crowded(passes, &metered, stops, 100_000);
        let (most_in_second, crowds) = check::crowded(passes, &metered, stops, 1_000_000);
        found.broken.extend(crowd.into_iter().chain(crowds));
        found.measure("limit, at once at the most", f64::from(most));
        found.measure("rate, in 100 ms at the most", most_soon as f64);
        found.measure("rate, in a second at the most", most_in_second as f64);

        let slow = || passes.iter().filter(|pass| pass.is_slow());
        let low = slow().filter(|pass| pass.what == LOWEST).count() as f64 / slow().count().max(1) as f64;
        found.measure("priority, share of the lowest", low);
        if low < LOW_SHARE {
            found.broken.push(format!("priority: the lowest had {low:.3} of what was handed out, and starves"));
        }
        for (what, id) in [("killed", "F1"), ("stopped", "F2")] {
            if setting.counts.of(id) == 0 {
                found.broken.push(format!("the run itself: nobody was {what}; let it run for longer"));
            }
        }
    }

    fn judge_pause(&self, pause: &Paused, found: &mut Found) {
        let Paused { subscription, by, from, to, over } = *pause;
        let own = |pass: &&Pass| if subscription == FEW { pass.what == FEW } else { pass.is_slow() };
        let came = || self.passes.iter().filter(own).map(|pass| pass.came);
        let claimed = self.claims.iter().filter(|claim| claim.subscription == subscription).map(|claim| claim.at);
        let during = |times: &mut dyn Iterator<Item = u64>| times.filter(|at| (from..to).contains(at)).max();
        let ms = |after: Option<u64>| after.map_or(0.0, |at| (at - from) as f64 / 1000.0);
        let last_claim = during(&mut claimed.clone());
        let last_call = during(&mut came());
        found.measure(format!("pause by {by}, last claim after, ms"), ms(last_claim));
        found.measure(format!("pause by {by}, last call after, ms"), ms(last_call));
        for (what, last) in [("claimed", last_claim), ("called", last_call)] {
            if last.is_some_and(|at| at > from + STOPS_WITHIN) {
                found.broken.push(format!("pause: {subscription} was {what} {:.0} ms after it was paused", ms(last)));
            }
        }
        match came().filter(|at| *at > to).min() {
            Some(first) => {
                let after = first.saturating_sub(over) as f64 / 1000.0;
                found.measure(format!("resume by {by}, first call after, ms"), after);
            }
            None => found.broken.push(format!("pause: {subscription} did not go on after it was resumed")),
        }
    }
}

/// Keeps each claim, in its transaction: whose, of which subscription, and when the bucket was last filled up.
fn witness(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => {
            "create table torture.taken (subscription text, delivery bigint, process bigint, token bigint, at bigint);
             create function torture.keep_taken() returns trigger language plpgsql as $$
             begin
                 insert into torture.taken (subscription, delivery, process, token, at)
                 select s.name, d.delivery, substring(w.name from '[0-9]+$')::bigint,
                     (select (extract(epoch from max(f.refilled_at)) * 1000000)::bigint from postbox.flow_limit f
                      where f.token_us is not null),
                     (extract(epoch from clock_timestamp()) * 1000000)::bigint
                 from unnest(new.deliveries, new.subscriptions) d(delivery, subscription)
                 join postbox.subscription s on s.id = d.subscription
                 join postbox.worker w on w.id = new.worker;
                 return null;
             end $$;
             create trigger torture_taken after insert on postbox.lease
                 for each row execute function torture.keep_taken();"
        }
        Kind::Sqlite => {
            "create table torture_taken (subscription text, delivery integer, process integer, token integer, at integer);
             create trigger torture_taken_straight after insert on postbox_lease
             begin
                 insert into torture_taken (subscription, delivery, process, token, at)
                 select s.name, i.value ->> 0, cast(substr(w.name, instr(w.name, ':') + 1) as integer),
                     (select max(refilled_at) * 1000 from postbox_flow_limit where token_us is not null),
                     cast(unixepoch('subsec') * 1000000 as integer)
                 from json_each(new.items) i
                 join postbox_subscription s on s.id = i.value ->> 2
                 join postbox_worker w on w.id = new.worker;
             end;
             create trigger torture_taken_again after update of token on postbox_delivery
             when new.token is not null and new.token is not old.token
             begin
                 insert into torture_taken (subscription, delivery, process, token, at)
                 select s.name, new.id, cast(substr(w.name, instr(w.name, ':') + 1) as integer),
                     (select max(refilled_at) * 1000 from postbox_flow_limit where token_us is not null),
                     cast(unixepoch('subsec') * 1000000 as integer)
                 from postbox_lease l
                 join postbox_subscription s on s.id = new.subscription
                 join postbox_worker w on w.id = l.worker
                 where l.token = new.token;
             end;"
        }
    }
}

async fn claims<Db: Site>(ground: &Ground<Db>) -> Result<Vec<Claim>, String> {
    let sql = format!(
        "select subscription, cast(delivery as text), cast(process as text), cast(token as text), cast(at as text) from {}",
        Db::table("taken")
    );
    let whole = |row: &Texts, at: usize| row.get(at).and_then(|text| text.as_deref()?.parse::<i64>().ok());
    let claim = |row: &Texts| {
        Some(Claim {
            subscription: row.first()?.clone()?,
            delivery: whole(row, 1)?,
            process: whole(row, 2)?,
            token: u64::try_from(whole(row, 3)?).ok()?,
            at: u64::try_from(whole(row, 4)?).ok()?,
        })
    };
    let claims: Option<Vec<Claim>> = ground.rows(sql).await?.iter().map(claim).collect();
    claims.ok_or_else(|| "a claim that cannot be read".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(after_ms: &[u64]) -> Seen {
        let call = |ms: &u64| Pass {
            what: FEW.into(),
            delivery: *ms as i64,
            process: 1,
            begun: ms * 1000,
            came: ms * 1000,
            gone: None,
            left: None,
        };
        Seen { passes: after_ms.iter().map(call).collect(), claims: Vec::new(), stops: Vec::new() }
    }

    fn broken(after_ms: &[u64]) -> String {
        let mut found = Found::default();
        let pause = Paused { subscription: FEW, by: "library", from: 1_000_000, to: 3_000_000, over: 3_000_000 };
        seen(after_ms).judge_pause(&pause, &mut found);
        found.broken.join("; ")
    }

    #[test]
    fn a_pause_that_does_not_hold_is_seen() {
        assert_eq!(broken(&[900, 1900, 3100]), "");
        assert!(broken(&[900, 2100, 3100]).contains("called 1100 ms after"));
        assert!(broken(&[900]).contains("did not go on"));
    }

    #[test]
    fn what_is_not_used_is_seen() {
        let enough = Used { at_once: 0.95, rate: 0.97 };
        let mut found = Found::default();
        Used::judge(&[Used { rate: 0.5, ..enough }, enough], "", &mut found);
        assert!(found.broken.is_empty());
        Used::judge(&[Used { at_once: 0.5, ..enough }], "", &mut found);
        assert!(found.broken[0].contains("not used to 0.9"), "{:?}", found.broken);
    }
}
