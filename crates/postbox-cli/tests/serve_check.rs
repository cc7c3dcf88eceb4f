//! `postbox serve --check`: what the file says, and what is wrong with it.

use std::path::Path;

use crate::place::{Place, Ran};
use serde_json::Value;

/// As it stands in the docs, with everything in it.
const FILE: &str = r#"
application = "shop"
database_url = "postgres://ana:secret@localhost/shop"
http = "127.0.0.1:7070"
concurrency = 20

[[source]]
name = "payments"
kind = "redis"
url = "redis://:secret@localhost:6379"
stream = "payments"
group = "shop"
consumer = "host-a"
batch = 100
block = "500ms"

[[source]]
name = "github"
kind = "webhook"
scheme = "github"
secret = { env = "GITHUB_SECRET" }
topic = "github.{header:x-github-event}.{payload:action}"
id = "{header:x-github-delivery}"
key = "{payload:repository.full_name}"

[[relay]]
name = "to-redis"
pattern = "orders.>"
kind = "redis"
url = "redis://localhost:6379"
to = "shop.{topic}"
envelope = "cloudevents-binary"
ordered = true

[[relay]]
name = "log"
pattern = ">"
kind = "stdout"
ordered = false

[[push]]
name = "crm"
pattern = "orders.placed"
url = "http://localhost:8000/events"
secret = [{ file = "new-secret" }, { env = "CRM_SECRET" }]
operation = true
"#;

fn place(file: &str) -> Place {
    let place = Place::new();
    std::fs::write(place.file("postbox.toml"), file).expect("written");
    std::fs::write(place.file("new-secret"), "whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0\n").expect("written");
    place
}

fn check(place: &Place, more: &[&str]) -> Ran {
    let args: Vec<&str> = ["serve", "--check"].iter().chain(more).copied().collect();
    let mut command = place.command(&args);
    command.env("GITHUB_SECRET", "it's a secret").env("CRM_SECRET", "another secret");
    command.env_remove("DATABASE_URL");
    Ran::of(&command.output().expect("runs"))
}

#[test]
fn a_file_that_is_fine_is_told() {
    let place = place(FILE);
    let ran = check(&place, &[]).ends(0);
    for line in [
        "postbox.toml is fine; it would",
        "  work on postgres://ana:***@localhost/shop, as the application shop",
        "  listen at http://127.0.0.1:7070: GET /health and /ready",
        "  receive from the Redis stream payments at redis://:***@localhost:6379 (payments)",
        "  receive at POST /in/github, signed as github (github)",
        "  relay orders.> to the Redis stream shop.{topic} at redis://localhost:6379, in order of each key (to-redis)",
        "  relay > to standard output, in no order (log)",
        "  push orders.placed to http://localhost:8000/events, signed, as an operation (crm)",
    ] {
        assert!(ran.out.lines().any(|told| told == line), "no {line:?} in\n{}", ran.out);
    }
    assert!(!ran.out.contains("secret\n") && !ran.out.contains("it's"), "{}", ran.out);
    let told = check(&place, &["--json"]).ends(0).json();
    assert_eq!((&told["ok"], &told["http"]), (&Value::Bool(true), &Value::from("127.0.0.1:7070")));
    assert_eq!(told["relays"][0]["pattern"], "orders.>");
    // The same file holds the settings of every command.
    let mut show = place.command(&["config", "show", "--origin"]);
    let shown = Ran::of(&show.env_remove("DATABASE_URL").output().expect("runs")).ends(0);
    assert!(
        shown.out.lines().any(|l| l.contains("concurrency") && l.contains("20") && l.contains("postbox.toml, line 5"))
    );
}

#[test]
fn the_environment_says_where_the_database_is_first() {
    let place = place(FILE);
    let mut command = place.command(&["serve", "--check"]);
    command.env("GITHUB_SECRET", "a").env("CRM_SECRET", "b").env("DATABASE_URL", "sqlite:own.db");
    let ran = Ran::of(&command.output().expect("runs")).ends(0);
    assert!(ran.out.contains("work on sqlite:own.db"), "{}", ran.out);
}

/// The mistakes of a file, each with its line.
fn mistakes(file: &str) -> Vec<(u64, String)> {
    let place = place(file);
    let ran = check(&place, &["--json"]).ends(1);
    let told = ran.json();
    assert_eq!(told["ok"], false);
    let errors = told["errors"].as_array().expect("a list").iter();
    let all: Vec<(u64, String)> =
        errors.map(|e| (e["line"].as_u64().unwrap_or(0), e["error"].as_str().expect("words").to_owned())).collect();
    for (line, why) in &all {
        let place =
            if *line > 0 { format!("postbox.toml, line {line}: {why}") } else { format!("postbox.toml: {why}") };
        assert!(ran.err.contains(&place), "for people, too: {place}\n{}", ran.err);
    }
    assert!(ran.err.contains("next: mend the file, then:") && ran.err.contains("serve --check"), "{}", ran.err);
    all
}

