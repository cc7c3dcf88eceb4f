//! What is done to many deliveries: read, previewed, confirmed and paced in one way for `retry`, `cancel`
//! and `replay`.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use postbox::admin::{AuditEntry, DeliveryRow, Filter};
use postbox::lifecycle::State;
use postbox::{Database, Error, Postbox};
use serde::Serialize;
use serde_json::json;
use tokio::sync::watch;

use crate::commands::{Ended, list};
use crate::confirm::confirm;
use crate::desk::{Desk, usage};
use crate::failure::{FAILED, Failure, REFUSED, USAGE, code_of};
use crate::flags::Bulk;
use crate::output::{Output, Tone, state_word};
use crate::text::{capped, many, plain, quoted};

/// Deliveries looked at before anything is done, and counted by the preview.
const LOOKED_AT: u32 = 20_000;
/// Deliveries looked up at once after that.
const PAGE: u32 = 500;
/// So many of what would be done are shown.
const SAMPLE: usize = 5;
/// The exit code of a process that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// A verb, and what it can be done to.
#[derive(Debug)]
pub(super) struct Verb {
    /// As it is typed.
    pub(super) name: &'static str,
    pub(super) past: &'static str,
    /// It can be done to deliveries in these states,
    pub(super) states: &'static [State],
    /// and is done to these where a filter names none.
    pub(super) usual: &'static [State],
}

/// What is meant.
#[derive(Debug)]
pub(super) enum Which {
    Ids(Vec<i64>),
    Those(Filter),
}

/// What was typed, and what it means.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) verb: &'static Verb,
    pub(super) which: Which,
    pub(super) bulk: Bulk,
    /// In words.
    pub(super) tried: String,
    /// The numbers or the filter, as a shell takes them.
    pub(super) typed: String,
    /// The command again, without `--reason`, `--yes` and `--dry-run`.
    pub(super) same: String,
}

impl Wanted {
    /// Reads it. `beside` are the verb's own flags, as they were typed.
    pub(super) fn read(desk: &Desk<'_>, verb: &'static Verb, mut bulk: Bulk, beside: &str) -> Result<Wanted, Failure> {
        let words = std::mem::take(&mut bulk.which);
        let mut typed: Vec<String> = words.iter().map(|w| quoted(&plain(w))).collect();
        let name = verb.name;
        let tried =
            if bulk.all { format!("{name} all") } else { format!("{name} {}", words.join(" ")).trim_end().to_owned() };
        if bulk.all {
            typed.push("--all".into());
        }
        let given = typed.join(" ");
        let list = desk.command(format!("list {}", if bulk.all { "" } else { &given }).trim_end());
        if let Some(limit) = bulk.limit {
            typed.push(format!("--limit {limit}"));
        }
        if let Some(rate) = bulk.rate {
            typed.push(format!("--rate {rate}"));
        }
        let same = desk.action(&format!("{name} {}{beside}", typed.join(" ")));
        let ids: Vec<i64> = words.iter().filter_map(|word| word.parse().ok()).collect();
        if let Some(first) = ids.first() {
            let again = |why| Err(usage(&tried, why, desk.command(&format!("{name} {first} --reason …"))));
            if ids.len() < words.len() {
                return again("these are numbers and a filter together; give one or the other");
            }
            if bulk.limit.is_some() || bulk.rate.is_some() {
                return again("--limit and --rate go with a filter or --all");
            }
            return Ok(Wanted { verb, which: Which::Ids(ids), bulk, tried, typed: given, same });
        }
        let help = || desk.command(&format!("{name} --help"));
        let mut filter: Filter =
            words.join(" ").parse().map_err(|e: Error| Failure::new(USAGE, &tried, e.to_string(), help()))?;
        if filter == Filter::default() && !bulk.all {
            let why = "a filter that says nothing means everything there ever was; if that is meant, say --all";
            return Err(Failure::new(REFUSED, &tried, why, help()));
        }
        if let Some(other) = filter.states.iter().find(|state| !verb.states.contains(state)) {
            let may: Vec<&str> = verb.states.iter().map(|s| s.as_str()).collect();
            let why = match other {
                State::InDoubt => {
                    format!("what is in doubt cannot be {}: only `resolve` settles it, one by one", verb.past)
                }
                other => format!("what is {other} cannot be {}: only what is {}", verb.past, may.join(" or ")),
            };
            return Err(Failure::new(REFUSED, &tried, why, list));
        }
        if filter.states.is_empty() {
            filter.states = verb.usual.to_vec();
        }
        Ok(Wanted { verb, which: Which::Those(filter), bulk, tried, typed: given, same })
    }

