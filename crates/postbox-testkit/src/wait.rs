//! Waiting for an effect, without knowing when it comes.

use std::time::{Duration, Instant};

use postbox::admin::{DeliveryDetail, Filter};
use postbox::lifecycle::State;

use crate::{Fresh, Testable};

/// Longer than anything takes that comes at all.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks: those who are looked at work on the same cores.
const LOOK: Duration = Duration::from_millis(10);

/// Looks until it is so.
///
/// # Panics
/// It is not within a minute.
pub async fn until(what: &str, mut so: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !so().await {
        assert!(begun.elapsed() < PATIENCE, "it never came to this: {what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Looks until there are so many deliveries, and each is in such a state; with everything on record.
///
/// # Panics
/// It does not come to that within a minute, or the database does not answer.
pub async fn deliveries<Db: Testable>(
    fresh: &Fresh<Db>,
    count: usize,
    so: impl Fn(State) -> bool,
) -> Vec<DeliveryDetail> {
    let admin = fresh.postbox.admin();
    let looking = async {
        loop {
            let rows = admin.list(&Filter::default(), 1000).await.expect("list");
            if rows.len() == count && rows.iter().all(|row| so(row.state)) {
                break rows;
            }
            tokio::task::yield_now().await;
        }
    };
    let Ok(rows) = tokio::time::timeout(PATIENCE, looking).await else {
        panic!("not within a minute: {:#?}", admin.list(&Filter::default(), 1000).await);
    };
    let mut details = Vec::with_capacity(rows.len());
    for row in rows {
        details.push(admin.show(row.id).await.expect("show"));
    }
    details
}
