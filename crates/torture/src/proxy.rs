//! A proxy before PostgreSQL that understands enough of its protocol to cut a connection around a
//! COMMIT, and to let those that listen hear nothing.

mod ears;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use self::ears::{Ear, Ears, is_listen};
use crate::world::locked;

/// When a connection is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// PostgreSQL never sees the COMMIT.
    Before,
    /// It has committed, and its answer is lost.
    After,
}

/// A cut that waits for a transaction that it fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) when: When,
    /// A text that one of the transaction's statements has; empty: any.
    pub(crate) about: &'static str,
}

/// Statements whose COMMIT is worth cutting.
pub(crate) const ABOUTS: &[&str] = &["", PUBLISH, OUTCOME, FLUSH, CLAIM, RESOLUTION];

const PUBLISH: &str = "insert into postbox.message (";
const OUTCOME: &str = "insert into postbox.outcome (";
/// A flush: what has ended, what starts, or both; all of it is one statement.
const FLUSH: &str = "insert into postbox.outcome_part (";
const CLAIM: &str = "insert into postbox.lease (";
const RESOLUTION: &str = "insert into postbox.resolution (";

/// What a transaction is for, by the words of [`crate::fault::COMMITS`]. The first that fits: follow-ups are
/// published with an outcome.
fn purpose(statements: &[String]) -> Option<&'static str> {
    let all =
        [(RESOLUTION, "resolution"), (CLAIM, "claim"), (FLUSH, "flush"), (OUTCOME, "outcome"), (PUBLISH, "publish")];
    all.into_iter().find(|(text, _)| statements.iter().any(|s| s.contains(text))).map(|(_, purpose)| purpose)
}

/// What the proxy has done to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hit {
    /// It was cut, and this is what the transaction was for.
    Cut(When, Option<&'static str>),
    /// It listens, and hears nothing any more.
    Frozen,
}

/// The proxy; clones are the same one.
#[derive(Clone)]
pub(crate) struct Proxy {
    port: u16,
    armed: Arc<Mutex<VecDeque<Cut>>>,
    ears: Arc<Ears>,
    hit: Arc<dyn Fn(Hit) + Send + Sync>,
}

impl Proxy {
    /// Listens, and passes on to this port. It tells what it does to whom.
    pub(crate) async fn start(upstream: u16, hit: impl Fn(Hit) + Send + Sync + 'static) -> io::Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let proxy = Proxy { port, armed: Arc::default(), ears: Arc::default(), hit: Arc::new(hit) };
        let serving = proxy.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let proxy = serving.clone();
                tokio::spawn(async move {
                    if let Ok(server) = TcpStream::connect(("127.0.0.1", upstream)).await {
                        proxy.serve(client, server).await.ok();
                    }
                });
            }
        });
        Ok(proxy)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn arm(&self, cut: Cut) {
        let mut armed = locked(&self.armed);
        // What found no transaction to fit gives way.
        if armed.len() >= 4 {
            armed.pop_front();
        }
        armed.push_back(cut);
    }

    /// Nothing waits to be done, and whoever listens hears.
    pub(crate) fn disarm(&self) {
        locked(&self.armed).clear();
        self.ears.hear();
    }

    /// Connections that listen hear nothing for this long. Then they are cut, and the next ones hear.
    pub(crate) async fn deafen_for(&self, time: Duration) {
        self.deafen();
        tokio::time::sleep(time).await;
        self.ears.hear();
    }

    fn deafen(&self) {
        for _ in 0..self.ears.deafen() {
            (self.hit)(Hit::Frozen);
        }
    }

    /// For how long nobody has heard anything here.
    pub(crate) fn deaf_for(&self) -> Option<Duration> {
        self.ears.deaf_for()
    }

    /// The cut for a transaction with these statements, if one waits for it.
    fn take(&self, statements: &[String]) -> Option<Cut> {
        let mut armed = locked(&self.armed);
        let fits = |cut: &Cut| cut.about.is_empty() || statements.iter().any(|s| s.contains(cut.about));
        let index = armed.iter().position(fits)?;
        armed.remove(index)
    }

    async fn serve(&self, client: TcpStream, server: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (client_read, client_write) = client.into_split();
        let (server_read, server_write) = server.into_split();
        let (swallow, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
        let ear = Ear::default();
        let back = tokio::spawn(back(server_read, client_write, swallow.clone(), answered.clone(), ear.clone()));
        let result = tokio::select! {
            result = self.forth(client_read, server_write, &swallow, &answered, &ear) => result,
            () = ear.cut() => Ok(()),
        };
        // Both directions go: that is the cut, and the end as well.
        back.abort();
        result
    }

    async fn forth(
        &self,
        mut client: OwnedReadHalf,
        mut server: OwnedWriteHalf,
        swallow: &AtomicBool,
        answered: &Notify,
        ear: &Ear,
    ) -> io::Result<()> {
        let mut transaction = Transaction::default();
        let (mut buffer, mut started) = (Vec::new(), false);
        loop {
            let mut forwarded = 0;
            while let Some(length) = message_length(&buffer[forwarded..], started) {
                let message = &buffer[forwarded..forwarded + length];
                if !started {
                    // Requests for encryption come before the start, and are refused by the server.
                    started = message.get(4..8).is_some_and(|code| code == [0, 3, 0, 0]);
                } else if transaction.commits(message)
                    && let Some(cut) = self.take(&transaction.statements)
                {
                    server.write_all(&buffer[..forwarded]).await?;
                    if cut.when == When::After {
                        swallow.store(true, Ordering::SeqCst);
                        server.write_all(&buffer[forwarded..]).await?;
                        let patience = Duration::from_secs(2);
                        tokio::time::timeout(patience, answered.notified()).await.ok();
                    }
                    (self.hit)(Hit::Cut(cut.when, purpose(&transaction.statements)));
                    return Ok(());
                } else if is_listen(message) && self.ears.listens(ear) {
                    (self.hit)(Hit::Frozen);
                }
                forwarded += length;
            }
            server.write_all(&buffer[..forwarded]).await?;
            buffer.drain(..forwarded);
            if client.read_buf(&mut buffer).await? == 0 {
                return server.shutdown().await;
            }
        }
    }
}