    /// Without numbers and a filter's flags: an error where a flag goes with one number only.
    pub(super) fn one_only(&self, desk: &Desk<'_>, flag: &str, example: &str) -> Result<(), Failure> {
        match &self.which {
            Which::Ids(ids) if ids.len() == 1 => Ok(()),
            which => {
                let id = if let Which::Ids(ids) = which { ids[0].to_string() } else { "ID".into() };
                let why = format!("{flag} is one delivery's; give one ID");
                let next = format!("{} {id} {example} --reason …", self.verb.name);
                Err(usage(&self.tried, why, desk.command(&next)))
            }
        }
    }

    /// The reason that was given. Suggestions keep the flags.
    pub(super) fn reason(&self, desk: &Desk<'_>) -> Result<String, Failure> {
        let yes = if self.bulk.yes { " --yes" } else { "" };
        desk.reason(self.bulk.reason.clone(), &self.tried, &format!("{}{yes}", self.same), "why")
    }

    /// Goes on if somebody says so.
    pub(super) fn confirmed(&self, reason: &str) -> Result<(), Failure> {
        confirm(self.bulk.yes, &self.tried, &format!("{} --reason {}", self.same, quoted(&plain(reason))))
    }

    /// Shows what would be done, and asks; the reason, if it is to be done.
    pub(super) fn agreed(&self, desk: &Desk<'_>, preview: &Preview) -> Result<Option<String>, Failure> {
        if self.bulk.dry_run {
            preview.show(desk.output)?;
            if !desk.output.json && preview.deliveries > 0 {
                desk.output.prose(&format!("next: {} --reason \"why\"", self.same));
            }
            return Ok(None);
        }
        let reason = self.reason(desk)?;
        if !desk.output.json {
            preview.show(desk.output)?;
        }
        if preview.deliveries > 0 {
            self.confirmed(&reason)?;
        }
        Ok(Some(reason))
    }
}

/// What would be done.
#[derive(Debug)]
pub(super) struct Preview {
    /// To so many.
    pub(super) deliveries: i64,
    /// How many of whose, and what is to be said of them.
    pub(super) lines: Vec<(i64, String)>,
    pub(super) sample: Vec<DeliveryRow>,
    /// In a sentence.
    pub(super) words: String,
    /// For programs.
    pub(super) object: serde_json::Value,
}

impl Preview {
    fn show(&self, output: &Output) -> std::io::Result<()> {
        if output.json {
            return output.object(&self.object);
        }
        for (number, whose) in &self.lines {
            output.line(&format!("{:>8}  {whose}", capped(*number)))?;
        }
        if !self.sample.is_empty() {
            list::table(&self.sample, output)?;
        }
        output.prose(&self.words);
        Ok(())
    }
}

/// No faster than this.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Option<f64>,
    begun: Instant,
    done: u64,
}

impl Pace {
    pub(super) fn new(rate: Option<f64>) -> Pace {
        Pace { rate, begun: Instant::now(), done: 0 }
    }

    /// How many may be done at once: a tenth of a second's.
    pub(super) fn at_once(&self) -> u64 {
        self.rate.map_or(u64::MAX, |rate| (rate / 10.0).ceil() as u64)
    }

