//! Bugs planted on purpose: the tests that ought to catch them are run again with each, and must fail.

use std::io::Write;
use std::process::{Command, Stdio};

/// How one test of this program fails, with a bug planted in it or without one; `None` if it passes.
fn failure(test: &str, bug: Option<&str>) -> Option<String> {
    let program = std::env::current_exe().expect("the path of this test binary");
    let mut command = Command::new(program);
    command.args([test, "--exact", "--test-threads", "1"]).env_remove("POSTBOX_PLANTED");
    // Its schema is its own; a server of its own would take longer than the test.
    command.env("DATABASE_URL", crate::shared_url());
    command.envs(bug.map(|bug| ("POSTBOX_PLANTED", bug)));
    let output = command.stdin(Stdio::null()).output().expect("the test binary runs again");
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(words.contains("running 1 test"), "there is no test `{test}` in this program:\n{words}");
    if output.status.success() {
        return None;
    }
    let said = format!("{words}{}", String::from_utf8_lossy(&output.stderr));
    let mut lines = said.lines().skip_while(|line| !line.contains("panicked at"));
    Some(lines.nth(1).unwrap_or("it fails without a word").to_owned())
}

/// Runs, for each planted bug that this file of tests is to catch, its test without the bug, which passes, and
/// with it, which fails. The tests run in processes of their own. `module` is the file's `module_path!()`.
///
/// # Panics
/// A bug was not noticed.
pub fn each_is_caught(module: &str) {
    // In a process that runs because of this, there is nothing more to do.
    if std::env::var_os("POSTBOX_PLANTED").is_some() {
        return;
    }
    // A file may be a program, or a module in one: there its name is part of its tests' names.
    let (file, within) = match module.split_once("::") {
        Some((_, file)) => (file, format!("{file}::")),
        None => (module, String::new()),
    };
    let mut missed = Vec::new();
    let mut whole = std::collections::BTreeMap::new();
    for bug in postbox::planted::BUGS.iter().filter(|bug| bug.file == file) {
        for test in bug.caught_by {
            let name = format!("{within}{test}");
            let alone = whole.entry(*test).or_insert_with(|| failure(&name, None));
            assert_eq!(*alone, None, "`{test}` fails without any bug planted");
            match failure(&name, Some(bug.name)) {
                None => missed.push(format!("`{}` ({}) by `{test}`", bug.name, bug.what)),
                // Past the test runner's capture: a run shows who caught what also when it passes.
                Some(how) => {
                    writeln!(std::io::stderr(), "planted {:<28} caught by {file} {test}: {how}", bug.name).ok();
                }
            }
        }
    }
    assert!(!whole.is_empty(), "no planted bug is to be caught by `{file}`");
    assert!(missed.is_empty(), "nobody noticed {}", missed.join(", "));
}
