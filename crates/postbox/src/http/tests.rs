//! What is called and what is not, against servers on loopback and names that resolve to anything.

use std::collections::HashMap;
use std::sync::Mutex;

use axum::http::StatusCode;
use axum::routing::{any, get};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// Says what a test wants a name to mean: each time the next.
#[derive(Default)]
struct Liar(Mutex<HashMap<String, Vec<Vec<&'static str>>>>);

impl Liar {
    fn of(name: &str, answers: &[&[&'static str]]) -> Arc<Liar> {
        let answers = answers.iter().map(|one| one.to_vec()).collect();
        Arc::new(Liar(Mutex::new(HashMap::from([(name.to_owned(), answers)]))))
    }
}

impl Lookup for Liar {
    fn lookup(&self, name: String) -> Found {
        let mut names = self.0.lock().expect("the names");
        let answers = names.get_mut(&name).filter(|answers| !answers.is_empty()).map(|answers| answers.remove(0));
        Box::pin(async move {
            let answers = answers.ok_or_else(|| std::io::Error::other("no such name"))?;
            Ok(answers.iter().map(|ip| ip.parse().expect("an address")).collect())
        })
    }
}

fn allowing(networks: &[&str]) -> Calling {
    let mut calling = Calling { timeout: Duration::from_secs(5), ..Calling::default() };
    networks.iter().for_each(|network| calling.guard.allow(network).expect("a network"));
    calling
}

/// Serves on loopback; its port.
async fn serve(app: axum::Router) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("its address").port();
    tokio::spawn(async move { axum::serve(listener, app).await });
    port
}

async fn post(endpoint: &Endpoint) -> Result<Answer, Trouble> {
    endpoint.post(HeaderMap::new(), b"{}".to_vec()).await
}

#[tokio::test]
async fn addresses_in_urls_are_seen_through_whatever_their_spelling() {
    let refused = [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://127.0.0.1./",
        "http://0x7f.1/",
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://2130706433/",
        "http://017700000001/",
        "http://１２７.0.0.1/",
        "http://127。0。0。1/",
        "http://%31%32%37.0.0.1/",
        "http://0/",
        "http://0.0.0.0:8080/",
        "http://[::1]/",
        "http://[::]/",
        "http://[::127.0.0.1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[0:0:0:0:0:ffff:169.254.169.254]/",
        "http://[64:ff9b::a00:1]/",
        "http://[2002:a00:1::]/",
        "http://[fe80::1]/",
        "http://[fd00:ec2::254]/latest/meta-data",
        "http://169.254.169.254/latest/meta-data",
        "http://0xa9fea9fe/",
        "http://10.0.0.1:6379/",
        "https://192.168.1.1/",
        "https://172.16.0.1/",
        "https://100.64.0.1/",
        "https://224.0.0.1/",
        "https://203.0.113.5/",
    ];
    for url in refused {
        let error = Endpoint::new(url, Calling::default()).expect_err(url);
        assert!(error.contains("is not called unless it is allowed"), "{url}: {error}");
    }
    for url in
        ["https://1.1.1.1/hooks", "https://[2606:4700::1111]/", "https://example.org/a?b=c", " https://example.org "]
    {
        Endpoint::new(url, Calling::default()).expect(url);
    }
}

#[tokio::test]
async fn only_urls_of_http_without_credentials_are_called_and_errors_show_no_secret() {
    for (url, words) in [
        ("", "does not parse"),
        ("example.org/hooks", "does not parse"),
        ("ftp://example.org/", "only http and https"),
        ("file:///etc/passwd", "only http and https"),
        ("gopher://example.org/", "only http and https"),
        ("javascript:alert(1)", "only http and https"),
        ("http:///", "does not parse"),
        ("https://user@example.org/hidden", "user name or a password"),
        ("https://user:hidden@example.org/", "user name or a password"),
        ("https://:hidden@example.org/hidden?hidden", "user name or a password"),
        ("http://10.0.0.1/hidden?token=hidden", "is private"),
        ("https://exa mple.org/hidden", "does not parse"),
    ] {
        let error = Endpoint::new(url, Calling::default()).expect_err(url);
        assert!(error.contains(words) && !error.contains("hidden"), "{url}: {error}");
    }
    // Nor do errors of calls: paths and queries of webhooks are secrets, often enough.
    let names = Liar::of("example.org", &[&["127.0.0.1"]]);
    let endpoint = Endpoint::resolved_by("http://example.org:9/hidden?hidden", allowing(&["127.0.0.1"]), names);
    let error = post(&endpoint.expect("an endpoint")).await.expect_err("nobody listens");
    assert!(!error.words().contains("hidden"), "{error:?}");
    assert!(error.words().contains("http://example.org:9"), "{error:?}");
}

#[tokio::test]
async fn a_name_is_called_at_the_addresses_that_may_be_called() {
    let port = serve(axum::Router::new().fallback(any(|| async { "here" }))).await;
    let url = format!("http://hooks.example:{port}/");
    for (answers, networks, words) in [
        (&["127.0.0.1"][..], &[][..], Some("this machine's own")),
        (&["::ffff:127.0.0.1"], &[], Some("this machine's own")),
        (&["10.0.0.1", "192.168.0.1"], &[], Some("private")),
        (&["169.254.169.254"], &[], Some("metadata")),
        (&["169.254.169.254"], &["127.0.0.0/8"], Some("metadata")),
        (&["127.0.0.1"], &["10.0.0.0/8"], Some("this machine's own")),
        (&[], &["127.0.0.0/8"], Some("no connection")),
        (&["127.0.0.1"], &["127.0.0.0/8"], None),
        // What may not be called is left out, wherever it stands.
        (&["169.254.169.254", "127.0.0.1"], &["127.0.0.0/8"], None),
        (&["127.0.0.1", "10.0.0.1"], &["127.0.0.0/8"], None),
    ] {
        let names = Liar::of("hooks.example", &[answers]);
        let endpoint = Endpoint::resolved_by(&url, allowing(networks), names).expect("an endpoint");
        match (post(&endpoint).await, words) {
            (Ok(answer), None) => assert_eq!((answer.status, answer.text().as_str()), (200, "here")),
            (Err(Trouble::NotSent(error)), Some(words)) => assert!(error.contains(words), "{answers:?}: {error}"),
            (other, _) => panic!("{answers:?} {networks:?}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_name_that_comes_to_mean_something_else_is_looked_at_again() {
    let app = axum::Router::new().fallback(any(|| async { ([("connection", "close")], "here") }));
    let port = serve(app).await;
    let names = Liar::of("hooks.example", &[&["127.0.0.1"], &["169.254.169.254"], &["127.0.0.1"]]);
    let url = format!("http://hooks.example:{port}/");
    let endpoint = Endpoint::resolved_by(&url, allowing(&["127.0.0.1"]), names).expect("an endpoint");
    assert_eq!(post(&endpoint).await.expect("an answer").status, 200);
    let refused = post(&endpoint).await.expect_err("rebound");
    assert!(matches!(&refused, Trouble::NotSent(words) if words.contains("metadata")), "{refused:?}");
    endpoint.look().await.expect("it is back");
    let gone = endpoint.look().await.expect_err("it is gone").to_string();
    assert!(gone.contains("no such name"), "{gone}");
}

#[tokio::test]
async fn nothing_is_followed_and_little_is_read() {
    let secret = serve(axum::Router::new().fallback(any(|| async { "secret" }))).await;
    let app = axum::Router::new()
        .route(
            "/away",
            any(move || async move {
                (StatusCode::TEMPORARY_REDIRECT, [("location", format!("http://127.0.0.1:{secret}/"))], "moved")
            }),
        )
        .route("/large", any(|| async { "x".repeat(1 << 20) }))
        .route(
            "/endless",
            any(|| async {
                let chunks = (0..1 << 30).map(|_| Ok::<_, std::io::Error>("y".repeat(1000)));
                axum::body::Body::from_stream(futures_util::stream::iter(chunks))
            }),
        );
    let port = serve(app).await;
    let endpoint = |path: &str| {
        Endpoint::new(&format!("http://127.0.0.1:{port}{path}"), allowing(&["127.0.0.1"])).expect("an endpoint")
    };
    let away = post(&endpoint("/away")).await.expect("an answer");
    assert_eq!((away.status, away.meaning(), away.text().as_str()), (307, Meaning::Refused, "moved"));
    for path in ["/large", "/endless"] {
        let answer = post(&endpoint(path)).await.expect("an answer");
        assert_eq!((answer.status, answer.body.len()), (200, MAX_BODY), "{path}");
    }
}

/// Whether anything more comes.
async fn hears(stream: &mut tokio::net::TcpStream) -> bool {
    stream.read(&mut [0; 4096]).await.is_ok_and(|bytes| bytes > 0)
}

/// A server that takes a request and then does something else than to answer.
async fn odd_server(then: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("its address").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                if !hears(&mut stream).await {
                    return;
                }
                stream.write_all(if then == "garbage" { b"SSH-2.0-no\r\n\r\n" } else { b"" }).await.ok();
                if then == "body without end" {
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await.ok();
                }
                // Until the caller hangs up.
                while then == "silence" && hears(&mut stream).await {}
            });
        }
    });
    port
}

