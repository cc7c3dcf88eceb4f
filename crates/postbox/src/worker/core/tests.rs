//! The decisions driven through random orders of events, lost answers included, in virtual time.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::handler::Gather;
use crate::lifecycle::{Answer, Policy, State};
use crate::retry::RetryPolicy;
use crate::store::{ClaimRequest, Claimed, Settle};

const OPERATION: SubscriptionId = 1;
const PLAIN: SubscriptionId = 2;
const IDEMPOTENT: SubscriptionId = 3;
/// With a batch handler.
const BATCHES: SubscriptionId = 4;
/// The delivery whose outcome no store takes.
const POISON: i64 = 5;

fn lane(id: SubscriptionId, kind: Kind) -> Lane {
    let retry = RetryPolicy { max_attempts: 2, base: Duration::ZERO, cap: Duration::ZERO };
    Lane {
        id,
        policy: Policy { kind, retry, idempotent: id == IDEMPOTENT },
        timeout: Duration::from_secs(5),
        quiet: Duration::from_secs(60),
        late: Duration::from_secs(95),
        concurrency: None,
        keys: None,
        gather: (id == BATCHES).then_some(Gather { most: 4, within: Duration::from_millis(10) }),
        limited: false,
        metered: false,
    }
}

fn core(seed: u64, concurrency: usize) -> Core {
    Core::new(Setup {
        worker: Uuid::from_u128(1),
        concurrency,
        batch: None,
        poll_interval: Duration::from_secs(1),
        subscriptions: vec![
            lane(OPERATION, Kind::Operation),
            lane(PLAIN, Kind::Plain),
            lane(IDEMPOTENT, Kind::Operation),
            lane(BATCHES, Kind::Plain),
        ],
        seed,
    })
}

/// A store that loses answers, in memory.
#[derive(Default)]
struct Model {
    ready: VecDeque<Item>,
    leases: BTreeMap<Uuid, (i64, BTreeMap<i64, Item>)>,
    parts: BTreeSet<(i64, i32)>,
    begun: BTreeSet<(i64, u32)>,
    ended: BTreeMap<(i64, u32), &'static str>,
    terminal: BTreeMap<i64, State>,
    operations: BTreeSet<i64>,
    batches: i64,
}

impl Model {
    fn claim(&mut self, request: &ClaimRequest) -> Claimed {
        let mut items = Vec::new();
        for (subscription, room) in &request.wanted {
            let mut left = *room;
            self.ready.retain(|item| {
                let take = left > 0 && item.subscription == *subscription;
                if take {
                    left -= 1;
                    items.push(item.clone());
                }
                !take
            });
        }
        if !items.is_empty() {
            self.batches += 1;
            let held = items.iter().map(|i| (i.delivery, i.clone())).collect();
            self.leases.insert(request.token, (self.batches, held));
        }
        Claimed { batch: self.batches, token: request.token, items, next_due: None, dry: Vec::new() }
    }

