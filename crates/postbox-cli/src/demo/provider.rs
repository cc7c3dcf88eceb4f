//! The payment provider: a real HTTP server in a process of its own. It counts the charges of each
//! order and ignores the idempotency key, so that a blind retry would charge a card twice.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};

use super::script::{Charging, PATIENCE, SILENCE, charging};
use crate::commands::Ended;
use crate::failure::{FAILED, Failure};

/// What the provider knows of an order.
#[derive(Debug, Default, Clone, Copy)]
struct Book {
    calls: u32,
    charges: u32,
}

type Books = Arc<Mutex<BTreeMap<i64, Book>>>;

#[derive(Debug, Serialize, Deserialize)]
struct Charge {
    order: i64,
    cents: i64,
    idempotency_key: String,
}

/// What the provider counted in all.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Totals {
    /// Orders that were charged.
    pub(super) orders: u64,
    /// Charges beyond the first of each order.
    pub(super) duplicates: u64,
}

/// The hidden command: serves until standard input closes, so that it ends with the shop, however
/// the shop ends.
pub(crate) async fn run() -> Ended {
    let failed = |e: std::io::Error| Failure::new(FAILED, "run the payment provider", e.to_string(), "postbox demo");
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    crate::output::Output::new(false).line(&port.to_string())?;
    // Ctrl-C reaches the whole process group; the shop still has to ask for the totals.
    tokio::spawn(async { while tokio::signal::ctrl_c().await.is_ok() {} });
    let routes = Router::new()
        .route("/charges", post(charge))
        .route("/charges/{order}", get(find))
        .route("/totals", get(totals))
        .with_state(Books::default());
    let mut nothing = [0; 64];
    let mut shop = tokio::io::stdin();
    let hangs_up = async { while shop.read(&mut nothing).await.is_ok_and(|read| read > 0) {} };
    tokio::select! {
        served = axum::serve(listener, routes) => served.map_err(failed)?,
        () = hangs_up => {}
    }
    Ok(0)
}

async fn charge(State(books): State<Books>, Json(charge): Json<Charge>) -> (StatusCode, Json<Value>) {
    let order = charge.order;
    let fate = charging(order);
    let book = {
        let mut books = books.lock().unwrap_or_else(PoisonError::into_inner);
        let book = books.entry(order).or_default();
        book.calls += 1;
        if fate == Charging::Declined {
            return (StatusCode::PAYMENT_REQUIRED, Json(json!({"error": "card declined"})));
        }
        if fate == Charging::Overloaded && book.calls == 1 {
            return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"error": "overloaded, nothing was charged"})));
        }
        // `charge.idempotency_key` is not looked at: many a real provider is like that.
        book.charges += 1;
        *book
    };
    if matches!(fate, Charging::Silent | Charging::Forgotten) {
        tokio::time::sleep(SILENCE).await;
    }
    (StatusCode::OK, Json(json!({"charge": number(order, book.charges), "cents": charge.cents})))
}

async fn find(State(books): State<Books>, Path(order): Path<i64>) -> Json<Value> {
    if charging(order) == Charging::Forgotten {
        return Json(json!({"known": false}));
    }
    let book = books.lock().unwrap_or_else(PoisonError::into_inner).get(&order).copied().unwrap_or_default();
    let charge = (book.charges > 0).then(|| number(order, book.charges));
    Json(json!({"known": true, "charge": charge}))
}

async fn totals(State(books): State<Books>) -> Json<Totals> {
    let books = books.lock().unwrap_or_else(PoisonError::into_inner);
    Json(Totals {
        orders: books.values().filter(|b| b.charges > 0).count() as u64,
        duplicates: books.values().map(|b| u64::from(b.charges.saturating_sub(1))).sum(),
    })
}

fn number(order: i64, charge: u32) -> String {
    format!("ch_{order}_{charge}")
}

/// What a call to charge came to.
#[derive(Debug)]
pub(super) enum Charged {
    /// The provider's number for it.
    Done(String),
    /// The provider said that it charged nothing, and why.
    NotDone(String),
    /// The provider refused for good.
    Refused(String),
}

/// The provider as the shop sees it.
#[derive(Debug, Clone)]
pub(super) struct Provider {
    client: reqwest::Client,
    base: String,
}

impl Provider {
    /// Starts it. It ends when the child is dropped.
    pub(super) async fn start() -> std::io::Result<(Provider, Child)> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("demo-provider")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let said = child.stdout.take().ok_or_else(|| std::io::Error::other("it has no standard output"))?;
        let mut line = String::new();
        tokio::time::timeout(Duration::from_secs(10), BufReader::new(said).read_line(&mut line))
            .await
            .map_err(|_| std::io::Error::other("it did not say its port within 10 s"))??;
        let port: u16 = line.trim().parse().map_err(|_| std::io::Error::other("it did not say its port"))?;
        let client = reqwest::Client::builder().no_proxy().build().map_err(std::io::Error::other)?;
        Ok((Provider { client, base: format!("http://127.0.0.1:{port}") }, child))
    }

    /// Charges a card. An error means that nobody saw how it ended.
    pub(super) async fn charge(&self, order: i64, cents: i64, key: &str) -> Result<Charged, reqwest::Error> {
        let charge = Charge { order, cents, idempotency_key: key.to_owned() };
        let call = self.client.post(format!("{}/charges", self.base)).timeout(PATIENCE).json(&charge).send();
        let answer = match call.await {
            Ok(answer) => answer,
            // Without a connection nothing was sent.
            Err(error) if error.is_connect() => return Ok(Charged::NotDone("the provider is not there".into())),
            Err(error) => return Err(error),
        };
        let status = answer.status();
        let content: Value = answer.json().await?;
        let word = |name: &str| content[name].as_str().unwrap_or("it did not say").to_owned();
        Ok(match status {
            StatusCode::PAYMENT_REQUIRED => Charged::Refused(word("error")),
            StatusCode::SERVICE_UNAVAILABLE => Charged::NotDone(word("error")),
            _ => Charged::Done(word("charge")),
        })
    }

    /// Asks for an order's charge. `None`: the provider cannot tell.
    ///
    /// That it knows of none is no proof: the call may still be on its way to it.
    pub(super) async fn find(&self, order: i64) -> Result<Option<String>, reqwest::Error> {
        let call = self.client.get(format!("{}/charges/{order}", self.base)).timeout(PATIENCE * 5).send();
        let content: Value = call.await?.json().await?;
        Ok(content["charge"].as_str().map(str::to_owned))
    }

    /// What it counted.
    pub(super) async fn totals(&self) -> Result<Totals, reqwest::Error> {
        let call = self.client.get(format!("{}/totals", self.base)).timeout(Duration::from_secs(10)).send();
        call.await?.json().await
    }
}
