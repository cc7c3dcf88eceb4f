//! Deliveries of one key: so many at a time, and in order, one after the other. What has to wait for others of its
//! key waits here; one that did not succeed in order sends those behind it back.

use std::collections::{BTreeSet, HashMap, VecDeque};

use uuid::Uuid;

use super::batch::{Batch, Slot};
use super::wire::{Hold, Lane};
use super::{Core, Load};
use crate::keys::Keys;
use crate::lifecycle::End;
use crate::planted::planted;
use crate::store::{Item, SubscriptionId};

/// Nothing more is claimed from a lane of which so many wait for others of their key.
const FULL: usize = 128;

/// The deliveries of one key that are in hand.
#[derive(Debug, Default)]
struct Line {
    /// Queued, running, or otherwise on their way.
    going: usize,
    /// The lane of its key.
    level: i16,
    /// Behind them, in order.
    behind: VecDeque<Hold>,
    /// In order: the last that has succeeded, until that is on record. What follows under another lease waits for
    /// it: else it could be on record alone, and this one would come again after it.
    ahead: Option<Hold>,
    closed: Closed,
}

impl Line {
    /// Nothing is known of its key that has to be kept.
    fn is_over(&self) -> bool {
        self.going == 0 && self.behind.is_empty() && self.ahead.is_none() && self.closed == Closed::No
    }
}

/// Whether more of a key may come.
#[derive(Debug, Default, PartialEq, Eq)]
enum Closed {
    #[default]
    No,
    /// Until it is on record that this one did not succeed.
    Settling(Hold),
    /// Until these claims have returned: they may have been made before it was on record.
    Claiming(BTreeSet<Uuid>),
}

/// What to do with a delivery that was claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Queue,
    Behind,
    /// One before it did not succeed.
    Back,
}

/// How a delivery has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Through {
    /// It is to be put on record.
    Succeeded,
    /// That is on record already.
    OnRecord,
    Failed,
}

impl Through {
    pub(super) fn of(end: End) -> Through {
        if end == End::Succeeded { Through::Succeeded } else { Through::Failed }
    }
}

/// The lines of all keys in hand.
#[derive(Debug, Default)]
pub(super) struct Lines {
    of: HashMap<SubscriptionId, HashMap<String, Line>>,
    /// How many are behind others, by lane.
    behind: HashMap<(SubscriptionId, i16), usize>,
}

/// The key, if its subscription goes by keys.
fn key<'i>(lane: &Lane, item: &'i Item) -> Option<(Keys, &'i str)> {
    Some((lane.keys?, item.envelope.as_ref()?.key.as_deref()?))
}

impl Lines {
    pub(super) fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    /// Where a claimed delivery goes.
    pub(super) fn enter(&mut self, lane: &Lane, item: &Item, hold: Hold) -> Place {
        let Some((keys, key)) = key(lane, item) else { return Place::Queue };
        let line = self.of.entry(lane.id).or_default().entry(key.to_owned()).or_default();
        line.level = item.priority;
        if line.closed != Closed::No {
            return Place::Back;
        }
        let may_follow = line.ahead.is_none_or(|ahead| ahead.0 == hold.0);
        if may_follow && line.going < keys.at_once() as usize + usize::from(planted!("two-of-a-key")) {
            line.going += 1;
            return Place::Queue;
        }
        line.behind.push_back(hold);
        *self.behind.entry((lane.id, item.priority)).or_default() += 1;
        Place::Behind
    }

    /// One in order has succeeded, and that is not on record: the next of its key, if it is under the same lease.
    fn follower(&mut self, lane: &Lane, item: &Item, hold: Hold) -> Option<Hold> {
        let (_, key) = key(lane, item)?;
        let line = self.of.get_mut(&lane.id)?.get_mut(key)?;
        if line.behind.front().is_some_and(|next| next.0 == hold.0) {
            return self.next(lane, item);
        }
        line.going = line.going.saturating_sub(1);
        line.ahead = Some(hold);
        None
    }

