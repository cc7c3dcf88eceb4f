//! Who lives: a lock on a file beside the database, which the system lets go when a process ends.
//!
//! A sign of life costs no write, so that a handler that holds the only writer for long keeps
//! nobody from living.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use uuid::Uuid;

use crate::error::Error;

/// The locks that this store's workers live by, and where others have theirs.
#[derive(Debug)]
pub(super) struct Alive {
    database: PathBuf,
    own: Mutex<HashMap<Uuid, File>>,
}

/// A locked file. Dropped before it is kept, it is removed again.
pub(super) struct Locked {
    file: Option<File>,
    path: PathBuf,
}

impl Locked {
    /// The file's name, without its folder.
    pub(super) fn name(&self) -> String {
        self.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if self.file.is_some() {
            remove(&self.path);
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove the lock file of a worker that has ended");
    }
}

impl Alive {
    pub(super) fn new(database: PathBuf) -> Alive {
        Alive { database, own: Mutex::default() }
    }

    /// Beside the database as this process sees it: another one may see it under another path.
    fn path(&self, worker: Uuid) -> PathBuf {
        let mut name = self.database.file_name().unwrap_or_default().to_owned();
        name.push(format!("-postbox-{worker}.lock"));
        self.database.with_file_name(name)
    }

    fn own(&self) -> MutexGuard<'_, HashMap<Uuid, File>> {
        match self.own.lock() {
            Ok(own) => own,
            Err(poisoned) => poisoned.into_inner(),
        }
    }

    /// Makes and locks the file of a worker that is about to register.
    pub(super) fn lock(&self, worker: Uuid) -> Result<Locked, Error> {
        let path = self.path(worker);
        let cannot = |error: &dyn std::fmt::Display| {
            Error::Settings(format!(
                "cannot lock {}: {error}; a worker lives by a lock on a file beside the database",
                path.display()
            ))
        };
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(|e| cannot(&e))?;
        file.try_lock().map_err(|e| cannot(&e))?;
        Ok(Locked { file: Some(file), path })
    }

    /// The worker is on record: it lives for as long as the store does, or until it is let go.
    pub(super) fn keep(&self, worker: Uuid, mut locked: Locked) {
        if let Some(file) = locked.file.take() {
            self.own().insert(worker, file);
        }
    }

    /// Ends a worker's life; with `gone` its row is gone, and nobody will look for its file again.
    pub(super) fn let_go(&self, worker: Uuid, gone: bool) {
        let held = self.own().remove(&worker);
        if gone {
            remove(&self.path(worker));
        }
        drop(held);
    }

    /// Whether a worker on record lives.
    pub(super) fn lives(&self, worker: Uuid) -> bool {
        self.own().contains_key(&worker) || self.dead(worker).is_none()
    }

    /// The proof that a worker is dead: its file is not there, or its lock is free, and held by the
    /// answer from then on. `None` while it lives, and when that cannot be told.
    pub(super) fn dead(&self, worker: Uuid) -> Option<Dead> {
        if self.own().contains_key(&worker) {
            return None;
        }
        let path = self.path(worker);
        match OpenOptions::new().append(true).open(&path) {
            Ok(file) => match file.try_lock() {
                Ok(()) => Some(Dead { _lock: Some(file), path }),
                Err(TryLockError::WouldBlock) => None,
                Err(TryLockError::Error(error)) => {
                    tracing::warn!(path = %path.display(), %error, "cannot tell whether a worker lives");
                    None
                }
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Some(Dead { _lock: None, path }),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot tell whether a worker lives");
                None
            }
        }
    }
}

/// A dead worker's lock.
pub(super) struct Dead {
    _lock: Option<File>,
    path: PathBuf,
}

impl Dead {
    /// Its row is gone: the file has no meaning any more.
    pub(super) fn bury(self) {
        remove(&self.path);
    }
}
