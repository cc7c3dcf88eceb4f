//! Publishing as SQL text and binds, for any PostgreSQL driver: Diesel, SeaORM, what you have.
//!
//! Nothing here talks to a database. [`Statements`] checks the messages and says what to run; your
//! driver runs it, in your transaction, and its rows are read back. Every bind is a text, and the
//! columns are a `bigint`, a `text` and a `boolean`, so that every driver can do it.
//!
//! ```
//! use postbox::sql::Statements;
//! use postbox::{Envelope, PublishError, Published};
//!
//! // Your driver: binds texts, and reads rows of (i64, String, bool).
//! fn run(text: &str, binds: &[String]) -> Vec<(i64, String, bool)> {
//!     // …
//! #   assert!(text.contains("from postbox.publish_batch($1") && binds.len() == 17);
//! #   vec![(1, "0198c0de-0000-7000-8000-000000000001".into(), true)]
//! }
//!
//! fn publish(statements: &Statements) -> Result<Vec<Published>, PublishError> {
//!     let mut publishing = statements.publish([Envelope::json("orders.placed", &42)])?;
//!     while let Some(statement) = publishing.statement() {
//!         let rows = run(&statement.text, &statement.binds);
//!         publishing.read(rows)?;
//!     }
//!     publishing.finish()
//! }
//!
//! let published = publish(&Statements::new("postbox")?)?;
//! assert_eq!(published[0].topic, "orders.placed");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! It is one statement, as a rule. There are more for more than 1000 messages, and when dedup keys are
//! taken: then a second look tells whether by the same body.

use std::collections::VecDeque;
use std::fmt::Write;
use std::ops::Range;

use crate::context;
use crate::error::{Error, PublishError};
use crate::message::{Draft, Due, IntoDraft, MAX_PAYLOAD_BYTES, chunks};
use crate::postbox::{Postbox, Published, published};
use crate::settings::{Settings, plain_name};
use crate::store::Stored;

/// Types of the arguments of the SQL function `publish_batch`, in its order.
const BATCH: [&str; 17] = [
    TEXT,
    TEXT,
    TEXT,
    TEXT,
    "bigint[]",
    TEXT,
    TEXT,
    TEXT,
    TEXT,
    "int[]",
    "bigint[]",
    "bigint[]",
    TEXT,
    "bigint[]",
    BYTEA,
    TEXT,
    "smallint[]",
];
/// Those of `publish_duplicates`.
const DUPLICATES: [&str; 6] = [TEXT, TEXT, TEXT, TEXT, BYTEA, TEXT];
const TEXT: &str = "pg_catalog.text[]";
const BYTEA: &str = "pg_catalog.bytea[]";

/// What publishes into one schema. Needs no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statements {
    schema: String,
    max_payload_bytes: usize,
}

impl Statements {
    /// For a postbox in this schema, with the default limit of payloads.
    ///
    /// # Errors
    /// The schema's name is not `^[a-z_][a-z0-9_]{0,47}$`.
    pub fn new(schema: impl Into<String>) -> Result<Statements, Error> {
        let schema = schema.into();
        if !plain_name(&schema) {
            return Err(Error::Settings(format!(
                "the schema name `{}` must be 1 to 48 of a-z 0-9 _, not starting with a digit",
                schema.escape_debug()
            )));
        }
        Ok(Statements { schema, max_payload_bytes: MAX_PAYLOAD_BYTES })
    }

    /// With the schema and the limit of payloads that these settings have.
    ///
    /// # Errors
    /// One of the two cannot be used.
    pub fn of(settings: &Settings) -> Result<Statements, Error> {
        Ok(Statements { schema: settings.schema()?, max_payload_bytes: settings.max_payload_bytes()? })
    }

    /// The largest payload, in bytes.
    #[must_use]
    pub fn max_payload_bytes(self, bytes: usize) -> Statements {
        Statements { max_payload_bytes: bytes, ..self }
    }

    /// Checks messages, and says how they are published: in order, in your transaction. Run what
    /// [`Publishing::statement`] gives, and read its rows, until there is none.
    ///
    /// # Errors
    /// The first message that is refused; then there is nothing to run.
    pub fn publish<M>(&self, messages: M) -> Result<Publishing, PublishError>
    where
        M: IntoIterator,
        M::Item: IntoDraft,
    {
        let checked = |m: M::Item| context::inherit(m.into_draft()?).checked(self.max_payload_bytes);
        let drafts: Vec<Draft> = messages.into_iter().map(checked).collect::<Result<_, _>>()?;
        let mut waiting = VecDeque::new();
        let mut end = 0;
        for chunk in chunks(&drafts) {
            waiting.push_back(end..end + chunk.len());
            end += chunk.len();
        }
        let stored = vec![None; drafts.len()];
        let mut publishing =
            Publishing { schema: self.schema.clone(), drafts, stored, waiting, rounds: 0, running: None };
        publishing.next_chunk()?;
        Ok(publishing)
    }
}

