//! Batch handlers: deliveries wait for each other, and go into one call.

use std::collections::VecDeque;
use std::time::Duration;

use uuid::Uuid;

use super::batch::{Batch, Entry, Slot};
use super::claims::{MAX_BATCH, ahead};
use super::flush::policy_for;
use super::wire::{Command, Member};
use super::{Core, Hold, Lane, Load, Permit, Phase, is_suspect};
use crate::handler::Gather;
use crate::lifecycle::Kind;
use crate::store::{Item, SubscriptionId};

/// What is handed out next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// One delivery.
    One(Hold),
    /// A call of a batch handler, with what waits for it then.
    Batch(SubscriptionId),
}

/// What waits for a call of a batch handler.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// In order, and since when.
    holds: VecDeque<(Hold, Duration)>,
    /// Calls that stand in the queue.
    pub(super) turns: usize,
}

impl Waiting {
    /// How many calls it is time for.
    fn ripe(&self, gather: Gather, now: Duration) -> usize {
        let overdue = self.holds.front().is_some_and(|(_, since)| *since + gather.within <= now);
        (self.holds.len() / gather.most).max(usize::from(overdue))
    }

    /// They are somebody else's now.
    pub(super) fn forget(&mut self, token: Uuid) {
        self.holds.retain(|(hold, _)| hold.0 != token);
    }

    /// All of them, in order.
    pub(super) fn into_holds(self) -> impl Iterator<Item = Hold> {
        self.holds.into_iter().map(|(hold, _)| hold)
    }
}

impl Lane {
    /// How many of its deliveries may run at once, of a worker that makes so many calls at once.
    pub(super) fn own(&self, calls: usize) -> usize {
        self.concurrency.unwrap_or(calls).min(calls).saturating_mul(self.gather.map_or(1, |gather| gather.most))
    }

    /// Whether it shares a call. What may have killed its worker does not; nor does a last try, so that nothing
    /// dies of what another did.
    fn gathers(&self, item: &Item) -> bool {
        let last = item.attempts > 0 && item.attempts + 1 >= policy_for(item, Some(self)).retry.max_attempts;
        self.gather.is_some() && !is_suspect(self, item) && !last
    }
}

impl Load {
    /// How many of its deliveries should be claimed, so that so many can run at once for the time that is
    /// worked ahead.
    pub(super) fn share(&self, lane: &Lane, limit: u32) -> u32 {
        match lane.gather.map(|gather| gather.most as u32) {
            None => ahead(limit, self.ran),
            Some(most) => {
                let calls = ahead(limit.div_ceil(most), self.ran);
                calls.saturating_mul(most.min(limit)).min(MAX_BATCH.max(most))
            }
        }
    }

    /// How many calls could begin, if there was a permit.
    pub(super) fn startable(&self, lane: &Lane) -> usize {
        match lane.gather {
            _ if self.is_full(lane) => 0,
            None => self.queued - self.suspects,
            // What waits for others keeps nobody waiting.
            Some(_) => self.waiting.turns,
        }
    }

    /// Puts one where it waits for its turn.
    pub(super) fn line_up(&mut self, lane: &Lane, item: &Item, hold: Hold, queue: &mut VecDeque<Turn>, now: Duration) {
        self.enter(lane, item);
        match lane.gathers(item) {
            true => self.waiting.holds.push_back((hold, now)),
            false => queue.push_back(Turn::One(hold)),
        }
    }
}

impl Batch {
    /// One of it, as a handler's call takes it; `part` is what it would be settled with.
    pub(super) fn member(&self, index: usize, part: i32) -> Member {
        let item = &self.entries()[index].item;
        Member {
            hold: (self.lease.token, index),
            lease: self.lease,
            number: item.attempts + 1,
            item: item.clone(),
            part,
        }
    }
}

impl Core {
    /// When a batch is complete at the latest.
    pub(super) fn gather_tick(&self) -> Option<Duration> {
        let due = |id: &SubscriptionId| {
            let (lane, load) = self.lanes.get(id)?;
            let front = load.waiting.holds.front().filter(|_| load.waiting.turns == 0)?;
            Some(front.1 + lane.gather?.within)
        };
        self.gathering.iter().filter_map(due).min()
    }

