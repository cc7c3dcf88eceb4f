//! What a message fans out to: a delivery for each subscription of its topic, and none for another.

use std::collections::HashMap;

use super::Checker;
use crate::traffic::{SUBSCRIPTIONS, subscribed};

impl Checker<'_> {
    /// I1: each message has one delivery per subscription, each in one place.
    pub(super) fn fan_out(&mut self) {
        let mut places: HashMap<i64, u32> = HashMap::new();
        let mut reached: HashMap<(&str, &str), u32> = HashMap::new();
        for delivery in &self.history.deliveries {
            *places.entry(delivery.id).or_default() += 1;
            // A replay is one more, and checked as such.
            if delivery.replay_of.is_none() {
                *reached.entry((&delivery.message, &delivery.subscription)).or_default() += 1;
            }
        }
        for (delivery, count) in places.iter().filter(|(_, count)| **count > 1) {
            self.broken("I6", format!("delivery {delivery} is in {count} places at once"));
        }
        for message in &self.history.messages {
            for wanted in SUBSCRIPTIONS.iter().filter(|s| s.topics.contains(&message.topic.as_str())) {
                match reached.get(&(message.id.as_str(), wanted.name)).copied().unwrap_or_default() {
                    1 => {}
                    // Retention took it, and the window of its message is not over.
                    0 if self.fleeting.contains(message.ext.as_str()) => {}
                    0 => self.broken(
                        "I1",
                        format!("message {} ({}) has no delivery for {}", message.id, message.ext, wanted.name),
                    ),
                    n => self.broken(
                        "I1",
                        format!("message {} ({}) has {n} deliveries for {}", message.id, message.ext, wanted.name),
                    ),
                }
            }
            for lost in message.deliveries.iter().filter(|d| !places.contains_key(d)) {
                self.broken("I1", format!("delivery {lost} of message {} is nowhere", message.id));
            }
        }
    }

    /// I2: a delivery is of a message that is there, for a subscription of its topic; each message
    /// lists its own.
    pub(super) fn strangers(&mut self) {
        for delivery in &self.history.deliveries {
            let told = self.told_of(delivery);
            let Some(message) = self.messages.get(delivery.message.as_str()).copied() else {
                self.broken("I2", format!("{told} is of message {}, which is not there", delivery.message));
                continue;
            };
            match subscribed(&delivery.subscription) {
                None => self.broken("I2", format!("{told} is for a subscription that nobody declared")),
                Some(to) if !to.topics.contains(&message.topic.as_str()) => {
                    self.broken("I2", format!("{told} is for a subscription that does not match {}", message.topic));
                }
                Some(_) => {}
            }
        }
        let deliveries = self.by_id();
        for message in &self.history.messages {
            let others =
                message.deliveries.iter().filter_map(|d| deliveries.get(d)).filter(|d| d.message != message.id);
            for other in others {
                let told = self.told_of(other);
                self.broken("I2", format!("{told} is on the list of message {} ({})", message.id, message.ext));
            }
        }
    }
}
