//! Doors for the fuzz targets, to what is private otherwise.

use crate::error::{Error, PublishError};
use crate::message::{Draft, Envelope, MAX_PAYLOAD_BYTES};
use crate::pattern::Pattern;
use crate::postbox::published;
use crate::settings::Settings;
use crate::store::Stored;

/// The envelope that a draft gives, if it may be published.
///
/// # Errors
/// What is wrong with the message.
pub fn envelope(draft: Draft) -> Result<Envelope, PublishError> {
    let draft = draft.checked(MAX_PAYLOAD_BYTES)?;
    Ok(published(draft, Stored::New(uuid::Uuid::now_v7()))?.into_envelope())
}

/// What PostgreSQL matches topics with.
pub fn regex(pattern: &Pattern) -> String {
    pattern.to_regex()
}

/// Settings from the text of a file and from variables.
///
/// # Errors
/// The text does not parse, or names what is no setting.
pub fn settings(toml: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Settings, Error> {
    let mut settings = Settings::defaults();
    settings.read_toml(toml, "postbox.toml")?;
    settings.read_env(variable);
    Ok(settings)
}
