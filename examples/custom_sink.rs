//! A sink of one's own, behind a relay: messages go from a table to a file, each when the disk has it.
//!
//! ```sh
//! cargo run --example custom_sink -- orders.jsonl
//! ```
//!
//! `tests/custom_sink.rs` runs the suite for sinks against it.

#[path = "custom_sink/file.rs"]
mod file;

use std::time::Duration;

use postbox::{Envelope, Postbox, Router, Settings, Sqlite, relay};

use file::FileSink;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "orders.jsonl".into());
    let folder = tempfile::tempdir()?;
    let settings = Settings::defaults().url(format!("sqlite:{}", folder.path().join("shop.db").display()));
    let postbox = Postbox::<Sqlite>::migrate(settings.set("application", "shop")).await?;

    let drafts = (1..=3).map(|order| Envelope::json("orders.placed", &order).map(|draft| draft.key(order.to_string())));
    postbox.publish_now(drafts).await?;

    let routes = Router::new().relay("orders.>", relay(FileSink::at(&path)).named("to-the-file"));
    let worker = postbox.worker(routes).start().await?;
    while postbox.admin().sinks().await?.iter().any(|sink| sink.lag > 0) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    worker.stop(None).await?;
    eprintln!("3 messages are in {path}");
    Ok(())
}
