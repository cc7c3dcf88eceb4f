//! What operators do about schedules.

use super::{Admin, AuditEntry, short_enough};
use crate::error::Error;
use crate::schedule::{Schedule, ScheduleEdit, ScheduleRow, Wish};
use crate::store::{Database, Store};

impl<Db: Database> Admin<Db> {
    /// All schedules, by application and name.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn schedules(&self) -> Result<Vec<ScheduleRow>, Error> {
        self.store.schedules().await
    }

    /// Adds a schedule. What a program declares under its name does not change it any more.
    ///
    /// # Errors
    /// [`Error::Settings`] or [`Error::Publish`]: what is wrong with it; [`Error::Refused`] if there is one of
    /// that name, or the reason is too long; or the database did not answer.
    pub async fn add_schedule(
        &self,
        application: &str,
        schedule: Schedule,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        let (name, plan) = schedule.checked(application, self.max_payload_bytes)?;
        self.change_schedule(application, &name, &Wish::Add(plan), actor, reason).await
    }

    /// Changes what a schedule says, from its next tick on. Ticks that are due and not published yet are not
    /// published any more, if its times change.
    ///
    /// # Errors
    /// As [`add_schedule`](Self::add_schedule); [`Error::NotFound`]; [`Error::Conflict`] if it has moved on.
    pub async fn edit_schedule(
        &self,
        application: &str,
        name: &str,
        edit: &ScheduleEdit,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        let wish = Wish::Edit(edit.clone(), self.max_payload_bytes);
        self.change_schedule(application, name, &wish, actor, reason).await
    }

    /// No ticks until it is resumed. Those of that time are not missed: they are not published.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Refused`] if it is paused, or the reason is too long; or the database
    /// did not answer.
    pub async fn pause_schedule(
        &self,
        application: &str,
        name: &str,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        self.change_schedule(application, name, &Wish::Pause, actor, reason).await
    }

    /// Goes on with the first tick to come.
    ///
    /// # Errors
    /// As [`pause_schedule`](Self::pause_schedule), if it is not paused.
    pub async fn resume_schedule(
        &self,
        application: &str,
        name: &str,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        self.change_schedule(application, name, &Wish::Resume, actor, reason).await
    }

    /// Has a worker publish its message now, beside its ticks, also while it is paused. Asked for again
    /// before a worker has done so, it is one message.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Refused`] if the reason is too long; or the database did not answer.
    pub async fn run_schedule(
        &self,
        application: &str,
        name: &str,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        self.change_schedule(application, name, &Wish::Run, actor, reason).await
    }

    /// Removes a schedule; the messages it has published stay. A program that still declares it makes it
    /// again when it next starts: pause it to stop it for good.
    ///
    /// # Errors
    /// As [`run_schedule`](Self::run_schedule).
    pub async fn remove_schedule(
        &self,
        application: &str,
        name: &str,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        self.change_schedule(application, name, &Wish::Remove, actor, reason).await
    }

    async fn change_schedule(
        &self,
        application: &str,
        name: &str,
        wish: &Wish,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        short_enough(reason)?;
        let (_, entry) = self.store.change_schedule(application, name, wish, actor, reason).await?;
        // Whatever operators do leaves one.
        entry.ok_or_else(|| Error::Refused(format!("nothing was recorded about the schedule `{name}`")))
    }
}
