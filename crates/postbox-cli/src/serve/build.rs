//! From the plan to the library: sources, sinks and pushes.

use postbox::sink::{WebhookSink, redis, stdout, webhook_to};
use postbox::source::{RedisSource, Webhook, redis_stream, webhook};
use postbox::{Database, Push, RelayEntry, Router, push, relay};

use super::config::{self, Endpoint, Origin, Plan, Relay, Scheme, Source, To};

/// What a plan comes to.
pub(super) struct Built<Db: Database> {
    pub(super) router: Router<Db>,
    pub(super) streams: Vec<RedisSource>,
    pub(super) webhooks: Vec<Webhook>,
}

pub(super) fn build<Db: Database>(plan: Plan) -> Built<Db> {
    let mut router = Router::new();
    for relay in plan.relays {
        router = relayed(router, relay);
    }
    for push in plan.pushes {
        router = pushed(router, push);
    }
    let mut built = Built { router, streams: Vec::new(), webhooks: Vec::new() };
    for source in plan.sources {
        add(&mut built, source);
    }
    built
}

fn add<Db: Database>(built: &mut Built<Db>, source: Source) {
    let Source { name, from, format } = source;
    match from {
        Origin::Redis { url, stream, group, consumer, batch, block, min_idle, max_deliveries, replay_horizon } => {
            let mut source = redis_stream(stream).url(url).named(name);
            if let Some(group) = group {
                source = source.group(group);
            }
            if let Some(consumer) = consumer {
                source = source.consumer_prefix(consumer);
            }
            if let Some(batch) = batch {
                source = source.batch(batch);
            }
            if let Some(block) = block {
                source = source.block(block);
            }
            if let Some(min_idle) = min_idle {
                source = source.min_idle(min_idle);
            }
            if let Some(max_deliveries) = max_deliveries {
                source = source.max_deliveries(max_deliveries);
            }
            if let Some(replay_horizon) = replay_horizon {
                source = source.replay_horizon(replay_horizon);
            }
            if let Some(format) = format {
                source = source.format(format);
            }
            built.streams.push(source);
        }
        Origin::Webhook { scheme, secrets, tolerance, max_body_bytes } => {
            let mut source = webhook(name);
            source = match scheme {
                Scheme::Standard => source.standard(secrets),
                Scheme::GitHub => secrets.iter().fold(source, Webhook::github),
                Scheme::Stripe => secrets.iter().fold(source, Webhook::stripe),
            };
            if let Some(tolerance) = tolerance {
                source = source.tolerance(tolerance);
            }
            if let Some(bytes) = max_body_bytes {
                source = source.body_limit(bytes);
            }
            if let Some(format) = format {
                source = source.format(format);
            }
            built.webhooks.push(source);
        }
    }
}

impl Endpoint {
    /// As a handler behind a URL.
    pub(super) fn push(&self) -> Push {
        let mut push = push(&self.url).envelope(self.envelope).source(&self.source).keep_responses(self.keep_responses);
        for secret in &self.secrets {
            push = push.secret(secret);
        }
        for network in &self.allow {
            push = push.allow(network);
        }
        if let Some(timeout) = self.timeout {
            push = push.timeout(timeout);
        }
        if let Some(pem) = &self.root_certificate {
            push = push.root_certificate(pem.clone());
        }
        if let Some(url) = &self.reconcile {
            push = push.reconcile(url);
        }
        push
    }

    /// As a receiver of webhooks.
    pub(super) fn sink(&self) -> WebhookSink {
        let mut sink =
            webhook_to(&self.url).envelope(self.envelope).source(&self.source).keep_responses(self.keep_responses);
        for secret in &self.secrets {
            sink = sink.secret(secret);
        }
        for network in &self.allow {
            sink = sink.allow(network);
        }
        if let Some(timeout) = self.timeout {
            sink = sink.timeout(timeout);
        }
        if let Some(pem) = &self.root_certificate {
            sink = sink.root_certificate(pem.clone());
        }
        if self.allow_private_addresses {
            sink = sink.allow_private_addresses();
        }
        sink
    }
}

/// Options that entries of every kind have, each with a type of its own.
macro_rules! with_policy {
    ($entry:expr, $policy:expr) => {{
        let (mut entry, policy) = ($entry, $policy);
        if let Some(attempts) = policy.max_attempts {
            entry = entry.max_attempts(attempts);
        }
        if let Some((first, longest)) = policy.backoff {
            entry = entry.backoff(first, longest);
        }
        if let Some((count, per)) = policy.rate {
            entry = entry.rate(count, per);
        }
        entry
    }};
}

fn relayed<Db: Database>(router: Router<Db>, planned: Relay) -> Router<Db> {
    let pattern = planned.pattern.as_str().to_owned();
    match &planned.to {
        To::Redis { url, to, envelope, source, max_len } => {
            let mut sink = redis(to.to_string()).url(url).envelope(*envelope).source(source);
            if let Some(entries) = max_len {
                sink = sink.max_len_approx(*entries);
            }
            let entry = with_options(relay(sink), &planned);
            router.relay(
                &pattern,
                match planned.policy.concurrency {
                    Some(at_once) => entry.concurrency(at_once),
                    None => entry,
                },
            )
        }
        To::Webhook(endpoint) => {
            let mut sink = endpoint.sink();
            if let Some(at_once) = planned.policy.concurrency {
                // Of requests: a batch is many of them.
                sink = sink.at_once(at_once);
            }
            router.relay(&pattern, with_options(relay(sink), &planned))
        }
        To::Stdout => router.relay(&pattern, with_options(relay(stdout()), &planned)),
    }
}

fn with_options<K>(entry: RelayEntry<K>, planned: &Relay) -> RelayEntry<K> {
    let policy = &planned.policy;
    let mut entry = with_policy!(entry.named(&planned.name), policy);
    if let Some(up_to) = policy.up_to {
        entry = entry.up_to(up_to);
    }
    if planned.ordered { entry.on_dead(policy.on_dead) } else { entry.unordered() }
}

fn pushed<Db: Database>(router: Router<Db>, planned: config::Push) -> Router<Db> {
    let config::Push { name, pattern, endpoint, operation, ordered, policy } = planned;
    let pattern = pattern.as_str();
    if operation {
        let mut entry = with_policy!(endpoint.push().operation().named(name), &policy);
        if let Some(at_once) = policy.concurrency {
            entry = entry.concurrency(at_once);
        }
        if ordered {
            entry = entry.ordered().on_dead(policy.on_dead);
        }
        router.on(pattern, entry)
    } else {
        let mut entry = with_policy!(endpoint.push().handler().named(name), &policy);
        if let Some(at_once) = policy.concurrency {
            entry = entry.concurrency(at_once);
        }
        if ordered {
            entry = entry.ordered().on_dead(policy.on_dead);
        }
        router.on(pattern, entry)
    }
}
