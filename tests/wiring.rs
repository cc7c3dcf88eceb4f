//! Wiring mistakes: what the compiler says, and at which line the others panic.

use postbox::{Envelope, Postgres, Router, Tx, handler, together};

#[test]
fn what_does_not_compile_says_why() {
    trybuild::TestCases::new().compile_fail("../../tests/compile_fail/*.rs");
}

/// Where a closure panics, and with which words.
fn panic_of(mistake: impl FnOnce() + std::panic::UnwindSafe) -> (u32, String) {
    use std::sync::{Arc, Mutex};
    let seen: Arc<Mutex<Option<(u32, String)>>> = Arc::default();
    let hook = {
        let seen = seen.clone();
        move |info: &std::panic::PanicHookInfo<'_>| {
            let here = info.location().filter(|l| l.file().ends_with("wiring.rs")).map(|l| l.line()).unwrap_or(0);
            let words = info.payload_as_str().unwrap_or_default().to_owned();
            seen.lock().expect("the place").replace((here, words));
        }
    };
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(hook));
    let result = std::panic::catch_unwind(mistake);
    std::panic::set_hook(before);
    assert!(result.is_err(), "no panic");
    let found = seen.lock().expect("the place").take();
    found.expect("the hook was called")
}

async fn audit(_: Envelope) {}
async fn notify(_: Envelope) {}
async fn reserve(_: Tx<Postgres>) {}

#[test]
fn mistakes_panic_at_the_callers_line() {
    type R = Router<Postgres>;
    // All in one test: the panic hook is the process's.
    let (line, words) = panic_of(|| drop(R::new().on("orders..placed", audit)));
    assert_eq!(line, line!() - 1);
    assert!(words.contains("empty segment"), "{words}");

    let (line, words) = panic_of(|| drop(R::new().on("a", audit).on("b", audit)));
    assert_eq!(line, line!() - 1);
    assert!(words.contains("two subscriptions are called `audit`") && words.contains(".named"), "{words}");

    let (line, words) = panic_of(|| drop(R::new().on("a", |_: Envelope| async {})));
    assert_eq!(line, line!() - 1);
    assert!(words.contains("closure has no durable name"), "{words}");

    let (line, words) = panic_of(|| drop(R::new().nest("or*ders", R::new())));
    assert_eq!(line, line!() - 1);
    assert!(words.contains("prefix"), "{words}");

    let (line, words) = panic_of(|| drop(R::new().on("a", audit).merge(R::new().on("b", audit))));
    assert_eq!(line, line!() - 1);
    assert!(words.contains("`audit`"), "{words}");

    let (line, words) = panic_of(|| drop(handler(audit).max_attempts(0)));
    assert_eq!(line, line!() - 1);
    assert!(words.contains("1 to 1000"), "{words}");

    let (line, words) = panic_of(|| drop(R::new().on("a", together((audit, notify)))));
    assert_eq!(line, line!() - 1);
    assert!(words.contains("takes a `Tx`"), "{words}");

    let (line, words) = panic_of(|| drop(R::new().on("a", together((reserve, |_: Envelope| async {})))));
    assert_eq!(line, line!() - 1);
    assert!(words.contains("closure has no durable name"), "{words}");

    let (line, words) = panic_of(|| drop(R::new().on("a", handler(audit).named("two words"))));
    assert_eq!(line, line!() - 1);
    assert!(words.contains("spaces"), "{words}");
}
