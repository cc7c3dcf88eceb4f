//! The record: what may be written of a delivery, and what would break an invariant.

use std::time::Duration;

use uuid::Uuid;

use super::super::{AFTER, Checked, continues, ensure, policy};
use super::{Model, Place, Row};
use crate::lifecycle::{Kind, State};
use crate::message::Draft;
use crate::store::{DeliveryId, Item, Move};

impl Model {
    pub(super) fn let_go(&mut self, token: Uuid, delivery: DeliveryId) -> Checked<Item> {
        let Some(lease) = self.leases.get_mut(&token) else { return Err("I6: settled without a lease".into()) };
        lease.begun.remove(&delivery);
        lease.held.remove(&delivery).ok_or_else(|| format!("I6: delivery {delivery} is settled, and not in the lease"))
    }

    pub(super) fn begin(&mut self, token: Uuid, delivery: DeliveryId, number: u32) -> Checked {
        let held = self.leases.get_mut(&token).filter(|l| l.held.contains_key(&delivery));
        let Some(lease) = held else { return Err(format!("I6: delivery {delivery} begins, and is not in the lease")) };
        ensure!(lease.begun.insert(delivery), "I11: delivery {delivery} begins twice");
        let Some(row) = self.rows.get_mut(&delivery) else { return Ok(()) };
        ensure!(row.begun.insert(number), "I11: attempt {number} of {delivery} begins twice");
        let next = row.outcomes.len() as u32 + 1;
        ensure!(number == next, "I11: attempt {number} of {delivery} begins where {next} is next");
        within_limit(row, number)
    }

    /// Puts a delivery where it goes next, and checks that it may.
    pub(super) fn moved(&mut self, moved: &Move, now: Duration) -> Checked {
        let Some(row) = self.rows.get_mut(&moved.delivery) else { return Err("I2: a delivery that is none".into()) };
        let delivery = moved.delivery;
        ensure!(moved.rev == row.rev + 1, "I6: delivery {delivery} goes from revision {} to {}", row.rev, moved.rev);
        ensure!(
            !matches!(row.place, Place::Succeeded | Place::Dead),
            "I6: delivery {delivery} leaves {:?} by itself",
            row.place
        );
        if let Some(outcome) = &moved.outcome {
            let next = row.outcomes.len() as u32 + 1;
            ensure!(outcome.number == next, "I11: outcome {} of {delivery} where {next} is next", outcome.number);
            let recorded = row.begun.contains(&next);
            ensure!(row.kind() != Kind::Operation || recorded, "I3: attempt {next} of {delivery} ends without a start");
            within_limit(row, next)?;
            row.outcomes.insert(next, outcome.kind);
            let unseen = matches!(outcome.kind, "in_doubt" | "panicked" | "timed_out" | "lost");
            ensure!(
                row.kind() != Kind::Operation
                    || !unseen
                    || moved.standing.state == State::InDoubt
                    || (policy(row.subscription).repeats() && moved.standing.state == State::Pending),
                "I5: delivery {delivery} is {} though nobody saw how it ended",
                moved.standing.state
            );
            if row.kind() == Kind::Operation && unseen {
                row.unseen.insert(next);
            }
        }
        ensure!(
            row.unseen.is_empty() || !matches!(moved.standing.state, State::Dead | State::Cancelled),
            "I5: delivery {delivery} is {} though attempts {:?} may have happened",
            moved.standing.state,
            row.unseen
        );
        ensure!(
            moved.standing.attempts as usize == row.outcomes.len(),
            "I11: delivery {delivery} counts {} attempts and has {}",
            moved.standing.attempts,
            row.outcomes.len()
        );
        (row.attempts, row.lost, row.rev) = (moved.standing.attempts, moved.standing.lost, moved.rev);
        row.place = match moved.standing.state {
            State::Pending if moved.delay.is_zero() => {
                self.positions += 1;
                Place::Ready(self.positions)
            }
            State::Pending => {
                row.due = now + moved.delay;
                Place::Scheduled(row.due)
            }
            State::InDoubt => {
                ensure!(row.kind() == Kind::Operation, "I5: delivery {delivery} is no operation, and in doubt");
                Place::Doubt { quiet_at: now + moved.quiet, ask_at: now, asks: 0, word: false }
            }
            State::Succeeded => Place::Succeeded,
            State::Dead => Place::Dead,
            other => return Err(format!("I6: delivery {delivery} goes to {other}")),
        };
        Ok(())
    }
}

impl Model {
    /// Publishes what follows, in the transaction that is under way.
    pub(super) fn follow(&mut self, follow_ups: &[Draft]) -> Checked {
        for draft in follow_ups {
            let cause = draft.causation_id.as_deref().and_then(|cause| cause.parse().ok());
            let Some(row) = cause.and_then(|cause: DeliveryId| self.rows.get_mut(&cause)) else {
                return Err("I2: a message follows from nothing".into());
            };
            let (delivery, place) = (row.delivery, &row.place);
            ensure!(*place == Place::Succeeded, "I2: a message follows from delivery {delivery}, which is {place:?}");
            row.followed += 1;
            let pos = self.position();
            self.publish(pos, AFTER, pos, Duration::ZERO);
        }
        Ok(())
    }

    /// Whenever a transaction has committed: what follows is there exactly if the success is, once.
    pub(in super::super) fn followed(&self) -> Checked {
        for row in self.rows.values() {
            let (delivery, times) = (row.delivery, row.followed);
            let due = row.place == Place::Succeeded && continues(delivery, row.subscription);
            ensure!(times >= u32::from(due), "I1: delivery {delivery} succeeded, and what follows is not published");
            ensure!(times <= u32::from(due), "I2: what follows from delivery {delivery} is published {times} times");
        }
        Ok(())
    }
}

fn within_limit(row: &Row, number: u32) -> Checked {
    let most = policy(row.subscription).retry.max_attempts + row.allowed;
    ensure!(number <= most, "I11: attempt {number} of {}, which may have {most}", row.delivery);
    Ok(())
}
