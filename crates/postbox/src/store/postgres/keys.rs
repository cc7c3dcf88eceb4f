//! Keys in order: one whose delivery has not succeeded holds back the others of its key, until it has, or until
//! somebody decides.

use sqlx::PgConnection;

use super::lanes::{self, Lane};
use super::PgStore;
use crate::error::Error;
use crate::lifecycle::State;
use crate::store::Move;

/// After these moves, in their transaction: what comes before all others of its key now, and which keys go on.
pub(super) async fn follow<'m>(
    store: &PgStore,
    connection: &mut PgConnection,
    moves: impl Iterator<Item = &'m Move> + Clone,
) -> Result<(), Error> {
    let in_lanes = moves.filter(|m| lanes::is_lane(m.priority));
    let ended = |m: &&Move| matches!(m.standing.state, State::Succeeded | State::Cancelled);
    let leading: Vec<&Move> = in_lanes.clone().filter(|m| m.leads && !ended(m)).collect();
    let over: Vec<&Move> = in_lanes.filter(|m| ended(m)).collect();
    let mut lanes: Vec<Lane> = leading.iter().chain(&over).map(|m| (m.subscription, m.priority)).collect();
    if lanes.is_empty() {
        return Ok(());
    }
    lanes.sort_unstable();
    lanes.dedup();
    lanes::hold(store, connection, &lanes).await?;
    let dead: Vec<i64> =
        leading.iter().filter(|m| m.standing.state == State::Dead).map(|m| m.delivery).collect();
    if !leading.is_empty() {
        store
            .query(store.sql.keys_block)
            .bind(leading.iter().map(|m| m.subscription).collect::<Vec<_>>())
            .bind(leading.iter().map(|m| m.delivery).collect::<Vec<_>>())
            .bind(leading.iter().map(|m| m.message).collect::<Vec<_>>())
            .bind(leading.iter().map(|m| m.standing.state.as_str()).collect::<Vec<_>>())
            .bind(leading.iter().map(|m| m.note.as_str()).collect::<Vec<_>>())
            .execute(&mut *connection)
            .await?;
    }
    let over: Vec<i64> = over.iter().map(|m| m.delivery).collect();
    if !(over.is_empty() && dead.is_empty()) {
        store.query(store.sql.keys_free).bind(over).bind(dead).execute(connection).await?;
    }
    Ok(())
}