    /// Waits until so many more may have been done.
    pub(super) async fn after(&mut self, done: u64) {
        self.done += done;
        let Some(rate) = self.rate else { return };
        let until = Duration::try_from_secs_f64(self.done as f64 / rate).unwrap_or(Duration::MAX);
        tokio::time::sleep(until.saturating_sub(self.begun.elapsed())).await;
    }
}

/// Ctrl-C while many are done: the run ends between two of them, and says where it came to. A second one
/// ends the process.
#[derive(Debug)]
pub(super) struct Interrupt(watch::Receiver<bool>);

impl Interrupt {
    /// From here on.
    pub(super) fn listen(desk: &Desk<'_>) -> Interrupt {
        let (tell, told) = watch::channel(false);
        let output = desk.output.clone();
        tokio::spawn(async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                output.prose("stops after what is under way; Ctrl-C again ends it at once");
                tell.send_replace(true);
                if tokio::signal::ctrl_c().await.is_ok() {
                    std::process::exit(INTERRUPTED);
                }
            }
            std::future::pending::<()>().await;
        });
        Interrupt(told)
    }

    pub(super) fn came(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits for as long as the pace says, or until it comes.
    pub(super) async fn or_after(&mut self, pace: &mut Pace, done: u64) {
        tokio::select! {
            () = pace.after(done) => {}
            _ = self.0.wait_for(|came| *came) => {}
        }
    }
}

/// What became of many.
#[derive(Debug, Default, Serialize)]
struct Sums {
    done: u64,
    refused: u64,
}

/// Looks for the deliveries, page by page, and does it to each with the revision that was seen.
pub(super) async fn one_by_one<Db: Database, F>(
    desk: &Desk<'_>,
    postbox: &Postbox<Db>,
    wanted: &Wanted,
    filter: &Filter,
    act: impl Fn(i64, i32, String) -> F,
) -> Ended
where
    F: Future<Output = Result<AuditEntry, Error>>,
{
    let name = wanted.verb.name;
    let failed = |e: Error| Failure::of(&e, &wanted.tried, desk.command("status"));
    let mut found = postbox.admin().list(filter, LOOKED_AT).await.map_err(failed)?;
    let Some(reason) = wanted.agreed(desk, &preview(wanted, &found))? else { return Ok(0) };
    // What is newer was not there when it was agreed to.
    let newest = found.first().map_or(0, |row| row.id);
    let limit = wanted.bulk.limit.unwrap_or(u64::MAX);
    let (mut pace, mut interrupt) = (Pace::new(wanted.bulk.rate), Interrupt::listen(desk));
    let (mut sums, mut seen, mut codes) = (Sums::default(), HashSet::new(), HashSet::new());
    let mut asked = LOOKED_AT;
    let ended = 'all: loop {
        let last_page = found.len() < asked as usize;
        let fresh: Vec<&DeliveryRow> = found.iter().filter(|r| r.id <= newest && !seen.contains(&r.id)).collect();
        let stay = found.len() - fresh.len();
        for row in fresh.iter().filter(|row| !left_out(wanted, row)) {
            if sums.done >= limit {
                break 'all None;
            }
            if interrupt.came() {
                break 'all Some(Cut::Interrupted);
            }
            match act(row.id, row.rev, reason.clone()).await {
                Ok(entry) => {
                    sums.done += 1;
                    tell(desk, &entry)?;
                }
                // It has another state now, or a rule is against it; the others can still be done.
                Err(error @ (Error::Conflict(_) | Error::Refused(_) | Error::NotFound(_))) => {
                    sums.refused += 1;
                    codes.insert(code_of(&error));
                    failed_at(desk, name, row.id, &error)?;
                }
                Err(error) => break 'all Some(Cut::Failed(error)),
            }
            interrupt.or_after(&mut pace, 1).await;
        }
        if last_page {
            break None;
        }
        seen.extend(fresh.iter().map(|row| row.id));
        // Those that were seen and match still, or are newer, come first again.
        asked = PAGE.saturating_add(u32::try_from(stay + fresh.len()).unwrap_or(u32::MAX));
        found = match postbox.admin().list(filter, asked).await {
            Ok(found) => found,
            Err(error) => break Some(Cut::Failed(error)),
        };
    };
    if desk.output.json {
        desk.output.object(&json!({"action": name, "done": sums.done, "refused": sums.refused}))?;
    } else {
        let plus = desk.output.paint(Tone::Good, "+");
        desk.output.line(&format!("{plus} {} {}, refused {}", wanted.verb.past, sums.done, sums.refused))?;
    }
    if let Some(cut) = ended {
        let next = format!("{} --reason {} --yes", wanted.same, quoted(&plain(&reason)));
        return Err(cut.failure(format!("{} to its end", wanted.tried), next));
    }
    Ok(match (sums.done, codes.len(), codes.iter().next()) {
        (_, 0, _) => 0,
        (0, 1, Some(code)) => *code,
        _ => FAILED,
    })
}

