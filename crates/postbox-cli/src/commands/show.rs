//! `postbox show ID`: a delivery with its whole history, or a message with its deliveries.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use postbox::admin::{AttemptRow, DeliveryDetail, RecordRow};
use postbox::lifecycle::State;
use postbox::{Content, Database, Envelope, Postbox, Priority};
use uuid::Uuid;

use crate::commands::{Ended, list};
use crate::desk::{Desk, usage};
use crate::failure::Failure;
use crate::flags::Show;
use crate::output::{Output, Tone, state_sign};
use crate::text::{count, inert_json, plain, took};

/// So much of a payload is shown to people,
const SHOWN_CHARACTERS: usize = 4096;
/// and this, if there is more.
const MORE: &str = " … (--json has it all)";

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, show: Show) -> Ended {
    let delivery = show.id.parse::<i64>().ok();
    let message = show.id.parse::<Uuid>().ok();
    if delivery.is_none() && message.is_none() {
        let why = format!("`{}` is neither a delivery's number nor a message's id", show.id);
        return Err(usage("show it", why, desk.command("list")));
    }
    let postbox = desk.open::<Db>().await?;
    if let Some(id) = delivery {
        let failed = |e| Failure::of(&e, format!("show delivery {id}"), desk.command("list"));
        let detail = postbox.admin().show(id).await.map_err(failed)?;
        if desk.output.json { desk.output.object(&detail)? } else { tell(desk, &detail)? }
    } else if let Some(id) = message {
        show_message(desk, &postbox, id).await?;
    }
    Ok(0)
}

async fn show_message<Db: Database>(desk: &Desk<'_>, postbox: &Postbox<Db>, id: Uuid) -> Result<(), Failure> {
    let admin = postbox.admin();
    let failed = |e| Failure::of(&e, format!("show message {id}"), desk.command("list"));
    let (envelope, ids) = admin.message(id).await.map_err(failed)?;
    let mut rows = Vec::with_capacity(ids.len());
    for delivery in ids {
        rows.push(admin.show(delivery).await.map_err(failed)?.row);
    }
    let coalesced = admin.coalesced(id).await.map_err(failed)?;
    let output = desk.output;
    if output.json {
        // The envelope is serialized as it is, so that its payload keeps its digits.
        #[derive(serde::Serialize)]
        struct Message<'a> {
            message: &'a Envelope,
            deliveries: &'a [postbox::admin::DeliveryRow],
            coalesced: &'a [postbox::admin::CoalescedRow],
        }
        return Ok(output.object(&Message { message: &envelope, deliveries: &rows, coalesced: &coalesced })?);
    }
    output.line(&format!("{}  message {}", output.paint(Tone::Strong, &plain(&envelope.topic)), envelope.id))?;
    tell_envelope(output, &envelope)?;
    for one in &coalesced {
        let whose = format!("{}/{}", plain(&one.application), plain(&one.subscription));
        output.line(&format!("coalesced  into delivery {} of {whose}, which has the same key", one.delivery))?;
    }
    if let ([], Some(one)) = (rows.as_slice(), coalesced.first()) {
        output.line(&format!("next: {}", desk.command(&format!("show {}", one.delivery))))?;
        return Ok(());
    }
    if rows.is_empty() {
        output.line("no deliveries: it matched no subscription so far")?;
        output.line(&format!("next: {}", desk.command("subscriptions")))?;
        return Ok(());
    }
    list::table(&rows, output)?;
    output.line(&format!("next: {}", desk.command(&format!("show {}", rows[0].id))))?;
    Ok(())
}