    fn settle(&mut self, settle: &Settle) -> Guarded {
        if self.parts.contains(&(settle.lease.batch, settle.part)) {
            return Guarded::Done;
        }
        let Some((batch, held)) = self.leases.get_mut(&settle.lease.token) else { return Guarded::Fenced };
        assert_eq!(*batch, settle.lease.batch);
        self.parts.insert((settle.lease.batch, settle.part));
        for success in &settle.successes {
            held.remove(&success.delivery).expect("settled once, while it is held");
            assert!(self.ended.insert((success.delivery, 1), "succeeded").is_none());
            self.terminal.insert(success.delivery, State::Succeeded);
        }
        for moved in &settle.moves {
            let item = held.remove(&moved.delivery).expect("settled once, while it is held");
            match &moved.outcome {
                Some(outcome) => {
                    assert_eq!(outcome.number, item.attempts + 1, "attempts count one by one");
                    assert!(self.ended.insert((moved.delivery, outcome.number), outcome.kind).is_none());
                }
                None => {
                    let next = (moved.delivery, item.attempts + 1);
                    assert!(!self.begun.contains(&next), "what has begun has an outcome: {next:?}");
                    let snoozed = settle.seen.iter().any(|s| s.delivery == moved.delivery && s.kind == "snoozed");
                    let withheld = item.subscription == OPERATION && item.lost > 0;
                    assert!(snoozed || withheld, "no attempt, and no reason: {moved:?}");
                    assert_eq!(moved.standing.state == State::InDoubt, withheld);
                }
            }
            if matches!(moved.standing.state, State::Dead | State::Cancelled) && item.subscription == IDEMPOTENT {
                let unseen = |kind: &str| matches!(kind, "in_doubt" | "timed_out" | "panicked");
                let any = self.ended.iter().any(|((delivery, _), kind)| *delivery == moved.delivery && unseen(kind));
                assert!(!any && item.lost == 0, "one that may have happened is {}", moved.standing.state);
            }
            match moved.standing.state {
                State::Pending => self.ready.push_back(Item {
                    attempts: moved.standing.attempts,
                    lost: moved.standing.lost,
                    rev: moved.rev,
                    ..item
                }),
                state => {
                    self.terminal.insert(moved.delivery, state);
                }
            }
        }
        for item in &settle.released {
            let item = held.remove(&item.delivery).expect("released once, while it is held");
            assert!(!self.begun.contains(&(item.delivery, item.attempts + 1)), "what has begun is not handed back");
            self.ready.push_back(item);
        }
        for start in &settle.starts {
            assert!(held.contains_key(&start.0), "what begins is held");
            assert!(self.begun.insert(*start), "an attempt begins once");
        }
        if settle.close {
            assert!(held.is_empty(), "a lease ends when nothing of it is left: {held:?}");
            self.leases.remove(&settle.lease.token);
        }
        Guarded::Done
    }

    /// Operations that a kill would leave in doubt now.
    fn exposed(&self) -> usize {
        self.begun.iter().filter(|key| self.operations.contains(&key.0) && !self.ended.contains_key(key)).count()
    }
}

fn item(delivery: i64, subscription: SubscriptionId, lost: u32) -> Item {
    Item {
        delivery,
        subscription,
        message: Uuid::from_u128(delivery as u128),
        priority: 0,
        attempts: 0,
        lost,
        rev: 1,
        leads: false,
        envelope: None,
    }
}

fn ended(end: End) -> Box<Ended> {
    Box::new(Ended { ran: Duration::from_millis(1), ..Ended::of(end) })
}

