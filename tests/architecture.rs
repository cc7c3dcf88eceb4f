//! Imports run one way. Each module may use those below it and its own; this reads the `use` lines
//! (and paths in code) and says who breaks the rule.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// From the bottom up; a module may use modules of lower layers, and of its own.
const LAYERS: [&[&str]; 11] = [
    // Pure: no clock, no I/O, no SQL.
    &[
        "body",
        "content",
        "json",
        "pattern",
        "priority",
        "raw",
        "retry",
        "signature",
        "template",
        "crash",
        "planted",
        "unique",
    ],
    &["lifecycle", "message", "error", "keys", "limits", "retention", "schedule"],
    &["settings", "context", "redis_client"],
    // The port, and the types that go through it.
    &["store", "admin", "operation"],
    &["handler", "http", "push", "router", "sink"],
    &["postbox", "pull", "worker", "inbox", "source"],
    &["testing"],
    &["sql"],
    &["tokio_postgres"],
    &["fuzzing"],
    &["lib"],
];

/// Uses that go up, each with its reason.
const EXCEPTIONS: [(&str, &str, &str); 6] = [
    ("error", "message", "names the limits in its words"),
    ("operation", "handler", "turns a handler's verdict marks into its own failures"),
    ("admin", "postbox", "is opened by the handle"),
    ("message", "error", "refuses with a publish error"),
    ("lifecycle", "lifecycle", "its tests"),
    ("sink", "source", "its tests: what goes out comes in equal"),
];

/// Crates that the pure modules must not know.
const IMPURE: [&str; 4] = ["sqlx", "tokio", "std::time::Instant", "SystemTime"];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).expect("the sources").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The top-level module a file belongs to.
fn module(root: &Path, file: &Path) -> String {
    let first = file.strip_prefix(root).expect("below the root").components().next().expect("a name");
    first.as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned()
}