fn tell(desk: &Desk<'_>, detail: &DeliveryDetail) -> std::io::Result<()> {
    let output = desk.output;
    let row = &detail.row;
    let (sign, tone) = state_sign(row.state);
    let trace = detail.envelope.as_ref().and_then(Envelope::traceparent);
    output.line(&format!(
        "{} -> {}    {}   v{}   try {}/{}{}",
        output.paint(Tone::Strong, &plain(&row.topic)),
        plain(&row.subscription),
        output.paint(tone, sign),
        row.rev,
        row.attempt,
        row.max_attempts,
        trace.map_or_else(String::new, |t| format!("   trace {}", plain(t))),
    ))?;
    if let Some(cause) = detail.envelope.as_ref().and_then(|e| e.causation_id.as_deref()) {
        output.line(&format!("caused by  {}", plain(cause)))?;
    }
    for (id, topic) in &detail.effects {
        output.line(&format!("caused     {} {id}", plain(topic)))?;
    }
    if row.priority != Priority::Normal {
        output.line(&format!("priority   {}", row.priority))?;
    }
    if let Some(old) = row.replay_of {
        output.line(&format!("replay of  delivery {old}"))?;
    }
    for new in &detail.replays {
        output.line(&format!("replayed   as delivery {new}"))?;
    }
    for message in &detail.coalesced {
        output.line(&format!("stands for message {message}, of the same key"))?;
    }
    timeline(output, detail)?;
    if let Some(due) = list::due(row).filter(|_| row.state == State::Pending) {
        output.line(&format!("waits      {due}"))?;
    }
    if let Some(worker) = detail.worker.as_deref().filter(|_| row.state == State::Running) {
        output.line(&format!("held by    {}", plain(worker)))?;
    }
    if let Some(note) = row.note.as_ref().filter(|note| row.last_error.as_ref() != Some(*note)) {
        output.line(&format!("note       {}", plain(note)))?;
    }
    if row.kind == "operation" {
        output.line(&format!("its key    {}", plain(&detail.idempotency_key)))?;
    }
    output.line(&format!("message    {}", row.message))?;
    match &detail.envelope {
        Some(envelope) => tell_envelope(output, envelope)?,
        None => output.line("payload    (gone: retention took the message)")?,
    }
    match next(detail) {
        Some(next) => output.line(&format!("next: {}", desk.command(&next))),
        None => Ok(()),
    }
}

fn tell_envelope(output: &Output, envelope: &Envelope) -> std::io::Result<()> {
    for (name, value) in [("key", &envelope.key), ("source", &envelope.source), ("external id", &envelope.external_id)]
    {
        if let Some(value) = value {
            output.line(&format!("{name:<10} {}", plain(value)))?;
        }
    }
    for (name, value) in &envelope.headers {
        output.line(&format!("header     {}: {}", plain(name), plain(value)))?;
    }
    match &envelope.payload {
        Content::Json(text) => output.line(&format!("payload    {}", cut(inert_json(text.get())))),
        Content::Bytes(bytes) => {
            let size = if bytes.is_empty() { "0".into() } else { count(bytes.len() as i64) };
            output.line(&format!("content    {}, {size} bytes", plain(bytes.content_type())))?;
            output.line(format!("payload    {}", shown(bytes.content_type(), bytes)).trim_end())
        }
    }
}

/// Bytes as people read them: text that says it is text, as one inert line; else the first ones in
/// hexadecimal digits.
fn shown(content_type: &str, bytes: &[u8]) -> String {
    if content_type.get(..5).is_some_and(|kind| kind.eq_ignore_ascii_case("text/"))
        && let Ok(text) = std::str::from_utf8(bytes)
    {
        return cut(plain(text));
    }
    let first: Vec<String> = bytes.iter().take(32).map(|byte| format!("{byte:02x}")).collect();
    let more = if bytes.len() > 32 { MORE } else { "" };
    format!("{}{more}", first.join(" "))
}

/// As much of a long payload as people read.
fn cut(mut text: String) -> String {
    if let Some((at, _)) = text.char_indices().nth(SHOWN_CHARACTERS) {
        text.truncate(at);
        text.push_str(MORE);
    }
    text
}

/// One line of a history.
struct Moment {
    at: Timestamp,
    what: String,
    detail: String,
}

impl Moment {
    fn new(at: Timestamp, what: impl Into<String>, detail: impl Into<String>) -> Moment {
        Moment { at, what: what.into(), detail: detail.into() }
    }
}

