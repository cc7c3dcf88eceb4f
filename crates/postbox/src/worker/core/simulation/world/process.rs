//! A worker process: its shell, which carries out what the decisions say, and its handlers.

use std::time::Duration;

use uuid::Uuid;

use super::super::remote::Fate;
use super::super::store::{Place, Verb};
use super::super::{AFTER, ALL, Checked, LEASE, PLAIN, QUIET, TIMEOUT, ensure, follow_ups, policy, policy_of};
use super::{AGAIN, At, Context, Happening, Run, Stage, World, ended};
use crate::handler::Gather;
use crate::lifecycle::{End, Kind};
use crate::operation::Operation;
use crate::store::{Item, LeaseRef, Observation};
use crate::worker::core::{Cancel, Command, Core, Ended, Event, Hold, Lane, Member, Setup};
use crate::worker::ran_out;

impl World {
    pub(super) fn start(&mut self, place: usize) {
        let worker = Uuid::from_u128(self.dice.u128(..));
        let late = QUIET + TIMEOUT + LEASE;
        let declares = self.chance(80);
        // Not from the dice: what they decide stays as it is where there are no batches.
        let batches = worker.as_u128().is_multiple_of(2);
        let batches = batches.then_some(Gather { most: 3, within: Duration::from_millis(30) });
        let lane = |id| Lane {
            id,
            policy: policy_of(id, declares),
            timeout: TIMEOUT,
            quiet: QUIET,
            late,
            concurrency: None,
            keys: None,
            gather: batches.filter(|_| matches!(id, PLAIN | AFTER)),
            limited: false,
            metered: false,
        };
        let setup = Setup {
            worker,
            concurrency: self.dice.usize(1..4),
            batch: None,
            poll_interval: Duration::from_secs(2),
            subscriptions: ALL.map(lane).into(),
            seed: self.dice.u64(..),
        };
        let now = self.now;
        self.store.enlist(worker, LEASE, declares, now);
        let node = &mut self.nodes[place];
        node.life += 1;
        node.declares = declares;
        node.core = Some(Core::new(setup));
        (node.origin, node.worker, node.beating, node.told) = (now, worker, worker, worker);
        node.renewed = (worker, now);
        (node.paused, node.stalled, node.asleep) = (now, now, false);
        node.tick = Some(now);
        let at = (place, node.life);
        self.at(now, Happening::Tick(at));
        self.after(1_000..1_001, Happening::Beat(at));
        self.after(0..1_200, Happening::Round(at));
        self.after(0..700, Happening::Ask(at));
    }

    /// The process ends: what it had sent is on its way all the same.
    pub(super) fn ends(&mut self, place: usize, again: std::ops::Range<u64>) {
        let node = &mut self.nodes[place];
        node.core = None;
        node.running.clear();
        node.calls.clear();
        self.after(again, Happening::Start(place));
    }

    pub(super) fn step(&mut self, at: At, event: Event) -> Checked {
        let node = &mut self.nodes[at.0];
        let own = self.now.saturating_sub(node.origin);
        let Some(core) = &mut node.core else { return Ok(()) };
        let commands = core.step([event], own);
        if self.trace.is_some() {
            let words = format!("  {at:?} {commands:?}");
            self.note(|| words);
        }
        for command in commands {
            self.perform(at, command)?;
        }
        let node = &mut self.nodes[at.0];
        let Some(core) = &node.core else { return Ok(()) };
        if core.is_done(own) {
            let worker = node.worker;
            self.ask(at, Verb::Retire { worker }, Context::Nothing);
            self.ends(at.0, 10..2_000);
            return Ok(());
        }
        if let Some(next) = core.next_tick() {
            let when = (node.origin + next).max(self.now + Duration::from_micros(1));
            if node.tick.is_none_or(|tick| tick > when || tick < self.now) {
                node.tick = Some(when);
                self.at(when, Happening::Tick(at));
            }
        }
        Ok(())
    }

