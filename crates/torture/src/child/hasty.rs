//! A worker and a publisher whose connections give up soon: statements, locks and idle transactions
//! have 50 to 100 ms.

use std::sync::Arc;
use std::time::Duration;

use super::drops::PATIENCE;
use super::hit;
use super::publisher::{Publisher, Told, ended};
use crate::fault::{Fault, TIMEOUTS};
use crate::site::{Session, Site, code};

/// What a URL says for it. A lock that is waited for is a statement, too: either comes first.
pub(crate) fn options(lock_first: bool) -> String {
    let (statement, lock) = if lock_first { (100, 50) } else { (60, 90) };
    let all =
        [("statement_timeout", statement), ("lock_timeout", lock), ("idle_in_transaction_session_timeout", IDLE_MS)];
    all.map(|(name, ms)| format!("&options[{name}]={ms}")).concat()
}

/// How long a transaction may rest.
const IDLE_MS: u64 = 75;

impl<Db: Site> Publisher<Db> {
    pub(crate) fn is_hasty(&self) -> bool {
        self.plan.tag == Some(Fault::F11)
    }

    /// A timeout in this error is a hit.
    pub(crate) fn saw_timeout(&self, error: &sqlx::Error) {
        if let Some(state) = code(error).filter(|code| self.is_hasty() && TIMEOUTS.contains(&code.as_str())) {
            hit(format_args!("F11:{state}"), 1);
        }
    }

    /// One transaction after the other that rests, often for longer than it may.
    pub(crate) async fn linger(self: Arc<Self>, mut dice: fastrand::Rng) {
        while !self.resting() {
            tokio::time::sleep(Duration::from_millis(dice.u64(300..1000))).await;
            let messages = vec![(self.external_id(), "note")];
            self.intend(&messages, "business").await;
            let rest = Duration::from_millis(dice.u64(IDLE_MS / 3..IDLE_MS * 3));
            let lingering = self.linger_once(&messages[0].0, rest, &mut dice);
            let told = tokio::time::timeout(PATIENCE, lingering).await.unwrap_or(Told::Unknown);
            self.told(&messages, told).await;
        }
        self.rest();
    }

    async fn linger_once(&self, ext: &str, rest: Duration, dice: &mut fastrand::Rng) -> Told {
        let Ok(mut session) = Session::begin(&self.pool, Db::BEGIN).await else { return Told::Fail };
        let row = format!("insert into {} (ext) values ('{ext}')", Db::table("business"));
        if session.run(row).await.is_err() {
            return Told::Fail;
        }
        let Ok(draft) = self.draft("note", ext, dice) else { return Told::Fail };
        if self.postbox.publish(session.on(), draft).await.is_err() {
            return Told::Fail;
        }
        tokio::time::sleep(rest).await;
        let end = session.end("COMMIT").await;
        if let Err(error) = &end {
            self.saw(error);
        }
        ended(&end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_timeout_comes_first() {
        let url =
            |lock_first| format!("postgres://postgres@127.0.0.1:1/postgres?sslmode=disable{}", options(lock_first));
        for (lock_first, wanted) in [(true, "lock_timeout=50"), (false, "statement_timeout=60")] {
            let parsed: sqlx::postgres::PgConnectOptions = url(lock_first).parse().expect("a URL");
            let options = parsed.get_options().expect("options");
            assert!(
                options.contains(wanted) && options.contains("idle_in_transaction_session_timeout=75"),
                "{options}"
            );
        }
    }
}
