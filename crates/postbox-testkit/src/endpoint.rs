//! An HTTP endpoint that puts on record what it was asked, and loses connections where a test wants it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A request that arrived as a whole.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Where.
    pub path: String,
    headers: HashMap<String, String>,
    /// Its body.
    pub body: Vec<u8>,
}

impl Asked {
    /// A header, by its name in lower case; empty if it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// What happens to a request that has arrived and is on record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// The connection is cut, and nobody hears of it.
    Cut,
    /// It is not answered, for as long as the caller waits.
    Hold,
}

#[derive(Debug)]
struct Inner {
    address: String,
    asked: Mutex<Vec<Asked>>,
    /// So many connections are cut before anything of a request is read.
    unread: AtomicUsize,
    then: Mutex<Vec<(String, Then)>>,
    /// How many requests have arrived.
    count: watch::Sender<usize>,
    held: watch::Sender<usize>,
    cut: watch::Sender<usize>,
}

/// An endpoint on loopback: `200`, unless it was told otherwise.
#[derive(Debug, Clone)]
pub struct Endpoint(Arc<Inner>);

impl Endpoint {
    /// Starts one on the current runtime.
    ///
    /// # Panics
    /// There is no free port.
    pub async fn start() -> Endpoint {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = Endpoint(Arc::new(Inner {
            address: listener.local_addr().expect("its address").to_string(),
            asked: Mutex::default(),
            unread: AtomicUsize::new(0),
            then: Mutex::default(),
            count: watch::Sender::new(0),
            held: watch::Sender::new(0),
            cut: watch::Sender::new(0),
        }));
        let accepting = endpoint.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let endpoint = accepting.clone();
                // Whoever calls may be killed at any byte.
                tokio::spawn(async move { endpoint.serve(stream).await.ok() });
            }
        });
        endpoint
    }

    /// Its URL, without a path.
    pub fn url(&self) -> String {
        format!("http://{}", self.0.address)
    }

    /// What arrived there, in that order.
    ///
    /// # Panics
    /// A request panicked.
    pub fn at(&self, path: &str) -> Vec<Asked> {
        let asked = self.0.asked.lock().expect("what was asked");
        asked.iter().filter(|asked| asked.path == path).cloned().collect()
    }

    /// The next so many requests meet a cut before anything of them is read.
    pub fn cut_unread(&self, requests: usize) {
        self.0.unread.fetch_add(requests, Ordering::SeqCst);
    }

    /// What happens to the next request there.
    ///
    /// # Panics
    /// A request panicked.
    pub fn next(&self, path: &str, then: Then) {
        self.0.then.lock().expect("what is next").push((path.to_owned(), then));
    }

    /// How many requests have arrived.
    pub fn count(&self) -> usize {
        *self.0.count.borrow()
    }

    /// Waits until so many requests have arrived.
    ///
    /// # Panics
    /// Never: it is there itself.
    pub async fn arrived(&self, requests: usize) {
        self.0.count.subscribe().wait_for(|count| *count >= requests).await.expect("it is there");
    }

    /// Waits until so many connections were cut in all.
    ///
    /// # Panics
    /// Never: it is there itself.
    pub async fn cut(&self, connections: usize) {
        self.0.cut.subscribe().wait_for(|cut| *cut >= connections).await.expect("it is there");
    }

    /// Waits until so many requests were held in all.
    ///
    /// # Panics
    /// Never: it is there itself.
    pub async fn held(&self, requests: usize) {
        self.0.held.subscribe().wait_for(|held| *held >= requests).await.expect("it is there");
    }

    async fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        while stream.get_ref().peek(&mut [0]).await? > 0 {
            let one_less = |left: usize| left.checked_sub(1);
            if self.0.unread.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok() {
                self.0.cut.send_modify(|cut| *cut += 1);
                return Ok(());
            }
            let asked = read(&mut stream).await?;
            match self.note(asked) {
                Some(Then::Cut) => {
                    self.0.cut.send_modify(|cut| *cut += 1);
                    return Ok(());
                }
                Some(Then::Hold) => {
                    self.0.held.send_modify(|held| *held += 1);
                    stream.read_u8().await?;
                }
                None => {}
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\ntaken").await?;
        }
        Ok(())
    }

    /// Puts it on record; what then.
    fn note(&self, asked: Asked) -> Option<Then> {
        let mut next = self.0.then.lock().expect("what is next");
        let then = next.iter().position(|(path, _)| *path == asked.path).map(|at| next.remove(at).1);
        self.0.asked.lock().expect("what was asked").push(asked);
        self.0.count.send_modify(|count| *count += 1);
        then
    }
}

/// One request, up to the end of its body.
async fn read(stream: &mut BufReader<TcpStream>) -> std::io::Result<Asked> {
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(Asked { path, headers, body })
}