/// Code without comments and doc text.
fn code(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// What follows `crate::` anywhere in the code.
fn used(code: &str) -> Vec<String> {
    code.match_indices("crate::")
        .map(|(at, prefix)| &code[at + prefix.len()..])
        .map(|rest| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
        .collect()
}

fn library() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

#[test]
fn imports_run_one_way() {
    let layer: BTreeMap<&str, usize> =
        LAYERS.iter().enumerate().flat_map(|(n, modules)| modules.iter().map(move |m| (*m, n))).collect();
    let root = library();
    let (mut wrong, mut edges) = (Vec::new(), 0);
    for file in sources(&root) {
        let from = module(&root, &file);
        let from_layer = layer.get(from.as_str()).unwrap_or_else(|| panic!("{from} has no layer; give it one"));
        for to in used(&code(&std::fs::read_to_string(&file).expect("a source"))) {
            let Some(to_layer) = layer.get(to.as_str()) else { continue };
            edges += 1;
            let allowed = to_layer <= from_layer
                || EXCEPTIONS.iter().any(|(a, b, _)| *a == from && *b == to)
                // Adapters name themselves where the databases are listed.
                || from == "lib";
            if !allowed {
                wrong.push(format!("{} uses crate::{to}, which lies above it", file.display()));
            }
        }
    }
    assert!(edges > 50, "only {edges} imports were read: this checks nothing");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn adapters_keep_to_themselves() {
    let root = library();
    let mut wrong = Vec::new();
    for file in sources(&root) {
        let text = code(&std::fs::read_to_string(&file).expect("a source"));
        let inside = |store: &str| file.starts_with(root.join("store").join(store));
        let port = file == root.join("store/mod.rs") || file == root.join("lib.rs");
        for store in ["postgres", "sqlite"] {
            let named = text.contains(&format!("store::{store}"));
            if named && !inside(store) && !port {
                wrong.push(format!("{} names the {store} store", file.display()));
            }
        }
        if (inside("postgres") && text.contains("sqlx::Sqlite"))
            || (inside("sqlite") && text.contains("sqlx::Postgres"))
        {
            wrong.push(format!("{} knows the other database", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_pure_modules_are_pure() {
    let root = library();
    for name in [
        "content.rs",
        "json.rs",
        "pattern.rs",
        "retry.rs",
        "template.rs",
        "source/format.rs",
        "source/format/cloudevent.rs",
        "source/format/flat.rs",
        "source/format/mapping.rs",
        "source/format/reading.rs",
        "sink/envelope.rs",
        "limits.rs",
        "unique.rs",
        "retention.rs",
        "schedule.rs",
        "schedule/calendar.rs",
        "schedule/change.rs",
        "schedule/tick.rs",
        "lifecycle.rs",
        "worker/core.rs",
        "worker/core/wire.rs",
        "worker/core/flush.rs",
        "worker/core/limits.rs",
        "store/decide.rs",
    ] {
        let text = code(&std::fs::read_to_string(root.join(name)).expect("a source"));
        for impure in IMPURE {
            assert!(!text.contains(impure), "{name} must not know {impure}");
        }
    }
}

/// What a build for production must not hold: points to be killed at, and planted bugs.
const FOR_TESTS: [&str; 2] = ["crash-points", "planted-bugs"];

#[test]
fn what_is_for_tests_is_compiled_for_tests_only() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut using = Vec::new();
    for folder in std::fs::read_dir(&crates).expect("the crates").flatten() {
        let manifest = std::fs::read_to_string(folder.path().join("Cargo.toml")).expect("a manifest");
        let (before_dev, _) = manifest.split_once("[dev-dependencies]").unwrap_or((&manifest, ""));
        let published = !manifest.contains("publish = false");
        let named = FOR_TESTS.iter().filter(|feature| before_dev.contains(&format!("\"{feature}\""))).count();
        if named > 0 {
            assert!(!published, "{} is published, and switches on what is for tests", folder.path().display());
            using.push(folder.file_name());
        }
    }
    assert!(!using.is_empty(), "the tests run without what is for them");
    let own = std::fs::read_to_string(library().join("../Cargo.toml")).expect("the manifest");
    for feature in FOR_TESTS {
        assert!(own.contains(&format!("\n{feature} = []\n")), "`{feature}` switches on nothing else");
    }
    assert!(!own.contains("\ndefault ="), "look here again when there are default features");
    let planted = std::fs::read_to_string(library().join("planted.rs")).expect("the source");
    assert!(planted.contains("($bug:literal) => {\n        false\n    };"), "without the feature a bug is `false`");
}

#[test]
fn every_planted_bug_is_planted_and_has_its_test() {
    let bugs = postbox::planted::BUGS;
    assert!(bugs.len() >= 12);
    let mut sites: BTreeMap<&str, usize> = bugs.iter().map(|bug| (bug.name, 0)).collect();
    assert_eq!(sites.len(), bugs.len(), "each has a name of its own");
    for file in sources(&library()) {
        if file.ends_with("src/planted.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&file).expect("a source");
        for (name, places) in &mut sites {
            *places += text.matches(&format!("\"{name}\"")).count();
        }
    }
    let nowhere: Vec<_> = sites.iter().filter(|(_, places)| **places == 0).collect();
    assert!(nowhere.is_empty(), "in the list and not in the code: {nowhere:?}");
    for bug in bugs {
        let file = match bug.file {
            "simulation" => library().join("worker/core/simulation.rs"),
            file => library().join(format!("../../../tests/{file}.rs")),
        };
        let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        assert!(text.contains("fn planted_bugs_are_caught()"), "{} runs no planted bugs", file.display());
        for test in bug.caught_by {
            let name = test.rsplit("::").next().expect("a name");
            assert!(text.contains(&format!("fn {name}")), "`{}`: there is no {name} in {}", bug.name, file.display());
        }
    }
}

#[test]
fn the_command_knows_the_library_by_its_doors_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../postbox-cli/src");
    for file in sources(&root) {
        let text = code(&std::fs::read_to_string(&file).expect("a source"));
        assert!(!text.contains("postbox::store"), "{} reaches past the library's doors", file.display());
    }
}

/// Words before a parenthesis that the grammar knows itself, so that no schema can hold another.
const SYNTAX: &str = "array any bit brin coalesce exists extract gist greatest least nullif \
    and as check conflict filter from in join key lateral list materialized not offset on or over range select table using values where with";

/// Types that are keywords: all others are looked up, in the session's temporary schema first.
const KEYWORD_TYPES: [&str; 7] =
    ["bigint", "bit", "double precision", "int", "numeric", "smallint", "timestamp with time zone"];

/// SQL without comments and without what is inside quotes.
fn bare(sql: &str) -> String {
    let uncommented: Vec<&str> = sql.lines().map(|line| line.split("--").next().unwrap_or_default()).collect();
    uncommented.join("\n").split('\'').step_by(2).collect::<Vec<_>>().join("''")
}

/// The name that ends the text, qualified if it is written so.
fn last_name(text: &str) -> &str {
    let text = text.trim_end();
    let start = text.rfind(|c: char| !(c.is_alphanumeric() || "_.{}$".contains(c))).map_or(0, |at| at + 1);
    &text[start..]
}

/// How many arguments follow an opening parenthesis.
fn arguments(rest: &str) -> usize {
    let (mut depth, mut commas) = (0_usize, 0);
    for c in rest.chars() {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' if depth == 0 => break,
            ')' | ']' => depth -= 1,
            ',' if depth == 0 => commas += 1,
            _ => {}
        }
    }
    commas + 1
}

/// What in a statement could mean something else in another session.
fn open_to_others(sql: &str) -> Vec<String> {
    let sql = bare(sql);
    let mut wrong = Vec::new();
    for (at, _) in sql.match_indices('(') {
        let name = last_name(&sql[..at]);
        let before = last_name(sql[..at].trim_end().strip_suffix(name).unwrap_or_default());
        let alone = name.is_empty() || SYNTAX.split(' ').any(|word| word == name) || before == "as";
        let qualified = name.starts_with("pg_catalog.") || name.starts_with("{schema}.");
        // With several arguments it is syntax too, and has no qualified form.
        let rows = name == "unnest" && arguments(&sql[at + 1..]) > 1;
        if !(alone || qualified || rows) {
            wrong.push(format!("{name}( names no schema"));
        }
    }
    for (at, cast) in sql.match_indices("::") {
        let to = &sql[at + cast.len()..];
        let keyword = KEYWORD_TYPES
            .iter()
            .filter_map(|k| to.strip_prefix(k))
            .any(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'));
        if !keyword && !to.starts_with("pg_catalog.") {
            wrong.push(format!("the cast to {} names no schema", to.split_whitespace().next().unwrap_or_default()));
        }
    }
    // Such an operator is found by converting an operand; an exact one in another schema would win.
    if sql.contains("* interval") {
        wrong.push(
            "`x * interval` is no operator of pg_catalog unless x is double precision: write the interval first".into(),
        );
    }
    for operator in ["* ", "/ "] {
        for (at, _) in sql.match_indices(operator) {
            let factor = &sql[at + operator.len()..];
            let typed = factor.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').starts_with("::");
            if factor.starts_with(|c: char| c.is_ascii_digit()) && !typed {
                wrong.push(format!("the number after `{operator}` names no type"));
            }
        }
    }
    wrong
}

#[test]
fn statements_name_their_schema() {
    let root = library().join("store/postgres");
    let files = [root.clone(), root.join("migrations")]
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).expect("the statements").flatten())
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "sql"))
        .collect::<Vec<_>>();
    assert!(files.len() > 20, "only {} statements were read: this checks little", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).expect("a statement");
        wrong.extend(open_to_others(&text).into_iter().map(|what| format!("{}: {what}", file.display())));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // It sees what it is for.
    for odd in
        ["select now()", "select 1 from unnest(a) u", "n * interval '1 s'", "x::text", "x::integers", "x / 1000.0"]
    {
        assert_eq!(open_to_others(odd).len(), 1, "{odd}");
    }
    for fine in ["unnest(a, b[1]) -- now()", "extract(epoch from x) * 10::numeric", "f in ('now()')", "x as d(a)"] {
        assert_eq!(open_to_others(fine), [""; 0], "{fine}");
    }
}

#[test]
fn programs_in_the_docs_are_shown_whole() {
    // Who reads the Markdown sees the lines that rustdoc hides, and copies them.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let pages = std::fs::read_dir(root.join("docs")).expect("the docs").flatten().map(|page| page.path());
    let mut programs = 0;
    for page in pages.chain([root.join("README.md")]).filter(|page| page.extension().is_some_and(|e| e == "md")) {
        let text = std::fs::read_to_string(&page).expect("a page");
        for program in text.split("\n```rust").skip(1).filter_map(|rest| rest.split("\n```").next()) {
            programs += 1;
            let hidden = program.lines().find(|line| line.trim() == "#" || line.trim_start().starts_with("# "));
            assert!(hidden.is_none(), "{}: {}", page.display(), hidden.unwrap_or_default());
        }
    }
    assert!(programs > 20, "only {programs} programs are there");
}
