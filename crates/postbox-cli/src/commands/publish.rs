//! `postbox publish TOPIC [PAYLOAD|-]`; a file of messages is in `jsonl`.

use std::io::Read;

use postbox::{Database, Draft, Envelope, Published};
use serde::Serialize;

use crate::commands::{Ended, jsonl};
use crate::desk::{Desk, usage};
use crate::failure::{FAILED, Failure};
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
    let payload = payload(publish.payload.as_deref(), &example)?;
    let drafted = draft(&publish, payload).map_err(|e| Failure::of(&e.into(), TRIED, example()))?;
    let postbox = desk.open_or_create::<Db>().await?;
    let published = postbox.publish_now([drafted]).await.map_err(|e| Failure::of(&e, TRIED, desk.command("status")))?;
    for message in published {
        tell(desk, &message)?;
    }
    Ok(0)
}

/// The payload's text: as typed, from standard input, or `null`.
fn payload(given: Option<&str>, example: &dyn Fn() -> String) -> Result<String, Failure> {
    match given {
        None => Ok("null".into()),
        Some("-") => {
            let mut bytes = Vec::new();
            std::io::stdin()
                .lock()
                .take(READ_AT_MOST)
                .read_to_end(&mut bytes)
                .map_err(|e| Failure::new(FAILED, "read the payload from standard input", e.to_string(), example()))?;
            String::from_utf8(bytes).map_err(|e| {
                let why = format!("it is not UTF-8 (byte {})", e.utf8_error().valid_up_to());
                Failure::new(FAILED, "read the payload from standard input", why, example())
            })
        }
        Some(text) => Ok(text.to_owned()),
    }
}

fn draft(publish: &Publish, payload: String) -> Result<Draft, postbox::PublishError> {
    let topic = publish.topic.clone().unwrap_or_default();
    let mut draft = Envelope::raw(topic, payload.trim())?;
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
    Ok(draft)
}

/// The message with its id, and whether it was there already.
#[derive(Serialize)]
struct Told<'a> {
    duplicate: bool,
    #[serde(flatten)]
    envelope: &'a Envelope,
}

fn tell(desk: &Desk<'_>, message: &Published) -> std::io::Result<()> {
    let output = desk.output;
    if output.json {
        return output.object(&Told { duplicate: message.is_duplicate(), envelope: message });
    }
    let (mark, word) = match message.is_duplicate() {
        true => (output.paint(Tone::Faint, "-"), "was there already"),
        false => (output.paint(Tone::Good, "+"), "published"),
    };
    output.line(&format!("{mark} {} {} {word}", message.id, plain(&message.topic)))?;
    output.prose(&format!("next: {}", desk.command(&format!("show {}", message.id))));
    Ok(())
}
