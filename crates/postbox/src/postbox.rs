//! The handle: connect, publish, operate, start workers.

use std::sync::Arc;

use crate::admin::{Admin, MigrationStatus, RoleRow};
use crate::context;
use crate::error::{Error, PublishError};
use crate::message::{Draft, Envelope, IntoDraft, chunks, minted_at};
use crate::pull::PullSubscription;
use crate::router::Router;
use crate::schedule::{Schedule, Scheduled, Wish};
use crate::settings::Settings;
use crate::store::{AsConnection, Database, DeliveryId, HandlerTx, Loss, Store, Stored};
use crate::worker::WorkerBuilder;
use crate::worker::puller::{Puller, Shared};

/// A postbox in a database. Cheap to clone; clones share their connections.
#[derive(Debug)]
pub struct Postbox<Db: Database> {
    store: Db::Store,
    settings: Settings,
    max_payload_bytes: usize,
    puller: Arc<tokio::sync::Mutex<Option<Puller<Db::Store>>>>,
}

impl<Db: Database> Clone for Postbox<Db> {
    fn clone(&self) -> Self {
        Postbox {
            store: self.store.clone(),
            settings: self.settings.clone(),
            max_payload_bytes: self.max_payload_bytes,
            puller: self.puller.clone(),
        }
    }
}

/// A message as it was published: the envelope with its id, before the commit.
#[derive(Debug, Clone)]
pub struct Published {
    envelope: Envelope,
    duplicate: bool,
    coalesced_into: Vec<DeliveryId>,
}

impl Published {
    /// The dedup key was taken by a message with the same body: nothing was stored, and the
    /// envelope carries that message's id.
    pub fn is_duplicate(&self) -> bool {
        self.duplicate
    }

    /// Deliveries that stand for this message where a subscription takes one delivery of a key at a time
    /// ([`Unique::Coalesce`](crate::Unique::Coalesce)): it has none of its own there. Not told to drivers
    /// other than sqlx; [`Admin::coalesced`](crate::admin::Admin::coalesced) tells always.
    pub fn coalesced_into(&self) -> &[DeliveryId] {
        &self.coalesced_into
    }

    /// The envelope.
    pub fn into_envelope(self) -> Envelope {
        self.envelope
    }
}

impl std::ops::Deref for Published {
    type Target = Envelope;

    fn deref(&self) -> &Envelope {
        &self.envelope
    }
}

impl<Db: Database> Postbox<Db> {
    /// Connects to `postgres://…` or `sqlite:FILE`; everything else comes from the environment and
    /// `postbox.toml` (see [`Settings`]). SQLite is migrated; an old or missing schema on
    /// PostgreSQL is refused.
    ///
    /// # Errors
    /// [`Error::Schema`] with the command that mends it; [`Error::Settings`]; or the database did
    /// not answer.
    pub async fn connect(url: &str) -> Result<Self, Error> {
        Self::open(Settings::load()?.url(url)).await
    }