    pub(super) fn perform(&mut self, at: At, command: Command) -> Checked {
        match command {
            Command::Permits(..) => panic!("nothing here has a limit"),
            Command::Claim(request) => self.ask(at, Verb::Claim(request), Context::Nothing),
            Command::Settle(settle) => {
                if settle.moves.iter().any(|m| m.outcome.is_none()) {
                    self.hit("withheld");
                }
                self.ask(at, Verb::Settle(settle), Context::Nothing);
            }
            Command::Disown(token) => {
                let worker = self.nodes[at.0].worker;
                self.ask(at, Verb::Disown { worker, token }, Context::Nothing);
            }
            Command::Observe(seen) => {
                self.hit("late outcome");
                ensure!(seen.iter().all(|s: &Observation| s.number > 0), "I11: an observation of attempt 0");
                self.ask(at, Verb::Observe(seen), Context::Nothing);
            }
            Command::Asleep(asleep) => {
                self.nodes[at.0].asleep = asleep;
                self.after(0..5, Happening::Tell(at, Event::Woken));
            }
            Command::AskPaused(mut queued) => {
                // Somebody pauses and resumes all the time; what is handed back comes again.
                queued.retain(|_| self.chance(10));
                if !queued.is_empty() {
                    self.hit("paused");
                }
                self.after(0..50, Happening::Tell(at, Event::Paused(queued)));
            }
            Command::Run(hold, lease, item, number) => self.attempt(at, hold, lease, *item, number)?,
            Command::RunBatch(members) => {
                if members.len() > 1 {
                    self.hit("a batch");
                }
                let holds: Vec<Hold> = members.iter().map(|m| m.hold).collect();
                let call = holds[0];
                self.nodes[at.0].calls.insert(call, (holds, Vec::new()));
                for Member { hold, lease, item, number, .. } in members {
                    self.attempt(at, hold, lease, item, number)?;
                    if let Some(run) = self.nodes[at.0].running.get_mut(&hold) {
                        run.call = Some(call);
                    }
                }
            }
            Command::Cancel(hold, why) => self.cancel(at, hold, why),
        }
        Ok(())
    }

    pub(super) fn attempt(&mut self, at: At, hold: Hold, lease: LeaseRef, item: Item, number: u32) -> Checked {
        let Some(row) = self.store.rows.get(&item.delivery) else { return Ok(()) };
        // One that was taken over meanwhile may be waiting for its retry.
        let own = row.place == Place::Leased(lease.token);
        ensure!(!own || row.due <= self.now, "I13: delivery {} starts before it is due", item.delivery);
        let kind = row.kind();
        let declares = self.nodes[at.0].declares;
        let renewed = self.nodes[at.0].renewed;
        let over = renewed.0 != lease.worker || ran_out(self.now.saturating_sub(renewed.1), LEASE);
        if kind == Kind::Operation && over {
            self.hit("call not made after the lease");
            self.tell_end(at, hold, ended(AGAIN));
            return Ok(());
        }
        let run = Run {
            item,
            number,
            lease,
            kind,
            stage: Stage::Working,
            sent: false,
            checked: self.now,
            declares,
            call: None,
        };
        self.nodes[at.0].running.insert(hold, run);
        if kind == Kind::Transactional {
            let end = if self.healed() || self.chance(80) { End::Succeeded } else { AGAIN };
            self.after(1..60, Happening::Return(at, hold, end));
            return Ok(());
        }
        if kind == Kind::Operation && !self.healed() && self.chance(4) {
            // The worst moment: the clock was looked at, the call is not sent. As long as is assumed.
            self.hit("pause before the call");
            self.nodes[at.0].paused = self.now + self.within(3_500..4_980);
        }
        let wait = if !self.healed() && self.chance(5) { 0..2_400 } else { 0..8 };
        self.after(wait, Happening::Send(at, hold));
        Ok(())
    }

    /// The handler calls its remote.
    pub(super) fn send(&mut self, at: At, hold: Hold) -> Checked {
        let (now, healed) = (self.now, self.healed());
        let Some(run) = self.nodes[at.0].running.get_mut(&hold) else { return Ok(()) };
        if std::mem::replace(&mut run.sent, true) {
            return Ok(());
        }
        let (delivery, number, operation) = (run.item.delivery, run.number, run.kind == Kind::Operation);
        let key = Operation::of(run.item.message, delivery, number).idempotency_key().to_owned();
        let keyed = policy(run.item.subscription).repeats();
        let declares = run.declares && keyed;
        if !healed && self.chance(6) {
            // Nothing is sent, and the handler knows it.
            self.after(0..5, Happening::Return(at, hold, AGAIN));
            return Ok(());
        }
        let Some(row) = self.store.rows.get(&delivery) else { return Ok(()) };
        let call = self.remote.sent(row, number, key, declares, now)?;
        if declares && number > 1 && row.may_have_happened(number) {
            self.hit("repeated under its key");
        }
        let fate = match self.dice.u32(..100) {
            _ if healed => Fate::Done,
            // One that knows the key repeats its answer.
            94.. if keyed && self.remote.applied(delivery) => Fate::Done,
            0..65 => Fate::Done,
            65..80 => Fate::DoneUnheard,
            80..94 => Fate::Lost,
            _ => Fate::Refused,
        };
        let slow = !healed && self.chance(10);
        let longest = QUIET.as_millis() as u64 - 10;
        let travel = if slow { self.within(50..longest) } else { self.within(1..50) };
        self.at(now + travel, Happening::Land { delivery, call, fate });
        let heard = now + travel + self.within(1..20);
        match fate {
            Fate::Done => self.at(heard, Happening::Return(at, hold, End::Succeeded)),
            Fate::Refused => {
                self.at(heard, Happening::Return(at, hold, End::Failed { permanent: true, retry_after: None }));
            }
            Fate::DoneUnheard | Fate::Lost => {
                let unheard = if operation { End::InDoubt } else { AGAIN };
                match self.dice.u32(..4) {
                    0 => {}
                    1 => self.after(0..1_000, Happening::Return(at, hold, End::Panicked)),
                    _ => self.after(0..1_000, Happening::Return(at, hold, unheard)),
                }
            }
        }
        Ok(())
    }

