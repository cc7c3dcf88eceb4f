//! The torture's scenarios run, and each of their checks can fail.

use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

/// One at a time: they measure how much gets through.
static ONE: Mutex<()> = Mutex::new(());

#[track_caller]
fn kept(scenario: &str, store: &str, seconds: &str) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_torture"))
        .args(["--scenario", scenario, "--store", store, "--seed", "42", "--for", seconds, "--json"])
        .stdin(Stdio::null())
        .output()
        .expect("torture runs");
    let told = String::from_utf8_lossy(&output.stderr);
    let out = String::from_utf8_lossy(&output.stdout);
    let line = out.lines().last().unwrap_or_default();
    let report: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: `{line}`\n{told}"));
    assert_eq!(report["broken"], serde_json::json!([]), "{told}");
    assert_eq!(output.status.code(), Some(0), "{told}");
    assert!(report["messages"].as_u64().is_some_and(|n| n > 0), "{report}");
    assert!(report["faults"]["F1"].as_u64().is_some_and(|n| n > 0), "somebody was killed: {report}");
    report
}

#[test]
fn limits_are_kept_and_used() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let report = kept("limits", "postgres", "3s");
    let most = report["measured"]["limit, at once at the most"].as_f64();
    assert_eq!(most, Some(10.0), "all of it was used: {report}");
}

#[test]
fn ticks_fire_once() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    kept("schedules", "sqlite", "6s");
}

#[test]
fn keys_are_in_order() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let report = kept("order", "postgres", "4s");
    let repeated = report["measured"]["order, calls that were repeated"].as_f64();
    assert!(repeated.is_some_and(|n| n > 0.0), "some failed, and some were lost: {report}");
}

#[test]
fn planted_bugs_are_caught() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    postbox_testkit::planted::each_is_caught(module_path!());
}
