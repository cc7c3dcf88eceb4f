//! The shop: its tables, its messages, and what it does about them.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use postbox::{
    Attempt, Failure, Message, Operation, OperationFailure, Payload, Postbox, Receipt, Reconciled, Router, State, Tx,
    handler, operation,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::Sqlite;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions};

use super::provider::{Charged, Provider};
use super::script::{Mailing, PATIENCE, mailing};
use super::story::Story;
use crate::output::Tone;

const ITEMS: [(&str, i64); 4] = [("teapot", 3990), ("kettle", 4250), ("cup", 890), ("tray", 1575)];
const TABLES: &str = "
    create table if not exists shop_order (
        order_id integer primary key, item text not null, cents integer not null, email text not null
    ) strict;
    create table if not exists shop_stock (item text primary key, available integer not null) strict;
    create table if not exists shop_reservation (order_id integer primary key, item text not null) strict;
";

/// An order was placed.
#[derive(Debug, Clone, Serialize, Deserialize, Message)]
#[message(topic = "orders.placed", key = order_id)]
pub(super) struct OrderPlaced {
    order_id: i64,
    item: String,
    cents: i64,
    email: String,
}

/// Its item is set aside.
#[derive(Debug, Serialize, Deserialize, Message)]
#[message(topic = "orders.reserved", key = order_id)]
struct OrderReserved {
    order_id: i64,
    item: String,
    email: String,
}

impl OrderPlaced {
    pub(super) fn number(order_id: i64) -> OrderPlaced {
        let (item, cents) = ITEMS[order_id.unsigned_abs() as usize % ITEMS.len()];
        let email = match mailing(order_id) {
            Mailing::Nowhere => "nobody@nowhere.invalid".to_owned(),
            _ => format!("customer{order_id}@example.com"),
        };
        OrderPlaced { order_id, item: item.to_owned(), cents, email }
    }

    pub(super) fn words(&self) -> String {
        format!("a {} for {}.{:02}, by {}", self.item, self.cents / 100, self.cents % 100, self.email)
    }
}

/// What the handlers work with.
#[derive(Debug, Clone)]
pub(super) struct Shop {
    postbox: Postbox<Sqlite>,
    provider: Provider,
    story: Story,
    /// `postbox --database-url …`, to be followed by what to do.
    command: Arc<str>,
    doubted: Arc<Mutex<BTreeSet<i64>>>,
}

impl Shop {
    /// At the provider, and telling this story.
    pub(super) fn new(postbox: &Postbox<Sqlite>, provider: Provider, story: Story, command: &str) -> Shop {
        Shop { postbox: postbox.clone(), provider, story, command: command.into(), doubted: Arc::default() }
    }

    /// Who does what when.
    pub(super) fn routes(self) -> Router<Sqlite> {
        let soon = Duration::from_millis(200);
        let later = Duration::from_millis(800);
        Router::new()
            .on_type::<OrderPlaced, _>(reserve_stock)
            .on_type::<OrderPlaced, _>(
                operation(charge_card).reconcile(find_charge).max_attempts(4).backoff(soon, later),
            )
            .on_type::<OrderReserved, _>(handler(send_mail).max_attempts(3).backoff(soon, later))
            .with_state(self)
    }
}

/// The shop's own connections to its database.
pub(super) async fn open(path: &Path) -> Result<SqlitePool, sqlx::Error> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(10));
    let pool = SqlitePoolOptions::new().max_connections(2).connect_with(options).await?;
    sqlx::raw_sql(TABLES).execute(&pool).await?;
    for (item, _) in ITEMS {
        let stock = sqlx::query("insert into shop_stock (item, available) values (?, 1000000) on conflict do nothing");
        stock.bind(item).execute(&pool).await?;
    }
    Ok(pool)
}

/// A customer orders: the order and its message commit together, or neither.
pub(super) async fn place(
    pool: &SqlitePool,
    postbox: &Postbox<Sqlite>,
    order: &OrderPlaced,
) -> Result<(), postbox::Error> {
    let mut tx = pool.begin_with("begin immediate").await?;
    sqlx::query("insert into shop_order (order_id, item, cents, email) values (?, ?, ?, ?)")
        .bind(order.order_id)
        .bind(&order.item)
        .bind(order.cents)
        .bind(&order.email)
        .execute(&mut *tx)
        .await?;
    postbox.publish(&mut tx, order).await?;
    tx.commit().await?;
    Ok(())
}