    pub(super) fn returned(&mut self, at: At, hold: Hold, end: End) {
        let Some(run) = self.nodes[at.0].running.get_mut(&hold) else { return };
        match run.stage {
            Stage::Sealed => {}
            Stage::Deaf => self.after(0..3, Happening::Tell(at, Event::Freed(hold))),
            Stage::Working if run.kind == Kind::Transactional && end == End::Succeeded => {
                run.stage = Stage::Sealed;
                let (lease, item, number) = (run.lease, &run.item, run.number);
                let follow_ups = follow_ups(item.delivery, item.subscription);
                let verb = Verb::SettleOpen { lease, delivery: item.delivery, number, rev: item.rev + 1, follow_ups };
                self.ask(at, verb, Context::Attempt(hold));
            }
            Stage::Working => {
                let carried = (end == End::Succeeded).then(|| follow_ups(run.item.delivery, run.item.subscription));
                self.end(at, hold, Ended { follow_ups: carried.unwrap_or_default(), ..ended(end) });
            }
        }
    }

    pub(super) fn end(&mut self, at: At, hold: Hold, ended: Ended) {
        let node = &mut self.nodes[at.0];
        let Some(run) = node.running.remove(&hold) else { return };
        let Some(call) = run.call else { return self.tell_end(at, hold, ended) };
        // A batch handler returns when it is through with all of them.
        let Some((members, ends)) = node.calls.get_mut(&call) else { return };
        ends.push((hold, Box::new(ended)));
        if ends.len() == members.len() {
            let ends = std::mem::take(ends);
            node.calls.remove(&call);
            self.at(self.now, Happening::Tell(at, Event::EndedTogether(ends)));
            self.after(0..3, Happening::Tell(at, Event::Freed(call)));
        }
    }

    pub(super) fn tell_end(&mut self, at: At, hold: Hold, ended: Ended) {
        self.at(self.now, Happening::Tell(at, Event::Ended(hold, Box::new(ended))));
        self.after(0..3, Happening::Tell(at, Event::Freed(hold)));
    }

    pub(super) fn cancel(&mut self, at: At, hold: Hold, why: Cancel) {
        let deaf = self.chance(15);
        let shared = self.nodes[at.0].calls.iter().find(|(_, (members, _))| members.contains(&hold));
        if let Some(call) = shared.map(|(call, _)| *call) {
            return self.cancel_call(at, call, hold, why, deaf);
        }
        let Some(run) = self.nodes[at.0].running.get_mut(&hold).filter(|r| r.stage == Stage::Working) else { return };
        let end = match why {
            Cancel::TimedOut => End::TimedOut,
            Cancel::Stopped | Cancel::Fenced if run.kind == Kind::Operation => End::InDoubt,
            Cancel::Stopped | Cancel::Fenced => End::Failed { permanent: false, retry_after: Some(Duration::ZERO) },
        };
        let ended = Ended { fenced: why == Cancel::Fenced, cut_off: true, ..ended(end) };
        run.stage = Stage::Deaf;
        self.at(self.now, Happening::Tell(at, Event::Ended(hold, Box::new(ended))));
        if deaf {
            // It goes on for a while, and may even send now.
            self.after(1..1_500, Happening::Tell(at, Event::Freed(hold)));
        } else {
            self.nodes[at.0].running.remove(&hold);
            self.after(0..3, Happening::Tell(at, Event::Freed(hold)));
        }
    }

    /// All of a batch handler's call, of which this one was named.
    fn cancel_call(&mut self, at: At, call: Hold, named: Hold, why: Cancel, deaf: bool) {
        let node = &mut self.nodes[at.0];
        let Some((members, _)) = node.calls.remove(&call) else { return };
        let end = match why {
            Cancel::TimedOut => End::TimedOut,
            Cancel::Stopped | Cancel::Fenced => End::Failed { permanent: false, retry_after: Some(Duration::ZERO) },
        };
        let ends = members.iter().map(|member| {
            let fenced = why == Cancel::Fenced && member.0 == named.0;
            (*member, Box::new(Ended { fenced, cut_off: true, ..ended(end) }))
        });
        let told = Event::EndedTogether(ends.collect());
        for member in &members {
            match node.running.get_mut(member) {
                Some(run) if deaf => run.stage = Stage::Deaf,
                _ => {
                    node.running.remove(member);
                }
            }
        }
        self.at(self.now, Happening::Tell(at, told));
        self.after(if deaf { 1..1_500 } else { 0..3 }, Happening::Tell(at, Event::Freed(call)));
    }
}