/// Why a run did not come to its end.
#[derive(Debug)]
pub(super) enum Cut {
    Interrupted,
    Failed(Error),
}

impl Cut {
    pub(super) fn failure(&self, tried: String, next: String) -> Failure {
        match self {
            Cut::Interrupted => Failure::new(FAILED, tried, "it was interrupted", next),
            Cut::Failed(error) => Failure::of(error, tried, next),
        }
    }
}

/// An operation whose outcome nobody knows may have happened: whoever tries it again says so for each.
fn left_out(wanted: &Wanted, row: &DeliveryRow) -> bool {
    let abandoned = row.note.as_deref().is_some_and(|note| note.starts_with("abandoned"));
    wanted.verb.name == "retry" && row.state == State::Dead && row.kind == "operation" && abandoned
}

/// How many of whose in which state, and some of them.
fn preview(wanted: &Wanted, found: &[DeliveryRow]) -> Preview {
    let more = found.len() >= LOOKED_AT as usize;
    let mut counts: BTreeMap<(&str, &str, &str, bool), i64> = BTreeMap::new();
    for row in found {
        let whose = (row.application.as_str(), row.subscription.as_str(), row.state.as_str(), left_out(wanted, row));
        *counts.entry(whose).or_default() += 1;
    }
    let lines = counts
        .iter()
        .map(|((application, subscription, state, left_out), number)| {
            let note = if *left_out { "  left out: outcome never known; retry each by its number" } else { "" };
            (*number, format!("{} of {}  {}{note}", plain(subscription), plain(application), state_word(state)))
        })
        .collect();
    let by_subscription: Vec<_> = counts
        .iter()
        .map(|((application, subscription, state, left_out), number)| {
            json!({"application": application, "subscription": subscription, "state": state, "left_out": left_out, "deliveries": number})
        })
        .collect();
    let matched: i64 = counts.iter().filter(|((.., left_out), _)| !left_out).map(|(_, number)| number).sum();
    let deliveries = wanted.bulk.limit.and_then(|l| i64::try_from(l).ok()).map_or(matched, |l| l.min(matched));
    let what = if wanted.verb.name == "retry" { "tries again" } else { "calls off" };
    let mut words = match (deliveries, deliveries < matched) {
        (0, _) => format!("no delivery matches that is {}", states(wanted)),
        (n, true) => format!("{what} the newest {n} of {matched} that match"),
        (n, false) => format!("{what} {}", many(n, "delivery", "deliveries")),
    };
    if more && deliveries == matched {
        words.push_str(", and those that match beyond them");
    }
    // No more of them than it is done to.
    let shown = SAMPLE.min(usize::try_from(deliveries).unwrap_or(SAMPLE));
    let sample: Vec<DeliveryRow> = found.iter().filter(|row| !left_out(wanted, row)).take(shown).cloned().collect();
    let object = json!({"deliveries": deliveries, "matched": matched, "more": more, "by_subscription": by_subscription, "sample": sample});
    Preview { deliveries, lines, sample, words, object }
}

