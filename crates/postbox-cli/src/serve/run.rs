//! Running a plan: one worker for everything, and one address to listen at.

use std::path::Path;
use std::time::Duration;

use postbox::{Alive, Database, Error, Postbox, Worker};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::build::{Built, build};
use super::config::Plan;
use super::http::{self, Stopping};
use crate::commands::Ended;
use crate::desk::Desk;
use crate::failure::{FAILED, Failure, needs_role};
use crate::text::many;

/// How long a stop waits for requests that have begun.
const LAST_REQUESTS: Duration = Duration::from_secs(5);

/// SIGINT and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Signals> {
        Ok(Signals { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Runs until SIGINT or SIGTERM, or until the worker gives up.
pub(crate) async fn run<Db: Database>(desk: &Desk<'_>, plan: Plan) -> Ended {
    let failed = |tried: &str, error: &std::io::Error| {
        Failure::new(FAILED, tried, error.to_string(), desk.command("serve --check"))
    };
    // Before the start: a signal that comes meanwhile is not lost.
    let mut signals = Signals::listen().map_err(|e| failed("listen for signals", &e))?;
    if let Ok(schema) = desk.settings.schema() {
        needs_role(format!("{schema}_worker"));
    }
    let listener = match plan.http {
        Some(address) => Some((TcpListener::bind(address).await, address)),
        None => None,
    };
    let listener = match listener {
        Some((Ok(listener), _)) => Some(listener),
        Some((Err(error), address)) => {
            let next = format!("end what listens there, or change `http`, then: {}", desk.command("serve"));
            return Err(Failure::new(FAILED, format!("listen at {address}"), error.to_string(), next));
        }
        None => None,
    };
    let words = format!(
        "{}, {}, {}",
        many(plan.sources.len() as i64, "source", "sources"),
        many(plan.relays.len() as i64, "relay", "relays"),
        many(plan.pushes.len() as i64, "push", "pushes")
    );
    let stopping = Stopping::default();
    let mut starting = std::pin::pin!(start::<Db>(desk, plan, listener, stopping.clone()));
    let (worker, server) = tokio::select! {
        started = &mut starting => started?,
        () = signals.next() => {
            desk.output.prose("stopped before it had started");
            return Ok(0);
        }
    };
    let place = server.as_ref().map_or_else(String::new, |server| format!(", at http://{}", server.address));
    desk.output.prose(&format!("serving {words}{place}; Ctrl-C or SIGTERM stops it"));
    let alive: Alive = worker.alive();
    let asked = tokio::select! {
        () = signals.next() => true,
        () = alive.ended() => false,
    };
    // First what comes in, then what goes out, and last who tells of it.
    stopping.begins();
    if asked {
        desk.output.prose("stopping: what runs is waited for (a second signal ends it at once)");
    }
    let stopped = worker.stop_or_hurry(signals.next()).await;
    if let Some(server) = server {
        server.stop().await;
    }
    let ended = |error: &Error| Failure::of(error, "serve", desk.command("status"));
    stopped.map_err(|error| ended(&error))?;
    if !asked {
        let why = "the worker has ended by itself; the log says why";
        return Err(Failure::new(FAILED, "serve", why, desk.command("status")));
    }
    Ok(0)
}

async fn start<Db: Database>(
    desk: &Desk<'_>,
    plan: Plan,
    listener: Option<TcpListener>,
    stopping: Stopping,
) -> Result<(Worker<Db>, Option<Server>), Failure> {
    let postbox: Postbox<Db> = desk.open_or_create().await?;
    // `--check` connects to nothing: it has found nothing wrong with what is told here.
    let file = desk.file.as_deref().unwrap_or(Path::new("postbox.toml")).display();
    let next = format!("mend that in {file} or at the other side, then: {}", desk.command("serve"));
    let failed = |error: Error| Failure::of(&error, "start", next.clone());
    let Built { router, streams, webhooks } = build(plan);
    let mut doors = axum::Router::new();
    for webhook in webhooks {
        doors = doors.merge(webhook.routes(&postbox).await.map_err(failed)?);
    }
    let mut builder = postbox.worker(router);
    for stream in streams {
        builder = builder.receive(stream);
    }
    let worker = builder.start().await.map_err(failed)?;
    let routes = http::routes(postbox, worker.alive(), stopping, doors);
    let server = match listener {
        Some(listener) => Some(
            Server::start(listener, routes)
                .map_err(|error| Failure::new(FAILED, "listen", error.to_string(), desk.command("serve --check")))?,
        ),
        None => None,
    };
    Ok((worker, server))
}

/// Listens until it is told to stop.
struct Server {
    address: std::net::SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<()>>,
}

impl Server {
    fn start(listener: TcpListener, routes: axum::Router) -> std::io::Result<Server> {
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let stopped = async move {
            stopped.await.ok();
        };
        let serving = axum::serve(listener, routes).with_graceful_shutdown(stopped).into_future();
        Ok(Server { address, stop, task: tokio::spawn(serving) })
    }

    /// Takes no new connections, and waits for the requests that have begun; not for ever.
    async fn stop(self) {
        let Server { stop, mut task, .. } = self;
        stop.send(()).ok();
        if tokio::time::timeout(LAST_REQUESTS, &mut task).await.is_err() {
            task.abort();
        }
    }
}