    fn is_ahead(&self, item: &Item, hold: Hold) -> bool {
        let key = item.envelope.as_ref().and_then(|envelope| envelope.key.as_deref());
        let line = self.of.get(&item.subscription).zip(key).and_then(|(lines, key)| lines.get(key));
        line.is_some_and(|line| line.ahead == Some(hold))
    }

    /// One is not on its way any more: the next of its key.
    fn next(&mut self, lane: &Lane, item: &Item) -> Option<Hold> {
        let (_, key) = key(lane, item)?;
        let lines = self.of.get_mut(&lane.id)?;
        let line = lines.get_mut(key)?;
        line.going = line.going.saturating_sub(1);
        let next = line.behind.pop_front();
        if next.is_some() {
            line.going += 1;
            self.came_out(lane.id, item.priority, 1);
        } else if line.is_over() {
            lines.remove(key);
        }
        next
    }

    /// One in order has not succeeded: those behind it, which go back.
    fn close(&mut self, lane: &Lane, item: &Item, closed: Closed) -> Vec<Hold> {
        let Some((_, key)) = key(lane, item) else { return Vec::new() };
        let line = self.of.entry(lane.id).or_default().entry(key.to_owned()).or_default();
        line.going = line.going.saturating_sub(1);
        line.ahead = None;
        line.closed = closed;
        let behind: Vec<Hold> = std::mem::take(&mut line.behind).into();
        self.came_out(lane.id, item.priority, behind.len());
        behind
    }

    fn came_out(&mut self, subscription: SubscriptionId, level: i16, number: usize) {
        if let Some(behind) = self.behind.get_mut(&(subscription, level)) {
            *behind = behind.saturating_sub(number);
            if *behind == 0 {
                self.behind.remove(&(subscription, level));
            }
        }
    }

    /// Nothing of these subscriptions waits behind others any more.
    pub(super) fn empty(&mut self, which: impl Fn(SubscriptionId) -> bool) {
        self.behind.retain(|(subscription, _), _| !which(*subscription));
        for (_, lines) in self.of.iter_mut().filter(|(subscription, _)| which(**subscription)) {
            lines.values_mut().for_each(|line| line.behind.clear());
        }
    }

    /// What is behind others and belongs to this batch is not any more.
    fn forget(&mut self, token: Uuid, claiming: &BTreeSet<Uuid>) {
        self.each_closed(|closed| match closed {
            Closed::Settling((of, _)) if *of == token => *closed = Closed::Claiming(claiming.clone()),
            _ => {}
        });
        self.behind.clear();
        for (subscription, lines) in &mut self.of {
            for line in lines.values_mut() {
                line.behind.retain(|(of, _)| *of != token);
                if !line.behind.is_empty() {
                    *self.behind.entry((*subscription, line.level)).or_default() += line.behind.len();
                }
            }
        }
    }

    pub(super) fn none_behind(&self) -> bool {
        self.behind.is_empty()
    }

