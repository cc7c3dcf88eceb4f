//! Publishing on a client or transaction of tokio-postgres: the feature
//! `tokio-postgres`.
//!
//! [`Postbox::publish_on`] does what [`Postbox::publish`] does. A program that has no postbox open takes
//! [`Statements`]: it needs the schema's name only, and no connection of its own.
//!
//! ```no_run
//! use postbox::sql::Statements;
//!
//! # #[derive(serde::Serialize, postbox::Message)] #[message(topic = "orders.placed")] struct OrderPlaced { order_id: i64 }
//! # async fn shop(client: &mut tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
//! let outbox = Statements::new("postbox")?;
//!
//! let tx = client.transaction().await?; // your transaction
//! tx.execute("insert into orders (id) values (42)", &[]).await?;
//! outbox.publish_on(&tx, &OrderPlaced { order_id: 42 }).await?; // never commits
//! tx.commit().await?;
//! # Ok(()) }
//! ```
//!
//! Pools hand out wrappers around these types: with deadpool-postgres, pass `&**tx`.

use ::tokio_postgres::types::{ToSql, Type};
use ::tokio_postgres::{Error as DriverError, GenericClient, Row};

use crate::error::PublishError;
use crate::message::IntoDraft;
use crate::postbox::{Postbox, Published};
use crate::sql::Statements;
use crate::unique::InFlight;

impl Statements {
    /// Stores a message and its deliveries on a tokio-postgres client or transaction. Never commits; on
    /// a bare client it is one atomic statement. Statements are not prepared by name, so pgbouncer may
    /// stand between.
    ///
    /// Cancel safety: the statement of a dropped future may run all the same; roll the transaction back.
    ///
    /// # Errors
    /// [`PublishError`]: what is wrong with the message, or with the database
    /// ([`PublishError::Driver`]).
    pub async fn publish_on<C>(&self, client: &C, message: impl IntoDraft) -> Result<Published, PublishError>
    where
        C: GenericClient + Sync,
    {
        let draft = message.into_draft()?;
        let mut published = self.publish_all_on(client, [draft]).await?;
        Ok(published.remove(0))
    }

    /// Stores many messages, in order, in bulk, as [`Postbox::publish_all`] does. On a bare client each
    /// statement of up to 1000 commits by itself, so use a transaction.
    ///
    /// # Errors
    /// As [`publish_on`](Self::publish_on).
    pub async fn publish_all_on<C, M>(&self, client: &C, messages: M) -> Result<Vec<Published>, PublishError>
    where
        C: GenericClient + Sync,
        M: IntoIterator,
        M::Item: IntoDraft,
    {
        let mut publishing = self.publish(messages)?;
        while let Some(statement) = publishing.statement() {
            let binds: Vec<(&(dyn ToSql + Sync), Type)> =
                statement.binds.iter().map(|bind| (bind as &(dyn ToSql + Sync), Type::TEXT)).collect();
            let rows = client.query_typed(&statement.text, &binds).await.map_err(refused)?;
            let rows: Vec<(i64, String, bool)> = rows.iter().map(read).collect::<Result<_, _>>().map_err(refused)?;
            publishing.read(rows)?;
        }
        publishing.finish()
    }
}

impl Postbox<sqlx::Postgres> {
    /// As [`publish`](Self::publish), on a tokio-postgres client or transaction of yours.
    ///
    /// # Errors
    /// As [`Statements::publish_on`].
    pub async fn publish_on<C>(&self, client: &C, message: impl IntoDraft) -> Result<Published, PublishError>
    where
        C: GenericClient + Sync,
    {
        self.statements().publish_on(client, message).await
    }

    /// As [`publish_all`](Self::publish_all), on a tokio-postgres client or transaction of yours.
    ///
    /// # Errors
    /// As [`Statements::publish_on`].
    pub async fn publish_all_on<C, M>(&self, client: &C, messages: M) -> Result<Vec<Published>, PublishError>
    where
        C: GenericClient + Sync,
        M: IntoIterator,
        M::Item: IntoDraft,
    {
        self.statements().publish_all_on(client, messages).await
    }
}

fn read(row: &Row) -> Result<(i64, String, bool), DriverError> {
    Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
}

/// Its words without the detail, which can hold whole rows.
fn refused(error: DriverError) -> PublishError {
    let code = error.code().map(|code| code.code().to_owned());
    let detail = error.as_db_error().and_then(|db| db.detail());
    if let Some(in_flight) = detail.filter(|_| code.as_deref() == Some(InFlight::SQLSTATE)).and_then(InFlight::read) {
        return in_flight.into();
    }
    let words = match (error.as_db_error(), &code) {
        (Some(db), Some(code)) => format!("{} ({code})", db.message()),
        _ => error.to_string(),
    };
    PublishError::Driver { words, code, error: Box::new(error) }
}