#[test]
fn all_mistakes_are_told_at_once_with_their_lines() {
    let told = mistakes(
        r#"database_url = "sqlite:shop.db"
lease = "1ms"
http = "localhost"

[[source]]
name = "payments"
kind = "redis"
url = "localhost:6379"
stram = "payments"
batch = 0

[[source]]
name = "payments"
kind = "kafka"

[[source]]
name = "git hub"
kind = "webhook"
scheme = "gitlab"
secret = "plain"
topic = "github.{header:x"
id = "constant"

[[relay]]
name = "to-redis"
pattern = "orders.>.x"
kind = "redis"
url = 6379
to = "shop.{topc}"
envelope = "xml"
ordered = "yes"

[[relay]]
name = "again"
kind = "carrier-pigeon"

[[push]]
name = "to-redis"
pattern = "orders.placed"
url = "localhost:8000"
secret = { env = "NOT_SET" }
timeout = "1y"
rate = "many"

[[push]]
"#,
    );
    let expected = [
        (0, "`lease` = `1ms` (postbox.toml, line 2) must be a duration"),
        (3, "the file: `http` = `localhost`"),
        (5, "[[source]] `payments`: it has no `stream`; add one, like stream = \"payments\""),
        (8, "[[source]] `payments`: `url` is no address of a Redis server"),
        (9, "[[source]] `payments`: there is no `stram` here; there are name, kind, url, stream, group"),
        (10, "[[source]] `payments`: `batch` must be a whole number from 1 to 10000"),
        (13, "[[source]] `payments` in line 6 has this name already"),
        (14, "the kind `kafka` comes with a later version; there are redis and webhook"),
        (17, "[[source]]: `name` must be at most 255 bytes, without spaces"),
        (19, "there is no scheme `gitlab`; there are standard, github and stripe"),
        (20, "`secret` is not written into this file; say where it is: secret = { env ="),
        (21, "`topic` = `github.{header:x`: the template has a mistake at byte 7: a `{` is not closed"),
        (22, "`id` is the same for all entries"),
        (26, "[[relay]] `to-redis`: `pattern` = `orders.>.x`: the pattern `orders.>.x` has a misplaced wildcard"),
        (28, "`url` is a whole number; it must be a text"),
        (29, "at byte 5: there is no placeholder `{topc}`"),
        (30, "there is no envelope `xml`; there are cloudevents-binary"),
        (31, "`ordered` is a text; it must be true or false"),
        (33, "[[relay]] `again`: it has no `pattern`; add one, like pattern = \"orders.>\""),
        (35, "there is no kind `carrier-pigeon`; there are redis, webhook and stdout (nats, amqp and kafka come"),
        (38, "[[relay]] `to-redis` in line 25 has this name already"),
        (40, "`url` must begin with https:// or http://"),
        (41, "the variable NOT_SET is not set; set it where postbox starts, like export NOT_SET=…"),
        (42, "`timeout` must be a duration from 100ms to 3600s"),
        (43, "a rate is a whole number by a time, like 100/s"),
        (45, "[[push]]: it has no `name`; add one"),
        (45, "[[push]]: it has no `pattern`; add one"),
        (45, "[[push]]: it has no `url`; add one"),
    ];
    let list = told.iter().map(|(line, why)| format!("{line}: {why}")).collect::<Vec<_>>().join("\n");
    for (line, why) in expected {
        assert!(told.iter().any(|(l, w)| *l == line && w.contains(why)), "no {line}: {why}\nin\n{list}");
    }
    assert_eq!(told.len(), expected.len(), "{list}");
}

#[test]
fn what_is_no_setting_is_told_with_the_rest() {
    let file = "aplication = \"shop\"\ndatabase_url = \"sqlite:shop.db\"\nmax_backlog = 99999999999999999999\n\
        lease = [1]\nlease_time = \"10s\"\n[[relay]]\nname = \"log\"\npattern = \">\"\nkind = \"stdot\"\n";
    let told = mistakes(file);
    let expected = [
        (0, "`max_backlog` = `99999999999999999999` (postbox.toml, line 3) must be a whole number"),
        (1, "there is no setting `aplication`; there are database_url, host"),
        (4, "the setting `lease` must be a text, a whole number, true or false"),
        (5, "there is no setting `lease_time`"),
        (9, "there is no kind `stdot`"),
    ];
    for (line, why) in expected {
        assert!(told.iter().any(|(l, w)| *l == line && w.contains(why)), "no {line}: {why}\nin\n{told:?}");
    }
    assert_eq!(told.len(), expected.len(), "{told:?}");
    // Serving and testing a webhook tell the same; other commands tell the first, and change nothing.
    let place = place(file);
    for command in [&["serve"][..], &["webhooks", "test", "log"]] {
        let ran = place.run(command).ends(1);
        assert!(ran.err.contains("it has 5 mistakes, told above"), "{}", ran.err);
    }
    let ran = place.run(&["migrate", "up"]).ends(2);
    assert!(ran.err.contains("postbox.toml, line 1: there is no setting `aplication`"), "{}", ran.err);
    assert!(!place.file("shop.db").exists());
}