    /// Those of which something is behind others.
    pub(super) fn subscriptions_behind(&self) -> impl Iterator<Item = SubscriptionId> + '_ {
        self.behind.keys().map(|(subscription, _)| *subscription)
    }

    /// Lanes that have enough of their deliveries here, or of which a key is closed.
    pub(super) fn full(&self) -> Vec<(SubscriptionId, i16)> {
        let mut full: Vec<_> = self.behind.iter().filter(|(_, n)| **n >= FULL).map(|(lane, _)| *lane).collect();
        for (subscription, lines) in &self.of {
            full.extend(
                lines.values().filter(|line| line.closed != Closed::No).map(|line| (*subscription, line.level)),
            );
        }
        full.sort_unstable();
        full.dedup();
        full
    }

    /// What has ended in this batch is on record: claims that begin now know of it. Whether keys are open again for it,
    /// and what may follow.
    pub(super) fn on_record(
        &mut self,
        token: Uuid,
        settled: impl Fn(usize) -> bool,
        claiming: impl Fn() -> BTreeSet<Uuid>,
    ) -> (bool, Vec<Hold>) {
        let is_settled = |hold: &Hold| hold.0 == token && settled(hold.1);
        let mut following = Vec::new();
        for (subscription, lines) in &mut self.of {
            lines.retain(|_, line| {
                if line.ahead.as_ref().is_none_or(|ahead| !is_settled(ahead)) {
                    return true;
                }
                line.ahead = None;
                if line.going == 0
                    && let Some(next) = line.behind.pop_front()
                {
                    line.going = 1;
                    following.push((next, (*subscription, line.level)));
                }
                !line.is_over()
            });
        }
        for (_, lane) in &following {
            self.came_out(lane.0, lane.1, 1);
        }
        let opened = self.each_closed(|closed| match closed {
            Closed::Settling(hold) if is_settled(hold) => *closed = Closed::Claiming(claiming()),
            _ => {}
        });
        (opened, following.into_iter().map(|(hold, _)| hold).collect())
    }

    /// A claim has returned, or never will. Whether keys are open again for it.
    pub(super) fn returned(&mut self, claim: Uuid) -> bool {
        self.each_closed(|closed| {
            if let Closed::Claiming(claims) = closed {
                claims.remove(&claim);
            }
        })
    }

    /// Whether some are open again.
    fn each_closed(&mut self, mut change: impl FnMut(&mut Closed)) -> bool {
        let mut opened = false;
        for lines in self.of.values_mut() {
            lines.retain(|_, line| {
                if line.closed == Closed::No {
                    return true;
                }
                change(&mut line.closed);
                if matches!(&line.closed, Closed::Claiming(claims) if claims.is_empty()) {
                    line.closed = Closed::No;
                    opened = true;
                }
                !line.is_over()
            });
        }
        opened
    }
}

impl Core {
    /// A delivery is not on its way any more: it ended well, or goes back without having begun. The next of its
    /// key may go.
    pub(super) fn passed(&mut self, subscription: SubscriptionId, item: &Item) {
        let Some((lane, _)) = self.lanes.get(&subscription) else { return };
        if let Some(next) = self.lines.next(lane, item) {
            self.comes(next);
        }
    }

    /// One that was behind others takes its turn.
    pub(super) fn comes(&mut self, next: Hold) {
        let Some(batch) = self.batches.get_mut(&next.0) else { return };
        let item = &batch.entries()[next.1].item;
        let Some((lane, load)) = self.lanes.get_mut(&item.subscription) else { return };
        // Whatever made its lane full.
        self.hungry = true;
        load.line_up(lane, item, next, &mut self.queue, self.now);
        batch.put(next.1, Slot::Queued);
    }

    /// The same of one that goes back with all that was behind it.
    pub(super) fn went_back(&mut self, item: &Item) {
        if let Some((lane, _)) = self.lanes.get(&item.subscription) {
            self.lines.next(lane, item);
        }
    }

    /// A delivery has ended: how, as far as its key goes.
    pub(super) fn through(&mut self, hold: Hold, how: Through) {
        // Most subscriptions do not go by keys.
        if self.lines.is_empty() {
            return;
        }
        let Some(item) = self.batches.get(&hold.0).map(|batch| batch.entries()[hold.1].item.clone()) else { return };
        let Some((lane, _)) = self.lanes.get(&item.subscription) else { return };
        match (lane.keys, how) {
            (None, _) => {}
            (Some(Keys::Ordered(_)), Through::Failed) if !planted!("followers-go-on") => {
                let behind = self.lines.close(lane, &item, Closed::Settling(hold));
                self.back(behind);
            }
            (Some(Keys::Ordered(_)), Through::Succeeded) => {
                if let Some(next) = self.lines.follower(lane, &item, hold) {
                    self.comes(next);
                }
            }
            (Some(_), _) => self.passed(item.subscription, &item),
        }
    }

    /// What was refused by the database has failed, whatever it came to: nothing of its key follows it.
    pub(super) fn lines_refused(&mut self, token: Uuid) {
        let Some(batch) = self.batches.get(&token).filter(|_| !self.lines.is_empty()) else { return };
        let failed = |slot: &Slot| matches!(slot, Slot::Ended(ended, _) if ended.end != End::Succeeded);
        let entries = batch.entries().iter().enumerate().filter(|(_, entry)| failed(&entry.slot));
        let ahead: Vec<Hold> = entries
            .filter(|(index, entry)| self.lines.is_ahead(&entry.item, (token, *index)))
            .map(|(index, _)| (token, index))
            .collect();
        for hold in ahead {
            self.through(hold, Through::Failed);
        }
    }