    /// Connects as the settings say.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn open(settings: Settings) -> Result<Self, Error> {
        let postbox = Self::open_unchecked(settings).await?;
        postbox.check_schema().await?;
        Ok(postbox)
    }

    /// Connects and brings the schema to this version first.
    ///
    /// # Errors
    /// As [`connect`](Self::connect), or the role may not create the schema.
    pub async fn migrate(settings: Settings) -> Result<Self, Error> {
        let postbox = Self::open_unchecked(settings).await?;
        postbox.store.migrate().await?;
        Ok(postbox)
    }

    /// Connects without a look at the schema: for migrating.
    ///
    /// # Errors
    /// [`Error::Settings`], or the database did not answer.
    pub async fn open_unchecked(settings: Settings) -> Result<Self, Error> {
        let max_payload_bytes = settings.max_payload_bytes()?;
        let store = Db::Store::connect(&settings).await?;
        Ok(Postbox { store, settings, max_payload_bytes, puller: Arc::default() })
    }

    async fn check_schema(&self) -> Result<(), Error> {
        let status = self.store.migration_status().await?;
        let needed = status.migrations.len() as u32;
        let found = status.migrations.iter().filter(|(_, _, at)| at.is_some()).count() as u32;
        if found == needed {
            return Ok(());
        }
        Err(Error::Schema {
            mend: format!("run `postbox migrate up --schema {}`, or `Postbox::migrate` at start", status.schema),
            schema: status.schema,
            found,
            needed,
        })
    }

    /// Brings the schema to this version. The names of the migrations that were applied.
    ///
    /// # Errors
    /// The role may not, or the database did not answer. Nothing is half applied.
    pub async fn migrate_up(&self) -> Result<Vec<String>, Error> {
        self.store.migrate().await
    }

    /// Which migrations there are, and which were applied.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn migration_status(&self) -> Result<MigrationStatus, Error> {
        self.store.migration_status().await
    }

    /// Takes migrations back, newest first, down to a version; 0 leaves nothing of the schema but what
    /// others put into it. Each commits whole or not at all. The names of those taken back.
    ///
    /// # Errors
    /// [`Error::Refused`] if messages would be lost, workers are alive, or the schema is below that
    /// version already; the role may not; or the database did not answer.
    pub async fn migrate_down(&self, to: u32) -> Result<Vec<String>, Error> {
        self.store.migrate_down(to, Loss::Refused).await
    }

    /// The same, whatever is lost, and whoever works on it: all messages, and the whole record.
    ///
    /// # Errors
    /// As [`migrate_down`](Self::migrate_down), but for the messages and the workers.
    pub async fn migrate_down_and_lose_data(&self, to: u32) -> Result<Vec<String>, Error> {
        self.store.migrate_down(to, Loss::Accepted).await
    }

    /// The roles that programs can be given on PostgreSQL, and which of them are there; none on SQLite.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn roles(&self) -> Result<Vec<RoleRow>, Error> {
        self.store.roles().await
    }

    /// Makes the roles that are not there and gives all of them their rights, as the migration does
    /// where it may. It can be repeated.
    ///
    /// # Errors
    /// [`Error::Refused`] with the names of those that could not be made; those that are there have
    /// their rights then. Or this login does not own the schema.
    pub async fn grant_roles(&self) -> Result<Vec<RoleRow>, Error> {
        self.store.grant_roles().await
    }

    /// The settings it was opened with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The verbs beneath, for the store's own suite and tools.
    #[doc(hidden)]
    pub fn store(&self) -> &Db::Store {
        &self.store
    }

    /// Stores a message and its deliveries in the caller's transaction. Never commits; on a bare
    /// connection it is one atomic statement.
    ///
    /// Cancel safety: a dropped future leaves the transaction in whatever state the driver is in;
    /// roll it back.
    ///
    /// # Errors
    /// [`PublishError`]: what is wrong with the message, or with the database.
    pub async fn publish<C>(&self, connection: &mut C, message: impl IntoDraft) -> Result<Published, PublishError>
    where
        C: AsConnection<Db> + ?Sized,
    {
        let draft = message.into_draft()?;
        let mut published = self.publish_all(connection, [draft]).await?;
        Ok(published.remove(0))
    }

    /// Stores many messages, in order, in bulk: the first that is wrong is told. Checks come first,
    /// so a message that is refused leaves nothing behind; after a
    /// [`PublishError::DedupConflict`] the others are in the transaction, and it is the caller's to
    /// commit or roll back. On a bare connection each statement of up to 1000 commits by itself, so
    /// use a transaction.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub async fn publish_all<C, M>(&self, connection: &mut C, messages: M) -> Result<Vec<Published>, PublishError>
    where
        C: AsConnection<Db> + ?Sized,
        M: IntoIterator,
        M::Item: IntoDraft,
    {
        let drafts: Vec<Draft> = messages.into_iter().map(|m| self.checked(m)).collect::<Result<_, _>>()?;
        self.store_all(connection.as_connection(), drafts).await?.into_iter().collect()
    }

    /// Takes the lock of a key until the transaction ends, and waits for whoever has it: transactions that take it
    /// before they publish come in the order in which they commit, where a subscription is `ordered()`. On
    /// SQLite, which has one writer, it does nothing.
    ///
    /// Cancel safety: as [`publish`](Self::publish).
    ///
    /// # Errors
    /// The key is empty, or the database did not answer.
    pub async fn lock_key<C>(&self, connection: &mut C, key: &str) -> Result<(), Error>
    where
        C: AsConnection<Db> + ?Sized,
    {
        if key.is_empty() {
            return Err(Error::Refused("`lock_key` needs a key".into()));
        }
        Db::Store::lock_key(connection.as_connection(), &self.store, key).await
    }

    /// Publishes in a transaction of its own, and commits it: for programs that have none.
    ///
    /// # Errors
    /// As [`publish`](Self::publish), or the commit failed. After an error nothing is stored, unless
    /// the connection broke during the commit: then that is not known, and a dedup key tells.
    pub async fn publish_now<M>(&self, messages: M) -> Result<Vec<Published>, Error>
    where
        M: IntoIterator,
        M::Item: IntoDraft,
    {
        let drafts: Vec<Draft> = messages.into_iter().map(|m| self.checked(m)).collect::<Result<_, _>>()?;
        let mut tx = self.store.begin().await?;
        let published = self.store_all(tx.connection(), drafts).await?;
        let published = published.into_iter().collect::<Result<_, _>>()?;
        self.store.commit(tx).await?;
        Ok(published)
    }

    /// Publishes what can be, each by itself, in a transaction of its own, and commits it. The
    /// results are in the order given.
    ///
    /// # Errors
    /// The database did not answer; nothing is stored then, with the exception that
    /// [`publish_now`](Self::publish_now) names.
    pub async fn publish_each_now<M>(&self, messages: M) -> Result<Vec<Result<Published, PublishError>>, Error>
    where
        M: IntoIterator,
        M::Item: IntoDraft,
    {
        let checked: Vec<Result<Draft, PublishError>> = messages.into_iter().map(|m| self.checked(m)).collect();
        let good: Vec<Draft> = checked.iter().flatten().cloned().collect();
        let mut tx = self.store.begin().await?;
        let mut stored = self.store_all(tx.connection(), good).await?.into_iter();
        self.store.commit(tx).await?;
        let lost = || Err(PublishError::Database(sqlx::Error::RowNotFound));
        Ok(checked.into_iter().map(|c| c.and_then(|_| stored.next().unwrap_or_else(lost))).collect())
    }

    pub(crate) fn max_payload_bytes(&self) -> usize {
        self.max_payload_bytes
    }

    fn checked(&self, message: impl IntoDraft) -> Result<Draft, PublishError> {
        context::inherit(message.into_draft()?).checked(self.max_payload_bytes)
    }

    async fn store_all(
        &self,
        connection: &mut Db::Connection,
        drafts: Vec<Draft>,
    ) -> Result<Vec<Result<Published, PublishError>>, PublishError> {
        let mut stored = Vec::with_capacity(drafts.len());
        for chunk in chunks(&drafts) {
            stored.extend(Db::Store::publish(connection, &self.store, chunk).await?);
        }
        Ok(drafts.into_iter().zip(stored).map(|(draft, stored)| published(draft, stored)).collect())
    }

    /// Declares a schedule of this application: it is made if it is not there, and made to say this if it
    /// says something else, unless an operator has added or edited it; then it stays as they want it.
    /// Whether it is paused stays as it is, too. Workers publish its messages; any worker of the database
    /// does.
    ///
    /// # Errors
    /// [`Error::Settings`] or [`Error::Publish`]: what is wrong with it; or the database did not answer.
    pub async fn schedule(&self, schedule: Schedule) -> Result<Scheduled, Error> {
        self.declare_schedule(&self.settings.application()?, schedule).await
    }

    pub(crate) async fn declare_schedule(&self, application: &str, schedule: Schedule) -> Result<Scheduled, Error> {
        let (name, plan) = schedule.checked(application, self.max_payload_bytes)?;
        let wish = Wish::Declare(plan);
        let (scheduled, _) = self.store.change_schedule(application, &name, &wish, application, "").await?;
        if scheduled == Scheduled::Edited {
            tracing::info!(schedule = name, "an operator has edited this schedule: it stays as it is stored");
        }
        Ok(scheduled)
    }

    /// The operator's door: status, list, show, retry, resolve.
    pub fn admin(&self) -> Admin<Db> {
        Admin::new(self)
    }

    /// A worker for these routes, to be started.
    pub fn worker(&self, router: Router<Db>) -> WorkerBuilder<Db> {
        WorkerBuilder::new(self, router)
    }

    /// A subscription to pull from, one delivery at a time, each in a transaction of the caller's.
    pub fn subscription(&self, name: impl Into<String>) -> PullSubscription<Db> {
        PullSubscription::new(self, name.into())
    }

    /// The same, if it was started already.
    pub(crate) async fn running_puller(&self) -> Option<Arc<Shared<Db::Store>>> {
        self.puller.lock().await.as_ref().filter(|p| !p.is_over()).map(Puller::shared)
    }

    /// What stands behind this process's pulls; started with the first one.
    pub(crate) async fn puller(&self) -> Result<Arc<Shared<Db::Store>>, Error> {
        let mut puller = self.puller.lock().await;
        if let Some(running) = puller.as_ref().filter(|p| !p.is_over()) {
            return Ok(running.shared());
        }
        let started = Puller::start(self.store.clone(), &self.settings).await?;
        Ok(puller.insert(started).shared())
    }

    /// Closes its connections, and those of its clones. What was pulled and rolled back is settled first.
    pub async fn close(&self) {
        if let Some(puller) = self.puller.lock().await.take() {
            puller.stop().await;
        }
        self.store.close().await;
    }
}

pub(crate) fn published(draft: Draft, stored: Stored) -> Result<Published, PublishError> {
    let (id, duplicate, coalesced_into) = match stored {
        Stored::New(id) => (id, false, Vec::new()),
        Stored::Coalesced { id, into } => (id, false, into),
        Stored::Duplicate { existing, same_body: true } => (existing, true, Vec::new()),
        Stored::Duplicate { existing, same_body: false } => {
            return Err(PublishError::DedupConflict {
                topic: draft.topic,
                key: draft.dedup.map(|d| d.key).unwrap_or_default(),
                existing,
            });
        }
    };
    let envelope = Envelope {
        id,
        topic: draft.topic,
        key: draft.key,
        payload: draft.payload,
        headers: draft.headers,
        occurred_at: draft.occurred_at.unwrap_or_else(|| minted_at(id)),
        received_at: minted_at(id),
        source: draft.source,
        external_id: draft.external_id,
        correlation_id: draft.correlation_id,
        causation_id: draft.causation_id,
        max_attempts: draft.max_attempts,
    };
    Ok(Published { envelope, duplicate, coalesced_into })
}
