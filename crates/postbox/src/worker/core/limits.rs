//! Limits that hold across workers: permits that workers share out among themselves, and tokens that claims
//! take.

use std::time::Duration;

use super::wire::Command;
use super::{Core, Lane, Load, Phase};
use crate::planted::planted;
use crate::store::{PermitWish, Permits, SubscriptionId};

/// How often a worker asks how its permits stand while it uses them, and while it does not.
const BUSY: Duration = Duration::from_millis(500);
const IDLE: Duration = Duration::from_secs(2);
/// How soon it asks for more when it could use more and got all that it asked for.
const EAGER: Duration = Duration::from_millis(20);
/// A claim that finds the bucket dry comes back when there is a token, but not sooner: a few are worth a claim.
const LEAST_DRY: Duration = Duration::from_millis(20);

/// Where a limited or metered lane stands.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Allowance {
    /// How many may run at once.
    permits: usize,
    /// What would be fair to others, who want more.
    fair: Option<usize>,
    /// How many were asked for.
    asked: usize,
    /// Since then: the most that ran, and whether that was all that may.
    most: usize,
    short: bool,
    /// No token until then.
    pub(super) dry_until: Option<Duration>,
}

impl Load {
    /// How many may run at once in this worker, which makes so many calls at once.
    pub(super) fn most_at_once(&self, lane: &Lane, calls: usize) -> usize {
        match lane.limited && !planted!("limit-not-kept") {
            true => lane.own(calls).min(self.allowance.permits),
            false => lane.own(calls),
        }
    }

    /// How many more may run, whatever number of calls they are.
    pub(super) fn room(&self, lane: &Lane) -> usize {
        if lane.limited && !planted!("limit-not-kept") {
            self.allowance.permits.saturating_sub(self.running)
        } else {
            usize::MAX
        }
    }

    /// One more call would run than may.
    pub(super) fn is_full(&self, lane: &Lane) -> bool {
        lane.concurrency.is_some_and(|most| self.calls >= most) || self.room(lane) == 0
    }

    /// A call with so many more runs.
    pub(super) fn run(&mut self, deliveries: usize) {
        self.calls += 1;
        self.running += deliveries;
        self.allowance.most = self.allowance.most.max(self.running);
        self.allowance.short |= self.running >= self.allowance.permits;
    }
}

/// When permits are asked for next, and whether they are being asked for.
#[derive(Debug, Default)]
pub(super) struct Asking {
    /// When the last answer came, or was given up.
    answered: Option<Duration>,
    under_way: bool,
    /// All that were wanted were given: it may ask for more at once.
    generous: bool,
}

impl Core {
    fn limited(&self) -> impl Iterator<Item = &(Lane, Load)> {
        self.lanes.values().filter(|(lane, _)| lane.limited)
    }

    /// When the limits want a `Tick` at the latest.
    pub(super) fn limits_tick(&self) -> Option<Duration> {
        if self.phase != Phase::Working {
            return None;
        }
        let dry = self.lanes.values().filter_map(|(_, load)| load.allowance.dry_until).min();
        let ask = (!self.sharing.under_way && self.limited().next().is_some()).then(|| self.ask_at());
        dry.into_iter().chain(ask).min()
    }

    fn ask_at(&self) -> Duration {
        let any = |is: fn(&Load) -> bool| self.limited().any(|(_, load)| is(load));
        let pause = match self.sharing.generous && any(|load| load.allowance.short) {
            true => EAGER,
            false if any(|load| load.running + load.queued > 0 || load.allowance.fair.is_some()) => BUSY,
            false => IDLE,
        };
        self.sharing.answered.map_or(Duration::ZERO, |at| at + pause)
    }

    /// Asks for permits, when it is time to.
    pub(super) fn ask_for_permits(&mut self, now: Duration, commands: &mut Vec<Command>) {
        if self.phase != Phase::Working
            || self.sharing.under_way
            || self.limited().next().is_none()
            || now < self.ask_at()
        {
            return;
        }
        let all = self.setup.concurrency;
        let mut wishes: Vec<PermitWish> = Vec::new();
        for (lane, load) in self.lanes.values_mut().filter(|(lane, _)| lane.limited) {
            let own = lane.own(all);
            let Allowance { permits, fair, most, short, .. } = load.allowance;
            // One is kept while idle, so that what comes can begin.
            let wanted = if short { own } else { most.max(load.running).max(1) };
            // What is given back is not used from here on: the answer may get lost.
            let keep = permits.min(wanted).min(fair.unwrap_or(usize::MAX)).max(load.running.min(permits));
            load.allowance = Allowance {
                permits: keep,
                fair: None,
                asked: wanted,
                most: load.running,
                short: load.running > 0 && load.running >= keep,
                ..load.allowance
            };
            wishes.push(PermitWish { subscription: lane.id, wanted: clamp(wanted), keep: clamp(keep) });
        }
        wishes.sort_unstable_by_key(|wish| wish.subscription);
        self.sharing.under_way = true;
        commands.push(Command::Permits(self.setup.worker, wishes));
    }

