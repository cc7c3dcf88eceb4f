//! The checker runs, on both stores: a few seconds of it, and the line that programs read.

use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

/// One at a time: each fault that is wanted has to take effect in so few seconds.
static ONE: Mutex<()> = Mutex::new(());

fn run(store: &str, faults: &str) -> (Option<i32>, Value, String) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let output = Command::new(env!("CARGO_BIN_EXE_torture"))
        .args(["--seed", "42", "--for", "8s", "--store", store, "--faults", faults, "--json"])
        .stdin(Stdio::null())
        .output()
        .expect("torture runs");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = out.lines().last().unwrap_or_default();
    let report = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: `{line}`\n{told}"));
    (output.status.code(), report, told)
}

#[track_caller]
fn kept(store: &str, faults: &str) {
    let (code, report, told) = run(store, faults);
    assert_eq!(report["broken"], serde_json::json!([]), "{told}");
    assert_eq!(code, Some(0), "{told}");
    assert!(told.starts_with("seed 42, "), "the seed comes first: {told}");
    assert_eq!((&report["seed"], &report["store"]), (&42.into(), &store.into()));
    for count in ["messages", "operations", "in_doubt"] {
        assert!(report[count].as_u64().is_some_and(|n| n > 0), "{count}: {report}");
    }
    assert!(report["seconds"].as_f64().is_some_and(|s| s >= 8.0), "{report}");
    for fault in faults.split(',') {
        assert!(report["faults"][fault].as_u64().is_some_and(|n| n > 0), "{fault}: {report}");
    }
}

#[test]
fn postgres() {
    kept("postgres", "F1,F2,F3,F4,F5,F6,F12,F13,F18,F24");
}

#[test]
fn sqlite() {
    // Not F19: a signal has to meet a running handler, and in seconds with one writer it may not.
    kept("sqlite", "F1,F2,F5,F13,F18,F22,F24");
}

/// Whether this process may have a disk of its own: the checker says so itself, and why not.
fn has_disks() -> bool {
    let tried = Command::new(env!("CARGO_BIN_EXE_torture")).arg("--try-disk").output().expect("torture runs");
    eprint!("{}", String::from_utf8_lossy(&tried.stderr));
    tried.status.success()
}

#[test]
fn disks_get_full() {
    for store in ["postgres", "sqlite"] {
        if has_disks() {
            // In most of so short a time nothing can be written: little else is sure to have been there.
            let (code, report, told) = run(store, "F16");
            assert_eq!((code, &report["broken"]), (Some(0), &serde_json::json!([])), "{told}");
            assert!(report["faults"]["F16"].as_u64().is_some_and(|n| n > 0), "{report}");
            continue;
        }
        let args = ["--store", store, "--faults", "F16"];
        let output = Command::new(env!("CARGO_BIN_EXE_torture")).args(args).output().expect("torture runs");
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("F16 needs a disk of its own"));
    }
}

#[test]
fn says_what_it_cannot_do() {
    let output = Command::new(env!("CARGO_BIN_EXE_torture"))
        .args(["--store", "sqlite", "--faults", "F4"])
        .stdin(Stdio::null())
        .output()
        .expect("torture runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not exist on sqlite"));
}
