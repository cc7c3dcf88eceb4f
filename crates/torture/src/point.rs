//! Named points that need a process of their own: it is killed there, and then the same must work.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::child::ChildPlan;
use crate::fault::Kind;
use crate::round::Round;
use crate::site::Site;

/// A process of its own is killed at a named point; after it, the same must work.
pub(crate) async fn point_of_its_own<Db: Site>(round: &Arc<Round>, pool: &Pool<Db>, point: &'static str, unique: u64) {
    let schema = format!("migrated_{unique:x}");
    let file = round.folder.join(format!("{schema}.db"));
    let url = match Db::KIND {
        Kind::Postgres => round.world.direct(round.number),
        Kind::Sqlite => format!("sqlite:{}", file.display()),
    };
    let plan = ChildPlan { name: schema.clone(), url, ..round.plan() };
    let killed = migrate(&plan, Some(point)).await;
    // The database may be away by another fault: then it says so, and the point was not reached.
    if matches!(killed, Ok(true)) {
        let begun = Instant::now();
        let mut again = migrate(&plan, None).await;
        while !matches!(again, Ok(false)) && begun.elapsed() < Duration::from_secs(30) {
            tokio::time::sleep(Duration::from_millis(300)).await;
            again = migrate(&plan, None).await;
        }
        match again {
            Ok(false) => round.world.counts.add(&format!("F1:{point}"), 1),
            other => round.world.broken(format!("I14: after a kill at {point}, migrating again fails: {other:?}")),
        }
    }
    match Db::KIND {
        Kind::Postgres => {
            if let Ok(Ok(mut connection)) = tokio::time::timeout(Duration::from_secs(20), Db::acquire(pool)).await {
                Db::run(&mut connection, format!("drop schema if exists {schema} cascade")).await.ok();
            }
        }
        Kind::Sqlite => drop(std::fs::remove_file(file)),
    }
}

/// Runs a migration in a child. Whether it was killed at the point.
async fn migrate(plan: &ChildPlan, point: Option<&str>) -> Result<bool, String> {
    let run = async {
        let mut process = Command::new(std::env::current_exe()?)
            .arg("migrate")
            .arg(serde_json::to_string(plan)?)
            .env_remove("POSTBOX_CRASH_POINT")
            .envs(point.map(|point| ("POSTBOX_CRASH_POINT", point)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines =
            BufReader::new(process.stdout.take().ok_or_else(|| std::io::Error::other("no output"))?).lines();
        while let Some(line) = lines.next_line().await? {
            if line.starts_with("crash point") {
                process.kill().await?;
                return Ok(true);
            }
        }
        match process.wait().await? {
            status if status.success() => Ok(false),
            status => Err(std::io::Error::other(format!("{status}"))),
        }
    };
    match tokio::time::timeout(Duration::from_secs(30), run).await {
        Ok(result) => result.map_err(|e: std::io::Error| e.to_string()),
        Err(_) => Err("it took more than 30 s".into()),
    }
}