/// Everything on record, in order of time.
fn timeline(output: &Output, detail: &DeliveryDetail) -> std::io::Result<()> {
    let mut moments = vec![Moment::new(detail.row.recorded_at, "recorded", by_whom(detail))];
    moments.extend(detail.attempts.iter().flat_map(of_attempt));
    // An operator's resolution is in the audit, too; once is enough here.
    let settled = |by: &str| detail.records.iter().any(|r| r.record == "resolution" && r.actor == by);
    let again = |r: &&RecordRow| r.record == "audit" && r.what.starts_with("resolve: ") && settled(&r.actor);
    moments.extend(detail.records.iter().filter(|r| !again(r)).map(of_record));
    moments.sort_by_key(|m| m.at);
    let mut day = None;
    for moment in moments {
        let at = moment.at.to_zoned(TimeZone::UTC);
        if day.replace(at.date()) != Some(at.date()) {
            output.line(&output.paint(Tone::Faint, &format!("{} (UTC)", at.date())))?;
        }
        let line = format!("{}  {:<13} {}", at.strftime("%H:%M:%S%.3f"), moment.what, moment.detail);
        output.line(line.trim_end())?;
    }
    Ok(())
}

fn by_whom(detail: &DeliveryDetail) -> String {
    match detail.envelope.as_ref().and_then(|e| e.source.as_deref()) {
        Some(source) => format!("from {}", plain(source)),
        None => "in the caller's transaction".into(),
    }
}

fn of_attempt(attempt: &AttemptRow) -> Vec<Moment> {
    let number = attempt.number;
    let mut moments = vec![Moment::new(
        attempt.started_at,
        format!("attempt {number}"),
        // `next` in SQL works without a worker.
        match attempt.worker.is_nil() {
            true => "taken in SQL".to_owned(),
            false => format!("started by worker {}", attempt.worker),
        },
    )];
    if let Some(outcome) = &attempt.outcome {
        let at = attempt.finished_at.unwrap_or(attempt.started_at);
        let mut detail = attempt.error.as_deref().map(plain).unwrap_or_default();
        if outcome == "in_doubt" {
            detail = format!("outcome unknown: {detail}");
        }
        if let Some(receipt) = &attempt.receipt {
            let gap = if detail.is_empty() { "" } else { "  " };
            detail.push_str(&format!("{gap}receipt {}", inert_json(&receipt.to_string())));
        }
        let ran = std::time::Duration::try_from(at.duration_since(attempt.started_at)).unwrap_or_default();
        let detail = format!("attempt {number} after {}  {detail}", took(ran));
        moments.push(Moment::new(at, plain(outcome).replace('_', " "), detail));
    }
    moments
}

fn of_record(record: &RecordRow) -> Moment {
    let detail = record.detail.as_deref().map(|d| format!(": {}", plain(d))).unwrap_or_default();
    Moment::new(
        record.at,
        plain(&record.record),
        format!("{} by {}{detail}", plain(&record.what).replace('_', " "), plain(&record.actor)),
    )
}

/// What an operator would do about it.
fn next(detail: &DeliveryDetail) -> Option<String> {
    let id = detail.row.id;
    match detail.row.state {
        State::InDoubt => {
            Some(format!("resolve {id} --happened | --did-not-happen | --abandon --reason \"how you know\""))
        }
        State::Dead | State::Cancelled => Some(format!("retry {id} --reason \"what was mended\"")),
        State::Pending if detail.row.next_due_at.is_some() => Some(format!("retry {id} --reason \"not to wait\"")),
        State::Pending | State::Running => Some("status".into()),
        State::Succeeded => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{cut, shown};

    #[test]
    fn long_payloads_are_cut() {
        let long = "é".repeat(4096);
        assert_eq!(cut(long.clone()), long);
        assert_eq!(cut(format!("{long}é")), format!("{long} … (--json has it all)"));
    }

    #[test]
    fn bytes_are_shown_inert() {
        assert_eq!(shown("Text/plain; charset=utf-8", b"a\x1b[31m\nb"), "a\\u{1b}[31m\\nb");
        assert_eq!(shown("text/plain", b"\xff"), "ff");
        assert_eq!(shown("image/png", b"\x89PNG"), "89 50 4e 47");
        assert!(shown("image/png", &[7; 33]).ends_with("07 … (--json has it all)"));
        assert_eq!(shown("image/png", &[7; 32]).len(), 95);
    }
}
