//! What the workers ask the store for: when it gets there, how long it takes, and what they hear of it.

use std::time::Duration;

use uuid::Uuid;

use super::super::store::{Said, Verb};
use super::super::{Checked, LEASE};
use super::{AGAIN, At, Context, Happening, Open, Request, World, ended, ms};
use crate::lifecycle::End;
use crate::store::Guarded;
use crate::worker::core::{Ended, Event, Flushed};

impl World {
    pub(super) fn ask(&mut self, from: At, verb: Verb, context: Context) {
        self.after(0..3, Happening::Arrive(Request { from, verb, context }));
    }

    pub(super) fn arrive(&mut self, mut request: Request) {
        let Some(locks) = self.store.lock(&mut request.verb, self.now, &mut self.dice) else {
            // Waits for the first that ends, and looks again.
            let ends = self.open.values().map(|o| o.ends).min().unwrap_or(self.now + ms(1));
            self.at(ends + Duration::from_micros(1), Happening::Arrive(request));
            return;
        };
        let slow = !self.healed() && self.chance(2);
        let takes = if slow { self.within(100..4_000) } else { self.within(0..6) };
        let ends = self.now + takes;
        let mut open = Open { request, locks, lost: false, answered: true, ends };
        if !self.healed() {
            if self.chance(self.losses) {
                open.answered = false;
                open.lost = self.dice.bool();
                self.hit(if open.lost { "rolled back, answer lost" } else { "committed, answer lost" });
            } else if takes > LEASE {
                // Nobody waits that long.
                open.answered = false;
            } else if let Verb::Settle(settle) = &open.request.verb
                && !(settle.moves.is_empty() && settle.successes.is_empty())
                // One that has committed is not written again, whatever is in it.
                && !self.store.written(settle)
                && self.dice.u32(..400) == 0
            {
                let (from, token) = (open.request.from, settle.lease.token);
                (open.lost, open.answered) = (true, true);
                self.hit("flush refused");
                self.at(ends, Happening::Refuse(from, token));
            }
        }
        if !open.answered {
            // Perhaps while the server is still at it.
            let told = self.now + self.within(0..takes.as_millis() as u64 + 50).min(LEASE);
            let Request { from, verb, context } = &open.request;
            let unknown = Happening::Reply(*from, verb.clone(), *context, None);
            self.at(told, unknown);
        }
        self.count += 1;
        let number = self.count;
        self.open.insert(number, open);
        self.at(ends, Happening::Commit(number));
    }

    pub(super) fn commit(&mut self, number: u64) -> Checked {
        let Some(Open { request, locks, lost, answered, .. }) = self.open.remove(&number) else { return Ok(()) };
        self.store.unlock(&locks);
        if lost {
            return Ok(());
        }
        let before = self.store.rows.len();
        let said = self.store.commit(&request.verb, &locks, self.now)?;
        self.store.followed()?;
        if self.store.rows.len() > before {
            self.hit(match &request.verb {
                Verb::Observe(_) => "followed by evidence",
                Verb::Answer(_) => "followed by an answer",
                _ => "followed",
            });
            self.wake();
        }
        if let Said::TookOver(true) = said {
            self.hit("taken over");
        }
        if answered {
            self.after(0..3, Happening::Reply(request.from, request.verb, request.context, Some(said)));
        }
        Ok(())
    }

    pub(super) fn reply(&mut self, at: At, verb: Verb, context: Context, said: Option<Said>) -> Checked {
        match (verb, context, said) {
            (Verb::Claim(request), _, said) => {
                let claimed = said.and_then(|s| if let Said::Claimed(claimed) = s { Some(claimed) } else { None });
                self.step(at, Event::Claimed(request.token, claimed))?;
            }
            (Verb::Settle(settle), _, said) => {
                let flushed = match said {
                    Some(Said::Guarded(guarded)) => Flushed::Known(guarded),
                    _ => Flushed::Unknown,
                };
                if let Flushed::Known(Guarded::Fenced) = flushed {
                    self.hit("fenced");
                }
                self.step(at, Event::Settled(settle.lease.token, flushed))?;
            }
            (Verb::SettleOpen { lease, delivery, number, .. }, Context::Attempt(hold), said) => match said {
                Some(Said::Guarded(Guarded::Done)) => {
                    self.end(at, hold, Ended { settled: true, ..ended(End::Succeeded) });
                }
                Some(_) => self.end(at, hold, Ended { fenced: true, ..ended(AGAIN) }),
                None => self.ask(at, Verb::Recheck { lease, delivery, number }, context),
            },
            (verb @ Verb::Recheck { .. }, Context::Attempt(hold), said) => match said {
                Some(Said::Rechecked(Some(true))) => {
                    self.end(at, hold, Ended { settled: true, ..ended(End::Succeeded) });
                }
                Some(Said::Rechecked(Some(false))) => self.end(at, hold, ended(AGAIN)),
                Some(_) => self.end(at, hold, Ended { fenced: true, ..ended(AGAIN) }),
                None => self.after(50..51, Happening::Arrive(Request { from: at, verb, context })),
            },
            (Verb::Disown { token, .. }, _, said) => {
                let done = matches!(said, Some(Said::Disowned(true)));
                self.step(at, Event::Disowned(token, done))?;
            }
            (Verb::Beat { worker, .. }, Context::Sent(sent), said) => self.beaten(at, worker, sent, said),
            (Verb::Revive { worker, .. }, Context::Sent(sent), said) => match said {
                Some(_) => {
                    self.hit("reborn");
                    (self.nodes[at.0].renewed, self.nodes[at.0].told) = ((worker, sent), worker);
                    self.after(0..1, Happening::Tell(at, Event::Reborn(worker)));
                    self.after(1_000..1_001, Happening::Beat(at));
                }
                None => self.after(200..201, Happening::Beat(at)),
            },
            (Verb::TakeOver { .. }, _, Some(Said::TookOver(true))) => self.after(0..1, Happening::Round(at)),
            (Verb::TakeOver { .. }, ..) => self.after(800..1_200, Happening::Round(at)),
            (Verb::Doubts { .. }, _, Some(Said::Doubts(doubts))) => {
                for doubt in doubts {
                    self.after(0..40, Happening::Asked(at, Box::new(doubt)));
                }
            }
            (verb @ Verb::Observe(_), _, None) => {
                self.after(1_000..1_001, Happening::Arrive(Request { from: at, verb, context }));
            }
            _ => {}
        }
        Ok(())
    }

    /// What the heart makes of an answer.
    pub(super) fn beaten(&mut self, at: At, worker: Uuid, sent: Duration, said: Option<Said>) {
        let node = &mut self.nodes[at.0];
        match said {
            Some(Said::Beat(Some(tokens))) => {
                node.renewed = (worker, sent);
                let (sent, reborn) = (sent.saturating_sub(node.origin), node.told != worker);
                node.told = worker;
                if reborn {
                    self.after(0..1, Happening::Tell(at, Event::Reborn(worker)));
                }
                self.after(1..2, Happening::Tell(at, Event::Pulse(sent, tokens)));
                self.after(1_000..1_001, Happening::Beat(at));
            }
            Some(_) => {
                node.beating = Uuid::from_u128(self.dice.u128(..));
                let (worker, sent) = (node.beating, self.now);
                let declares = node.declares;
                self.ask(at, Verb::Revive { worker, lease: LEASE, declares }, Context::Sent(sent));
            }
            None => self.after(300..301, Happening::Beat(at)),
        }
    }
}
