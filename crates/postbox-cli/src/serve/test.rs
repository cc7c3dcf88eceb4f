//! `postbox webhooks test NAME`: one signed message to an endpoint of the file, and what it answers.

use postbox::Tested;
use serde_json::json;

use super::config::{Endpoint, Plan, To};
use super::plan;
use crate::commands::Ended;
use crate::desk::Desk;
use crate::failure::{FAILED, Failure, NOT_FOUND};
use crate::text::{plain, took};

/// Endpoints by the names of their relays and pushes.
fn endpoints(plan: &Plan) -> impl Iterator<Item = (&str, &Endpoint, bool)> {
    let relays = plan.relays.iter().filter_map(|relay| match &relay.to {
        To::Webhook(endpoint) => Some((relay.name.as_str(), endpoint, false)),
        _ => None,
    });
    relays.chain(plan.pushes.iter().map(|push| (push.name.as_str(), &push.endpoint, true)))
}

pub(crate) async fn run(desk: &Desk<'_>, name: &str) -> Ended {
    let plan = plan(desk)?;
    let tried = format!("test the webhook `{name}`");
    let Some((_, endpoint, push)) = endpoints(&plan).find(|(known, ..)| *known == name) else {
        let known: Vec<&str> = endpoints(&plan).map(|(known, ..)| known).collect();
        let there = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        let why = format!("no relay of the kind webhook and no push has this name; there are: {there}");
        return Err(Failure::new(NOT_FOUND, tried, why, desk.command("serve --check")));
    };
    let refused = |why: String| Failure::new(FAILED, &tried, why, desk.command("serve --check"));
    let tested: Tested = match push {
        true => endpoint.push().test().await.map_err(|e| refused(e.to_string()))?,
        false => endpoint.sink().test().await.map_err(|e| refused(e.to_string()))?,
    };
    let Tested { id, status, body, words, taken, .. } = &tested;
    if desk.output.json {
        let milliseconds = u64::try_from(tested.took.as_millis()).unwrap_or(u64::MAX);
        desk.output.object(&json!({
            "name": name, "id": id, "status": status, "took_ms": milliseconds, "taken": taken, "answer": body, "words": words,
        }))?;
    } else {
        let sign = if *taken { "+ TAKEN" } else { "x REFUSED" };
        desk.output.line(&format!("{sign}  {} in {} (message {id})", plain(words), took(tested.took)))?;
    }
    if *taken {
        return Ok(0);
    }
    let next = format!("mend the endpoint or its secret, then: {}", desk.command(&format!("webhooks test {name}")));
    Err(Failure::new(FAILED, tried, words.as_str(), next))
}