    /// How permits stand; `None`: the answer was lost, and what was kept is still ours.
    pub(super) fn permitted(&mut self, worker: uuid::Uuid, permits: Option<Vec<Permits>>, now: Duration) {
        self.sharing = Asking { answered: Some(now), under_way: false, generous: permits.is_some() };
        // An earlier incarnation's are nobody's.
        let Some(permits) = permits.filter(|_| worker == self.setup.worker) else { return };
        for Permits { subscription, granted, fair } in permits {
            let Some((lane, load)) = self.lanes.get_mut(&subscription) else { continue };
            let own = lane.own(self.setup.concurrency);
            let granted = granted as usize;
            self.hungry |= granted > load.allowance.permits;
            load.allowance.permits = granted;
            load.allowance.fair = fair.map(|fair| fair as usize);
            // Otherwise nothing more is to be had at once.
            let Allowance { asked, .. } = load.allowance;
            self.sharing.generous &= fair.is_none() && granted >= asked && asked < own;
        }
    }

    /// Another incarnation has no permits.
    pub(super) fn without_permits(&mut self) {
        for (_, load) in self.lanes.values_mut() {
            load.allowance = Allowance { dry_until: load.allowance.dry_until, ..Allowance::default() };
        }
        self.sharing = Asking::default();
    }

    /// These got fewer tokens than were wanted.
    pub(super) fn dry(&mut self, lanes: Vec<(SubscriptionId, Duration)>, now: Duration) {
        for (id, wait) in lanes {
            if let Some((_, load)) = self.lanes.get_mut(&id) {
                load.allowance.dry_until = Some(now + wait.max(LEAST_DRY));
            }
        }
    }

    /// Lanes whose next token has come are claimed from again.
    pub(super) fn refill(&mut self, now: Duration) {
        for (_, load) in self.lanes.values_mut() {
            if load.allowance.dry_until.is_some_and(|at| at <= now) {
                load.allowance.dry_until = None;
                self.hungry = true;
            }
        }
    }
}

