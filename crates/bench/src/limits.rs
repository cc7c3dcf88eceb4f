//! What a limit across all workers costs: the same drain with one that is never reached, and without.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::drain::filled;
use crate::figure::{Bar, Figure};
use crate::load::{drained, limited_handler};
use crate::site::Site;
use crate::{Extent, Problem};

/// Handlers at once in the worker, and a limit far above it.
const AT_ONCE: usize = 100;
const LIMIT: u32 = 1000;

pub(crate) async fn cost(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 0..extent.rounds {
        // Whoever comes second finds the machine as the first has left it: they take turns at that.
        let mut order = [Some(LIMIT), None];
        order.rotate_left(round % 2);
        for limit in order {
            let rate = drain(site, extent.messages, limit).await?;
            if limit.is_some() { &mut with } else { &mut without }.push(rate);
        }
    }
    let name = "drain, with a limit across workers (baseline: without)";
    Ok(vec![Figure::beside(name, &with, &without, "msg/s", Bar::Ratio(0.9))])
}

async fn drain(site: &Site, messages: usize, limit: Option<u32>) -> Result<f64, Problem> {
    let done = Arc::new(AtomicU64::new(0));
    let fresh = filled(site, limited_handler(&done, limit), messages, true).await?;
    let start = fresh.postbox.worker(limited_handler(&done, limit)).concurrency(AT_ONCE).start();
    let rate = drained(site, &fresh, &done, start, messages).await?;
    fresh.drop(site).await?;
    Ok(rate)
}