/// Transactional: the reservation, the message that follows and the outcome commit together.
async fn reserve_stock(
    Payload(order): Payload<OrderPlaced>,
    State(shop): State<Shop>,
    mut tx: Tx<Sqlite>,
) -> Result<(), Failure> {
    let taken = sqlx::query("update shop_stock set available = available - 1 where item = ? and available > 0")
        .bind(&order.item)
        .execute(&mut tx)
        .await?;
    if taken.rows_affected() == 0 {
        return Err(Failure::permanent(format!("{} is sold out", order.item)));
    }
    sqlx::query("insert into shop_reservation (order_id, item) values (?, ?)")
        .bind(order.order_id)
        .bind(&order.item)
        .execute(&mut tx)
        .await?;
    shop.story.tell(order.order_id, "stock", Tone::Good, &format!("+ a {} is reserved", order.item));
    let reserved = OrderReserved { order_id: order.order_id, item: order.item, email: order.email };
    shop.postbox.publish(&mut tx, &reserved).await?;
    Ok(())
}

/// An operation: the attempt is on record before the card is charged.
async fn charge_card(
    operation: Operation,
    attempt: Attempt,
    Payload(order): Payload<OrderPlaced>,
    State(shop): State<Shop>,
) -> Result<Receipt, OperationFailure> {
    let tell = |tone, words: &str| shop.story.tell(order.order_id, "charge", tone, words);
    match shop.provider.charge(order.order_id, order.cents, operation.idempotency_key()).await {
        Ok(Charged::Done(charge)) => {
            tell(Tone::Good, &format!("+ charged, {charge}"));
            Ok(Receipt::of(json!({"charge": charge})))
        }
        Ok(Charged::NotDone(why)) => {
            tell(
                Tone::Busy,
                &format!(". {why}; try {} of {} failed, it is safe to try again", attempt.number, attempt.max),
            );
            Err(OperationFailure::not_done(why))
        }
        Ok(Charged::Refused(why)) => {
            tell(Tone::Bad, &format!("x {why}: a dead letter"));
            Err(OperationFailure::refused(why))
        }
        Err(error) => {
            let what = if error.is_timeout() { "no answer" } else { "the answer was lost" };
            tell(
                Tone::Doubt,
                &format!("? {what} within {PATIENCE:?}: in doubt, the card may have been charged; not trying blindly"),
            );
            Err(OperationFailure::in_doubt(format!("{what} within {PATIENCE:?} after the call was sent")))
        }
    }
}

/// Asks the provider how a doubt ends.
async fn find_charge(
    attempt: Attempt,
    Payload(order): Payload<OrderPlaced>,
    State(shop): State<Shop>,
) -> Result<Reconciled, Failure> {
    if let Some(charge) = shop.provider.find(order.order_id).await? {
        shop.story.tell(
            order.order_id,
            "charge",
            Tone::Good,
            &format!("+ asked the provider: it was charged, {charge}"),
        );
        return Ok(Reconciled::Done(Receipt::of(json!({"charge": charge}))));
    }
    let first = shop.doubted.lock().unwrap_or_else(PoisonError::into_inner).insert(order.order_id);
    if first {
        shop.story.tell(
            order.order_id,
            "charge",
            Tone::Doubt,
            "? asked the provider: it cannot tell; this one waits for you:",
        );
        for what in look_and_resolve(attempt.delivery) {
            shop.story.say(&format!("           {} {what}", shop.command));
        }
    }
    Ok(Reconciled::Unknown)
}

/// What to type about a charge in doubt.
pub(super) fn look_and_resolve(delivery: i64) -> [String; 2] {
    [format!("show {delivery}"), format!("resolve {delivery} --happened --reason \"seen in the provider's console\"")]
}

/// Plain: at least once. A mail twice is a pity, not a theft.
async fn send_mail(
    attempt: Attempt,
    Payload(order): Payload<OrderReserved>,
    State(shop): State<Shop>,
) -> Result<(), Failure> {
    let tell = |tone, words: &str| shop.story.tell(order.order_id, "mail", tone, words);
    let wrong = match mailing(order.order_id) {
        Mailing::Shaky if attempt.number <= 2 => "the mail server hung up",
        Mailing::Nowhere => "no such address",
        _ => {
            tell(
                Tone::Good,
                &format!(
                    "+ \"your {} is reserved\" sent to {}{}",
                    order.item,
                    order.email,
                    if attempt.number > 1 { ", at last" } else { "" }
                ),
            );
            return Ok(());
        }
    };
    let tried = format!("try {} of {}", attempt.number, attempt.max);
    if attempt.is_last() {
        tell(Tone::Bad, &format!("x {wrong}: {}; {tried}, a dead letter", order.email));
    } else {
        tell(Tone::Busy, &format!(". {wrong}; {tried} failed, it will be tried again"));
    }
    Err(Failure::retry(format!("{wrong}: {}", order.email)))
}