fn clamp(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX).min(i32::MAX as u32)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::super::wire::{Ended, Event, Setup};
    use super::*;
    use crate::lifecycle::{End, Kind, Policy};
    use crate::retry::RetryPolicy;
    use crate::store::{Claimed, Item};

    const ME: Uuid = Uuid::from_u128(1);
    const MS: Duration = Duration::from_millis(1);

    fn core(limited: bool, metered: bool) -> Core {
        let policy = Policy { kind: Kind::Plain, retry: RetryPolicy::default(), idempotent: false };
        let second = Duration::from_secs(1);
        let lane = Lane {
            id: 1,
            policy,
            timeout: second,
            quiet: second,
            late: second,
            concurrency: None,
            keys: None,
            gather: None,
            limited,
            metered,
        };
        let setup = Setup {
            worker: ME,
            concurrency: 8,
            batch: None,
            poll_interval: second,
            subscriptions: vec![lane],
            seed: 1,
        };
        Core::new(setup)
    }

    fn claims(commands: &[Command]) -> Vec<(Uuid, u32)> {
        let claim = |c: &Command| match c {
            Command::Claim(request) => Some((request.token, request.wanted[0].1)),
            _ => None,
        };
        commands.iter().filter_map(claim).collect()
    }

    fn wishes(commands: &[Command]) -> Vec<(u32, u32)> {
        let wish = |c: &Command| match c {
            Command::Permits(ME, wishes) => Some((wishes[0].wanted, wishes[0].keep)),
            _ => None,
        };
        commands.iter().filter_map(wish).collect()
    }

    fn runs(commands: &[Command]) -> Vec<(Uuid, usize)> {
        let run = |c: &Command| match c {
            Command::Run(hold, ..) => Some(*hold),
            _ => None,
        };
        commands.iter().filter_map(run).collect()
    }

    fn got(token: Uuid, count: i64, dry: Option<Duration>) -> Event {
        let item = |delivery| Item {
            delivery,
            subscription: 1,
            message: Uuid::nil(),
            priority: 0,
            attempts: 0,
            lost: 0,
            rev: 1,
            leads: false,
            envelope: None,
        };
        let dry = dry.map(|wait| (1, wait)).into_iter().collect();
        Event::Claimed(
            token,
            Some(Claimed { batch: 1, token, items: (1..=count).map(item).collect(), next_due: None, dry }),
        )
    }

    fn permits(granted: u32, fair: Option<u32>) -> Event {
        Event::Permitted(ME, Some(vec![Permits { subscription: 1, granted, fair }]))
    }

    #[test]
    fn nothing_is_claimed_or_run_without_a_permit() {
        let mut core = core(true, false);
        let first = core.step([Event::Tick], Duration::ZERO);
        assert_eq!((claims(&first), wishes(&first)), (vec![], vec![(1, 0)]), "one, to begin with");
        let granted = core.step([permits(1, None)], MS);
        let token = claims(&granted)[0].0;
        let running = core.step([got(token, 3, None)], MS * 2);
        assert_eq!((runs(&running).len(), wishes(&running)), (1, vec![]), "the others wait");
        // All that was wanted was given, and it is all in use: it asks for more at once.
        let more = core.step([Event::Tick], MS * 30);
        assert_eq!(wishes(&more), [(8, 1)]);
        assert_eq!(runs(&core.step([permits(2, None)], MS * 31)).len(), 1);
        // There was no more to be had: it asks again when it is time.
        assert_eq!(wishes(&core.step([Event::Tick], MS * 60)), []);
        assert_eq!(wishes(&core.step([Event::Tick], MS * 600)), [(8, 2)]);
    }

    #[test]
    fn what_is_given_back_is_not_used_from_then_on() {
        let mut core = core(true, false);
        core.step([Event::Tick], Duration::ZERO);
        let token = claims(&core.step([permits(4, Some(2))], MS))[0].0;
        // Others want some, too: two would be fair.
        assert_eq!(wishes(&core.step([Event::Tick], MS * 600)), [(1, 1)], "and one will do while it is idle");
        // The answer gets lost; what was given back may be somebody else's.
        core.step([Event::Permitted(ME, None)], MS * 601);
        assert_eq!(runs(&core.step([got(token, 8, None)], MS * 602)).len(), 1);
    }

    #[test]
    fn what_runs_keeps_its_permits() {
        let mut core = core(true, false);
        core.step([Event::Tick], Duration::ZERO);
        let token = claims(&core.step([permits(4, None)], MS))[0].0;
        let running = runs(&core.step([got(token, 8, None)], MS * 2));
        assert_eq!(running.len(), 4);
        assert_eq!(wishes(&core.step([Event::Tick], MS * 30)), [(8, 4)]);
        core.step([permits(4, Some(2))], MS * 31);
        assert_eq!(wishes(&core.step([Event::Tick], MS * 600)), [(8, 4)], "all four run still");
        core.step([permits(4, Some(2))], MS * 601);
        let ended =
            |hold: &(Uuid, usize)| [Event::Ended(*hold, Box::new(Ended::of(End::Succeeded))), Event::Freed(*hold)];
        let next = core.step(ended(&running[0]), MS * 602);
        assert_eq!(runs(&next).len(), 1, "until it asks, what it has is its own");
        core.step([Event::Stop], MS * 603);
        assert_eq!(wishes(&core.step([Event::Tick], MS * 1200)), [], "who stops asks for nothing");
    }

    #[test]
    fn another_incarnation_begins_without_permits() {
        let mut core = core(true, false);
        core.step([Event::Tick], Duration::ZERO);
        core.step([permits(4, None)], MS);
        let reborn = core.step([Event::Reborn(Uuid::from_u128(2)), permits(4, None)], MS * 2);
        assert_eq!(claims(&reborn), [], "an answer to the earlier one is nobody's");
    }

    #[test]
    fn a_dry_bucket_is_waited_for() {
        let mut core = core(false, true);
        let (token, room) = claims(&core.step([Event::Tick], Duration::ZERO))[0];
        assert_eq!(room, 8, "as many as can begin");
        let dry = core.step([got(token, 2, Some(MS * 100))], MS);
        assert_eq!((runs(&dry).len(), claims(&dry)), (2, vec![]));
        assert_eq!(claims(&core.step([Event::Woken], MS * 50)), []);
        assert!(core.next_tick().is_some_and(|at| at <= MS * 101));
        assert_eq!(claims(&core.step([Event::Tick], MS * 101))[0].1, 6);
    }
}
