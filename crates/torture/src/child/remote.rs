//! The fake remote: it knows what it was asked and what it did, and keeps that on its own disk.
//!
//! `charge` is the irreversible call: before it is applied, the remote looks over a connection of its
//! own whether the attempt is on record. `repeat` is the same, applied once per key. What it does with a call follows from the seed, the key and
//! the attempt, not from the order in which calls come. `pass` takes its time, and tells when it came, when its
//! caller was gone, and when it was over.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::{ChildPlan, listen, say};
use crate::fault::Fault;
use crate::log::Log;
use crate::scenario::now_us;
use crate::site::{Site, number};
use crate::world::locked;

/// Nothing is applied later than this after it came: well within the quiet period.
const LATEST: Duration = Duration::from_millis(1200);

/// What the remote does with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Answer,
    /// Takes its time; the call is applied in the end, whether somebody still waits or not.
    Slow(u64),
    /// Applied, and never answered.
    Silent,
    /// Not applied, and never answered.
    Deaf,
    ResetAfter,
    ResetBefore,
    /// Not now: safe to try again.
    Later,
    /// For good.
    Refuse,
}

struct Remote<Db: Site> {
    plan: ChildPlan,
    log: Log,
    witness: Pool<Db>,
    applied: Mutex<HashSet<String>>,
    dared: Mutex<HashSet<String>>,
    /// Messages that a plain handler has spoken of.
    noted: Mutex<HashSet<String>>,
    /// Calls that take their time have numbers.
    passes: AtomicU64,
    /// No faults any more.
    healing: AtomicBool,
    started: Instant,
}

pub(crate) async fn run<Db: Site>(plan: ChildPlan) -> Result<(), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let remote = Arc::new(Remote::<Db> {
        log: Log::open(&plan.log)?,
        witness: Db::pool(&plan.direct, 8, Duration::from_millis(700))?,
        applied: Mutex::default(),
        dared: Mutex::default(),
        noted: Mutex::default(),
        passes: AtomicU64::default(),
        healing: AtomicBool::new(plan.faults.is_empty()),
        started: Instant::now(),
        plan,
    });
    let healed = remote.clone();
    listen(move |line| match line {
        "heal" => healed.healing.store(true, Ordering::SeqCst),
        "sync" => {
            let log = healed.log.clone();
            tokio::spawn(async move {
                log.write("synced").await;
                say("synced");
            });
        }
        _ => {}
    });
    say(format_args!("listening {}", listener.local_addr()?));
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(remote.clone().serve(stream));
    }
}

impl<Db: Site> Remote<Db> {
    fn now(&self) -> u128 {
        self.started.elapsed().as_micros()
    }

    fn dice(&self, what: impl Hash) -> fastrand::Rng {
        let mut hasher = DefaultHasher::new();
        (self.plan.seed, what).hash(&mut hasher);
        fastrand::Rng::with_seed(hasher.finish())
    }