/// From the server to the client, until an answer is to be swallowed, or the client to hear nothing.
async fn back(
    mut server: OwnedReadHalf,
    mut client: OwnedWriteHalf,
    swallow: Arc<AtomicBool>,
    answered: Arc<Notify>,
    ear: Ear,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let read = tokio::select! {
            biased;
            // As in a network that loses all of it: not even the end of the server gets through.
            () = ear.frozen() => std::future::pending().await,
            read = server.read(&mut buffer) => read?,
        };
        if swallow.load(Ordering::SeqCst) {
            answered.notify_one();
            // Nothing more reaches the client.
            std::future::pending::<()>().await;
        }
        if read == 0 {
            return client.shutdown().await;
        }
        client.write_all(&buffer[..read]).await?;
    }
}

/// The length of the first message, when it is all there.
fn message_length(buffer: &[u8], started: bool) -> Option<usize> {
    let tag = usize::from(started);
    let length: [u8; 4] = buffer.get(tag..tag + 4)?.try_into().ok()?;
    let length = u32::from_be_bytes(length) as usize + tag;
    (buffer.len() >= length && length > tag).then_some(length)
}

/// What a connection's transaction has said.
#[derive(Debug, Default)]
struct Transaction {
    statements: Vec<String>,
    prepared: HashMap<String, String>,
    portals: HashMap<String, String>,
}

impl Transaction {
    /// Takes a message from the client; whether it makes the server commit.
    fn commits(&mut self, message: &[u8]) -> bool {
        let mut texts = message.get(5..).unwrap_or_default().split(|b| *b == 0);
        let mut next = || String::from_utf8_lossy(texts.next().unwrap_or_default()).into_owned();
        match message[0] {
            b'Q' => {
                let text = next();
                if is_commit(&text) {
                    return true;
                }
                if text.trim_start().get(..5).is_some_and(|begin| begin.eq_ignore_ascii_case("begin")) {
                    self.statements.clear();
                }
                self.statements.push(text);
            }
            b'P' => {
                let name = next();
                self.prepared.insert(name, next());
            }
            b'B' => {
                let (portal, name) = (next(), next());
                let text = self.prepared.get(&name).cloned().unwrap_or_default();
                self.statements.push(text.clone());
                self.portals.insert(portal, text);
            }
            b'E' => return self.portals.get(&next()).is_some_and(|text| is_commit(text)),
            _ => {}
        }
        false
    }
}

