//! Draining in order per key, beside draining the same messages in no order.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use postbox::{Draft, Failure, Postgres, Router, handler};

use crate::figure::{Bar, Figure};
use crate::load::{TOPIC, draft, drained, register};
use crate::site::Site;
use crate::{Extent, Problem};

/// Different keys, in turns.
const KEYS: usize = 1000;

fn routes(done: &Arc<AtomicU64>, ordered: bool) -> Router<Postgres> {
    let done = done.clone();
    let counted = handler(move || {
        done.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Ok::<(), Failure>(()))
    });
    let counted = counted.named("bench");
    Router::new().on(TOPIC, if ordered { counted.ordered() } else { counted })
}

pub(crate) async fn drain(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let (mut in_order, mut in_none) = (Vec::new(), Vec::new());
    for _ in 0..extent.rounds {
        for (rates, ordered) in [(&mut in_none, false), (&mut in_order, true)] {
            let done = Arc::new(AtomicU64::new(0));
            let fresh = site.fresh().await?;
            register(&fresh, routes(&done, ordered)).await?;
            for begin in (0..extent.messages).step_by(1000) {
                let upto = extent.messages.min(begin + 1000);
                let drafts = (begin..upto).map(|n| Ok(draft(n)?.key(format!("key-{}", n % KEYS))));
                fresh.postbox.publish_now(drafts.collect::<Result<Vec<Draft>, Problem>>()?).await?;
            }
            site.run(&format!("vacuum analyze {0}.ready; ", fresh.schema)).await?;
            site.run(&format!("vacuum analyze {0}.message", fresh.schema)).await?;
            site.settle_down().await?;
            let start = fresh.postbox.worker(routes(&done, ordered)).concurrency(100).start();
            rates.push(drained(site, &fresh, &done, start, extent.messages).await?);
            fresh.drop(site).await?;
        }
    }
    let name = "drain in order, 1,000 keys, beside in no order";
    Ok(vec![Figure::beside(name, &in_order, &in_none, "msg/s", Bar::Ratio(0.5))])
}
