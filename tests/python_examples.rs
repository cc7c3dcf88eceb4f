//! The examples in Python, on a schema of their own: `scripts/python-examples` runs this.

use std::path::Path;

use postbox::Postgres;
use postbox_testkit::Testable;
use tokio::process::Command;

async fn example(file: &str, words: &str) {
    let python = std::env::var("POSTBOX_TEST_PYTHON").expect("POSTBOX_TEST_PYTHON; run scripts/python-examples");
    let fresh = Postgres::fresh().await;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/python");
    let ran = Command::new(python)
        .arg(folder.join(file))
        .env("DATABASE_URL", fresh.url())
        .env("POSTBOX_SCHEMA", fresh.schema())
        .output();
    let ran = tokio::time::timeout(std::time::Duration::from_secs(120), ran).await.expect("it ends").expect("it runs");
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success() && out.contains(words), "{file}: {}\n{out}\n{err}", ran.status);
}

#[tokio::test]
#[ignore = "needs Python packages: scripts/python-examples"]
async fn asyncpg() {
    example("asyncpg_example.py", "1 dead letter after 3 attempts").await;
}

#[tokio::test]
#[ignore = "needs Python packages: scripts/python-examples"]
async fn sqlalchemy() {
    example("sqlalchemy_example.py", "1 dead letter after 2 attempts").await;
}
