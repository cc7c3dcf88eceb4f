//! I6 by the witness of claims: whoever wrote of an attempt had claimed its delivery.

use std::collections::HashMap;

use super::{Checker, Delivery};
use crate::history::Claim;
use crate::traffic::PULLED_IN_SQL;

impl Checker<'_> {
    /// I6: a delivery is claimed once in each revision; its start and its outcome are written by the
    /// batch that claimed it, and lead from that revision to the next.
    pub(super) fn claims(&mut self) {
        let deliveries = self.by_id();
        let claims = self.history.claims.iter().map(|c| ((c.by.as_str(), c.delivery), c)).collect();
        self.handed_out(&deliveries);
        self.begun(&deliveries, &claims);
        self.written(&deliveries, &claims);
    }

    fn handed_out(&mut self, deliveries: &HashMap<i64, &Delivery>) {
        let mut claims: Vec<&Claim> = self.history.claims.iter().collect();
        claims.sort_by_key(|c| (c.delivery, c.rev));
        for pair in claims.windows(2).filter(|p| (p[0].delivery, p[0].rev) == (p[1].delivery, p[1].rev)) {
            let (one, other) = (pair[0], pair[1]);
            self.broken(
                "I6",
                format!(
                    "revision {} of delivery {} was claimed by {} and by {}",
                    one.rev, one.delivery, one.by, other.by
                ),
            );
        }
        for claim in claims {
            let Some(delivery) = deliveries.get(&claim.delivery) else { continue };
            let ended = ["succeeded", "dead", "cancelled"].contains(&delivery.state.as_str());
            if ended && claim.rev >= delivery.rev {
                let told = self.told_of(delivery);
                let (by, rev, last) = (&claim.by, claim.rev, delivery.rev);
                self.broken("I6", format!("{told} was claimed by {by} at revision {rev}, and ended at {last}"));
            }
        }
    }

    fn begun(&mut self, deliveries: &HashMap<i64, &Delivery>, claims: &HashMap<(&str, i64), &Claim>) {
        for attempt in &self.history.attempts {
            let Some(by) = attempt.begun_by.as_deref() else { continue };
            let claim = claims.get(&(by, attempt.delivery));
            if let Some(delivery) = deliveries.get(&attempt.delivery)
                && claim.is_none_or(|c| c.number != attempt.number)
            {
                let (told, number) = (self.told_of(delivery), attempt.number);
                self.broken("I6", format!("attempt {number} of {told} was begun by {by}, which had not claimed it"));
            }
        }
    }

    fn written(&mut self, deliveries: &HashMap<i64, &Delivery>, claims: &HashMap<(&str, i64), &Claim>) {
        let mut first: HashMap<(i64, u32), &str> = HashMap::new();
        for written in &self.history.written {
            let Some(delivery) = deliveries.get(&written.delivery) else { continue };
            let (number, rev) = (written.number, written.rev);
            let what = format!("the outcome of attempt {number} of {}", self.told_of(delivery));
            let Some(by) = written.by.as_deref() else {
                // In SQL there is no lease: the delivery itself is taken, in the caller's transaction.
                if delivery.subscription != PULLED_IN_SQL {
                    self.broken("I6", format!("{what} was written by nobody"));
                }
                continue;
            };
            match claims.get(&(by, written.delivery)) {
                None => self.broken("I6", format!("{what} was written by {by}, which had not claimed it")),
                Some(claim) if (claim.number, claim.rev + 1) != (number, rev) => {
                    let (wanted, from) = (claim.number, claim.rev);
                    let claimed = format!("{by} had claimed it at revision {from} for attempt {wanted}");
                    self.broken("I6", format!("{what} has revision {rev}, and {claimed}"));
                }
                Some(_) => {}
            }
            let one = *first.entry((written.delivery, number)).or_insert(by);
            if one != by {
                self.broken("I6", format!("{what} was written by {one} and by {by}"));
            }
        }
    }
}