fn is_commit(text: &str) -> bool {
    text.trim_start().get(..6).is_some_and(|word| word.eq_ignore_ascii_case("commit"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::COMMITS;

    fn message(tag: u8, texts: &[&str]) -> Vec<u8> {
        let body: Vec<u8> = texts.iter().flat_map(|t| t.bytes().chain([0])).collect();
        let mut message = vec![tag];
        message.extend((body.len() as u32 + 4).to_be_bytes());
        message.extend(body);
        message
    }

    #[test]
    fn sees_commits_in_both_protocols() {
        let mut transaction = Transaction::default();
        assert!(!transaction.commits(&message(b'Q', &["BEGIN"])));
        assert!(!transaction.commits(&message(b'P', &["s1", "insert into postbox.attempt (x)"])));
        assert!(!transaction.commits(&message(b'B', &["", "s1"])));
        assert!(!transaction.commits(&message(b'E', &[""])));
        assert!(transaction.commits(&message(b'Q', &["COMMIT"])));
        assert!(transaction.statements.iter().any(|s| s.contains("postbox.attempt")));
        transaction.commits(&message(b'Q', &["begin"]));
        assert!(transaction.statements.len() == 1);
        transaction.commits(&message(b'P', &["c", "commit"]));
        transaction.commits(&message(b'B', &["p", "c"]));
        assert!(transaction.commits(&message(b'E', &["p"])));
    }

    #[test]
    fn a_transaction_has_one_purpose() {
        let of = |texts: &[&str]| purpose(&texts.iter().map(|t| format!("with x as ({t}id)")).collect::<Vec<_>>());
        assert_eq!(of(&["begin"]), None);
        assert_eq!(of(&[PUBLISH]), Some("publish"));
        assert_eq!(of(&[PUBLISH, OUTCOME]), Some("outcome"));
        assert_eq!((of(&[OUTCOME, FLUSH]), of(&[FLUSH])), (Some("flush"), Some("flush")));
        assert_eq!(of(&[RESOLUTION, PUBLISH]), Some("resolution"));
        for text in ABOUTS.iter().filter(|text| !text.is_empty()) {
            assert!(of(&[text]).is_some_and(|purpose| COMMITS.contains(&purpose)), "{text}");
        }
    }

    #[test]
    fn sees_who_listens() {
        assert!(is_listen(&message(b'Q', &["LISTEN \"postbox\""])));
        assert!(is_listen(&message(b'P', &["s1", "listen postbox"])));
        assert!(!is_listen(&message(b'Q', &["UNLISTEN *"])));
        assert!(!is_listen(&message(b'B', &["listen", "s1"])));
    }

    /// A client behind the proxy, and the server's end of its connection.
    async fn connected(proxy: &Proxy, server: &TcpListener) -> (TcpStream, TcpStream) {
        let mut client = TcpStream::connect(("127.0.0.1", proxy.port())).await.expect("the proxy");
        let (mut upstream, _) = server.accept().await.expect("the server");
        let hello = [0, 0, 0, 8, 0, 3, 0, 0];
        client.write_all(&hello).await.expect("a start");
        upstream.read_exact(&mut [0; 8]).await.expect("a start");
        (client, upstream)
    }

    async fn listen((client, upstream): &mut (TcpStream, TcpStream)) {
        let listen = message(b'Q', &["LISTEN postbox"]);
        client.write_all(&listen).await.expect("a LISTEN");
        upstream.read_exact(&mut vec![0; listen.len()]).await.expect("a LISTEN");
    }

    /// What the client hears of a word of the server; `None`: nothing.
    async fn hears((client, upstream): &mut (TcpStream, TcpStream)) -> Option<usize> {
        upstream.write_all(b"!").await.expect("a word");
        let patience = Duration::from_millis(200);
        tokio::time::timeout(patience, client.read(&mut [0; 1])).await.ok().map(|read| read.unwrap_or(0))
    }

    #[tokio::test]
    async fn those_who_listen_hear_nothing_for_a_while() {
        let server = TcpListener::bind("127.0.0.1:0").await.expect("a server");
        let hits = Arc::new(Mutex::new(Vec::new()));
        let told = hits.clone();
        let port = server.local_addr().expect("an address").port();
        let proxy = Proxy::start(port, move |hit| locked(&told).push(hit)).await.expect("a proxy");
        let (mut early, mut late) = (connected(&proxy, &server).await, connected(&proxy, &server).await);
        let mut other = connected(&proxy, &server).await;
        listen(&mut early).await;
        assert_eq!(hears(&mut early).await, Some(1));
        proxy.deafen();
        proxy.deafen();
        listen(&mut late).await;
        assert_eq!((hears(&mut early).await, hears(&mut late).await), (None, None));
        assert_eq!(hears(&mut other).await, Some(1), "another connection is left alone");
        assert_eq!(*locked(&hits), [Hit::Frozen, Hit::Frozen]);
        assert!(proxy.deaf_for().is_some());
        proxy.disarm();
        for (client, _) in [&mut early, &mut late] {
            assert_eq!(client.read(&mut [0; 1]).await.unwrap_or(0), 0, "it is cut, so that its owner notices");
        }
        let mut next = connected(&proxy, &server).await;
        listen(&mut next).await;
        assert_eq!((hears(&mut next).await, hears(&mut other).await), (Some(1), Some(1)));
        assert_eq!((proxy.deaf_for(), locked(&hits).len()), (None, 2));
    }

    #[test]
    fn messages_are_told_apart() {
        let whole = message(b'Q', &["select 1"]);
        assert_eq!(message_length(&whole, true), Some(whole.len()));
        assert_eq!(message_length(&whole[..whole.len() - 1], true), None);
        assert_eq!(message_length(&[0, 0, 0, 8, 4, 210, 22, 47], false), Some(8));
    }
}
