//! Signatures of webhooks: [Standard Webhooks](standard), [GitHub's](github) and [Stripe's](stripe), made and
//! checked.
//!
//! All are HMAC-SHA256 over the exact bytes of the body. Where a time is signed, it comes in as an argument, like
//! the clock that it is held against: nothing here knows what time it is. Signatures are compared in constant time,
//! with every secret: one that is on its way out is good beside the one that follows it.

use std::fmt;
use std::time::Duration;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use hmac::{Hmac, KeyInit, Mac};
use jiff::Timestamp;
use sha2::Sha256;

use crate::planted::planted;

/// How far a signed time may be from the clock, either way, unless something else is set: 300 s.
pub const TOLERANCE: Duration = Duration::from_secs(300);

/// A key to sign with. It does not show itself: its `Debug` has no byte of it.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What a secret of Standard Webhooks begins with.
const PREFIX: &str = "whsec_";
/// Below this a secret can be guessed; the specification asks for 24 to 64 bytes.
const SHORT: usize = 24;

/// Senders and their libraries write base64 with and without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl Secret {
    /// These bytes.
    ///
    /// # Errors
    /// There are none: a signature that everybody can make.
    pub fn bytes(bytes: impl Into<Vec<u8>>) -> Result<Secret, SignatureError> {
        let bytes = bytes.into();
        if bytes.is_empty() { Err(SignatureError::Secret("it is empty")) } else { Ok(Secret(bytes)) }
    }

    /// A secret of Standard Webhooks: `whsec_` and base64; or, without the prefix, the bytes of the text itself.
    /// (The libraries of Standard Webhooks take a text without the prefix for base64: put the prefix before it.)
    ///
    /// # Errors
    /// It is empty, or what follows the prefix is no base64.
    pub fn standard(text: &str) -> Result<Secret, SignatureError> {
        match text.strip_prefix(PREFIX) {
            Some(encoded) => {
                let bytes = BASE64.decode(encoded);
                Secret::bytes(bytes.map_err(|_| SignatureError::Secret("what follows `whsec_` is no base64"))?)
            }
            None => Secret::bytes(text),
        }
    }

    /// It is shorter than the 24 bytes that Standard Webhooks asks for.
    pub fn is_short(&self) -> bool {
        self.0.len() < SHORT
    }

    fn mac(&self, parts: &[&[u8]]) -> Option<Hmac<Sha256>> {
        // HMAC takes keys of any length: this is always there.
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).ok()?;
        parts.iter().for_each(|part| mac.update(part));
        Some(mac)
    }
}