/// Runs one worker against the model until it has stopped; the trace of what it did.
fn run(seed: u64, deliveries: i64, stop_after: Option<usize>) -> (Model, Vec<String>) {
    let mut dice = fastrand::Rng::with_seed(seed);
    let concurrency = dice.usize(1..6);
    let mut core = core(seed, concurrency);
    let mut model = Model::default();
    for delivery in 1..=deliveries {
        let subscription = [OPERATION, PLAIN, IDEMPOTENT, BATCHES, BATCHES][dice.usize(..5)];
        if matches!(subscription, OPERATION | IDEMPOTENT) {
            model.operations.insert(delivery);
        }
        model.ready.push_back(item(delivery, subscription, u32::from(dice.u8(0..10) == 0)));
    }
    let (mut now, mut trace) = (Duration::ZERO, Vec::new());
    // Answers under way, taken in any order; running attempts by hold.
    let mut inbox: Vec<Event> = vec![Event::Tick];
    let mut running: BTreeMap<Hold, (i64, u32, bool)> = BTreeMap::new();
    let mut called: BTreeSet<(i64, u32)> = BTreeSet::new();
    // Those of a call of the batch handler, by the one that holds its permit.
    let mut together: BTreeMap<Hold, Vec<(Hold, i64, u32, bool)>> = BTreeMap::new();
    let mut stopped = false;
    for step in 0..200_000 {
        let over = stop_after.map_or(model.terminal.len() as i64 == deliveries, |after| step >= after);
        if over && !stopped {
            stopped = true;
            inbox.push(Event::Stop);
        }
        let taken: Vec<Event> = match inbox.is_empty() {
            true => vec![Event::Tick],
            false => vec![inbox.swap_remove(dice.usize(..inbox.len()))],
        };
        trace.push(format!("{now:?} {taken:?}"));
        let ticked = matches!(taken.as_slice(), [Event::Tick]);
        let commands = core.step(taken, now);
        let idle = ticked && commands.is_empty();
        for command in commands {
            match command {
                Command::Permits(..) => panic!("nothing here has a limit"),
                Command::Claim(request) => {
                    let fate = dice.u8(0..10);
                    let claimed = (fate > 0).then(|| model.claim(&request));
                    // Lost on the way there (0), or on the way back (1).
                    inbox.push(Event::Claimed(request.token, claimed.filter(|_| fate > 1)));
                }
                Command::Disown(token) => {
                    let done = dice.bool();
                    if done && let Some((_, held)) = model.leases.remove(&token) {
                        model.ready.extend(held.into_values());
                    }
                    inbox.push(Event::Disowned(token, done));
                }
                Command::Settle(settle) => {
                    let fate = dice.u8(0..10);
                    let poison = settle
                        .moves
                        .iter()
                        .any(|m| m.delivery == POISON && m.outcome.as_ref().is_some_and(|o| o.error.is_none()));
                    let flushed = match fate {
                        0 => Flushed::Unknown,
                        // What this delivery's handler returned, no store takes.
                        _ if poison || settle.successes.iter().any(|s| s.delivery == POISON) => {
                            Flushed::Refused("interval out of range".into())
                        }
                        1 => {
                            model.settle(&settle);
                            Flushed::Unknown
                        }
                        _ => Flushed::Known(model.settle(&settle)),
                    };
                    assert!(model.exposed() <= concurrency, "a kill now leaves {} in doubt", model.exposed());
                    inbox.push(Event::Settled(settle.lease.token, flushed));
                }
                Command::Run(hold, _, item, number) => {
                    let key = (item.delivery, number);
                    assert!(called.insert(key), "an attempt is made once: {key:?}");
                    assert_ne!(item.subscription, BATCHES);
                    let recorded = item.subscription != PLAIN || item.lost > 0;
                    assert!(item.subscription != OPERATION || item.lost == 0, "it may have happened: {key:?}");
                    assert!(!recorded || model.begun.contains(&key), "on record before the call: {key:?}");
                    assert!(running.insert(hold, (item.delivery, number, recorded)).is_none());
                    assert!(running.len() <= concurrency, "{} at once", running.len());
                    assert!(running.values().filter(|r| r.2).count() <= concurrency);
                }
                Command::RunBatch(members) => {
                    let shares = |m: &Member| m.item.lost == 0 && (m.number == 1 || m.number < 2);
                    assert!(members.len() <= 4 && (members.len() == 1 || members.iter().all(shares)), "{members:?}");
                    let mut call = Vec::new();
                    for Member { hold, item, number, .. } in members {
                        let key = (item.delivery, number);
                        assert!(called.insert(key), "an attempt is made once: {key:?}");
                        assert_eq!(item.subscription, BATCHES);
                        assert!(item.lost == 0 || model.begun.contains(&key), "on record before the call: {key:?}");
                        call.push((hold, item.delivery, number, item.lost > 0));
                    }
                    let (hold, delivery, number, recorded) = call[0];
                    assert!(running.insert(hold, (delivery, number, recorded)).is_none());
                    assert!(running.len() <= concurrency, "{} at once", running.len());
                    together.insert(hold, call);
                }
                Command::Cancel(hold, _) => {
                    let shared = together.iter().find(|(_, call)| call.iter().any(|(member, ..)| *member == hold));
                    if let Some((first, _)) = shared.map(|(first, call)| (*first, call.len())) {
                        let call = together.remove(&first).expect("it runs");
                        running.remove(&first);
                        let ends = call.into_iter().map(|(member, ..)| (member, ended(End::TimedOut)));
                        inbox.push(Event::EndedTogether(ends.collect()));
                        inbox.push(Event::Freed(first));
                    } else if running.remove(&hold).is_some() {
                        inbox.push(Event::Ended(hold, ended(End::TimedOut)));
                        inbox.push(Event::Freed(hold));
                    }
                }
                Command::Observe(_) => panic!("nobody fences this worker"),
                Command::Asleep(_) => inbox.push(Event::Woken),
                Command::AskPaused(mut queued) => {
                    queued.retain(|_| dice.bool());
                    inbox.push(Event::Paused(queued));
                }
            }
        }
        if core.is_done(now) {
            return (model, trace);
        }
        // Something that runs may end; time may pass.
        if !running.is_empty() && dice.u8(0..3) == 0 {
            let nth = dice.usize(..running.len());
            let hold = *running.keys().nth(nth).expect("one of them");
            let one = running.remove(&hold).map(|(delivery, number, recorded)| (hold, delivery, number, recorded));
            let call = together.remove(&hold).unwrap_or_else(|| one.into_iter().collect());
            let ends = [
                End::Succeeded,
                End::Failed { permanent: false, retry_after: None },
                End::Failed { permanent: true, retry_after: None },
                End::InDoubt,
                End::Discarded,
                End::Snoozed { wait: Duration::ZERO },
            ];
            let mut told = Vec::new();
            for (member, delivery, number, recorded) in call {
                let end = ends[dice.usize(..ends.len())];
                if matches!(end, End::Snoozed { .. }) && !recorded {
                    // No attempt: the next one has the same number.
                    called.remove(&(delivery, number));
                }
                told.push((member, ended(end)));
            }
            inbox.push(match told.len() {
                1 if dice.bool() => Event::Ended(hold, told.remove(0).1),
                _ => Event::EndedTogether(told),
            });
            inbox.push(Event::Freed(hold));
        }
        if inbox.is_empty() {
            // A tick that was due and changed nothing must not be wanted again at once: a hot loop.
            let next = core.next_tick();
            if let (Some(at), true) = (next, idle) {
                assert!(at > now, "seed {seed}: a tick at {at:?} is wanted without end at {now:?}: {core:?}");
            }
            now = next.filter(|at| *at > now).unwrap_or(now + Duration::from_millis(1));
        }
    }
    panic!("seed {seed}: no end in sight: {:?}\n{}", core, trace[trace.len() - 20..].join("\n"));
}

