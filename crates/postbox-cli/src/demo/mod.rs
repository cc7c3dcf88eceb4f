//! `postbox demo`: a small shop that runs by itself.
//!
//! `script` says what goes wrong, `provider` is the payment provider in a process of its own,
//! `shop` holds the handlers, `story` tells what happens, `ending` counts.

mod ending;
pub(crate) mod provider;
mod script;
mod shop;
mod story;

use std::path::{Path, PathBuf};
use std::time::Duration;

use postbox::admin::Filter;
use postbox::lifecycle::State;
use postbox::{Postbox, Settings, Sqlite};
use sqlx::sqlite::SqlitePool;
use tempfile::TempDir;
use tokio::time::Instant;

use self::ending::Ending;
use self::provider::Provider;
use self::script::{PACE, WHOLE_STORY};
use self::shop::{OrderPlaced, Shop};
use self::story::Story;
use crate::commands::Ended;
use crate::desk;
use crate::failure::{FAILED, Failure, REFUSED, USAGE};
use crate::flags::Demo;
use crate::output::{Output, Tone};
use crate::text::quoted;

/// On a busy machine, what is under way may end this much later than was asked for.
const GRACE: Duration = Duration::from_secs(10);

pub(crate) async fn run(demo: Demo, output: &Output) -> Ended {
    let home = Home::new(demo.keep)?;
    let story = Story::new(output);
    let url = home.url();
    let command = format!("{} --database-url {}", desk::program(), quoted(&url));
    let settings = Settings::defaults().url(&url).set("application", "shop");
    let postbox: Postbox<Sqlite> = Postbox::migrate(settings).await.map_err(broken)?;
    let pool = shop::open(&home.file).await.map_err(broken)?;
    let (provider, _child) = Provider::start().await.map_err(broken)?;
    let shop = Shop::new(&postbox, provider.clone(), story.clone(), &command);
    let worker = postbox
        .worker(shop.routes())
        .concurrency(5)
        .lease(Duration::from_secs(2))
        .poll_interval(Duration::from_millis(100))
        .start()
        .await
        .map_err(broken)?;

    story.say(&format!("A small shop in {}", crate::text::plain(&home.file.display().to_string())));
    story.say("Look at it from another terminal:");
    story.say(&format!("  {command} status"));
    if demo.lasting.is_none() {
        story.say("Ctrl-C ends it.");
    }
    let orders = trade(&pool, &postbox, &story, demo.lasting).await.map_err(broken)?;

    worker.stop(Some(Duration::from_secs(5))).await.map_err(broken)?;
    let totals = provider.totals().await.map_err(broken)?;
    let ending = Ending::count(&postbox.admin(), orders, totals, &home.file).await.map_err(broken)?;
    pool.close().await;
    postbox.close().await;
    home.keep();
    ending.tell(output, &command)?;
    Ok(if ending.duplicates_at_provider > 0 { FAILED } else { 0 })
}

fn broken(error: impl std::fmt::Display) -> Failure {
    Failure::new(FAILED, "run the demo", error.to_string(), "postbox demo --keep shop.db, in a directory with room")
}

/// Places orders until it is time, then lets what is under way end. How many orders there were.
async fn trade(
    pool: &SqlitePool,
    postbox: &Postbox<Sqlite>,
    story: &Story,
    lasting: Option<Duration>,
) -> Result<i64, postbox::Error> {
    let start = Instant::now();
    // The last part of the time is for what is under way.
    let shut = lasting.map(|l| start + l - (l / 2).min(Duration::from_secs(4)));
    let called_off = called_off();
    tokio::pin!(called_off);
    let mut order = 0;
    let mut stopped = false;
    // An order is placed as a whole: the wait can be interrupted, the transaction cannot.
    while !stopped && (shut.is_none_or(|shut| Instant::now() < shut) || order < WHOLE_STORY) {
        order += 1;
        let placed = OrderPlaced::number(order);
        shop::place(pool, postbox, &placed).await?;
        story.tell(order, "placed", Tone::Strong, &placed.words());
        let next = start + PACE * u32::try_from(order).unwrap_or(u32::MAX);
        tokio::select! {
            () = tokio::time::sleep_until(next) => stopped = story.is_unheard(),
            () = &mut called_off => stopped = true,
        }
    }
    let Some(end) = lasting.map(|l| start + l).filter(|_| !stopped) else { return Ok(order) };
    loop {
        let quiet = is_quiet(postbox).await?;
        if (quiet && Instant::now() >= end) || Instant::now() >= end + GRACE {
            return Ok(order);
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
            () = &mut called_off => return Ok(order),
        }
    }
}

/// Nothing waits or runs, and only the doubt that the provider cannot end is left.
async fn is_quiet(postbox: &Postbox<Sqlite>) -> Result<bool, postbox::Error> {
    let mut open = Filter::default();
    open.states = vec![State::Pending, State::Running, State::InDoubt];
    let open = postbox.admin().list(&open, 100).await?;
    Ok(matches!(open.as_slice(), [only] if only.state == State::InDoubt))
}

/// Ctrl-C, or a polite kill.
async fn called_off() {
    #[cfg(unix)]
    if let Ok(mut killed) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = killed.recv() => {}
        }
        return;
    }
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Where the shop's database lives. It is kept, so that what is left to do can be done; only a demo
/// that never began leaves nothing behind.
struct Home {
    file: PathBuf,
    directory: Option<TempDir>,
}

impl Home {
    fn new(keep: Option<PathBuf>) -> Result<Home, Failure> {
        let tried = "make a place for the shop";
        let made = |e: std::io::Error| Failure::new(FAILED, tried, e.to_string(), "postbox demo --keep shop.db");
        if let Some(file) = keep {
            if file.exists() {
                let why = format!("{} is there already; nothing was done", file.display());
                return Err(Failure::new(REFUSED, tried, why, "postbox demo --keep with the name of a new file"));
            }
            let file = std::path::absolute(file).map_err(made)?;
            if file.to_str().is_none() {
                return Err(Failure::new(USAGE, tried, "the file's name is not UTF-8", "postbox demo --keep shop.db"));
            }
            if let Some(directory) = file.parent().filter(|d| !d.exists()) {
                let why = format!("there is no directory {}", directory.display());
                return Err(Failure::new(
                    FAILED,
                    tried,
                    why,
                    format!("mkdir -p {}", quoted(&directory.display().to_string())),
                ));
            }
            return Ok(Home { file, directory: None });
        }
        let directory = tempfile::Builder::new().prefix("postbox-demo-").tempdir().map_err(made)?;
        Ok(Home { file: Path::join(directory.path(), "shop.db"), directory: Some(directory) })
    }

    /// What has a meaning in a URL is written out.
    fn url(&self) -> String {
        format!("sqlite:{}", self.file.display().to_string().replace('%', "%25").replace('?', "%3F"))
    }

    fn keep(self) {
        if let Some(directory) = self.directory {
            let _ = directory.keep();
        }
    }
}
