//! `postbox publish TOPIC [PAYLOAD|-]`; a file of messages is in `jsonl`.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use postbox::{Database, Draft, Envelope, Error, PublishError, Published};
use serde::Serialize;

use crate::commands::{Ended, jsonl};
use crate::desk::{Desk, usage};
use crate::failure::{Failure, NOT_FOUND, USAGE, code_of};
use crate::flags::Publish;
use crate::output::Tone;
use crate::text::plain;

/// Beyond the largest payload that can be allowed; the library says what the limit is.
const READ_AT_MOST: u64 = 65 << 20;
const TRIED: &str = "publish the message";

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, publish: Publish) -> Ended {
    if let Some(file) = &publish.jsonl {
        return jsonl::run::<Db>(desk, file, publish.dedup_window).await;
    }
    let example = || desk.command("publish orders.placed '{\"order_id\": 42}'");
    if publish.dedup_window.is_some() && publish.dedup.is_none() {
        return Err(usage(TRIED, "--dedup-window goes with --dedup or --jsonl", example()));
    }
    let payload = payload(&publish, &example)?;
    let drafted = match &publish.content_type {
        Some(content_type) => {
            Envelope::bytes(publish.topic.clone().unwrap_or_default(), content_type.as_str(), payload)
        }
        None => json(&publish, payload, &example)?,
    };
    let drafted = options(&publish, drafted);
    let postbox = desk.open_or_create::<Db>().await?;
    let published = postbox.publish_now([drafted]).await.map_err(|e| {
        let next = match &e {
            Error::Publish(PublishError::DedupConflict { existing, .. }) => desk.command(&format!("show {existing}")),
            e if code_of(e) == USAGE => example(),
            _ => desk.command("status"),
        };
        Failure::of(&e, TRIED, next)
    })?;
    for message in published {
        tell(desk, &message)?;
    }
    Ok(0)
}

/// Where the payload comes from, in words.
fn origin(publish: &Publish) -> String {
    match &publish.file {
        Some(file) => format!("read the payload from {}", file.display()),
        None => "read the payload from standard input".into(),
    }
}

/// The payload: as typed, from a file or standard input, or `null`.
fn payload(publish: &Publish, example: &dyn Fn() -> String) -> Result<Vec<u8>, Failure> {
    let failed = |e: std::io::Error| {
        let code = if e.kind() == ErrorKind::NotFound { NOT_FOUND } else { USAGE };
        Failure::new(code, origin(publish), e.to_string(), example())
    };
    match (&publish.file, publish.payload.as_deref()) {
        (Some(file), _) if file != Path::new("-") => read(File::open(file).map_err(failed)?).map_err(failed),
        (Some(_), _) | (None, Some("-")) => read(std::io::stdin().lock()).map_err(failed),
        (None, Some(text)) => Ok(text.into()),
        (None, None) if publish.content_type.is_some() => {
            Err(usage(TRIED, "--content-type needs bytes: --file PATH, or `-` for standard input", example()))
        }
        (None, None) => Ok("null".into()),
    }
}

fn read(from: impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(READ_AT_MOST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A draft of JSON text.
fn json(publish: &Publish, payload: Vec<u8>, example: &dyn Fn() -> String) -> Result<Draft, Failure> {
    let text = String::from_utf8(payload).map_err(|e| {
        let why = format!("it is not UTF-8 (byte {}); bytes need a --content-type", e.utf8_error().valid_up_to());
        Failure::new(USAGE, origin(publish), why, example())
    })?;
    Envelope::raw(publish.topic.clone().unwrap_or_default(), text.trim())
        .map_err(|e| Failure::of(&e.into(), TRIED, example()))
}

fn options(publish: &Publish, mut draft: Draft) -> Draft {
    if let Some(key) = &publish.key {
        draft = draft.key(key);
    }
    for (name, value) in &publish.headers {
        draft = draft.header(name, value);
    }
    if let Some(delay) = publish.after {
        draft = draft.after(delay);
    }
    if let Some(time) = publish.at {
        draft = draft.at(time);
    }
    draft = match (&publish.dedup, publish.dedup_window) {
        (Some(key), Some(window)) => draft.dedup_within(key, window),
        (Some(key), None) => draft.dedup(key),
        (None, _) => draft,
    };
    if let Some(attempts) = publish.max_attempts {
        draft = draft.max_attempts(attempts);
    }
    if let Some(priority) = publish.priority {
        draft = draft.priority(priority);
    }
    draft
}

/// The message with its id, whether it was there already, and which deliveries stand for it.
#[derive(Serialize)]
struct Told<'a> {
    duplicate: bool,
    #[serde(skip_serializing_if = "<[i64]>::is_empty")]
    coalesced_into: &'a [i64],
    #[serde(flatten)]
    envelope: &'a Envelope,
}

fn tell(desk: &Desk<'_>, message: &Published) -> std::io::Result<()> {
    let output = desk.output;
    if output.json {
        let (duplicate, coalesced_into) = (message.is_duplicate(), message.coalesced_into());
        return output.object(&Told { duplicate, coalesced_into, envelope: message });
    }
    let (mark, word) = match message.is_duplicate() {
        true => (output.paint(Tone::Faint, "-"), "was there already"),
        false => (output.paint(Tone::Good, "+"), "published"),
    };
    output.line(&format!("{mark} {} {} {word}", message.id, plain(&message.topic)))?;
    for delivery in message.coalesced_into() {
        output.line(&format!("  coalesced into delivery {delivery}, which has the same key"))?;
    }
    output.prose(&format!("next: {}", desk.command(&format!("show {}", message.id))));
    Ok(())
}
