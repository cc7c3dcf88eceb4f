//! What goes wrong, and who helps: faults, operators and reconcile hooks.

use std::time::Duration;

use super::super::store::{Place, Verb};
use super::super::{Checked, LEASE, TIMEOUT, WIRE, continues, follow_ups};
use super::{At, Context, Happening, Run, World};
use crate::lifecycle::{Answer, Kind};
use crate::operation::{Receipt, Reconciled};
use crate::store::{Answered, DeliveryId, Doubtful, Speaker, decide};
use crate::worker::core::{Event, Hold};
use crate::worker::maintain::ask_again;

impl World {
    pub(super) fn asked(&mut self, at: At, doubt: Doubtful) {
        let (answer, speaker) = match &doubt.word {
            Some(_) => (Some(Answer::Happened), Speaker::Operator),
            None => {
                let said = match self.remote.applied(doubt.delivery) {
                    _ if !self.healed() && self.chance(10) => Reconciled::Unknown,
                    true => Reconciled::Done(Receipt::none()),
                    false => Reconciled::NotDone,
                };
                let answer = decide::believed(&said, doubt.quiet);
                if let (Reconciled::NotDone, None) = (&said, answer) {
                    self.hit("not done, not believed");
                }
                (answer, Speaker::Reconcile)
            }
        };
        let Some(answer) = answer else {
            let wait = ask_again(doubt.asks);
            return self.ask(at, Verb::Unanswered { doubt: Box::new(doubt), wait }, Context::Nothing);
        };
        self.hit("reconciled");
        let draw = self.dice.f64();
        self.ask(
            at,
            Verb::Answer(Box::new(Answered {
                follow_ups: follow_ups(doubt.delivery, doubt.subscription),
                ..answered(doubt.delivery, doubt.rev, answer, speaker, draw)
            })),
            Context::Nothing,
        );
    }

    pub(super) fn fault(&mut self) -> Checked {
        if self.healed() {
            return Ok(());
        }
        let place = self.dice.usize(..self.nodes.len());
        let at = (place, self.nodes[place].life);
        if self.nodes[place].core.is_some() {
            match self.dice.u32(..10) {
                0..2 => {
                    self.hit("crash");
                    self.ends(place, 10..4_000);
                }
                2..4 => {
                    let pause = self.within(10..3_000);
                    self.pause(at, pause)?;
                }
                4..6 => {
                    self.hit("pause past the lease");
                    let pause = self.within(3_000..14_000);
                    self.pause(at, pause)?;
                }
                6..8 => {
                    self.hit("stall");
                    self.nodes[place].stalled = self.now + self.within(10..4_000);
                }
                8 => {
                    self.hit("stop");
                    self.after(0..1, Happening::Tell(at, Event::Stop));
                }
                _ => {
                    self.hit("stop now");
                    self.after(0..1, Happening::Tell(at, Event::Stop));
                    self.after(1..500, Happening::Tell(at, Event::StopNow));
                }
            }
        }
        self.after(200..3_000, Happening::Fault);
        Ok(())
    }

    /// The whole process stands still. What is assumed of it (RULES 13): between its last look at the
    /// clock and its call it never sleeps for longer than its lease and its timeout; so a call that
    /// would be sent later than that is sent right before.
    pub(super) fn pause(&mut self, at: At, pause: Duration) -> Checked {
        let until = self.now + pause;
        let late = |run: &&Run| run.kind == Kind::Operation && !run.sent && until >= run.checked + LEASE + TIMEOUT;
        let running = &self.nodes[at.0].running;
        let holds: Vec<Hold> = running.iter().filter(|(_, run)| late(run)).map(|(hold, _)| *hold).collect();
        for hold in holds {
            self.send(at, hold)?;
        }
        self.nodes[at.0].paused = until;
        Ok(())
    }

    pub(super) fn operate(&mut self) -> Checked {
        let healed = self.healed();
        let deliveries: Vec<DeliveryId> = self.store.rows.keys().copied().collect();
        for delivery in deliveries {
            let Some(row) = self.store.rows.get(&delivery) else { continue };
            let (rev, subscription, place) = (row.rev, row.subscription, row.place.clone());
            match place {
                Place::Doubt { word: false, .. } if subscription == WIRE || (!healed && self.chance(10)) => {
                    if !healed && self.chance(50) {
                        continue;
                    }
                    self.hit("operator");
                    let answer = match self.dice.u32(..10) {
                        0 => Answer::Abandoned,
                        1 => Answer::DidNotHappen,
                        _ if self.remote.applied(delivery) => Answer::Happened,
                        _ => Answer::DidNotHappen,
                    };
                    if answer == Answer::Happened && continues(delivery, subscription) {
                        self.store.note_word(delivery, self.now);
                    } else {
                        self.store.end_doubt(&answered(delivery, rev, answer, Speaker::Operator, 0.0), self.now)?;
                    }
                }
                Place::Dead | Place::Scheduled(_) | Place::Ready(_) if !healed && self.chance(5) => {
                    self.hit("operator");
                    self.store.retry(delivery, self.now)?;
                }
                _ => {}
            }
        }
        self.after(500..4_000, Happening::Operator);
        Ok(())
    }
}

fn answered(delivery: DeliveryId, rev: i32, answer: Answer, speaker: Speaker, draw: f64) -> Answered {
    Answered {
        delivery,
        rev,
        answer,
        speaker,
        actor: speaker.as_str().to_owned(),
        reason: None,
        receipt: None,
        follow_ups: Vec::new(),
        draw,
    }
}