#[tokio::test]
async fn not_sent_is_said_only_when_nothing_was_sent() {
    let calling = || Calling { timeout: Duration::from_millis(300), ..allowing(&["127.0.0.1"]) };
    for then in ["close", "garbage", "silence"] {
        let port = odd_server(then).await;
        let endpoint = Endpoint::new(&format!("http://127.0.0.1:{port}/"), calling()).expect("an endpoint");
        let trouble = post(&endpoint).await.expect_err(then);
        assert!(matches!(trouble, Trouble::Unknown(_)), "{then}: {trouble:?}");
        if then == "silence" {
            assert!(trouble.words().contains("did not answer within 300ms"), "{trouble:?}");
        }
    }
    // The status was there: that the body broke off changes nothing.
    let port = odd_server("body without end").await;
    let endpoint = Endpoint::new(&format!("http://127.0.0.1:{port}/"), calling()).expect("an endpoint");
    let answer = post(&endpoint).await.expect("an answer");
    assert_eq!((answer.status, answer.text().as_str()), (200, "half"));

    let nobody = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = nobody.local_addr().expect("its address").port();
    drop(nobody);
    let plain = serve(axum::Router::new().route("/", get(|| async { "no TLS here" }))).await;
    for url in [
        format!("http://127.0.0.1:{port}/"),
        // No TLS on the other side: the handshake fails before a request is written.
        format!("https://127.0.0.1:{plain}/"),
        "http://no-such-name.invalid/".to_owned(),
    ] {
        let calling = Calling { timeout: Duration::from_secs(5), ..calling() };
        let endpoint = Endpoint::new(&url, calling).expect("an endpoint");
        let trouble = post(&endpoint).await.expect_err(&url);
        assert!(matches!(trouble, Trouble::NotSent(_)), "{url}: {trouble:?}");
    }
}

#[test]
fn what_cannot_be_used_is_said() {
    let roots = tls(&[b"no certificate".to_vec()]).expect_err("no PEM");
    assert!(roots.contains("BEGIN CERTIFICATE"), "{roots}");
    assert!(Endpoint::new("https://example.org", Calling { timeout: Duration::ZERO, ..Calling::default() }).is_err());
}

#[test]
fn any_text_has_a_place_in_a_header() {
    assert_eq!(header_value("a b\r\nx: y%é\"").to_str().expect("ASCII"), "a%20b%0D%0Ax:%20y%25%C3%A9%22");
}