/// Why a signature is not good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureError {
    /// The secret is none.
    #[error("the secret cannot be used: {0}")]
    Secret(&'static str),
    /// A header is not there, or there more than once.
    #[error("the header `{0}` is missing, or is there more than once")]
    Missing(&'static str),
    /// A header does not read as it should.
    #[error("the header `{header}` is malformed: {why}")]
    Malformed {
        /// Which.
        header: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// None of the signatures is one of these bytes with one of the secrets.
    #[error("the signature is not that of this body with a secret that is known here")]
    Mismatch,
    /// It was signed too long ago, or in the future: somebody replays it, or a clock is wrong.
    #[error("the timestamp is {} s {}; {} s are tolerated: a replay, or a clock that is wrong", .seconds.unsigned_abs(), if *.seconds < 0 { "in the future" } else { "old" }, .tolerance.as_secs())]
    Stale {
        /// How old it is; below zero, how far in the future.
        seconds: i64,
        /// How far it may be, either way.
        tolerance: Duration,
    },
}

/// Every signature against every secret, in constant time.
fn matches(secrets: &[Secret], parts: &[&[u8]], signatures: &[Vec<u8>]) -> Result<(), SignatureError> {
    let mut good = false;
    for mac in secrets.iter().filter_map(|secret| secret.mac(parts)) {
        for signature in signatures {
            good |= mac.clone().verify_slice(signature).is_ok();
        }
    }
    if good { Ok(()) } else { Err(SignatureError::Mismatch) }
}

/// Seconds since 1970, as they are written in a header: digits only.
fn seconds(text: &str, header: &'static str) -> Result<i64, SignatureError> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let parsed = if digits { text.parse().ok() } else { None };
    parsed.ok_or(SignatureError::Malformed { header, why: "no whole number of seconds since 1970" })
}

fn in_time(signed: i64, now: Timestamp, tolerance: Duration) -> Result<(), SignatureError> {
    let seconds = now.as_second().saturating_sub(signed);
    if seconds.unsigned_abs() <= tolerance.as_secs() || planted!("stale-taken") {
        return Ok(());
    }
    Err(SignatureError::Stale { seconds, tolerance })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let digit = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
    text.as_bytes().chunks(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

fn tag(secret: &Secret, parts: &[&[u8]]) -> Vec<u8> {
    secret.mac(parts).map(|mac| mac.finalize().into_bytes().to_vec()).unwrap_or_default()
}

/// Standard Webhooks: `webhook-id`, `webhook-timestamp`, and in `webhook-signature` one or more of `v1,` and base64,
/// over `id.timestamp.body`.
///
/// Source: the specification of Standard Webhooks, version 1.
pub mod standard {
    use super::*;

    /// The message's id: the same each time it is sent.
    pub const ID: &str = "webhook-id";
    /// When this attempt was signed, in seconds since 1970.
    pub const TIMESTAMP: &str = "webhook-timestamp";
    /// The signatures, separated by spaces.
    pub const SIGNATURE: &str = "webhook-signature";

    /// The value of [`SIGNATURE`]: one signature for each secret.
    pub fn sign(secrets: &[Secret], id: &str, now: Timestamp, body: &[u8]) -> String {
        let time = now.as_second().to_string();
        let signed = secrets.iter().map(|secret| {
            let tag = tag(secret, &[id.as_bytes(), b".", time.as_bytes(), b".", body]);
            format!("v1,{}", BASE64.encode(tag))
        });
        signed.collect::<Vec<_>>().join(" ")
    }

    /// Whether one of the signatures is that of this body, and `timestamp` is near enough to `now`.
    ///
    /// # Errors
    /// Why it is not good. Signatures of other versions than `v1` count as not there.
    pub fn verify(
        secrets: &[Secret],
        id: &str,
        timestamp: &str,
        signature: &str,
        body: &[u8],
        now: Timestamp,
        tolerance: Duration,
    ) -> Result<(), SignatureError> {
        let signed = seconds(timestamp, TIMESTAMP)?;
        let signatures: Vec<Vec<u8>> = signature
            .split(' ')
            .filter_map(|one| one.strip_prefix("v1,"))
            .filter_map(|encoded| BASE64.decode(encoded).ok())
            .collect();
        if signatures.is_empty() {
            return Err(SignatureError::Malformed { header: SIGNATURE, why: "no `v1,` and base64 in it" });
        }
        // As it was written: what is signed is the text.
        matches(secrets, &[id.as_bytes(), b".", timestamp.as_bytes(), b".", body], &signatures)?;
        in_time(signed, now, tolerance)
    }
}

/// GitHub: `X-Hub-Signature-256: sha256=` and hex, over the body. No time is signed.
///
/// Source: GitHub's documentation, "Validating webhook deliveries".
pub mod github {
    use super::*;

    /// The signature.
    pub const SIGNATURE: &str = "x-hub-signature-256";
    /// The id of a delivery: the same when GitHub delivers it again.
    pub const ID: &str = "x-github-delivery";

    /// The value of [`SIGNATURE`].
    pub fn sign(secret: &Secret, body: &[u8]) -> String {
        format!("sha256={}", hex(&tag(secret, &[body])))
    }

    /// Whether it is the signature of this body with one of the secrets.
    ///
    /// # Errors
    /// Why it is not good.
    pub fn verify(secrets: &[Secret], signature: &str, body: &[u8]) -> Result<(), SignatureError> {
        let tag = signature.strip_prefix("sha256=").and_then(unhex);
        let tag = tag.ok_or(SignatureError::Malformed { header: SIGNATURE, why: "not `sha256=` and hex" })?;
        matches(secrets, &[body], &[tag])
    }
}

/// Stripe: `Stripe-Signature: t=SECONDS,v1=HEX`, over `t.body`; several `v1=` while a secret is rolled. The secret is
/// the whole text, `whsec_` included.
///
/// Source: Stripe's documentation, "Verify webhook signatures manually".
pub mod stripe {
    use super::*;

    /// The time and the signatures.
    pub const SIGNATURE: &str = "stripe-signature";

    /// The value of [`SIGNATURE`]: one `v1=` for each secret.
    pub fn sign(secrets: &[Secret], now: Timestamp, body: &[u8]) -> String {
        let time = now.as_second().to_string();
        secrets.iter().fold(format!("t={time}"), |header, secret| {
            format!("{header},v1={}", hex(&tag(secret, &[time.as_bytes(), b".", body])))
        })
    }

    /// Whether one of the signatures is that of this body, and its time is near enough to `now`.
    ///
    /// # Errors
    /// Why it is not good. Other schemes than `v1` count as not there.
    pub fn verify(
        secrets: &[Secret],
        header: &str,
        body: &[u8],
        now: Timestamp,
        tolerance: Duration,
    ) -> Result<(), SignatureError> {
        let malformed = |why| SignatureError::Malformed { header: SIGNATURE, why };
        let named = |name| header.split(',').filter_map(move |item| item.trim().strip_prefix(name));
        let mut times = named("t=");
        let time = times.next().ok_or(malformed("no `t=` in it"))?;
        if times.next().is_some() {
            return Err(malformed("more than one `t=` in it"));
        }
        let signed = seconds(time, SIGNATURE)?;
        let signatures: Vec<Vec<u8>> = named("v1=").filter_map(unhex).collect();
        if signatures.is_empty() {
            return Err(malformed("no `v1=` and hex in it"));
        }
        matches(secrets, &[time.as_bytes(), b".", body], &signatures)?;
        in_time(signed, now, tolerance)
    }
}

#[cfg(test)]
mod tests;
