//! The group in the stream: made, made again, looked at, and its consumers forgotten.

use redis::{Value, cmd, pipe};

use super::reply::{self, Id};
use super::{RedisSource, millis};
use crate::error::BrokerError;
use crate::redis_client::{Trouble, unsafe_settings};

/// KEYS: the stream. ARGV: the group, and the idle time in milliseconds.
const FORGET: &str = "local forgotten = 0
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for at = 1, #flat, 2 do consumer[flat[at]] = flat[at + 1] end
  if consumer['pending'] == 0 and consumer['idle'] >= tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer['name'])
    forgotten = forgotten + 1
  end
end
return forgotten";

impl RedisSource {
    /// Makes the group where it is missing, from what is known to be done, else from the beginning.
    pub(super) async fn make_group(&mut self) -> Result<(), BrokerError> {
        let (stream, group) = (self.stream.clone(), self.group.clone());
        let checkpoint = self.checkpoint.as_deref().and_then(|c| c.parse::<Id>().ok());
        let session = self.session()?;
        let mut from = Id::ZERO;
        if let Some(checkpoint) = checkpoint {
            // A stream that has not come as far as that is another one, with nothing done.
            match session.control.ask(cmd("XINFO").arg("STREAM").arg(&stream)).await {
                Ok(info) if reply::stream_id(&info, "last-generated-id") >= Some(checkpoint) => from = checkpoint,
                Ok(_) | Err(Trouble::Server { .. }) => {}
                Err(Trouble::Broker(error)) => return Err(error),
            }
        }
        let mut create = cmd("XGROUP");
        create.arg("CREATE").arg(&stream).arg(&group).arg(from.to_string()).arg("MKSTREAM");
        match session.control.ask(&create).await {
            Ok(_) => {
                tracing::info!(stream, group, %from, "made the consumer group");
                Ok(())
            }
            Err(trouble) if trouble.is("BUSYGROUP") => Ok(()),
            Err(trouble) if trouble.is("WRONGTYPE") => {
                let words = BrokerError::from(trouble);
                Err(BrokerError::Refused(format!("the key `{stream}` holds something that is no stream: {words}")))
            }
            Err(trouble) => Err(trouble.into()),
        }
    }

    /// Deletes consumers that have been silent for long. The script is one step for Redis: none of them can be
    /// handed an entry between the look and the deletion.
    pub(super) async fn forget_consumers(&mut self) -> Result<(), BrokerError> {
        let mut script = cmd("EVAL");
        script.arg(FORGET).arg(1).arg(&self.stream).arg(&self.group).arg(millis(self.forget_after));
        match self.session()?.control.ask(&script).await {
            Ok(Value::Int(forgotten @ 1..)) => {
                tracing::info!(stream = self.stream, group = self.group, forgotten, "deleted consumers long silent");
                Ok(())
            }
            // Scripts may not be allowed here: then the names stay.
            Ok(_) | Err(Trouble::Server { .. }) => Ok(()),
            Err(Trouble::Broker(error)) => Err(error),
        }
    }

    pub(super) async fn warnings(&mut self) -> Result<Vec<String>, BrokerError> {
        let (stream, group) = (self.stream.clone(), self.group.clone());
        let control = &mut self.session()?.control;
        let mut look = pipe();
        look.cmd("XINFO").arg("STREAM").arg(&stream).cmd("XINFO").arg("GROUPS").arg(&stream);
        let answers = control.ask_all(&mut look).await?;
        let mut warnings = unsafe_settings(control).await?;
        if let [about, groups] = &answers[..]
            && let (Some(added), Some(length)) = (reply::count(about, "entries-added"), reply::count(about, "length"))
            && let Some(read) = reply::group(groups, &group).and_then(|group| group.read)
            && let Some(gone @ 1..) = added.saturating_sub(length).checked_sub(read)
        {
            warnings.push(format!(
                "at least {gone} entries of the stream {stream} were trimmed or deleted before the group {group} was handed them: they cannot be read any more"
            ));
        }
        Ok(warnings)
    }
}