impl Postbox<sqlx::Postgres> {
    /// What publishes into this postbox on a connection of any driver.
    pub fn statements(&self) -> Statements {
        // Both were checked when it was opened.
        let settings = self.settings();
        Statements {
            schema: settings.schema().unwrap_or_default(),
            max_payload_bytes: settings.max_payload_bytes().unwrap_or(MAX_PAYLOAD_BYTES),
        }
    }
}

/// A statement to run.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statement {
    /// The SQL, with `$1`, `$2` …
    pub text: String,
    /// A text for each of them; none is null.
    pub binds: Vec<String>,
}

/// Messages on their way: what to run, and what came of it. It holds no connection. Dropped half-way, it
/// leaves what was run to your transaction.
#[derive(Debug)]
#[must_use = "nothing is published before its statements are run"]
pub struct Publishing {
    schema: String,
    drafts: Vec<Draft>,
    stored: Vec<Option<Stored>>,
    waiting: VecDeque<Range<usize>>,
    /// How often those that run were tried.
    rounds: u32,
    running: Option<Running>,
}

/// A statement, and the drafts that it is about.
#[derive(Debug)]
struct Running {
    statement: Statement,
    drafts: Vec<usize>,
    /// It is the second look at dedup keys that are taken.
    looks: bool,
}

impl Publishing {
    /// What to run now; none when all is done. The columns of its rows are `ord` (bigint), `id` (text)
    /// and `yes` (boolean).
    pub fn statement(&self) -> Option<&Statement> {
        self.running.as_ref().map(|running| &running.statement)
    }

    /// Takes all rows of the statement, in any order.
    ///
    /// # Errors
    /// They do not answer the statement. Or a dedup key changed hands five times meanwhile: try again.
    pub fn read(&mut self, rows: impl IntoIterator<Item = (i64, String, bool)>) -> Result<(), PublishError> {
        let Some(Running { drafts, looks, .. }) = self.running.take() else {
            return Err(misread("there was no statement to run any more"));
        };
        let mut read = 0;
        for (ord, id, yes) in rows {
            let place = usize::try_from(ord).ok().and_then(|ord| drafts.get(ord.checked_sub(1)?));
            let place = *place.ok_or_else(|| misread(format!("no message has the `ord` {ord}")))?;
            let id = id.parse().map_err(|_| misread("an `id` is no UUID"))?;
            if looks {
                self.stored[place] = Some(Stored::Duplicate { existing: id, same_body: yes });
            } else if yes {
                self.stored[place] = Some(Stored::New(id));
            }
            read += 1;
        }
        if !looks && read != drafts.len() {
            return Err(misread(format!("{read} rows were read of {}", drafts.len())));
        }
        let open: Vec<usize> = drafts.into_iter().filter(|place| self.stored[*place].is_none()).collect();
        if open.is_empty() {
            return self.next_chunk();
        }
        if looks {
            // A dedup row has expired between the two looks: its message is published after all.
            self.rounds += 1;
            if self.rounds == 5 {
                return Err(sqlx::Error::Protocol("a dedup key keeps changing hands; try again".into()).into());
            }
        }
        self.run(open, !looks)
    }

    /// The messages with their ids, in the order given, as after `publish_all`.
    ///
    /// # Errors
    /// [`PublishError::DedupConflict`] for the first whose dedup key is taken by another body; or
    /// statements are left to run.
    pub fn finish(self) -> Result<Vec<Published>, PublishError> {
        self.drafts
            .into_iter()
            .zip(self.stored)
            .map(|(draft, stored)| published(draft, stored.ok_or_else(|| misread("there is a statement left to run"))?))
            .collect()
    }

    fn next_chunk(&mut self) -> Result<(), PublishError> {
        self.rounds = 0;
        match self.waiting.pop_front() {
            Some(chunk) => self.run(chunk.collect(), false),
            None => Ok(()),
        }
    }