    async fn serve(self: Arc<Self>, stream: TcpStream) {
        let received = Instant::now();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        let read = tokio::time::timeout(Duration::from_secs(5), stream.read_line(&mut line)).await;
        // Half a line is not a call: its sender was killed.
        if !matches!(read, Ok(Ok(_))) || !line.ends_with('\n') {
            return;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words.as_slice() {
            [what @ ("charge" | "repeat"), ext, key, delivery, number, clock] => {
                let once = *what == "repeat";
                match self.charge(received, once, [ext, key, delivery, number], clock).await {
                    Some(answer) => answer,
                    None => return hang_up(stream.into_inner()),
                }
            }
            ["note", ext, delivery, number, clock, kind] => {
                let noted = self.answer_to_note((*ext, *number));
                locked(&self.noted).insert((*ext).to_owned());
                let told = noted.unwrap_or("reset");
                self.log.write(format!("note {ext} {delivery} {number} {clock} {kind} {} {told}", self.now())).await;
                match noted {
                    Some(answer) => answer,
                    None => return hang_up(stream.into_inner()),
                }
            }
            ["pass", what, ms, delivery, process, begun] => {
                let time = Duration::from_millis(ms.parse().unwrap_or_default());
                self.pass(&mut stream, format!("{what} {delivery} {process} {begun}"), time).await;
                "done"
            }
            ["find", key] => match locked(&self.applied).contains(*key) {
                true => "found",
                false => "nothing",
            },
            ["noted", ext] => match locked(&self.noted).contains(*ext) {
                true => "found",
                false => "nothing",
            },
            ["dare", ext] => self.dare(ext),
            _ => "what?",
        };
        if answer == "never" {
            // The caller's timeout ends it, or its death.
            line.clear();
            stream.read_line(&mut line).await.ok();
            return;
        }
        stream.get_mut().write_all(format!("{answer}\n").as_bytes()).await.ok();
    }

    /// Takes its time for a call, whether its caller lives on or not.
    async fn pass(&self, stream: &mut BufReader<TcpStream>, call: String, time: Duration) {
        let number = self.passes.fetch_add(1, Ordering::Relaxed);
        self.log.leave(format!("came {number} {call} {}", now_us()));
        let over = tokio::time::sleep(time);
        tokio::pin!(over);
        let mut more = String::new();
        tokio::select! {
            () = &mut over => {}
            _ = stream.read_line(&mut more) => {
                self.log.leave(format!("gone {number} {}", now_us()));
                over.await;
            }
        }
        self.log.leave(format!("left {number} {}", now_us()));
    }

    /// `None`: the connection is reset. With `once`, a key that was applied before is not applied again.
    async fn charge(&self, received: Instant, once: bool, call: [&str; 4], clock: &str) -> Option<&'static str> {
        let [ext, key, delivery, number] = call;
        let call = call.join(" ");
        let mode = self.mode(ext, number);
        // Looked up first: writing the log takes time, in which a late commit would come through.
        let came = self.now();
        let recorded = self.on_record(delivery, number).await;
        self.log.write(format!("call {call} {came} {clock}")).await;
        match recorded {
            Some(true) => {}
            Some(false) => self.log.write(format!("unrecorded {call}")).await,
            // Nothing is applied unchecked.
            None => {
                self.log.write(format!("over {call} {} unchecked", self.now())).await;
                return Some("later");
            }
        }
        if let Mode::Slow(ms) = mode {
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
        let refused = matches!(mode, Mode::Deaf | Mode::ResetBefore | Mode::Later | Mode::Refuse);
        let late = received.elapsed() > LATEST;
        let known = once && locked(&self.applied).contains(key);
        if !refused && !late {
            // Of two calls at once, one is new.
            let new = locked(&self.applied).insert(key.to_owned());
            if new || !once {
                self.log.write(format!("applied {call} {}", self.now())).await;
            }
        }
        let again = if known { " known" } else { "" };
        self.log.write(format!("over {call} {} {mode:?}{again}", self.now())).await;
        match mode {
            // It cannot refuse what it has done.
            Mode::Refuse if known => Some("done"),
            _ if late => Some("later"),
            Mode::Answer | Mode::Slow(_) => Some("done"),
            Mode::Silent | Mode::Deaf => Some("never"),
            Mode::ResetAfter | Mode::ResetBefore => None,
            Mode::Later => Some("later"),
            Mode::Refuse => Some("refused"),
        }
    }

    fn mode(&self, ext: &str, number: &str) -> Mode {
        let mut dice = self.dice((ext, number));
        if self.healing.load(Ordering::SeqCst) {
            return Mode::Answer;
        }
        match dice.u32(..100) {
            0..64 => Mode::Answer,
            64..76 => Mode::Slow(dice.u64(50..800)),
            76..80 => Mode::Silent,
            80..83 => Mode::Deaf,
            83..88 => Mode::ResetAfter,
            88..91 => Mode::ResetBefore,
            91..97 => Mode::Later,
            _ => Mode::Refuse,
        }
    }

    /// Whether the attempt is committed, as seen from here. `None`: the database does not say.
    async fn on_record(&self, delivery: &str, number: &str) -> Option<bool> {
        let (Ok(delivery), Ok(attempt)) = (delivery.parse::<i64>(), number.parse::<i64>()) else {
            return Some(false);
        };
        let sql = format!(
            "select cast(count(*) as text) from {} where delivery = {delivery} and number = {attempt}",
            Db::postbox("attempt")
        );
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(600) {
            let look = async {
                let mut connection = Db::acquire(&self.witness).await?;
                Db::rows(&mut connection, sql.clone()).await
            };
            match tokio::time::timeout(Duration::from_millis(500), look).await {
                Ok(Ok(rows)) => return Some(number_of(&rows)),
                Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(_) => {}
            }
        }
        None
    }

    fn answer_to_note(&self, what: impl Hash) -> Option<&'static str> {
        if self.healing.load(Ordering::SeqCst) {
            return Some("done");
        }
        match self.dice(what).u32(..100) {
            0..94 => Some("done"),
            94..97 => Some("later"),
            97..99 => None,
            _ => Some("never"),
        }
    }

    /// Says once per message how its handler shall misbehave.
    fn dare(&self, ext: &str) -> &'static str {
        let mut dice = self.dice(("dare", ext));
        if self.healing.load(Ordering::SeqCst) || !self.plan.wants(Fault::F18) {
            return "fine";
        }
        if !locked(&self.dared).insert(ext.to_owned()) {
            return "fine";
        }
        match dice.u32(..1000) {
            0..15 => "panic",
            15..27 => "block",
            27..42 => "ignore",
            42..49 => "abort",
            _ => "fine",
        }
    }
}

fn number_of(rows: &[crate::site::Texts]) -> bool {
    number(rows) > 0
}

/// Ends a connection with a reset.
fn hang_up(stream: TcpStream) {
    stream.set_zero_linger().ok();
}
