use super::*;
use proptest::prelude::*;

const POLICY: Policy = Policy {
    kind: Kind::Plain,
    retry: RetryPolicy { max_attempts: 3, base: Duration::from_secs(1), cap: Duration::from_secs(60) },
};
const OPERATION: Policy = Policy { kind: Kind::Operation, ..POLICY };

const ENDS: [End; 6] = [
    End::Succeeded,
    End::Failed { permanent: false, retry_after: None },
    End::Failed { permanent: true, retry_after: None },
    End::InDoubt,
    End::Panicked,
    End::TimedOut,
];
const ANSWERS: [Answer; 3] = [Answer::Happened, Answer::DidNotHappen, Answer::Abandoned];

fn events() -> Vec<Event> {
    let mut all = vec![Event::Claimed, Event::Begun];
    all.extend(ENDS.map(Event::Ended));
    all.extend([Event::Released, Event::WorkerLost]);
    all.extend(ANSWERS.map(Event::Resolved));
    all.extend([Event::Retried, Event::Cancelled]);
    all
}

/// One row a standing, one column an event, in the order of `events()`. `-` is a refusal, a letter
/// the state that follows: p(ending) r(unning) b(egun) ? (in doubt) s(ucceeded) d(ead) c(ancelled).
fn table(policy: &Policy) -> Vec<String> {
    let rows = [
        (State::Pending, false),
        (State::Running, false),
        (State::Running, true),
        (State::InDoubt, false),
        (State::Succeeded, false),
        (State::Dead, false),
        (State::Cancelled, false),
    ];
    rows.map(|(state, begun)| {
        let standing = Standing { state, begun, attempts: 1, lost: 0 };
        let cell = |event| match transition(standing, event, policy, 1.0) {
            Err(_) => '-',
            Ok(next) => match (next.standing.state, next.standing.begun) {
                (State::Pending, _) => 'p',
                (State::Running, true) => 'b',
                (State::Running, false) => 'r',
                (State::InDoubt, _) => '?',
                (State::Succeeded, _) => 's',
                (State::Dead, _) => 'd',
                (State::Cancelled, _) => 'c',
            },
        };
        events().into_iter().map(cell).collect()
    })
    .to_vec()
}

//            claimed, begun | succeeded, failed, permanent, in doubt, panicked, timed out |
//            released, worker lost | happened, did not, abandoned | retried, cancelled
#[test]
fn every_state_meets_every_event_plain() {
    let expected = [
        "r------------pc", // pending
        "-bspdppppp-----", // running, no record of a start
        "--spdppp-p-----", // running, start on record
        "----------spd--", // in doubt
        "---------------", // succeeded
        "-------------pc", // dead
        "-------------p-", // cancelled
    ];
    assert_eq!(table(&POLICY), expected);
    assert_eq!(table(&Policy { kind: Kind::Transactional, ..POLICY }), expected);
}

#[test]
fn every_state_meets_every_event_operation() {
    let expected = [
        "r------------pc",
        "-bspd???pp-----",
        "--spd???-?-----",
        "----------spd--",
        "---------------",
        "-------------pc",
        "-------------p-",
    ];
    assert_eq!(table(&OPERATION), expected);
}

#[test]
fn the_last_attempt_that_fails_is_dead() {
    let last = Standing { state: State::Running, begun: false, attempts: 2, lost: 0 };
    let failed = Event::Ended(End::Failed { permanent: false, retry_after: Some(Duration::from_secs(9)) });
    let next = transition(last, failed, &POLICY, 1.0).expect("allowed");
    assert_eq!((next.standing.state, next.standing.attempts), (State::Dead, 3));

    let next = transition(Standing { attempts: 1, ..last }, failed, &POLICY, 1.0).expect("allowed");
    assert_eq!((next.standing.state, next.delay), (State::Pending, Duration::from_secs(9)));
}

#[test]
fn a_message_that_kills_its_workers_ends_as_a_dead_letter() {
    let mut standing = Standing::NEW;
    let mut workers = 0;
    while standing.state != State::Dead {
        standing = transition(standing, Event::Claimed, &POLICY, 0.0).expect("claim").standing;
        if standing.lost > 0 {
            standing = transition(standing, Event::Begun, &POLICY, 0.0).expect("begin").standing;
        }
        standing = transition(standing, Event::WorkerLost, &POLICY, 0.0).expect("lose").standing;
        workers += 1;
    }
    assert_eq!((workers, standing.attempts), (4, 3), "one unrecorded, then max_attempts on record");
}

proptest! {
    /// A random walk with a remote beside it keeps I4 to I7 and I11 of the invariants.
    #[test]
    fn a_random_walk_keeps_the_promises(
        choices in proptest::collection::vec((0usize..15, 0u8..4, 0.0f64..1.0), 1..200),
        operation in any::<bool>(),
    ) {
        let policy = if operation { OPERATION } else { POLICY };
        let (mut now, mut applied, mut succeeded_attempts) = (Standing::NEW, 0u32, 0u32);
        let (mut operator_retries, mut repeats_allowed, mut open_effect) = (0u32, 0u32, false);
        for (choice, fate, draw) in choices {
            let event = events()[choice];
            // The remote: an operation's effect may land once it has begun, and only then.
            if operation && now.begun && fate == 0 && !open_effect {
                open_effect = true;
                applied += 1;
            }
            // Reports are honest: no success without the effect, no failure with it.
            match event {
                Event::Ended(End::Succeeded) | Event::Resolved(Answer::Happened) if operation && !open_effect => continue,
                Event::Ended(End::Failed { .. }) | Event::Resolved(Answer::DidNotHappen) if operation && open_effect => continue,
                // A worker calls an operation's handler only once the attempt is on record.
                Event::Ended(_) if operation && !now.begun => continue,
                _ => {}
            }
            let before = now;
            let Ok(next) = transition(now, event, &policy, draw) else { continue };
            now = next.standing;

            prop_assert!(now.attempts >= before.attempts, "I11: attempts never go back");
            prop_assert!(now.attempts <= before.attempts + 1, "I11: nor leave a gap");
            if event == Event::Retried && before.attempts >= policy.retry.max_attempts { operator_retries += 1; }
            prop_assert!(now.attempts <= policy.retry.max_attempts + operator_retries, "I11: nor pass the maximum");
            prop_assert!(before.state != State::Succeeded, "I6: success is final");
            if before.state == State::Dead || before.state == State::Cancelled {
                prop_assert!(matches!(event, Event::Retried | Event::Cancelled), "I6: only an operator moves it");
            }
            if now.state == State::Succeeded {
                succeeded_attempts += 1;
                prop_assert!(succeeded_attempts == 1, "I4");
                prop_assert!(!operation || open_effect, "I4: succeeded means applied");
            }
            if operation && now.state == State::Pending && before.state == State::Running {
                prop_assert!(!open_effect, "I5: never a blind retry of what may have happened");
            }
            if operation && before.state == State::Running && before.begun && event == Event::WorkerLost {
                prop_assert_eq!(now.state, State::InDoubt, "I5");
            }
            if operation && now.state == State::Dead && event != Event::Resolved(Answer::Abandoned) && event != Event::Cancelled && before.state != State::Dead {
                prop_assert!(!open_effect, "I5: failed means not applied");
            }
            // What was abandoned and is retried may be applied again: an operator said so.
            if event == Event::Retried && open_effect {
                open_effect = false;
                repeats_allowed += 1;
            }
            prop_assert!(applied <= 1 + repeats_allowed, "I7");
        }
    }
}
