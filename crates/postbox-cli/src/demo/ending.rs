//! How the demo ended: counted from the record, and by the provider.

use std::collections::BTreeSet;
use std::path::Path;

use postbox::admin::{Admin, DeliveryRow, Filter};
use postbox::lifecycle::State;
use postbox::{Error, Sqlite};
use serde::Serialize;

use super::provider::Totals;
use super::shop::look_and_resolve;
use crate::output::{Output, Tone};

/// So many deliveries are counted, which is hours of the demo.
const COUNTED: u32 = 100_000;

/// The numbers at the end.
#[derive(Debug, Serialize)]
pub(super) struct Ending {
    orders: i64,
    published: usize,
    succeeded: usize,
    retried: usize,
    dead: usize,
    in_doubt: usize,
    waiting: usize,
    charged_at_provider: u64,
    /// Must be 0.
    pub(super) duplicates_at_provider: u64,
    database: String,
    #[serde(skip)]
    doubt: Option<i64>,
    #[serde(skip)]
    dead_letter: Option<i64>,
}

impl Ending {
    pub(super) async fn count(
        admin: &Admin<Sqlite>,
        orders: i64,
        totals: Totals,
        database: &Path,
    ) -> Result<Ending, Error> {
        let rows = admin.list(&Filter::default(), COUNTED).await?;
        let of = |state| rows.iter().filter(move |r| r.state == state);
        // The oldest first: a list begins with the newest.
        let oldest = |state| of(state).map(|r: &DeliveryRow| r.id).min();
        Ok(Ending {
            orders,
            published: rows.iter().map(|r| r.message).collect::<BTreeSet<_>>().len(),
            succeeded: of(State::Succeeded).count(),
            retried: rows.iter().filter(|r| r.attempt > 1).count(),
            dead: of(State::Dead).count(),
            in_doubt: of(State::InDoubt).count(),
            waiting: of(State::Pending).count() + of(State::Running).count(),
            charged_at_provider: totals.orders,
            duplicates_at_provider: totals.duplicates,
            database: database.display().to_string(),
            doubt: oldest(State::InDoubt),
            dead_letter: oldest(State::Dead),
        })
    }

    /// Tells the numbers, and what there is to do.
    pub(super) fn tell(&self, output: &Output, command: &str) -> std::io::Result<()> {
        if output.json {
            return output.object(self);
        }
        output.line("")?;
        output.line(&format!("{} orders, {} messages published", self.orders, self.published))?;
        output.line(&format!(
            "{}   {}   {}   {}   ({} needed more than one try)",
            output.paint(Tone::Good, &format!("+ {} succeeded", self.succeeded)),
            output.paint(Tone::Bad, &format!("x {} dead", self.dead)),
            output.paint(Tone::Doubt, &format!("? {} in doubt", self.in_doubt)),
            output.paint(Tone::Busy, &format!(". {} waiting", self.waiting)),
            self.retried,
        ))?;
        output.line(&format!(
            "the provider charged {} orders and counts {} double charges",
            self.charged_at_provider, self.duplicates_at_provider
        ))?;
        if let Some(delivery) = self.doubt {
            output.line("")?;
            // Those that were under way at the end are in doubt, too.
            let doubts = match self.in_doubt {
                1 => "One charge is in doubt: the provider took the call and never answered.".to_owned(),
                n => format!("{n} charges are in doubt: the provider took the calls and never answered. The first:"),
            };
            output.line(&format!("{doubts} Look, then say how it ended:"))?;
            for what in look_and_resolve(delivery) {
                output.line(&format!("  {command} {what}"))?;
            }
        }
        if let Some(delivery) = self.dead_letter {
            output.line(
                "Dead letters are not tried again by themselves. The shop is closed now, so one that is retried waits:",
            )?;
            output.line(&format!("  {command} list state:dead"))?;
            output.line(&format!("  {command} retry {delivery} --reason \"what was wrong is mended\""))?;
        }
        output.line("")?;
        output.line(&format!("The shop's database is kept: {}", crate::text::plain(&self.database)))
    }
}
