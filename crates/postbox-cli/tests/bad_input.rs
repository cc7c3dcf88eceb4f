//! The table of bad input through `publish --jsonl`: the same verdicts as through Rust and SQL.

use std::collections::BTreeMap;
use std::process::Command;

use base64::Engine;
use postbox_testkit::bad_input::{Input, Verdict, table, verdict_of_words};

/// The line for an input, as far as a line can say it.
fn line(input: &Input) -> Option<String> {
    if input.after.is_some() || input.max_attempts.is_some() || input.external_id.is_some() {
        return None;
    }
    let text = |text: &str| serde_json::to_string(text).expect("a string");
    let mut fields = vec![format!("\"topic\":{}", text(&input.topic))];
    match &input.bytes {
        Some((content_type, bytes)) => fields.push(format!(
            "\"content_type\":{},\"data_base64\":{}",
            text(content_type),
            text(&base64::engine::general_purpose::STANDARD.encode(bytes))
        )),
        None => fields.push(format!("\"payload\":{}", input.payload)),
    }
    if let Some(key) = &input.key {
        fields.push(format!("\"key\":{}", text(key)));
    }
    if let Some(id) = &input.dedup {
        fields.push(format!("\"id\":{}", text(id)));
    }
    if let Some((name, value)) = &input.header {
        fields.push(format!("\"headers\":{{{}:{}}}", text(name), text(value)));
    }
    Some(format!("{{{}}}", fields.join(",")))
}

#[test]
fn through_jsonl() {
    let folder = tempfile::tempdir().expect("a folder");
    let lines: Vec<(Input, String)> = table().into_iter().filter_map(|i| line(&i).map(|l| (i, l))).collect();
    assert!(lines.len() > 30, "most of the table can be said in a line");
    let file = folder.path().join("bad.jsonl");
    let text: Vec<&str> = lines.iter().map(|(_, l)| l.as_str()).collect();
    std::fs::write(&file, text.join("\n")).expect("the file");
    let output = Command::new(env!("CARGO_BIN_EXE_postbox"))
        .arg("--database-url")
        .arg(format!("sqlite:{}", folder.path().join("t.db").display()))
        .args(["--json", "publish", "--jsonl"])
        .arg(&file)
        .output()
        .expect("the command");
    let told: BTreeMap<usize, String> = String::from_utf8_lossy(&output.stderr)
        .lines()
        .filter_map(|l| {
            l.strip_prefix("line ")?.split_once(": ").map(|(n, why)| (n.parse().unwrap_or(0), why.to_owned()))
        })
        .collect();
    for (number, (input, _)) in (1..).zip(&lines) {
        let verdict = match told.get(&number) {
            None => Verdict::Taken,
            Some(words) => verdict_of_words(words).unwrap_or_else(|| panic!("{}: {words}", input.what)),
        };
        assert_eq!(verdict, input.verdict, "{}: {:?}", input.what, told.get(&number));
    }
    let taken = lines.iter().filter(|(i, _)| i.verdict == Verdict::Taken).count();
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(summary["published"], taken);
    assert_eq!(summary["bad"], lines.len() - taken);
    assert_eq!(output.status.code(), Some(1), "some lines were bad");
}
