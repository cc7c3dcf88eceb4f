//! A login on the test server that owns nothing and has some of the roles.

use postbox::{Postgres, Settings};

use crate::{Fresh, Testable, clean_up, shared_url, unique};

/// A login of a name that nobody else has. Dropped, it leaves nothing behind.
pub struct Login {
    /// Its name.
    pub name: String,
    /// The settings of the postbox that it was made for, with this login.
    pub settings: Settings,
}

impl Login {
    /// Makes one with these of the schema's roles.
    pub async fn with(fresh: &Fresh<Postgres>, roles: &[&str]) -> Login {
        let name = unique("postbox_login");
        let schema = fresh.schema();
        // The server may ask for a password, or not.
        let mut sql = format!("create role {name} login password '{name}'");
        for role in roles {
            sql.push_str(&format!("; grant {schema}_{role} to {name}"));
        }
        Postgres::execute(fresh, &sql).await;
        let url = shared_url();
        let (scheme, rest) = url.split_once("://").expect("a URL");
        let place = rest.split_once('@').map_or(rest, |(_, place)| place);
        let settings = fresh.settings.clone().url(format!("{scheme}://{name}:{name}@{place}"));
        Login { name, settings }
    }

    /// Where it logs in.
    pub fn url(&self) -> String {
        self.settings.database_url().unwrap_or_default().to_owned()
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        let name = &self.name;
        clean_up(shared_url(), vec![format!("drop owned by {name} cascade"), format!("drop role if exists {name}")]);
    }
}