    /// Those go back, unstarted.
    fn back(&mut self, holds: Vec<Hold>) {
        for (token, index) in holds {
            if let Some(batch) = self.batches.get_mut(&token)
                && matches!(batch.entries()[index].slot, Slot::Behind)
            {
                batch.put(index, Slot::Released);
            }
        }
    }

    /// The lease of a batch was lost: what of it was on its way, or had ended, is somebody else's, and with it all of
    /// its keys.
    pub(super) fn lines_lost(&mut self, token: Uuid, lost: Vec<(Item, Lost)>) {
        if lost.is_empty() {
            return;
        }
        let claims = self.keyed.tokens();
        self.lines.forget(token, &claims);
        for (item, lost) in lost {
            let Some((lane, _)) = self.lanes.get(&item.subscription) else { continue };
            match (lane.keys, lost) {
                (Some(Keys::Ordered(_)), Lost::OnItsWay | Lost::Ended) => {
                    let behind = self.lines.close(lane, &item, Closed::Claiming(claims.clone()));
                    self.back(behind);
                }
                (Some(_), Lost::OnItsWay) => self.passed(item.subscription, &item),
                _ => {}
            }
        }
        // Where no claim is under way, nothing is waited for.
        self.hungry |= self.lines.returned(token);
    }
}

/// Where a delivery by key stood whose lease was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    OnItsWay,
    /// And it was not on record.
    Ended,
    Otherwise,
}

