//! Reading what the statements return: their columns are looked up by name once a result, not once a row.

use std::sync::Arc;

use sqlx::postgres::PgRow;
use sqlx::{Column, Row};
use uuid::Uuid;

use super::timestamp;
use crate::content::Content;
use crate::message::{Envelope, minted_at};
use crate::store::Item;

macro_rules! columns {
    ($(#[$doc:meta])* $name:ident: $($column:ident),* $(,)?) => {
        $(#[$doc])*
        struct $name { $($column: usize,)* }

        impl $name {
            fn of(row: &PgRow) -> Result<$name, sqlx::Error> {
                Ok($name { $($column: row.try_column(stringify!($column))?.ordinal(),)* })
            }
        }
    };
}

columns! {
    /// Where an envelope stands.
    EnvelopeAt: message, topic, key, payload, body, content_type, headers, occurred_us, source, external_id,
    correlation_id, causation_id, max_attempts,
}

impl EnvelopeAt {
    /// The envelope, unless its message is gone.
    fn read(&self, row: &PgRow) -> Result<Option<Envelope>, sqlx::Error> {
        let Some(topic) = row.try_get::<Option<String>, _>(self.topic)? else { return Ok(None) };
        let id: Uuid = row.try_get(self.message)?;
        let headers: Option<&str> = row.try_get(self.headers)?;
        let occurred_us: Option<i64> = row.try_get(self.occurred_us)?;
        let decode = |e: serde_json::Error| sqlx::Error::Decode(Box::new(e));
        let content = (row.try_get(self.payload)?, row.try_get(self.body)?, row.try_get(self.content_type)?);
        Ok(Some(Envelope {
            id,
            topic,
            key: row.try_get(self.key)?,
            payload: Content::stored(content.0, content.1, content.2).map_err(decode)?,
            headers: headers.map(serde_json::from_str).transpose().map_err(decode)?.unwrap_or_default(),
            occurred_at: occurred_us.map_or_else(|| minted_at(id), timestamp),
            received_at: minted_at(id),
            source: row.try_get(self.source)?,
            external_id: row.try_get(self.external_id)?,
            correlation_id: row.try_get(self.correlation_id)?,
            causation_id: row.try_get(self.causation_id)?,
            max_attempts: row.try_get::<Option<i32>, _>(self.max_attempts)?.map(|n| n.max(1) as u32),
        }))
    }
}

/// The envelope in a row, unless its message is gone.
pub(super) fn envelope(row: &PgRow) -> Result<Option<Envelope>, sqlx::Error> {
    EnvelopeAt::of(row)?.read(row)
}

columns! {
    /// Where a delivery stands.
    DeliveryAt: delivery, subscription, message, priority, attempt, lost, rev,
}

/// Reads deliveries of one result.
pub(super) struct Items {
    delivery: DeliveryAt,
    envelope: EnvelopeAt,
}

impl Items {
    /// Of the result that this row is of.
    pub(super) fn of(row: &PgRow) -> Result<Items, sqlx::Error> {
        Ok(Items { delivery: DeliveryAt::of(row)?, envelope: EnvelopeAt::of(row)? })
    }

    pub(super) fn read(&self, row: &PgRow) -> Result<Item, sqlx::Error> {
        let at = &self.delivery;
        Ok(Item {
            delivery: row.try_get(at.delivery)?,
            subscription: row.try_get(at.subscription)?,
            message: row.try_get(at.message)?,
            priority: row.try_get(at.priority)?,
            attempts: row.try_get::<i32, _>(at.attempt)?.max(0) as u32,
            lost: row.try_get::<i32, _>(at.lost)?.max(0) as u32,
            rev: row.try_get(at.rev)?,
            leads: false,
            envelope: self.envelope.read(row)?.map(Arc::new),
        })
    }
}
