//! Bugs planted on purpose: the tests that ought to catch them are run again with each, and must fail.

use std::io::Write;
use std::process::{Command, Stdio};

/// How one test of this binary fails, with a bug planted in it or without one; `None` if it passes.
fn failure(test: &str, bug: Option<&str>) -> Option<String> {
    let program = std::env::current_exe().expect("the path of this test binary");
    let mut command = Command::new(program);
    command.args([test, "--exact", "--test-threads", "1"]).env_remove("POSTBOX_PLANTED");
    command.envs(bug.map(|bug| ("POSTBOX_PLANTED", bug)));
    let output = command.stdin(Stdio::null()).output().expect("the test binary runs again");
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(words.contains("running 1 test"), "there is no test `{test}` in this binary:\n{words}");
    if output.status.success() {
        return None;
    }
    let said = format!("{words}{}", String::from_utf8_lossy(&output.stderr));
    let mut lines = said.lines().skip_while(|line| !line.contains("panicked at"));
    Some(lines.nth(1).unwrap_or("it fails without a word").to_owned())
}

/// Runs, for each planted bug that this binary is to catch, its test without the bug, which passes, and
/// with it, which fails. The tests run in processes of their own.
///
/// # Panics
/// A bug was not noticed.
pub fn each_is_caught(binary: &str) {
    // In a process that runs because of this, there is nothing more to do.
    if std::env::var_os("POSTBOX_PLANTED").is_some() {
        return;
    }
    let mut missed = Vec::new();
    let mut whole = std::collections::BTreeMap::new();
    for bug in postbox::planted::BUGS.iter().filter(|bug| bug.binary == binary) {
        for test in bug.caught_by {
            let alone = whole.entry(*test).or_insert_with(|| failure(test, None));
            assert_eq!(*alone, None, "`{test}` fails without any bug planted");
            match failure(test, Some(bug.name)) {
                None => missed.push(format!("`{}` ({}) by `{test}`", bug.name, bug.what)),
                // Past the test runner's capture: a run shows who caught what also when it passes.
                Some(how) => {
                    writeln!(std::io::stderr(), "planted {:<28} caught by {binary} {test}: {how}", bug.name).ok();
                }
            }
        }
    }
    assert!(!whole.is_empty(), "no planted bug is to be caught by `{binary}`");
    assert!(missed.is_empty(), "nobody noticed {}", missed.join(", "));
}
