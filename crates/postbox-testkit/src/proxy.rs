//! A TCP proxy that cuts connections: now, or around a command that a test names.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};

/// What is lost when a connection is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// The command and what follows it: the server never sees them.
    Request,
    /// The reply: the server has carried the command out.
    Reply,
}

/// The proxy; clones are the same one.
#[derive(Clone)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    upstream: u16,
    armed: Mutex<Vec<(Lost, String)>>,
    cut: Notify,
    /// Whether connections are refused; with each word of that, all that there are are cut.
    refusing: watch::Sender<bool>,
}

impl Proxy {
    /// Listens on loopback, and passes on to this port.
    ///
    /// # Panics
    /// There is no free port.
    pub async fn start(upstream: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let shared =
            Shared { upstream, armed: Mutex::default(), cut: Notify::new(), refusing: watch::channel(false).0 };
        let proxy = Proxy { port, shared: Arc::new(shared) };
        let shared = proxy.shared.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (shared, mut refusing) = (shared.clone(), shared.refusing.subscribe());
                if *refusing.borrow() {
                    continue;
                }
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(("127.0.0.1", shared.upstream)).await else { return };
                    tokio::select! {
                        _ = shared.serve(client, server) => {}
                        _ = refusing.changed() => {}
                    }
                });
            }
        });
        proxy
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Cuts the connection on which this word comes next, once.
    pub fn arm(&self, lost: Lost, word: &str) {
        self.shared.armed().push((lost, word.to_owned()));
    }

    /// Cuts all connections that there are.
    pub fn cut_all(&self) {
        self.refuse(false);
    }

    /// Cuts all connections that there are, and refuses others, or takes them again.
    pub fn refuse(&self, does: bool) {
        self.shared.refusing.send_replace(does);
    }

    /// Waits until an armed cut has been made.
    ///
    /// # Panics
    /// None is made within a minute.
    pub async fn cut(&self) {
        let minute = Duration::from_secs(60);
        tokio::time::timeout(minute, self.shared.cut.notified()).await.expect("nothing was cut");
    }
}

impl Shared {
    fn armed(&self) -> MutexGuard<'_, Vec<(Lost, String)>> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cut that these bytes are waited for with, and where in them.
    fn take(&self, bytes: &[u8]) -> Option<(Lost, usize)> {
        let mut armed = self.armed();
        let found = armed.iter().enumerate().find_map(|(index, (lost, word))| {
            let at = bytes.windows(word.len()).position(|window| window == word.as_bytes())?;
            Some((index, *lost, at))
        });
        let (index, lost, at) = found?;
        armed.remove(index);
        Some((lost, at))
    }

    async fn serve(&self, client: TcpStream, server: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (mut client_read, mut client_write) = client.into_split();
        let (mut server_read, mut server_write) = server.into_split();
        let back = async {
            let mut buffer = vec![0; 16 << 10];
            loop {
                let read = server_read.read(&mut buffer).await?;
                if read == 0 {
                    return client_write.shutdown().await;
                }
                client_write.write_all(&buffer[..read]).await?;
            }
        };
        let lost = tokio::select! {
            ended = back => return ended,
            ended = self.forth(&mut client_read, &mut server_write) => ended?,
        };
        match lost {
            None => return Ok(()),
            Some(Lost::Request) => {}
            Some(Lost::Reply) => {
                // With the reply there, the server has done what it was told.
                let patience = Duration::from_secs(10);
                tokio::time::timeout(patience, server_read.read(&mut [0; 1 << 10])).await.ok();
            }
        }
        self.cut.notify_one();
        Ok(())
    }

    /// From the client to the server, until the client has ended, or the connection is to be cut.
    async fn forth(&self, client: &mut OwnedReadHalf, server: &mut OwnedWriteHalf) -> io::Result<Option<Lost>> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let read = client.read(&mut buffer).await?;
            if read == 0 {
                return Ok(None);
            }
            let (lost, upto) = match self.take(&buffer[..read]) {
                Some((Lost::Request, at)) => (Some(Lost::Request), at),
                Some((Lost::Reply, _)) => (Some(Lost::Reply), read),
                None => (None, read),
            };
            server.write_all(&buffer[..upto]).await?;
            if lost.is_some() {
                return Ok(lost);
            }
        }
    }
}
