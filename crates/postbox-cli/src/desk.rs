//! What every command has at hand: the settings, who acts, where answers go.

use std::path::{Path, PathBuf};

use postbox::admin::MAX_REASON_BYTES;
use postbox::{Backend, Database, Error, Postbox, Settings, hide_password};

use crate::failure::{Failure, NOT_FOUND, REFUSED, USAGE, sqlstate};
use crate::flags::Global;
use crate::output::Output;
use crate::text::{plain, quoted};

/// The file of the settings: the one that was named, else the usual one if it is there.
pub(crate) fn settings_file(global: &Global) -> Option<PathBuf> {
    let usual = Path::new("postbox.toml");
    global.config.clone().or_else(|| usual.exists().then(|| usual.to_owned()))
}

/// A command to run next, with the same file, before anything of it is read.
pub(crate) fn about_file(global: &Global, rest: &str) -> String {
    let named = global.config.as_ref().map(|file| format!(" --config {}", quoted(&file.display().to_string())));
    format!("{}{} {rest}", program(), named.unwrap_or_default())
}

/// Where a command works.
#[derive(Debug)]
pub(crate) struct Desk<'a> {
    pub(crate) settings: Settings,
    pub(crate) output: &'a Output,
    /// Who acts.
    pub(crate) actor: String,
    /// Whose subscriptions are meant, if somebody said so.
    pub(crate) application: Option<String>,
    /// The settings' file, if there is one.
    pub(crate) file: Option<PathBuf>,
    /// What in it is no setting, each with its line.
    pub(crate) mistakes: Vec<(usize, String)>,
    prefix: String,
    /// The same without the database.
    elsewhere: String,
    /// `--actor` as it was typed.
    acting: String,
}