    fn run(&mut self, drafts: Vec<usize>, looks: bool) -> Result<(), PublishError> {
        let of = || drafts.iter().map(|place| &self.drafts[*place]);
        let schema = &self.schema;
        let statement = if looks {
            let call = call(schema, "publish_duplicates", &DUPLICATES);
            let text = format!("select b.ord, b.message::pg_catalog.text as id, b.same_body as yes from {call} b");
            Statement { text, binds: duplicates(of()) }
        } else {
            let call = call(schema, "publish_batch", &BATCH);
            let text =
                format!("select b.ord, b.id::pg_catalog.text as id, b.stored as yes from {call} b order by b.ord");
            Statement { text, binds: batch(of())? }
        };
        self.running = Some(Running { statement, drafts, looks });
        Ok(())
    }
}

fn misread(why: impl Into<String>) -> PublishError {
    PublishError::Rows { why: why.into() }
}

/// A function of the schema, with texts for its arrays.
fn call(schema: &str, function: &str, types: &[&str]) -> String {
    let binds: Vec<String> = (1..).zip(types).map(|(n, to)| format!("${n}::pg_catalog.text::{to}")).collect();
    format!("{schema}.{function}({})", binds.join(", "))
}

/// The arguments of `publish_batch`.
fn batch<'a>(drafts: impl Iterator<Item = &'a Draft> + Clone) -> Result<Vec<String>, PublishError> {
    let mut headers = Vec::new();
    for draft in drafts.clone() {
        headers.push(match draft.headers.is_empty() {
            true => None,
            false => Some(serde_json::to_string(&draft.headers).map_err(|e| sqlx::Error::Encode(Box::new(e)))?),
        });
    }
    let texts = |of: fn(&Draft) -> Option<&str>| array(drafts.clone().map(of));
    let numbers = |of: fn(&Draft) -> Option<i64>| array(drafts.clone().map(|d| of(d).map(|n| n.to_string())));
    Ok(vec![
        texts(|d| Some(&d.topic)),
        texts(|d| d.key.as_deref()),
        texts(|d| d.payload.json()),
        array(headers.into_iter()),
        numbers(|d| d.occurred_at.map(|t| t.as_microsecond())),
        texts(|d| d.source.as_deref()),
        texts(|d| d.external_id.as_deref()),
        texts(|d| d.correlation_id.as_deref()),
        texts(|d| d.causation_id.as_deref()),
        numbers(|d| d.max_attempts.map(i64::from)),
        numbers(|d| match d.due {
            Due::After(delay) => i64::try_from(delay.as_millis()).ok(),
            Due::Now | Due::At(_) => None,
        }),
        numbers(|d| match d.due {
            Due::At(time) => Some(time.as_microsecond()),
            Due::Now | Due::After(_) => None,
        }),
        texts(dedup_key),
        numbers(|d| d.dedup.as_ref().and_then(|dedup| i64::try_from(dedup.window.as_millis()).ok())),
        bodies(drafts.clone()),
        texts(content_type),
        numbers(|d| d.priority.stored().map(i64::from)),
    ])
}

/// The arguments of `publish_duplicates`.
fn duplicates<'a>(drafts: impl Iterator<Item = &'a Draft> + Clone) -> Vec<String> {
    let texts = |of: fn(&Draft) -> Option<&str>| array(drafts.clone().map(of));
    vec![
        texts(|d| Some(&d.topic)),
        texts(dedup_key),
        texts(|d| d.key.as_deref()),
        texts(|d| d.payload.json()),
        bodies(drafts.clone()),
        texts(content_type),
    ]
}

fn dedup_key(draft: &Draft) -> Option<&str> {
    draft.dedup.as_ref().map(|dedup| dedup.key.as_str())
}

fn content_type(draft: &Draft) -> Option<&str> {
    draft.payload.typed().map(|bytes| bytes.content_type())
}

fn bodies<'a>(drafts: impl Iterator<Item = &'a Draft>) -> String {
    array(drafts.map(|draft| {
        draft.payload.typed().map(|bytes| {
            bytes.iter().fold(String::from("\\x"), |mut text, byte| {
                // Writing to a String cannot fail.
                let _ = write!(text, "{byte:02x}");
                text
            })
        })
    }))
}

/// An array as PostgreSQL reads it: every element in quotes, in which only `"` and `\` mean something.
fn array<T: AsRef<str>>(elements: impl Iterator<Item = Option<T>>) -> String {
    let mut text = String::from("{");
    for (n, element) in elements.enumerate() {
        if n > 0 {
            text.push(',');
        }
        let Some(element) = element else {
            text.push_str("NULL");
            continue;
        };
        text.push('"');
        for c in element.as_ref().chars() {
            if matches!(c, '"' | '\\') {
                text.push('\\');
            }
            text.push(c);
        }
        text.push('"');
    }
    text.push('}');
    text
}

#[cfg(test)]
mod tests;
