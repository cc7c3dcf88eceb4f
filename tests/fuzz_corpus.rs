//! The corpus of the fuzz targets, through the same functions: what was found once stays found.

#[allow(unreachable_pub, reason = "a crate of its own")]
#[path = "../fuzz/src/lib.rs"]
mod fuzz;

fn replay(target: &str, check: fn(&[u8])) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut replayed = 0;
    for entry in std::fs::read_dir(folder).expect("the corpus").flatten() {
        let seed = std::fs::read(entry.path()).expect("a seed");
        check(&seed);
        // And what it is like when it is cut anywhere.
        for end in 0..seed.len().min(300) {
            check(&seed[..end]);
        }
        replayed += 1;
    }
    assert!(replayed > 5, "only {replayed} seeds of {target} were read: this checks little");
}

#[test]
fn patterns() {
    replay("pattern", fuzz::pattern);
}

#[test]
fn envelopes() {
    replay("envelope", fuzz::envelope);
}

#[test]
fn filters() {
    replay("filter", fuzz::filter);
}

#[test]
fn settings() {
    replay("settings", fuzz::settings);
}

#[test]
fn entries() {
    replay("entry", fuzz::entry);
}