impl<'a> Desk<'a> {
    /// Reads the settings: flag, then environment, then file, then default. An empty flag counts as
    /// not given. What in the file is no setting is left for [`Desk::no_mistakes`], or for `serve`, which tells it
    /// with what else is wrong.
    pub(crate) fn new(global: Global, output: &'a Output) -> Result<Desk<'a>, Failure> {
        let mut prefix = program();
        let mut elsewhere = program();
        let file = settings_file(&global);
        let (mut settings, mistakes) = Settings::load_with_mistakes(file.as_deref()).map_err(|e| {
            let next = format!("mend the file, then: {}", about_file(&global, "config show --origin"));
            Failure::of(&e, "read the settings", next)
        })?;
        for (name, flag, value) in [
            ("database_url", "--database-url", &global.database_url),
            ("schema", "--schema", &global.schema),
            ("application", "--application", &global.application),
        ] {
            if let Some(value) = value.as_deref().filter(|v| !v.is_empty()) {
                settings = settings.set_from(name, value, flag);
                let typed = format!(" {flag} {}", quoted(&hide_password(value)));
                prefix.push_str(&typed);
                if name != "database_url" {
                    elsewhere.push_str(&typed);
                }
            }
        }
        if let Some(file) = &global.config {
            let typed = format!(" --config {}", quoted(&file.display().to_string()));
            prefix.push_str(&typed);
            elsewhere.push_str(&typed);
        }
        let acting = global.actor.as_deref().filter(|a| !a.trim().is_empty());
        let acting = acting.map_or_else(String::new, |actor| format!(" --actor {}", quoted(&plain(actor))));
        let named = |name| std::env::var(name).ok();
        let actor =
            global.actor.or_else(|| named("USER")).into_iter().chain(named("LOGNAME")).find(|a| !a.trim().is_empty());
        Ok(Desk {
            settings,
            output,
            actor: actor.unwrap_or_else(|| "unknown".into()),
            application: global.application.filter(|a| !a.is_empty()),
            file,
            mistakes,
            prefix,
            elsewhere,
            acting,
        })
    }

    /// Goes on only with a file whose settings all are some.
    pub(crate) fn no_mistakes(&self) -> Result<(), Failure> {
        let (Some((line, why)), Some(file)) = (self.mistakes.first(), &self.file) else { return Ok(()) };
        let why = format!("{}, line {line}: {why}", file.display());
        let next = format!("mend the file, then: {}", self.command("config show --origin"));
        Err(usage("read the settings", why, next))
    }

    /// The application that a new subscription belongs to: of the flag or of a setting, if one says it.
    pub(crate) fn whose(&self) -> Option<String> {
        let said = |(name, _, origin): &(&str, String, String)| *name == "application" && origin != "default";
        let setting = || self.settings.shown().into_iter().find(said).map(|(_, application, _)| application);
        self.application.clone().or_else(setting)
    }

    /// A command to run next, against the same database.
    pub(crate) fn command(&self, rest: &str) -> String {
        format!("{} {rest}", self.prefix)
    }

    /// The same for what goes on record, by the same actor.
    pub(crate) fn action(&self, rest: &str) -> String {
        format!("{}{} {rest}", self.prefix, self.acting)
    }

    /// For a command to run next: whose a thing is, unless the command says so by itself.
    pub(crate) fn of(&self, application: &str) -> String {
        match self.application {
            Some(_) => String::new(),
            None => format!(" --application {}", quoted(&plain(application))),
        }
    }

    /// What to look at when a delivery was not changed.
    pub(crate) fn look_at(&self, delivery: i64, error: &Error) -> String {
        match error {
            Error::NotFound(_) => self.command("list"),
            _ => self.command(&format!("show {delivery}")),
        }
    }

    /// Which kind of database it is.
    pub(crate) fn backend(&self) -> Result<Backend, Failure> {
        self.settings.backend().map_err(|e| {
            Failure::of(&e, "find the database", format!("{} --database-url sqlite:shop.db status", self.elsewhere))
        })
    }

    /// Connects to a database that has to be there already.
    pub(crate) async fn open<Db: Database>(&self) -> Result<Postbox<Db>, Failure> {
        self.there_is_a_file()?;
        self.open_or_create().await
    }

    /// The same without a look at the schema.
    pub(crate) async fn open_as_it_is<Db: Database>(&self) -> Result<Postbox<Db>, Failure> {
        self.there_is_a_file()?;
        Postbox::open_unchecked(self.settings.clone()).await.map_err(|e| self.no_connection(&e))
    }

    /// Connects; a SQLite file is made if there is none, and that is told.
    pub(crate) async fn open_or_create<Db: Database>(&self) -> Result<Postbox<Db>, Failure> {
        let makes = self.makes_a_file();
        let postbox = Postbox::open(self.settings.clone()).await.map_err(|e| self.no_connection(&e))?;
        if makes {
            let settings = self.command("config show --origin");
            self.output.prose(&format!("opening it made the file; if another one was meant: {settings}"));
        }
        Ok(postbox)
    }

    /// What to say when the database cannot be reached.
    pub(crate) fn no_connection(&self, error: &Error) -> Failure {
        let settings = self.command("config show --origin");
        let next = match (error, sqlstate(error).as_deref()) {
            (Error::Schema { .. }, _) => self.command("migrate up"),
            (_, Some("3D000")) => format!("make the database with createdb, then: {}", self.command("migrate up")),
            (_, Some("28000" | "28P01")) => format!("mend the user or the password: {settings}"),
            (Error::Database(sqlx::Error::Io(_)), _) => format!("start the server, or mend the URL: {settings}"),
            _ => settings,
        };
        Failure::of(error, "open the database", next)
    }

    /// SQLite would make a missing file, and a typing mistake would look like an empty postbox.
    fn there_is_a_file(&self) -> Result<(), Failure> {
        match self.sqlite_file() {
            Some(path) if self.makes_a_file() => {
                let why = format!("there is no file {path}");
                Err(Failure::new(NOT_FOUND, "open the database", why, self.command("migrate up")))
            }
            _ => Ok(()),
        }
    }

    fn sqlite_file(&self) -> Option<String> {
        let url = self.settings.database_url()?.strip_prefix("sqlite:")?;
        let path = url.strip_prefix("//").unwrap_or(url).split('?').next().unwrap_or_default();
        (!path.is_empty() && path != ":memory:" && !url.contains("mode=memory") && !path.contains('%'))
            .then(|| path.to_owned())
    }

    /// A reason that says something; it goes on record. `hint` is what it says, in words.
    pub(crate) fn reason(
        &self,
        given: Option<String>,
        tried: &str,
        same_command: &str,
        hint: &str,
    ) -> Result<String, Failure> {
        let next = || format!("{same_command} --reason \"{hint}\"");
        let Some(reason) = given.filter(|reason| !reason.trim().is_empty()) else {
            let why = "it needs a reason, which goes on record; nothing was done";
            return Err(Failure::new(REFUSED, tried, why, next()));
        };
        if reason.len() > MAX_REASON_BYTES {
            let why = format!(
                "the reason is {} bytes long; the limit is {MAX_REASON_BYTES}; nothing was done: keep long texts elsewhere and name the place",
                reason.len()
            );
            return Err(Failure::new(REFUSED, tried, why, next()));
        }
        Ok(reason)
    }

    /// What is wanted lies with a SQLite file that is not there yet.
    pub(crate) fn makes_a_file(&self) -> bool {
        self.sqlite_file().is_some_and(|path| !Path::new(&path).exists())
    }
}

/// The command as it was called, so that what is printed can be run.
pub(crate) fn program() -> String {
    match std::env::args().next() {
        Some(name) if name.contains('/') => quoted(&name),
        _ => "postbox".into(),
    }
}

/// What was typed cannot be meant.
pub(crate) fn usage(tried: &str, why: impl Into<String>, next: String) -> Failure {
    Failure::new(USAGE, tried, why, next)
}