    /// Nothing waits for others.
    pub(super) fn gathers_nothing(&self) -> bool {
        let waits = |id: &SubscriptionId| self.lanes.get(id).is_some_and(|(_, load)| !load.waiting.holds.is_empty());
        !self.gathering.iter().any(waits)
    }

    /// Calls that it is time for take their turns.
    pub(super) fn gather(&mut self, now: Duration) {
        if self.phase != Phase::Working {
            return;
        }
        for id in &self.gathering {
            let Some((Some(gather), waiting)) =
                self.lanes.get_mut(id).map(|(lane, load)| (lane.gather, &mut load.waiting))
            else {
                continue;
            };
            while waiting.turns < waiting.ripe(gather, now) {
                waiting.turns += 1;
                self.queue.push_back(Turn::Batch(*id));
            }
        }
    }

    /// Makes a call with what waits; `false`: its turn comes later.
    pub(super) fn call(&mut self, id: SubscriptionId, now: Duration, commands: &mut Vec<Command>) -> bool {
        let Some((lane, load)) = self.lanes.get_mut(&id) else { return true };
        let Some(gather) = lane.gather else { return true };
        if load.is_full(lane) {
            return false;
        }
        load.waiting.turns = load.waiting.turns.saturating_sub(1);
        if load.waiting.ripe(gather, now) == 0 {
            return true;
        }
        let most = gather.most.min(load.room(lane));
        let mut members: Vec<Member> = Vec::with_capacity(most.min(load.waiting.holds.len()));
        let mut parts: Vec<(Uuid, i32)> = Vec::new();
        while members.len() < most
            && let Some((hold, _)) = load.waiting.holds.pop_front()
        {
            let Some(batch) = self.batches.get_mut(&hold.0) else { continue };
            let Entry { item, slot, .. } = &batch.entries()[hold.1];
            if !matches!(slot, Slot::Queued) {
                continue;
            }
            load.leave(lane, item);
            // What it is settled with is one flush of each lease, if that is in the handler's transaction.
            let part = match parts.iter().find(|(token, _)| *token == hold.0) {
                Some((_, part)) => *part,
                None if lane.policy.kind == Kind::Transactional => {
                    parts.push((hold.0, batch.next_part));
                    batch.next_part += 1;
                    batch.next_part - 1
                }
                None => 0,
            };
            members.push(batch.member(hold.1, part));
            batch.put(hold.1, Slot::Running { deadline: now.saturating_add(lane.timeout), cancelled: false });
        }
        if let Some((first, others)) = members.split_first() {
            let others = others.iter().map(|member| member.hold).collect();
            self.permits.insert(first.hold, Permit { subscription: id, others });
            load.run(members.len());
            commands.push(Command::RunBatch(members));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::{Cancel, Ended, Event, Flushed, Setup};
    use super::*;
    use crate::lifecycle::{End, Policy};
    use crate::retry::RetryPolicy;
    use crate::store::{Claimed, Guarded, Permits, Settle};

    const MS: Duration = Duration::from_millis(1);
    const ME: Uuid = Uuid::from_u128(1);
    const BATCHES: SubscriptionId = 1;
    const BESIDE: SubscriptionId = 2;

    fn lane(id: SubscriptionId, kind: Kind) -> Lane {
        let retry = RetryPolicy { max_attempts: 3, base: Duration::ZERO, cap: Duration::ZERO };
        let second = Duration::from_secs(1);
        Lane {
            id,
            policy: Policy { kind, retry, idempotent: false },
            timeout: second,
            quiet: second,
            late: second,
            concurrency: None,
            keys: None,
            gather: (id == BATCHES).then_some(Gather { most: 10, within: MS * 20 }),
            limited: false,
            metered: false,
        }
    }

    fn core_of(lane: Lane, beside: Lane, concurrency: usize) -> Core {
        Core::new(Setup {
            worker: ME,
            concurrency,
            batch: None,
            poll_interval: Duration::from_secs(1),
            subscriptions: vec![lane, beside],
            seed: 1,
        })
    }

    fn core(kind: Kind, concurrency: usize) -> Core {
        core_of(lane(BATCHES, kind), lane(BESIDE, Kind::Plain), concurrency)
    }

    fn item(delivery: i64, subscription: SubscriptionId) -> Item {
        Item {
            delivery,
            subscription,
            message: Uuid::nil(),
            priority: 0,
            attempts: 0,
            lost: 0,
            rev: 1,
            leads: false,
            envelope: None,
        }
    }

    fn claim(commands: &[Command]) -> Option<(Uuid, Vec<(SubscriptionId, u32)>)> {
        commands.iter().find_map(|c| match c {
            Command::Claim(request) => Some((request.token, request.wanted.clone())),
            _ => None,
        })
    }

    /// Claims these, once it asks.
    fn claims(core: &mut Core, items: impl IntoIterator<Item = Item>, now: Duration) -> Vec<Command> {
        let (token, _) = claim(&core.step([Event::Woken], now)).expect("it claims");
        let claimed = Claimed {
            batch: token.as_u128() as u64 as i64,
            token,
            items: items.into_iter().collect(),
            next_due: None,
            dry: Vec::new(),
        };
        core.step([Event::Claimed(token, Some(claimed))], now)
    }

    /// The calls of the batch handler: which deliveries are in each, and with which parts.
    fn calls(commands: &[Command]) -> Vec<Vec<(i64, i32)>> {
        let call = |c: &Command| match c {
            Command::RunBatch(members) => Some(members.iter().map(|m| (m.item.delivery, m.part)).collect()),
            _ => None,
        };
        commands.iter().filter_map(call).collect()
    }

    fn sizes(commands: &[Command]) -> Vec<usize> {
        calls(commands).iter().map(Vec::len).collect()
    }

    fn holds(commands: &[Command]) -> Vec<Hold> {
        let call = |c: &Command| match c {
            Command::RunBatch(members) => Some(members.iter().map(|m| m.hold).collect::<Vec<_>>()),
            _ => None,
        };
        commands.iter().filter_map(call).flatten().collect()
    }

    fn settles(commands: &[Command]) -> Vec<Settle> {
        commands.iter().filter_map(|c| if let Command::Settle(s) = c { Some(Settle::clone(s)) } else { None }).collect()
    }

    fn all(holds: &[Hold], end: End) -> Event {
        Event::EndedTogether(holds.iter().map(|hold| (*hold, Box::new(Ended::of(end)))).collect())
    }

    #[test]
    fn a_full_batch_goes_at_once_and_the_rest_waits() {
        let mut core = core(Kind::Plain, 4);
        let commands = claims(&mut core, (1..=23).map(|n| item(n, BATCHES)), MS);
        assert_eq!(sizes(&commands), [10, 10]);
        assert_eq!(core.gather_tick(), Some(MS * 21));
        assert_eq!(sizes(&core.step([Event::Tick], MS * 20)), [0; 0]);
        assert_eq!(calls(&core.step([Event::Tick], MS * 21)), [[(21, 0), (22, 0), (23, 0)]]);
        assert_eq!(core.gather_tick(), None);
    }

    #[test]
    fn what_waits_keeps_nobody_waiting_and_is_joined_by_what_comes() {
        let mut core = core(Kind::Plain, 4);
        let mixed = (1..=6).map(|n| item(n, BATCHES)).chain([item(7, BESIDE)]);
        let commands = claims(&mut core, mixed, MS);
        assert_eq!(commands.iter().filter(|c| matches!(c, Command::Run(..))).count(), 1, "{commands:?}");
        let wanted = claim(&commands).expect("it goes on claiming").1;
        assert!(wanted.iter().all(|(_, room)| *room > 0) && wanted.len() == 2, "{wanted:?}");
        let mut core = core_with(6);
        let commands = claims(&mut core, (7..=10).map(|n| item(n, BATCHES)), MS * 5);
        assert_eq!(sizes(&commands), [10], "from two leases");
    }

    /// One that so many wait in.
    fn core_with(waiting: i64) -> Core {
        let mut core = core(Kind::Plain, 4);
        let (token, _) = claim(&core.step([Event::Tick], MS)).expect("it claims");
        let items = (1..=waiting).map(|n| item(n, BATCHES)).collect();
        let claimed = Claimed { batch: 1, token, items, next_due: None, dry: Vec::new() };
        let next = core.step([Event::Claimed(token, Some(claimed))], MS);
        // Nothing more was there.
        let (token, _) = claim(&next).expect("it claims again");
        let nothing = Claimed { batch: 0, token, items: Vec::new(), next_due: None, dry: Vec::new() };
        let next = core.step([Event::Claimed(token, Some(nothing))], MS);
        let (token, _) = claim(&next).expect("once more before it sleeps");
        let nothing = Claimed { batch: 0, token, items: Vec::new(), next_due: None, dry: Vec::new() };
        core.step([Event::Claimed(token, Some(nothing))], MS);
        core
    }

    #[test]
    fn a_call_is_one_of_the_workers_and_each_of_it_is_settled_as_itself() {
        let mut core = core(Kind::Plain, 1);
        let commands = claims(&mut core, (1..=20).map(|n| item(n, BATCHES)), MS);
        assert_eq!(sizes(&commands), [10], "one call at a time");
        let of = holds(&commands);
        let dead = End::Failed { permanent: true, retry_after: None };
        let end = |n| Box::new(Ended::of(if n == 3 { dead } else { End::Succeeded }));
        let ends = of.iter().enumerate().map(|(n, hold)| (*hold, end(n))).collect();
        core.step([Event::EndedTogether(ends)], MS * 2);
        let commands = core.step([Event::Freed(of[0])], MS * 2);
        assert_eq!(sizes(&commands), [10], "the next one");
        let settle = settles(&core.step([Event::Tick], MS * 30)).remove(0);
        assert_eq!((settle.successes.len(), settle.moves.len()), (9, 1));
        assert_eq!(settle.moves[0].delivery, 4);
    }

    #[test]
    fn a_time_out_and_a_lost_task_end_all_of_a_call() {
        let mut core = core(Kind::Plain, 4);
        let of = holds(&claims(&mut core, (1..=10).map(|n| item(n, BATCHES)), MS));
        let cancelled = core.step([Event::Tick], MS * 1001);
        let first = cancelled.iter().filter(|c| matches!(c, Command::Cancel(_, Cancel::TimedOut))).count();
        assert_eq!(first, 10, "whichever is found, it is the one call");
        let commands = core.step([all(&of, End::TimedOut), Event::Freed(of[0])], MS * 1002);
        let settle = settles(&commands).remove(0);
        assert_eq!(settle.moves.len(), 10);
        assert!(settle.moves.iter().all(|m| m.outcome.as_ref().is_some_and(|o| o.kind == "timed_out")));

        let mut core = self::core(Kind::Plain, 4);
        let of = holds(&claims(&mut core, (1..=10).map(|n| item(n, BATCHES)), MS));
        let settle = settles(&core.step([Event::Freed(of[0])], MS * 2)).remove(0);
        assert!(settle.moves.iter().all(|m| m.outcome.as_ref().is_some_and(|o| o.kind == "panicked")));
        assert_eq!(settle.moves.len(), 10);
    }

    #[test]
    fn what_waits_goes_back_uncounted_at_a_stop_a_pause_and_a_fence() {
        let mut core = core_with(6);
        let settle = settles(&core.step([Event::Stop], MS * 2)).remove(0);
        assert_eq!((settle.released.len(), settle.close), (6, true));
        assert!(core.gathers_nothing() && core.gather_tick().is_none());

        let mut core = core_with(6);
        core.step([Event::Tick], MS * 3);
        let settle = settles(&core.step([Event::Paused(vec![BATCHES])], MS * 4)).remove(0);
        assert_eq!(settle.released.len(), 6);

        let mut core = core_with(6);
        let commands = core.step([Event::Pulse(MS * 5, Vec::new())], MS * 6);
        assert_eq!(settles(&commands).len(), 0);
        assert_eq!(sizes(&core.step([Event::Tick], MS * 30)), [0; 0], "others have taken them over");
    }

    #[test]
    fn a_last_try_and_what_may_have_killed_its_worker_are_called_alone() {
        let mut core = core(Kind::Plain, 8);
        let mut items: Vec<Item> = (1..=8).map(|n| item(n, BATCHES)).collect();
        items[2].attempts = 1;
        items[4].attempts = 2;
        items[6].lost = 1;
        let commands = claims(&mut core, items, MS);
        assert_eq!(calls(&commands), [[(5, 0)]], "the third of three");
        let settle = settles(&commands).remove(0);
        assert_eq!(settle.starts, [(7, 1)], "on record first");
        let token = settle.lease.token;
        let commands = core.step([Event::Settled(token, Flushed::Known(Guarded::Done))], MS);
        assert_eq!(calls(&commands).iter().map(|call| call[0].0).collect::<Vec<_>>(), [7]);
        assert_eq!(sizes(&core.step([Event::Tick], MS * 21)), [6]);
    }

    #[test]
    fn a_transactional_call_has_a_flush_of_each_of_its_leases() {
        let mut core = core(Kind::Transactional, 4);
        let (token, _) = claim(&claims(&mut core, (1..=4).map(|n| item(n, BATCHES)), MS)).expect("it goes on claiming");
        let claimed = |token, items: std::ops::Range<i64>| {
            let items = items.map(|n| item(n, BATCHES)).collect();
            Event::Claimed(token, Some(Claimed { batch: 2, token, items, next_due: None, dry: Vec::new() }))
        };
        core.step([claimed(token, 5..8)], MS * 2);
        let call = calls(&core.step([Event::Tick], MS * 21)).remove(0);
        assert_eq!(call.iter().map(|(_, part)| *part).collect::<Vec<_>>(), [0; 7], "the first of each");
        let mut core = self::core(Kind::Transactional, 4);
        let commands = claims(&mut core, (8..=17).map(|n| item(n, BATCHES)), MS * 22);
        let of = holds(&commands);
        let settled = |hold: &Hold| (*hold, Box::new(Ended { settled: true, ..Ended::of(End::Succeeded) }));
        let commands = core.step([Event::EndedTogether(of.iter().map(settled).collect())], MS * 23);
        let settle = settles(&commands).remove(0);
        assert_eq!((settle.part, settle.close, settle.successes.len()), (1, true, 0), "and the lease's end is another");
    }

    #[test]
    fn a_limit_counts_deliveries_and_concurrency_counts_calls() {
        let limited = Lane { limited: true, ..lane(BATCHES, Kind::Plain) };
        let mut core = core_of(limited, lane(BESIDE, Kind::Plain), 4);
        core.step([Event::Tick], Duration::ZERO);
        let permits = vec![Permits { subscription: BATCHES, granted: 4, fair: None }];
        core.step([Event::Permitted(ME, Some(permits))], MS);
        let (token, _) =
            claim(&core.step([Event::Claimed(Uuid::nil(), None), Event::Tick], MS * 60)).unwrap_or_default();
        let items = (1..=12).map(|n| item(n, BATCHES)).collect();
        let claimed = Claimed { batch: 1, token, items, next_due: None, dry: Vec::new() };
        let commands = core.step([Event::Claimed(token, Some(claimed))], MS * 61);
        assert_eq!(sizes(&commands), [4], "four permits");
        let of = holds(&commands);
        let commands = core.step([all(&of, End::Succeeded), Event::Freed(of[0])], MS * 82);
        assert_eq!(sizes(&commands), [4]);

        let narrow = Lane { concurrency: Some(1), ..lane(BATCHES, Kind::Plain) };
        let mut core = core_of(narrow, lane(BESIDE, Kind::Plain), 4);
        assert_eq!(sizes(&claims(&mut core, (1..=20).map(|n| item(n, BATCHES)), MS)), [10]);
    }
}
