use super::*;
use proptest::prelude::*;

const POLICY: Policy = Policy {
    kind: Kind::Plain,
    retry: RetryPolicy { max_attempts: 3, base: Duration::from_secs(1), cap: Duration::from_secs(60) },
    idempotent: false,
};
const OPERATION: Policy = Policy { kind: Kind::Operation, ..POLICY };
const IDEMPOTENT: Policy = Policy { idempotent: true, ..OPERATION };

const ENDS: [End; 8] = [
    End::Succeeded,
    End::Failed { permanent: false, retry_after: None },
    End::Failed { permanent: true, retry_after: None },
    End::InDoubt,
    End::Panicked,
    End::TimedOut,
    End::Snoozed { wait: Duration::from_secs(7) },
    End::Discarded,
];
const ANSWERS: [Answer; 3] = [Answer::Happened, Answer::DidNotHappen, Answer::Abandoned];

fn events() -> Vec<Event> {
    let mut all = vec![Event::Claimed, Event::Begun];
    all.extend(ENDS.map(Event::Ended));
    all.extend([Event::Released, Event::Withheld, Event::WorkerLost]);
    all.extend(ANSWERS.map(Event::Resolved));
    all.extend([Event::Retried, Event::Cancelled]);
    all
}

/// One row a standing, one column an event, in the order of `events()`. `-` is a refusal, a letter
/// the state that follows: p(ending) r(unning) b(egun) ? (in doubt) s(ucceeded) d(ead) c(ancelled).
fn table(policy: &Policy, lost: u32) -> Vec<String> {
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
        let standing = Standing { state, begun, attempts: 1, lost };
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

//            claimed, begun | succeeded, failed, permanent, in doubt, panicked, timed out, snoozed, discarded |
//            released, withheld, worker lost | happened, did not, abandoned | retried, cancelled
#[test]
fn every_state_meets_every_event_plain() {
    let expected = [
        "r---------------pc", // pending
        "-bspdppppcp-p-----", // running, no record of a start
        "--spdppppc--p-----", // running, start on record
        "-------------spd--", // in doubt
        "------------------", // succeeded
        "----------------pc", // dead
        "----------------p-", // cancelled
    ];
    for lost in [0, 1] {
        assert_eq!(table(&POLICY, lost), expected);
        assert_eq!(table(&Policy { kind: Kind::Transactional, ..POLICY }, lost), expected);
    }
    assert_eq!(table(&Policy { idempotent: true, ..POLICY }, 0), expected, "only operations are declared so");
}

#[test]
fn every_state_meets_every_event_operation() {
    let mut expected = [
        "r---------------pc",
        "-bspd???pcp-p-----",
        "--spd???pc--?-----",
        "-------------spd--",
        "------------------",
        "----------------pc",
        "----------------p-",
    ];
    assert_eq!(table(&OPERATION, 0), expected);
    // An attempt from the time when it was declared idempotent may have done it: not called, and
    // not called off as if nothing had been.
    expected[0] = "r---------------p?";
    expected[1] = "-bspd???pcp?p-----";
    assert_eq!(table(&OPERATION, 1), expected);
}

#[test]
fn every_state_meets_every_event_idempotent() {
    let mut expected = [
        "r---------------pc",
        "-bspdppppcp-p-----",
        "--spdppppc--p-----",
        "-------------spd--",
        "------------------",
        "----------------pc",
        "----------------p-",
    ];
    assert_eq!(table(&IDEMPOTENT, 0), expected, "like a plain one");
    // An earlier attempt may have done it: what would be dead or cancelled is in doubt.
    expected[0] = "r---------------p?";
    expected[1] = "-bsp?pppp?p-p-----";
    expected[2] = "--sp?pppp?--p-----";
    assert_eq!(table(&IDEMPOTENT, 1), expected);
}

#[test]
fn unseen_ends_are_remembered_until_somebody_knows() {
    let begun = Standing { state: State::Running, attempts: 1, begun: true, lost: 0 };
    let after = |now, event| transition(now, event, &IDEMPOTENT, 1.0).expect("allowed");
    for end in [End::InDoubt, End::Panicked, End::TimedOut] {
        let next = after(begun, Event::Ended(end));
        assert_eq!((next.standing.lost, next.delay), (1, Duration::from_secs(1)), "{end:?}: with a backoff");
    }
    let lost = after(begun, Event::WorkerLost);
    assert_eq!((lost.standing.lost, lost.delay), (1, Duration::ZERO), "a dead worker costs no wait");
    let unseen = Standing { attempts: 2, lost: 1, ..begun };
    let failed = Event::Ended(End::Failed { permanent: false, retry_after: None });
    assert_eq!(after(unseen, failed).standing.lost, 1, "a clear answer about the second says nothing of the first");
    let hurried = after(Standing { state: State::Pending, begun: false, ..unseen }, Event::Retried);
    assert_eq!(hurried.standing.lost, 1, "nor does an operator's hurry");
    let last = Standing { attempts: 3, ..unseen };
    for event in [failed, Event::WorkerLost, Event::Ended(End::InDoubt), Event::Ended(ENDS[6])] {
        assert_eq!(after(last, event).standing.state, State::InDoubt, "{event:?} at the last attempt");
    }
    assert_eq!(after(Standing { lost: 0, ..last }, failed).standing.state, State::Dead, "nothing was unseen");
    let word = after(Standing { state: State::InDoubt, begun: false, ..unseen }, Event::Resolved(ANSWERS[1]));
    assert_eq!((word.standing.state, word.standing.lost), (State::Pending, 0), "the word is about all of them");
}

#[test]
fn a_snooze_is_no_attempt_unless_its_start_is_on_record() {
    let running = Standing { state: State::Running, attempts: 2, begun: false, lost: 0 };
    let snooze = Event::Ended(End::Snoozed { wait: Duration::from_secs(7) });
    let next = transition(running, snooze, &POLICY, 0.0).expect("allowed");
    assert_eq!((next.standing.state, next.standing.attempts, next.delay), (State::Pending, 2, Duration::from_secs(7)));
    let begun = Standing { begun: true, lost: 1, ..running };
    let next = transition(begun, snooze, &POLICY, 0.0).expect("allowed");
    assert_eq!((next.standing.state, next.standing.attempts, next.standing.lost), (State::Pending, 2, 0));
    let last = transition(Standing { attempts: 3, ..begun }, snooze, &POLICY, 0.0).expect("allowed");
    assert_eq!(last.standing.state, State::Dead, "no attempt is left");
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
        choices in proptest::collection::vec((0usize..events().len(), 0u8..4, 0.0f64..1.0), 1..200),
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
                Event::Ended(End::Failed { .. } | End::Snoozed { .. } | End::Discarded)
                | Event::Resolved(Answer::DidNotHappen) if operation && open_effect => continue,
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
            if operation && matches!(now.state, State::Dead | State::Cancelled)
                && event != Event::Resolved(Answer::Abandoned) && before.state != State::Dead
            {
                prop_assert!(!open_effect, "I5: failed and cancelled mean not applied");
            }
            // What was abandoned and is retried may be applied again: an operator said so.
            if event == Event::Retried && open_effect {
                open_effect = false;
                repeats_allowed += 1;
            }
            prop_assert!(applied <= 1 + repeats_allowed, "I7");
        }
    }

    /// The same for a declared-idempotent one, whose remote applies what it is sent once.
    #[test]
    fn an_idempotent_one_is_never_dead_while_it_may_have_happened(
        choices in proptest::collection::vec((0usize..events().len(), 0u8..4, 0.0f64..1.0), 1..200),
    ) {
        let (mut now, mut applied, mut by_this, mut allowed) = (Standing::NEW, false, false, 0u32);
        for (choice, fate, draw) in choices {
            let event = events()[choice];
            if now.begun && fate == 0 {
                (applied, by_this) = (true, true);
            }
            match event {
                Event::Ended(_) if !now.begun => continue,
                // A repeat is told what the first one came to; a clear "no" is about this attempt only.
                Event::Ended(End::Succeeded) | Event::Resolved(Answer::Happened) if !applied => continue,
                Event::Ended(End::Failed { .. } | End::Snoozed { .. } | End::Discarded) if by_this => continue,
                Event::Resolved(Answer::DidNotHappen) if applied => continue,
                _ => {}
            }
            let before = now;
            let Ok(next) = transition(now, event, &IDEMPOTENT, draw) else { continue };
            now = next.standing;
            if event == Event::Begun { by_this = false; }
            if event == Event::Retried && before.attempts >= IDEMPOTENT.retry.max_attempts { allowed += 1; }
            prop_assert!(now.attempts >= before.attempts && now.attempts <= before.attempts + 1, "I11");
            prop_assert!(now.attempts <= IDEMPOTENT.retry.max_attempts + allowed, "I11: nor past the maximum");
            prop_assert!(now.state != State::Succeeded || applied, "I4");
            let said = event == Event::Resolved(Answer::Abandoned) || before.state == State::Dead;
            if matches!(now.state, State::Dead | State::Cancelled) && !said {
                prop_assert!(!applied, "I5: dead and cancelled mean not applied: {:?} by {:?}", before, event);
            }
            prop_assert!(now.state != State::InDoubt || now.lost == 0);
            // Given up on by an operator, and taken up again by one.
            if matches!(before.state, State::Dead | State::Cancelled) && now.state == State::Pending { applied = false; }
        }
    }
}