#[test]
fn everything_ends_whatever_answers_are_lost() {
    for seed in 0..300 {
        let (model, _) = run(seed, 60, None);
        assert_eq!(model.terminal.len(), 60, "seed {seed}");
        assert!(model.leases.is_empty(), "seed {seed}: a lease was left behind");
        assert_eq!(model.exposed(), 0, "seed {seed}");
    }
}

#[test]
fn a_stop_leaves_nothing_held() {
    for seed in 0..300 {
        let (model, _) = run(seed, 60, Some(seed as usize % 97));
        let held: usize = model.leases.values().map(|(_, held)| held.len()).sum();
        // A claim whose answer was lost may still be on its way back: the lease's end hands it back.
        assert!(model.ready.len() + model.terminal.len() + held == 60, "seed {seed}: nothing is lost");
        assert_eq!(model.exposed(), 0, "seed {seed}: what had begun was settled");
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    assert_eq!(run(7, 40, None).1, run(7, 40, None).1);
}

#[test]
fn a_fenced_batch_changes_nothing_and_its_late_answers_are_evidence() {
    let mut core = core(1, 4);
    let mut model = Model::default();
    model.ready.extend([item(1, OPERATION, 0), item(2, OPERATION, 0), item(3, PLAIN, 0)]);
    let mut now = Duration::ZERO;
    let commands = core.step([Event::Tick], now);
    let [Command::Claim(request)] = commands.as_slice() else { panic!("{commands:?}") };
    let claimed = model.claim(request);
    let commands = core.step([Event::Claimed(request.token, Some(claimed))], now);
    let settle = commands.iter().find_map(|c| if let Command::Settle(s) = c { Some(s.clone()) } else { None });
    let settle = settle.expect("the operations' attempts are put on record");
    assert_eq!(settle.starts, [(1, 1), (2, 1)]);
    let commands = core.step([Event::Settled(request.token, Flushed::Known(model.settle(&settle)))], now);
    let holds: Vec<Hold> =
        commands.iter().filter_map(|c| if let Command::Run(h, ..) = c { Some(*h) } else { None }).collect();
    assert_eq!(holds.len(), 2);

    // A heartbeat that was sent later does not find the lease: somebody took over.
    now += Duration::from_secs(1);
    let commands = core.step([Event::Pulse(now, Vec::new())], now);
    assert!(commands.iter().all(|c| !matches!(c, Command::Settle(_))), "{commands:?}");
    let cancelled = commands.iter().filter(|c| matches!(c, Command::Cancel(_, Cancel::Fenced))).count();
    assert_eq!(cancelled, 1, "the plain one; operations are let run, for their answers");
    let commands = core.step([Event::Ended(holds[0], ended(End::Succeeded)), Event::Freed(holds[0])], now);
    let seen = commands.iter().find_map(|c| if let Command::Observe(seen) = c { Some(seen) } else { None });
    let seen = seen.expect("a late outcome is kept");
    assert!(seen[0].evidence.as_ref().is_some_and(|e| e.answer == Answer::Happened));
    assert!(commands.iter().all(|c| !matches!(c, Command::Settle(_))), "and writes nothing: {commands:?}");
}

#[test]
fn an_operation_that_ignores_its_cancellation_is_not_settled_while_it_runs() {
    let mut core = core(1, 4);
    let mut model = Model::default();
    model.ready.push_back(item(1, OPERATION, 0));
    let commands = core.step([Event::Tick], Duration::ZERO);
    let [Command::Claim(request)] = commands.as_slice() else { panic!("{commands:?}") };
    let claimed = model.claim(request);
    let token = request.token;
    let settle_of = |commands: &[Command]| {
        commands.iter().find_map(|c| if let Command::Settle(s) = c { Some(s.clone()) } else { None })
    };
    let starts = settle_of(&core.step([Event::Claimed(token, Some(claimed))], Duration::ZERO)).expect("the start");
    core.step([Event::Settled(token, Flushed::Known(model.settle(&starts)))], Duration::ZERO);
    let late = Duration::from_secs(6);
    let commands = core.step([Event::Tick], late);
    assert!(commands.iter().any(|c| matches!(c, Command::Cancel(_, Cancel::TimedOut))), "{commands:?}");
    let cut = Ended { cut_off: true, ..Ended::of(End::TimedOut) };
    let commands = core.step([Event::Ended((token, 0), Box::new(cut))], late);
    assert!(settle_of(&commands).is_none(), "it may still do its work: {commands:?}");
    let settle = settle_of(&core.step([Event::Freed((token, 0))], late)).expect("now it is over");
    assert_eq!(settle.moves[0].standing.state, State::InDoubt);
    assert_eq!(settle.moves[0].quiet, Duration::from_secs(60), "and what it sent may still be on its way");
}

#[test]
fn an_unknown_lease_is_handed_back_and_a_failed_handback_is_tried_again() {
    let mut core = core(1, 4);
    let lost = Uuid::from_u128(77);
    let commands = core.step([Event::Pulse(Duration::ZERO, vec![lost])], Duration::ZERO);
    assert!(commands.iter().any(|c| matches!(c, Command::Disown(t) if *t == lost)), "{commands:?}");
    core.step([Event::Disowned(lost, false)], Duration::ZERO);
    let at = core.next_tick().expect("a tick");
    assert!(at > Duration::ZERO);
    let again = core.step([Event::Tick], LONGEST_PAUSE);
    assert!(again.iter().any(|c| matches!(c, Command::Disown(t) if *t == lost)), "{again:?}");
}

#[test]
fn a_stop_now_gives_up_in_the_end() {
    let mut core = core(1, 4);
    let mut model = Model::default();
    model.ready.push_back(item(1, PLAIN, 0));
    let commands = core.step([Event::Tick], Duration::ZERO);
    let [Command::Claim(request)] = commands.as_slice() else { panic!("{commands:?}") };
    core.step([Event::Claimed(request.token, Some(model.claim(request)))], Duration::ZERO);
    core.step([Event::Stop, Event::StopNow], Duration::ZERO);
    assert!(!core.is_done(Duration::ZERO), "its outcome is not written yet");
    assert_eq!(core.next_tick(), Some(LAST_WAIT));
    assert!(core.is_done(LAST_WAIT), "the database does not answer: a takeover will");
    assert_eq!(core.left(), 1);
}

/// A worker that has claimed these.
fn claimed(core: &mut Core, model: &mut Model, items: impl IntoIterator<Item = Item>) -> Vec<Command> {
    model.ready.extend(items);
    let commands = core.step([Event::Tick], Duration::ZERO);
    let [Command::Claim(request)] = commands.as_slice() else { panic!("{commands:?}") };
    let claimed = model.claim(request);
    core.step([Event::Claimed(request.token, Some(claimed))], Duration::ZERO)
}

fn settled(commands: &[Command]) -> Option<Arc<Settle>> {
    commands.iter().find_map(|c| if let Command::Settle(settle) = c { Some(settle.clone()) } else { None })
}

#[test]
fn what_was_not_started_goes_back_when_its_subscription_is_paused() {
    let (mut core, mut model) = (core(1, 2), Model::default());
    let items = (1..=4).map(|n| item(n, PLAIN, 0)).chain([item(5, IDEMPOTENT, 0)]);
    let commands = claimed(&mut core, &mut model, items);
    let running = commands.iter().filter(|c| matches!(c, Command::Run(..))).count();
    assert_eq!(running, 2, "{commands:?}");
    assert!(!commands.iter().any(|c| matches!(c, Command::AskPaused(_))), "not at once");
    let at = core.next_tick().expect("a tick");
    assert!(at <= PAUSES, "{at:?}");
    let commands = core.step([Event::Tick], PAUSES);
    let asked = commands.iter().find_map(|c| if let Command::AskPaused(ids) = c { Some(ids.clone()) } else { None });
    assert_eq!(asked.expect("it asks"), [PLAIN, IDEMPOTENT]);
    assert!(!core.step([Event::Tick], PAUSES * 3).iter().any(|c| matches!(c, Command::AskPaused(_))), "one at a time");
    let commands = core.step([Event::Paused(vec![PLAIN])], PAUSES * 3);
    let settle = settled(&commands).expect("what has not started is handed back at once");
    let released: Vec<i64> = settle.released.iter().map(|i| i.delivery).collect();
    assert_eq!(released, [3, 4], "what runs goes on, and so does the other subscription");
    assert!(settle.successes.is_empty() && settle.moves.is_empty(), "uncounted");
    assert_eq!(core.next_tick().map(|at| at > PAUSES * 3), Some(true));
}

#[test]
fn nobody_asks_for_pauses_while_nothing_lies_ready() {
    let (mut core, mut model) = (core(1, 4), Model::default());
    claimed(&mut core, &mut model, [item(1, PLAIN, 0), item(2, PLAIN, 0)]);
    let commands = core.step([Event::Tick], PAUSES * 2);
    assert!(!commands.iter().any(|c| matches!(c, Command::AskPaused(_))), "both run: {commands:?}");
}
