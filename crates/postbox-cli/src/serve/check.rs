//! What a plan comes to, in words and as JSON. Secrets are not in it.

use postbox::{Settings, hide_password};
use serde_json::{Value, json};

use super::config::{Endpoint, Origin, Plan, Push, Relay, Scheme, Source, To};
use crate::text::plain;

impl Scheme {
    pub(super) fn name(self) -> &'static str {
        match self {
            Scheme::Standard => "standard",
            Scheme::GitHub => "github",
            Scheme::Stripe => "stripe",
        }
    }
}

impl Source {
    pub(super) fn kind(&self) -> &'static str {
        match self.from {
            Origin::Redis { .. } => "redis",
            Origin::Webhook { .. } => "webhook",
        }
    }

    fn words(&self) -> String {
        match &self.from {
            Origin::Redis { url, stream, .. } => {
                format!("receive from the Redis stream {stream} at {} ({})", hide_password(url), self.name)
            }
            Origin::Webhook { scheme, .. } => {
                format!("receive at POST /in/{}, signed as {} ({})", self.name, scheme.name(), self.name)
            }
        }
    }
}

impl Endpoint {
    fn words(&self) -> String {
        let signed = if self.secrets.is_empty() { "not signed" } else { "signed" };
        format!("{}, {signed}", hide_password(&self.url))
    }
}

impl Relay {
    pub(super) fn kind(&self) -> &'static str {
        match self.to {
            To::Redis { .. } => "redis",
            To::Webhook(_) => "webhook",
            To::Stdout => "stdout",
        }
    }

    fn words(&self) -> String {
        let to = match &self.to {
            To::Redis { url, to, .. } => format!("the Redis stream {to} at {}", hide_password(url)),
            To::Webhook(endpoint) => endpoint.words(),
            To::Stdout => "standard output".into(),
        };
        let order = if self.ordered { "in order of each key" } else { "in no order" };
        format!("relay {} to {to}, {order} ({})", self.pattern, self.name)
    }
}

impl Push {
    fn words(&self) -> String {
        let kind = if self.operation { ", as an operation" } else { "" };
        format!("push {} to {}{kind} ({})", self.pattern, self.endpoint.words(), self.name)
    }
}

/// A line for each thing that would run.
pub(super) fn lines(plan: &Plan, settings: &Settings) -> Vec<String> {
    let shown = |name: &str| {
        let found = settings.shown().into_iter().find(|(known, ..)| *known == name);
        found.map(|(_, value, _)| value).unwrap_or_default()
    };
    let database = match shown("database_url") {
        url if url.is_empty() => format!("the PostgreSQL database {} at {}", shown("database"), shown("host")),
        url => url,
    };
    let mut lines = vec![format!("work on {database}, as the application {}", shown("application"))];
    lines.extend(plan.http.map(|http| format!("listen at http://{http}: GET /health and /ready")));
    lines.extend(plan.sources.iter().map(Source::words));
    lines.extend(plan.relays.iter().map(Relay::words));
    lines.extend(plan.pushes.iter().map(Push::words));
    lines.iter().map(|line| plain(line)).collect()
}

/// The same for programs.
pub(super) fn object(plan: &Plan, file: &str) -> Value {
    json!({
        "ok": true,
        "file": file,
        "http": plan.http.map(|http| http.to_string()),
        "sources": plan.sources.iter().map(|s| json!({"name": s.name, "kind": s.kind()})).collect::<Vec<_>>(),
        "relays": plan.relays.iter().map(|r| {
            json!({"name": r.name, "kind": r.kind(), "pattern": r.pattern.as_str(), "ordered": r.ordered})
        }).collect::<Vec<_>>(),
        "pushes": plan.pushes.iter().map(|p| {
            json!({"name": p.name, "pattern": p.pattern.as_str(), "operation": p.operation})
        }).collect::<Vec<_>>(),
    })
}
