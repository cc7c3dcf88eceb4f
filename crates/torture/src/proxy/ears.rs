//! The connections that listen for wake-ups, and the times in which they hear nothing.

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::world::locked;

/// What becomes of what the server says on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hearing {
    Open,
    /// Nothing is passed on, and nobody is told: a black hole.
    Frozen,
    /// The connection ends.
    Cut,
}

/// A connection's way back from the server.
#[derive(Debug, Clone)]
pub(super) struct Ear(Arc<watch::Sender<Hearing>>);

impl Default for Ear {
    fn default() -> Ear {
        Ear(Arc::new(watch::Sender::new(Hearing::Open)))
    }
}

impl Ear {
    /// Returns once nothing more is to reach the client.
    pub(super) async fn frozen(&self) {
        self.0.subscribe().wait_for(|hearing| *hearing != Hearing::Open).await.ok();
    }

    /// Returns once the connection is to end.
    pub(super) async fn cut(&self) {
        self.0.subscribe().wait_for(|hearing| *hearing == Hearing::Cut).await.ok();
    }
}

/// All connections that listen.
#[derive(Debug, Default)]
pub(super) struct Ears(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    deaf_since: Option<Instant>,
    listening: Vec<Weak<watch::Sender<Hearing>>>,
}

impl Ears {
    /// This connection listens from now on. Whether it is frozen with that.
    pub(super) fn listens(&self, ear: &Ear) -> bool {
        let mut state = locked(&self.0);
        state.listening.retain(|known| known.strong_count() > 0);
        let known = state.listening.iter().any(|known| known.as_ptr() == Arc::as_ptr(&ear.0));
        if !known {
            state.listening.push(Arc::downgrade(&ear.0));
        }
        if state.deaf_since.is_none() || *ear.0.borrow() != Hearing::Open {
            return false;
        }
        ear.0.send_replace(Hearing::Frozen);
        true
    }

    /// Whoever listens hears nothing any more, and who comes to listen neither. How many were frozen.
    pub(super) fn deafen(&self) -> u64 {
        let mut state = locked(&self.0);
        state.deaf_since.get_or_insert_with(Instant::now);
        let frozen = state.listening.iter().filter_map(Weak::upgrade).map(|ear| ear.send_replace(Hearing::Frozen));
        frozen.filter(|before| *before == Hearing::Open).count() as u64
    }

    /// The frozen ones are cut, so that their owners notice, and the next ones hear.
    pub(super) fn hear(&self) {
        let mut state = locked(&self.0);
        state.deaf_since = None;
        for ear in state.listening.iter().filter_map(Weak::upgrade) {
            ear.send_if_modified(|hearing| {
                let frozen = *hearing == Hearing::Frozen;
                if frozen {
                    *hearing = Hearing::Cut;
                }
                frozen
            });
        }
    }

    /// For how long nobody has heard anything.
    pub(super) fn deaf_for(&self) -> Option<Duration> {
        locked(&self.0).deaf_since.map(|since| since.elapsed())
    }
}

/// Whether a message from the client is a LISTEN, or prepares one.
pub(super) fn is_listen(message: &[u8]) -> bool {
    let mut texts = message.get(5..).unwrap_or_default().split(|b| *b == 0);
    let text = match message.first() {
        Some(b'Q') => texts.next(),
        Some(b'P') => texts.nth(1),
        _ => None,
    };
    let word = text.and_then(|text| text.trim_ascii_start().get(..6));
    word.is_some_and(|word| word.eq_ignore_ascii_case(b"listen"))
}