fn states(wanted: &Wanted) -> String {
    match &wanted.which {
        Which::Those(filter) => filter.states.iter().map(|s| s.as_str()).collect::<Vec<_>>().join(" or "),
        Which::Ids(_) => String::new(),
    }
}

/// Shows deliveries by their numbers, and the command for those that it can be done to.
pub(super) async fn look<Db: Database>(
    desk: &Desk<'_>,
    postbox: &Postbox<Db>,
    wanted: &Wanted,
    ids: &[i64],
    beside: &str,
) -> Result<Vec<DeliveryRow>, Failure> {
    let verb = wanted.verb;
    let mut rows = Vec::with_capacity(ids.len());
    for id in ids {
        let shown = postbox.admin().show(*id).await;
        let row = shown.map_err(|e| Failure::of(&e, &wanted.tried, desk.look_at(*id, &e)))?.row;
        if !verb.states.contains(&row.state) {
            desk.output.prose(&format!("delivery {id} is {}: it cannot be {}", row.state, verb.past));
        }
        rows.push(row);
    }
    if wanted.bulk.dry_run {
        if desk.output.json {
            for row in &rows {
                desk.output.object(row)?;
            }
        } else {
            list::table(&rows, desk.output)?;
            let can = rows.iter().filter(|r| verb.states.contains(&r.state)).map(|r| r.id.to_string());
            let can = can.collect::<Vec<_>>().join(" ");
            if !can.is_empty() {
                let same = desk.action(&format!("{} {can}{beside}", verb.name));
                desk.output.prose(&format!("next: {same} --reason \"why\""));
            }
        }
    }
    Ok(rows)
}

/// Tells what became of each, and ends with the code that says it for all.
pub(super) fn told<T>(
    desk: &Desk<'_>,
    verb: &str,
    outcomes: Vec<(i64, Result<T, Error>)>,
    tell: impl Fn(&Desk<'_>, &T) -> std::io::Result<()>,
) -> Ended {
    let (mut done, mut codes) = (0, HashSet::new());
    for (id, outcome) in outcomes {
        match outcome {
            Ok(outcome) => {
                done += 1;
                tell(desk, &outcome)?;
            }
            Err(error) => {
                codes.insert(code_of(&error));
                failed_at(desk, verb, id, &error)?;
            }
        }
    }
    Ok(match (done, codes.len(), codes.iter().next()) {
        (_, 0, _) => 0,
        // All failed in the same way: the code says how.
        (0, 1, Some(code)) => *code,
        _ => FAILED,
    })
}

/// One that it was not done to: for people, and for programs that count what they get.
fn failed_at(desk: &Desk<'_>, verb: &str, id: i64, error: &Error) -> std::io::Result<()> {
    Failure::of(error, format!("{verb} delivery {id}"), desk.look_at(id, error)).tell(desk.output);
    if desk.output.json {
        desk.output.object(&json!({"id": id, "error": error.to_string(), "code": code_of(error)}))?;
    }
    Ok(())
}

/// One that it was done to.
pub(super) fn tell(desk: &Desk<'_>, entry: &AuditEntry) -> std::io::Result<()> {
    if desk.output.json {
        return desk.output.object(entry);
    }
    let word = |word: &Option<String>| word.as_deref().map_or_else(|| "?".into(), state_word);
    desk.output.line(&format!(
        "{} delivery {}: {} -> {}, by {}, audit {}",
        desk.output.paint(Tone::Good, "+"),
        entry.delivery.unwrap_or_default(),
        word(&entry.state_before),
        word(&entry.state_after),
        plain(&entry.actor),
        entry.seq
    ))
}