#[test]
fn an_address_of_redis_that_can_never_work_is_told_without_its_password() {
    for url in [
        "redis://user:hidden@localhost:badport",
        "redis://user:hidden@localhost:6379/first",
        "redis://user:hid/den@localhost",
        "redis://:hidden@",
        "rediss://user:hidden@localhost#nonsense",
        "redi://user:hidden@localhost",
    ] {
        let file = format!(
            "database_url = \"sqlite:a.db\"\n[[source]]\nname = \"a\"\nkind = \"redis\"\nstream = \"s\"\nurl = \"{url}\"\n\
             [[relay]]\nname = \"b\"\npattern = \">\"\nkind = \"redis\"\nto = \"s\"\nurl = \"{url}\"\n"
        );
        let told = mistakes(&file);
        assert_eq!(told.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [6, 12], "{url}: {told:?}");
        for (_, why) in told {
            assert!(why.contains("`url` ") && why.contains("write it like redis://"), "{why}");
            assert!(!why.contains("hid") && !why.contains("den"), "{why}");
        }
    }
    let file = "database_url = \"postgres://h/shop?password=hidden\"\n[[source]]\nname = \"a\"\nkind = \"redis\"\n\
        stream = \"s\"\nurl = \"unix:///run/redis.sock?pass=hidden\"\n";
    let ran = check(&place(file), &[]).ends(0);
    assert!(ran.out.contains("unix:///run/redis.sock?pass=***") && !ran.out.contains("hidden"), "{}", ran.out);
}

#[test]
fn the_files_in_the_docs_are_fine() {
    for document in ["docs/serve.md", "README.md"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(document);
        let text = std::fs::read_to_string(path).expect("the document");
        let file = text.split("```toml\n# postbox.toml\n").nth(1).and_then(|rest| rest.split("```").next());
        let ran = check(&place(file.unwrap_or_else(|| panic!("no file in {document}"))), &[]).ends(0);
        assert!(ran.out.contains("as the application shop"), "{document}: {}", ran.out);
    }
}

#[test]
fn what_is_no_toml_is_told_with_its_line() {
    let place = place("application = \"shop\"\n[[source]\nname = 1\n");
    let ran = check(&place, &[]);
    assert!(ran.code != 0 && ran.err.contains("line 2"), "{}", ran.err);
}

#[test]
fn other_mistakes() {
    for (file, why) in [
        ("database_url = \"sqlite:a.db\"\n", "there is nothing to serve; add a [[source]]"),
        ("[[relay]]\nname = \"a\"\npattern = \">\"\nkind = \"stdout\"\n", "set DATABASE_URL"),
        ("database_url = \"sqlite:a.db\"\nsource = 1\n", "write [[source]] above each"),
        ("database_url = \"sqlite:a.db\"\n[source]\nname = \"a\"\n", "write [[source]] above each"),
        (
            "database_url = \"sqlite:a.db\"\n[[source]]\nname = \"a\"\nkind = \"webhook\"\nscheme = \"github\"\nsecret = { env = \"GITHUB_SECRET\" }\n",
            "add http = \"127.0.0.1:7070\"",
        ),
        (
            "database_url = \"sqlite:a.db\"\nhttp = \"127.0.0.1:0\"\n[[source]]\nname = \"a\"\nkind = \"webhook\"\nscheme = \"github\"\n",
            "it has no `secret`; add one, like secret = { env = \"A_SECRET\" } or { file = \"/run/secrets/a_secret\" }",
        ),
        (
            "database_url = \"sqlite:a.db\"\n[[source]]\nname = \"a\"\nkind = \"redis\"\nurl = { file = \"missing\" }\nstream = \"s\"\nkey = \"{payload:id}\"\n",
            "`url`: cannot read missing",
        ),
        (
            "database_url = \"sqlite:a.db\"\n[[source]]\nname = \"a\"\nkind = \"redis\"\nurl = \"redis://h\"\nstream = \"s\"\nkey = \"{payload:id}\"\n",
            "it has no `topic`",
        ),
    ] {
        let told = mistakes(file);
        assert!(told.iter().any(|(_, told)| told.contains(why)), "no {why} in {told:?}");
    }
    let nowhere = Place::new();
    let ran = check(&nowhere, &[]).ends(1);
    assert!(ran.err.contains("there is no postbox.toml"), "{}", ran.err);
    assert!(!Path::new(&nowhere.file("shop.db")).exists());
}