/// Where the deliveries by key of a batch stand, before its slots change.
pub(super) fn in_lines(batch: &Batch, lanes: &HashMap<SubscriptionId, (Lane, Load)>) -> Vec<(Item, Lost)> {
    let by_key = |item: &Item| lanes.get(&item.subscription).is_some_and(|(lane, _)| lane.keys.is_some());
    let stood = |slot: &Slot| match slot {
        Slot::Queued | Slot::Reserved | Slot::Starting | Slot::Running { .. } | Slot::Paused(_) | Slot::CutOff(_) => {
            Lost::OnItsWay
        }
        Slot::Ended(..) | Slot::Settling(Some(_)) => Lost::Ended,
        _ => Lost::Otherwise,
    };
    let entries = batch.entries().iter().filter(|entry| by_key(&entry.item));
    entries.map(|entry| (entry.item.clone(), stood(&entry.slot))).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::super::wire::{Command, Ended, Event, Flushed, Setup};
    use super::*;
    use crate::content::Content;
    use crate::keys::OnDead;
    use crate::lifecycle::{Kind, Policy};
    use crate::message::Envelope;
    use crate::retry::RetryPolicy;
    use crate::store::lanes::{FIRST_LANE, LANES};
    use crate::store::{ClaimRequest, Claimed, Guarded, Settle};

    const MS: Duration = Duration::from_millis(1);

    fn core(keys: Keys) -> Core {
        let second = Duration::from_secs(1);
        let policy = Policy { kind: Kind::Plain, retry: RetryPolicy::default(), idempotent: false };
        let lane = Lane {
            id: 1,
            policy,
            timeout: second,
            quiet: second,
            late: second,
            concurrency: None,
            keys: Some(keys),
            gather: None,
            limited: false,
            metered: false,
        };
        Core::new(Setup {
            worker: Uuid::from_u128(1),
            concurrency: 8,
            batch: None,
            poll_interval: second,
            subscriptions: vec![lane],
            seed: 1,
        })
    }

    fn item(delivery: i64, key: &str) -> Item {
        let envelope = Envelope {
            id: Uuid::nil(),
            topic: "t".into(),
            key: Some(key.into()),
            payload: Content::stored(Some("1".into()), None, None).expect("a payload"),
            headers: Default::default(),
            occurred_at: jiff::Timestamp::UNIX_EPOCH,
            received_at: jiff::Timestamp::UNIX_EPOCH,
            source: None,
            external_id: None,
            correlation_id: None,
            causation_id: None,
            max_attempts: None,
        };
        Item {
            delivery,
            subscription: 1,
            message: Uuid::nil(),
            priority: 64,
            attempts: 0,
            lost: 0,
            rev: 1,
            leads: false,
            envelope: Some(Arc::new(envelope)),
        }
    }

    fn claim(commands: &[Command]) -> Uuid {
        let token = |c: &Command| if let Command::Claim(request) = c { Some(request.token) } else { None };
        commands.iter().find_map(token).expect("a claim")
    }

    fn got(token: Uuid, batch: i64, items: &[(i64, &str)]) -> Event {
        let items = items.iter().map(|(delivery, key)| item(*delivery, key)).collect();
        Event::Claimed(token, Some(Claimed { batch, token, items, next_due: None, dry: Vec::new() }))
    }

    fn runs(commands: &[Command]) -> Vec<i64> {
        let run = |c: &Command| if let Command::Run(_, _, item, _) = c { Some(item.delivery) } else { None };
        commands.iter().filter_map(run).collect()
    }

    fn hold(commands: &[Command], delivery: i64) -> Hold {
        let run = |c: &Command| match c {
            Command::Run(hold, _, item, _) if item.delivery == delivery => Some(*hold),
            _ => None,
        };
        commands.iter().find_map(run).expect("it runs")
    }

    fn ends(hold: Hold, end: End) -> [Event; 2] {
        [Event::Ended(hold, Box::new(Ended::of(end))), Event::Freed(hold)]
    }

    fn flushes(commands: &[Command]) -> Vec<Arc<Settle>> {
        let flush = |c: &Command| if let Command::Settle(settle) = c { Some(settle.clone()) } else { None };
        commands.iter().filter_map(flush).collect()
    }

    const DONE: fn(Uuid) -> Event = |token| Event::Settled(token, Flushed::Known(Guarded::Done));
    const FAILED: End = End::Failed { permanent: false, retry_after: None };

    #[test]
    fn one_of_a_key_at_a_time_and_the_next_under_another_lease_when_that_is_on_record() {
        let mut core = core(Keys::Ordered(OnDead::Block));
        let first = claim(&core.step([Event::Tick], MS));
        let running = core.step([got(first, 1, &[(1, "a"), (2, "a"), (3, "b")])], MS * 2);
        assert_eq!(runs(&running), [1, 3], "different keys run side by side");
        let second = claim(&running);
        assert_eq!(runs(&core.step([got(second, 2, &[(4, "a"), (5, "c")])], MS * 3)), [5]);
        let next = core.step(ends(hold(&running, 1), End::Succeeded), MS * 4);
        assert_eq!(runs(&next), [2], "under the same lease they are on record together");
        let last = core.step(ends(hold(&next, 2), End::Succeeded), MS * 5);
        assert!(runs(&last).is_empty(), "1 and 2 are not on record");
        let flushed = core.step([Event::Tick], MS * 40);
        assert_eq!(flushes(&flushed).len(), 1);
        assert_eq!(runs(&core.step([DONE(first)], MS * 41)), [4]);
    }

    #[test]
    fn one_that_fails_sends_back_what_is_behind_it_and_closes_its_key() {
        let mut core = core(Keys::Ordered(OnDead::Block));
        let first = claim(&core.step([Event::Tick], MS));
        let running = core.step([got(first, 1, &[(1, "a"), (2, "a"), (3, "b")])], MS * 2);
        let second = claim(&running);
        let failed = core.step(ends(hold(&running, 1), FAILED), MS * 3);
        let released: Vec<i64> = flushes(&failed).iter().flat_map(|f| f.released.iter().map(|i| i.delivery)).collect();
        assert_eq!(released, [2]);
        assert!(flushes(&failed)[0].moves[0].leads, "it is on record that the others wait");
        // A claim that was made before that was on record brings another one.
        let back = core.step([DONE(first), got(second, 2, &[(4, "a"), (5, "b")])], MS * 4);
        assert!(runs(&back).is_empty());
        let third = claim(&back);
        assert_eq!(runs(&core.step([got(third, 3, &[(1, "a")])], MS * 7)), [1], "it is open again for the first");
    }

    #[test]
    fn what_is_lost_with_its_lease_is_forgotten() {
        let mut core = core(Keys::Ordered(OnDead::Block));
        let first = claim(&core.step([Event::Tick], MS));
        let running = core.step([got(first, 1, &[(1, "a"), (2, "a")])], MS * 2);
        let second = claim(&running);
        let third = claim(&core.step([got(second, 2, &[(3, "a")])], MS * 3));
        core.step([Event::Reborn(Uuid::from_u128(2))], MS * 4);
        core.step(ends(hold(&running, 1), End::Succeeded), MS * 5);
        // Made before it was taken over.
        let fourth = claim(&core.step([got(third, 3, &[])], MS * 6));
        assert_eq!(runs(&core.step([got(fourth, 4, &[(1, "a")])], MS * 7)), [1]);
        assert!(core.lines.none_behind());
    }

    #[test]
    fn so_many_of_a_key_at_once() {
        let mut core = core(Keys::AtOnce(2));
        let first = claim(&core.step([Event::Tick], MS));
        let running = core.step([got(first, 1, &[(1, "a"), (2, "a"), (3, "a"), (4, "a")])], MS * 2);
        assert_eq!(runs(&running), [1, 2]);
        assert_eq!(runs(&core.step(ends(hold(&running, 2), FAILED), MS * 3)), [3], "whatever the other came to");
    }

    #[test]
    fn one_claim_of_keys_at_a_time_and_none_while_one_may_have_been_made() {
        let mut core = core(Keys::Ordered(OnDead::Block));
        let first = core.step([Event::Tick], MS);
        let token = claim(&first);
        assert_eq!(first.iter().filter(|c| matches!(c, Command::Claim(_))).count(), 1);
        let lost = core.step([Event::Claimed(token, None)], MS * 2);
        assert!(!lost.iter().any(|c| matches!(c, Command::Claim(_))));
        assert!(!core.step([Event::Woken], MS * 3).iter().any(|c| matches!(c, Command::Claim(_))));
        claim(&core.step([Event::Disowned(token, true), Event::Woken], MS * 4));
    }

    #[test]
    fn in_front_of_a_backlog_two_claims_have_no_lane_in_common() {
        let mut core = core(Keys::Ordered(OnDead::Block));
        let claims = |commands: &[Command]| -> Vec<ClaimRequest> {
            let of = |command: &Command| match command {
                Command::Claim(request) => Some(request.clone()),
                _ => None,
            };
            commands.iter().filter_map(of).collect()
        };
        let first = claims(&core.step([Event::Tick], MS));
        let [all] = first.as_slice() else { panic!("{first:?}") };
        assert!(all.full.is_empty() && all.sorts);
        let items = (0..i64::from(all.wanted[0].1)).map(|n| {
            let item = item(n, &format!("key-{n}"));
            Item { priority: FIRST_LANE + n as i16 % 2, ..item }
        });
        let claimed = Claimed { batch: 1, token: all.token, items: items.collect(), next_due: None, dry: Vec::new() };
        let mut commands = core.step([Event::Claimed(all.token, Some(claimed))], MS * 2);
        let mut running = Vec::new();
        let two = loop {
            let found = claims(&commands);
            if !found.is_empty() {
                break found;
            }
            // First what lies ready.
            running.extend(runs(&commands).into_iter().map(|delivery| hold(&commands, delivery)));
            let next = running.pop().expect("one runs, or there is a claim");
            commands = core.step(ends(next, End::Succeeded), MS * 3);
        };
        let [one, other] = two.as_slice() else { panic!("{two:?}") };
        assert!(one.sorts && !other.sorts, "one sorts");
        let all_lanes: BTreeSet<_> = (FIRST_LANE..FIRST_LANE + LANES).map(|level| (1, level)).collect();
        let left = |request: &ClaimRequest| all_lanes.iter().filter(|l| !request.full.contains(l)).count();
        let excluded: BTreeSet<_> = one.full.iter().chain(&other.full).copied().collect();
        assert_eq!((left(one), left(other)), (16, 16));
        assert_eq!(excluded, all_lanes, "what one may take is closed to the other");
    }
}
