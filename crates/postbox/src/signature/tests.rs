//! Known answers of others, and what must not be taken for good.

use super::*;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).expect("a time")
}

fn secret(text: &str) -> Secret {
    Secret::standard(text).expect("a secret")
}

/// From the specification of Standard Webhooks.
const WHSEC: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
const BODY: &[u8] = br#"{"test": 2432232314}"#;
const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
const TIME: i64 = 1_614_265_330;

fn standard(signature: &str, id: &str, time: &str, body: &[u8], now: i64) -> Result<(), SignatureError> {
    standard::verify(&[secret(WHSEC)], id, time, signature, body, at(now), TOLERANCE)
}

#[test]
fn the_specifications_own_example() {
    assert_eq!(standard::sign(&[secret(WHSEC)], ID, at(TIME), BODY), SIGNATURE);
    standard(SIGNATURE, ID, "1614265330", BODY, TIME).expect("good");
    // Among others, as a rotation has them.
    let several = format!("v1a,abc v1,AAAA {SIGNATURE} v2,zzz");
    standard(&several, ID, "1614265330", BODY, TIME).expect("good");
}

#[test]
fn githubs_own_example() {
    let secrets = [Secret::bytes("It's a Secret to Everybody").expect("a secret")];
    let signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
    assert_eq!(github::sign(&secrets[0], b"Hello, World!"), signature);
    github::verify(&secrets, signature, b"Hello, World!").expect("good");
    github::verify(&secrets, &signature.to_uppercase().replace("SHA256", "sha256"), b"Hello, World!").expect("good");
    assert_eq!(github::verify(&secrets, signature, b"Hello, World?"), Err(SignatureError::Mismatch));
    for odd in ["", "sha256=", "757107ea", "sha1=757107ea", "sha256=7571zz", "sha256=757", "sha256=é7"] {
        assert!(github::verify(&secrets, odd, b"Hello, World!").is_err(), "{odd}");
    }
}

#[test]
fn one_bit_less_is_no_signature() {
    let tampered = br#"{"test": 2432232315}"#;
    for (signature, id, time, body) in [
        (SIGNATURE, ID, "1614265330", &tampered[..]),
        (SIGNATURE, "msg_other", "1614265330", BODY),
        (SIGNATURE, ID, "1614265331", BODY),
        ("v1,h0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=", ID, "1614265330", BODY),
        ("v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1A==", ID, "1614265330", BODY),
        ("v1,", ID, "1614265330", BODY),
    ] {
        assert_eq!(standard(signature, id, time, body, TIME), Err(SignatureError::Mismatch), "{signature} {id} {time}");
    }
    let other = Secret::bytes("another").expect("a secret");
    let now = at(TIME);
    let verdict = standard::verify(&[other], ID, "1614265330", SIGNATURE, BODY, now, TOLERANCE);
    assert_eq!(verdict, Err(SignatureError::Mismatch));
    assert_eq!(
        standard::verify(&[], ID, "1614265330", SIGNATURE, BODY, now, TOLERANCE),
        Err(SignatureError::Mismatch),
        "without a secret nothing is good"
    );
}

#[test]
fn what_is_malformed_is_told_from_what_is_false() {
    for (signature, time) in [
        ("", "1614265330"),
        ("g0hM9SsE", "1614265330"),
        ("v2,g0hM9SsE", "1614265330"),
        ("v1,!!", "1614265330"),
        (SIGNATURE, ""),
        (SIGNATURE, "soon"),
        (SIGNATURE, "-1614265330"),
        (SIGNATURE, "+1614265330"),
        (SIGNATURE, "1614265330.5"),
        (SIGNATURE, "99999999999999999999"),
    ] {
        let verdict = standard(signature, ID, time, BODY, TIME);
        assert!(matches!(verdict, Err(SignatureError::Malformed { .. })), "{signature} {time}: {verdict:?}");
    }
}

#[test]
fn the_clock_may_differ_by_the_tolerance_either_way() {
    for now in [TIME - 300, TIME, TIME + 300] {
        standard(SIGNATURE, ID, "1614265330", BODY, now).expect("in time");
    }
    for (now, seconds, words) in [(TIME + 301, 301, "301 s old"), (TIME - 301, -301, "301 s in the future")] {
        let stale = standard(SIGNATURE, ID, "1614265330", BODY, now).expect_err("stale");
        assert_eq!(stale, SignatureError::Stale { seconds, tolerance: TOLERANCE });
        assert!(stale.to_string().contains(words), "{stale}");
    }
    let wide = Duration::from_secs(3600);
    standard::verify(&[secret(WHSEC)], ID, "1614265330", SIGNATURE, BODY, at(TIME + 3600), wide).expect("in time");
    // A time that nobody has, signed properly.
    let far = i64::MAX.to_string();
    let signature =
        format!("v1,{}", BASE64.encode(tag(&secret(WHSEC), &[ID.as_bytes(), b".", far.as_bytes(), b".", BODY])));
    let verdict = standard(&signature, ID, &far, BODY, TIME);
    assert!(matches!(verdict, Err(SignatureError::Stale { .. })), "{verdict:?}");
}

#[test]
fn secrets_rotate() {
    let (old, new) = (secret(WHSEC), secret("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"));
    let now = at(TIME);
    // The sender signs with both; a receiver that has either one takes it.
    let both = standard::sign(&[old.clone(), new.clone()], ID, now, BODY);
    assert_eq!(both.split(' ').count(), 2);
    for secrets in [vec![old.clone()], vec![new.clone()], vec![new.clone(), old.clone()]] {
        standard::verify(&secrets, ID, "1614265330", &both, BODY, now, TOLERANCE).expect("good");
    }
    // The receiver has both; the sender signs with either one.
    for one in [&old, &new] {
        let signature = standard::sign(std::slice::from_ref(one), ID, now, BODY);
        let known = [old.clone(), new.clone()];
        standard::verify(&known, ID, "1614265330", &signature, BODY, now, TOLERANCE).expect("good");
    }
    let header = stripe::sign(&[old.clone(), new.clone()], now, BODY);
    stripe::verify(&[new], &header, BODY, now, TOLERANCE).expect("good");
}

#[test]
fn stripes_header_is_read_as_it_is_written() {
    let secrets = [Secret::bytes("whsec_test_secret").expect("a secret")];
    let header = stripe::sign(&secrets, at(TIME), BODY);
    assert!(header.starts_with("t=1614265330,v1="), "{header}");
    let verify = |header: &str, now| stripe::verify(&secrets, header, BODY, at(now), TOLERANCE);
    verify(&header, TIME).expect("good");
    verify(&format!("v0=6ffbb59b,{header},v1=00"), TIME).expect("others beside it do not matter");
    assert!(matches!(verify(&header, TIME + 301), Err(SignatureError::Stale { seconds: 301, .. })));
    assert_eq!(verify(&header.replace("v1=", "v0="), TIME), Err(malformed("no `v1=` and hex in it")));
    assert_eq!(verify(&header.replace("t=1614265330,", ""), TIME), Err(malformed("no `t=` in it")));
    assert_eq!(verify(&format!("{header},t=1"), TIME), Err(malformed("more than one `t=` in it")));
    assert_eq!(verify(&header.replace("t=1614265330", "t=1614265329"), TIME), Err(SignatureError::Mismatch));

    fn malformed(why: &'static str) -> SignatureError {
        SignatureError::Malformed { header: stripe::SIGNATURE, why }
    }
}

#[test]
fn secrets_are_read_and_never_shown() {
    assert_eq!(secret(WHSEC).0.len(), 24);
    assert!(!secret(WHSEC).is_short());
    assert!(secret("short").is_short());
    assert_eq!(secret("no prefix").0, b"no prefix");
    assert_eq!(secret("whsec_YQ").0, secret("whsec_YQ==").0);
    for (bad, words) in [("", "empty"), ("whsec_", "empty"), ("whsec_?", "base64")] {
        let error = Secret::standard(bad).expect_err("refused").to_string();
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(format!("{:?}", secret(WHSEC)), "Secret(…)");
}
