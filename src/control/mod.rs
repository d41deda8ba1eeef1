//! The socket: HTTP/1.1 on a Unix socket, and the stream of events.
//!
//! One thread of its own, a single-threaded tokio runtime, never in the hot path. It never touches the mount and takes
//! no lock that a reader holds across a system call, so it answers while everything else hangs; what could wait (making
//! the kernel forget, evicting, counting a tree, unmounting) is done by helper threads that it awaits. Those are few
//! enough to run out: of what may hang with the backing filesystem only so much is under way at a time (`Look`).
//!
//! One file for each resource: bytes in, a call of the filesystem's own functions, a document out.

mod body;
mod coredump;
mod damage;
mod devices;
mod events;
mod every_route;
mod mode;
mod problem;
mod redirect;
mod requests;
mod rules;
mod space;
mod state;

use std::ops::Deref;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::AcqRel};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{FromRef, State};
use axum::http::Uri;
use axum::routing::{get, post};
use crossbeam_channel::{RecvTimeoutError, Sender};
use serde_json::Value;
use tokio::sync::{Notify, Semaphore};

use crate::event::{Cursor, Ring};
use crate::fault::{Op, Rule};
use crate::fs::mount::{Holder, How};
use crate::fs::{Changed, Core, kernel_cache};
use crate::host::Machine;
use problem::Problem;
pub use redirect::lease_of;

/// How long a change of the rules waits for the kernel to forget what could hide them.
const FORGET_LIMIT: Duration = Duration::from_secs(2);
/// How long the backing filesystem is waited for where an answer can do without it.
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// So many of one sort may hang in the backing filesystem; there are 512 helpers, and others need them.
const MOST_LOOKS: usize = 32;
/// How long open connections may take to end when the daemon does.
const END_LIMIT: Duration = Duration::from_millis(500);

/// Who this daemon is.
#[derive(Clone, Debug)]
pub struct Identity {
    pub instance: String,
    /// Distinguishes this run's events from those of an earlier daemon under the same name.
    pub boot_id: String,
    pub socket: PathBuf,
    pub log: Option<PathBuf>,
    /// None of one that serves the machine alone.
    pub mount: Option<Mount>,
}

/// What it serves.
#[derive(Clone, Debug)]
pub struct Mount {
    pub backing: PathBuf,
    pub mountpoint: PathBuf,
    /// The number of its connection to the kernel.
    pub connection: u32,
    pub readers: usize,
}

/// A client wants the mount to end.
pub struct Unmount {
    pub how: How,
    /// Told who still holds it, if it was detached.
    pub done: tokio::sync::oneshot::Sender<Result<Vec<Holder>, Unmounted>>,
}

/// Why it did not.
#[derive(Debug)]
pub enum Unmounted {
    Busy(Vec<Holder>),
    /// By somebody else's mount, which is not ours to take away.
    Covered(String),
    Failed(String),
}

/// What the handlers of every daemon share, with a mount or without.
pub struct Service {
    pub identity: Identity,
    pub machine: Arc<Machine>,
    ring: Arc<Ring>,
    /// Of all draws that no rule seeds itself.
    seed: Option<u64>,
    started: Instant,
    published: Notify,
    lines: events::Lines,
    unmount: Sender<Unmount>,
}

/// What the handlers of a mount share.
pub struct Control {
    pub core: Arc<Core>,
    service: Arc<Service>,
    /// Held for a few instructions, by helpers too.
    space: parking_lot::Mutex<space::Requested>,
    looks: Looks,
    redirection: redirect::Redirection,
}

/// What is asked of the backing filesystem, by sorts: one that hangs keeps no other from being asked.
#[derive(Default)]
struct Looks {
    statfs: Look,
    count: Look,
    fill: Look,
    remove: Look,
    damage: Look,
}

/// Helpers that may hang with the backing filesystem, for one sort of question.
struct Look(Arc<Semaphore>);

impl Default for Look {
    fn default() -> Look {
        Look(Arc::new(Semaphore::new(MOST_LOOKS)))
    }
}

impl Look {
    /// Runs it on a helper, from now on, whether the answer is awaited or not; refused when too many hang already.
    fn ask<T, F>(&self, act: F) -> impl Future<Output = Result<T, Problem>> + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let asking = self.0.clone().try_acquire_owned().ok().map(|permit| {
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                act()
            })
        });
        async move {
            match asking {
                Some(asking) => asking.await.map_err(failed_helper),
                None => Err(hangs()),
            }
        }
    }
}

fn hangs() -> Problem {
    Problem::new(409, "busy", "too much waits already, for the backing filesystem or for requests that are held")
        .hint("again when they go on")
}

impl Deref for Control {
    type Target = Service;

    fn deref(&self) -> &Service {
        &self.service
    }
}

/// The service as the handlers of every daemon get it.
#[derive(Clone)]
pub struct AnyDaemon(Arc<Service>);

impl Deref for AnyDaemon {
    type Target = Service;

    fn deref(&self) -> &Service {
        &self.0
    }
}

impl FromRef<Arc<Control>> for AnyDaemon {
    fn from_ref(control: &Arc<Control>) -> AnyDaemon {
        AnyDaemon(control.service.clone())
    }
}

type Shared = axum::extract::State<Arc<Control>>;
type OfAny = axum::extract::State<AnyDaemon>;
type Answer = Result<axum::response::Response, Problem>;

/// The control thread, running.
pub struct Running {
    thread: JoinHandle<()>,
    stop: Arc<Notify>,
    ready: mpsc::Receiver<Result<(), String>>,
}

impl Running {
    /// Waits until what is armed from the first request on has what it wants.
    ///
    /// # Errors
    /// When coredumps should go elsewhere, and cannot.
    pub fn wait_until_ready(&self) -> Result<(), String> {
        self.ready.recv().unwrap_or(Ok(()))
    }

    /// Ends it, once the last events have been sent, or soon.
    pub fn stop(self) {
        self.stop.notify_one();
        let _ = self.thread.join();
    }
}

/// Starts the control thread on a socket that listens already; without a `core` it serves the machine alone.
///
/// # Errors
/// When the thread or its runtime cannot be started.
pub fn start(
    listener: UnixListener,
    core: Option<Arc<Core>>,
    machine: Arc<Machine>,
    identity: Identity,
    unmount: Sender<Unmount>,
) -> std::io::Result<Running> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().thread_name("helper").build()?;
    let service = Arc::new(Service {
        identity,
        ring: machine.ring.clone(),
        machine,
        seed: core.as_ref().map(|core| core.arming.seed()),
        started: Instant::now(),
        published: Notify::new(),
        lines: Default::default(),
        unmount,
    });
    let waker = service.clone();
    service.ring.set_waker(move || waker.published.notify_waiters());
    let (router, control) = match core {
        None => (of_machine().with_state(AnyDaemon(service)), None),
        Some(core) => {
            let (space, looks, redirection) = Default::default();
            let control = Arc::new(Control { core, service, space, looks, redirection });
            (of_mount().with_state(control.clone()), Some(control))
        }
    };
    let router = router.layer(axum::middleware::from_fn(every_route::keep));
    let stop = Arc::new(Notify::new());
    let stopped = stop.clone();
    let (begun, ready) = mpsc::channel();
    let thread = std::thread::Builder::new().name("control".into()).spawn(move || {
        let served = runtime.block_on(async {
            if let Some(control) = control {
                // Beside the server: an agent may have to be heard for it.
                tokio::spawn(async move {
                    let _ = begun.send(control.redirected_at_start().await);
                    redirect::keep(control).await;
                });
            }
            serve(listener, router, stopped).await
        });
        if let Err(error) = served {
            tracing::error!(%error, "the control socket has failed");
        }
        // A helper may hang in the mount; nobody waits for it.
        runtime.shutdown_background();
    })?;
    Ok(Running { thread, stop, ready })
}

async fn serve(listener: UnixListener, router: Router, stop: Arc<Notify>) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let ending = stop.clone();
    let server = axum::serve(listener, router).with_graceful_shutdown(async move { ending.notified().await });
    tokio::select! {
        result = std::future::IntoFuture::into_future(server) => result,
        () = async {
            stop.notified().await;
            // The server was told too: `notify_one` wakes one, so pass it on.
            stop.notify_one();
            tokio::time::sleep(END_LIMIT).await;
        } => Ok(()),
    }
}

/// What every daemon answers.
fn routes<S: Clone + Send + Sync + 'static>() -> Router<S>
where
    AnyDaemon: FromRef<S>,
{
    Router::new()
        .route("/v1/version", get(state::version))
        .route("/v1/events", get(events::stream))
        .route("/v1/unmount", post(state::unmount))
        .merge(devices::routes())
        .route("/v1/coredump", get(coredump::status))
        .route("/v1/coredump/cores", get(coredump::cores))
        .route("/v1/coredump/leases", get(coredump::list).delete(coredump::release_all))
        .route("/v1/coredump/leases/{name}", get(coredump::show).put(coredump::take).delete(coredump::release))
        .route("/v1/coredump/steps", get(coredump::list_steps))
        .route("/v1/coredump/steps/{id}", post(coredump::acknowledge))
        .fallback(unknown_route)
}

/// What one answers that serves the machine alone.
fn of_machine() -> Router<AnyDaemon> {
    routes()
        .route("/v1/health", get(state::health_of_machine))
        .route("/v1/reset", post(state::reset_of_machine))
        .fallback(needs_a_mount)
}

/// What one answers that serves a mount.
fn of_mount() -> Router<Arc<Control>> {
    routes()
        .route("/v1/health", get(state::health))
        .route("/v1/reset", post(state::reset))
        .route("/v1/evict", post(damage::evict))
        .route("/v1/repair", get(damage::list).post(damage::repair))
        .route("/v1/rules", get(rules::list).put(rules::replace).delete(rules::clear))
        .route("/v1/rules/{name}", get(rules::show).put(rules::put).patch(rules::patch).delete(rules::remove))
        .route("/v1/rules/{name}/wait", get(rules::wait))
        .route("/v1/rules/{name}/release", post(rules::release))
        .route("/v1/mode", get(mode::show).put(mode::set))
        .route("/v1/space", get(space::show).put(space::set).delete(space::clear))
        .route("/v1/requests", get(requests::list))
}

async fn unknown_route(uri: Uri) -> Problem {
    let detail = format!("there is no {}", uri.path());
    Problem::new(404, "unknown_route", detail).hint("the routes are in docs/api.md")
}

async fn needs_a_mount(State(service): OfAny, uri: Uri) -> Problem {
    let detail = format!("instance {:?} has no mount, and so no {}", service.identity.instance, uri.path());
    Problem::new(404, "unknown_route", detail).hint("nemesisfs mount BACKING MOUNTPOINT")
}

impl Service {
    fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The id of the newest event: what comes after it is after this moment.
    fn cursor(&self) -> String {
        self.id(Cursor(self.ring().cursor().0 - 1))
    }

    fn id(&self, at: Cursor) -> String {
        format!("{}-{}", self.identity.boot_id, at.0)
    }
}

impl Control {
    /// Does what a change of the rules leaves to be done: parked requests of rules that are gone go on, and the kernel
    /// forgets what could hide the new ones.
    async fn in_force(self: &Arc<Self>, changed: Changed) -> InForce {
        self.core.let_go(changed.released.iter());
        self.core.parking.wake_clock();
        let Changed { armed, released } = changed;
        let mut warnings: Vec<String> = armed.iter().filter_map(|rule| never_met(rule)).collect();
        let mountpoint = self.core.mountpoint.get();
        warnings.extend(mountpoint.into_iter().flat_map(|place| armed.iter().filter_map(|rule| outside(rule, place))));
        let traces = released.into_iter().filter(|rule| kernel_cache::leaves_traces(rule));
        let hidden: Vec<_> = armed.iter().cloned().chain(traces).collect();
        let mut pending = Vec::new();
        if self.core.passthrough.is_some() || kernel_cache::can_hide(&hidden) {
            let core = self.core.clone();
            let settled = helper(move || settle(&core, &armed, &hidden)).await.unwrap_or_default();
            warnings.extend(settled.warnings);
            pending = settled.pending;
        }
        warnings.extend(self.give_coredumps_back().await);
        InForce { pending, warnings }
    }
}

/// Does a rule name an operation that never arrives?
fn never_met(rule: &Rule) -> Option<String> {
    let mut words = rule.spec.r#match.ops.iter();
    let (word, reason) = words.find_map(|word| Some((word, Op::why_never(word)?)))?;
    Some(format!("rule {:?}: {word:?} never arrives: {reason}", rule.name))
}

/// Does its path look like one of the host, with the mountpoint before it?
fn outside(rule: &Rule, mountpoint: &std::path::Path) -> Option<String> {
    let path = rule.spec.r#match.path.as_ref()?;
    let below = std::path::Path::new(path).strip_prefix(mountpoint).ok()?.display();
    let name = &rule.name;
    Some(format!(
        "rule {name:?}: paths begin below the mountpoint: if {path:?} is meant as the host has it, write \"/{below}\""
    ))
}

/// On a helper thread, with one limit for all of it: waits for what began before the change, looks what new rules
/// cannot reach of the files that were opened before, and makes the kernel forget what could hide them.
fn settle(core: &Arc<Core>, armed: &[Arc<Rule>], hidden: &[Arc<Rule>]) -> InForce {
    let until = Instant::now() + FORGET_LIMIT;
    kernel_cache::wait_for_earlier(core);
    let warnings = armed.iter().filter_map(|rule| warning(core, rule)).collect();
    let pending = if kernel_cache::can_hide(hidden) { forget(core, hidden, until) } else { Vec::new() };
    InForce { pending, warnings }
}

fn warning(core: &Core, rule: &Rule) -> Option<String> {
    let handles = core.out_of_reach(rule);
    let (_, first) = handles.first()?;
    let numbers: Vec<String> = handles.iter().map(|(fh, _)| fh.to_string()).collect();
    let (name, many, numbers) = (&rule.name, handles.len(), numbers.join(" "));
    Some(format!(
        "rule {name:?} does not see reads and writes through {many} open handles that are passed through: {numbers} \
             ({first}{}); it will see those of files that are opened from now on, once these are closed",
        if many > 1 { ", …" } else { "" }
    ))
}

/// How far a change has come when it is answered.
#[derive(Default)]
struct InForce {
    /// What the kernel still has; an event tells when not.
    pending: Vec<String>,
    /// What the new rules cannot reach.
    warnings: Vec<String>,
}

impl InForce {
    /// Says so in an answer.
    fn tell(self, answer: &mut Value) {
        answer["pending"] = self.pending.into();
        answer["warnings"] = self.warnings.into();
    }
}

/// So many paths are told of what is left, and of the others how many.
const MOST_PENDING: usize = 100;

/// Makes the kernel forget, and gives what it could not be made to in time: of that an event tells when it is done.
fn forget(core: &Arc<Core>, rules: &[Arc<Rule>], until: Instant) -> Vec<String> {
    let (ring, names) = (core.ring.clone(), rules.iter().map(|rule| rule.name.to_string()).collect::<Vec<_>>());
    // Of the end and the limit, the later one tells.
    let over = Arc::new(AtomicBool::new(false));
    let (was_over, in_force) = (over.clone(), names.clone());
    let cleaning = kernel_cache::clean(core, rules, move || {
        if was_over.swap(true, AcqRel) {
            for name in in_force {
                ring.change("rule", serde_json::json!({"rule": name, "action": "in_force"}));
            }
        }
    });
    match cleaning.done().recv_deadline(until) {
        Err(RecvTimeoutError::Timeout) if !over.swap(true, AcqRel) => {
            let left = cleaning.left();
            let mut paths: Vec<String> = left.iter().filter_map(|ino| path_of(core, *ino)).take(MOST_PENDING).collect();
            paths.sort();
            if left.len() > paths.len() {
                paths.push(format!("{} more", left.len() - paths.len()));
            }
            paths
        }
        _ => Vec::new(),
    }
}

fn path_of(core: &Core, ino: u64) -> Option<String> {
    let inode = core.tree.get(ino).ok()?;
    Some(String::from_utf8_lossy(&inode.path(core.tree.version())).into_owned())
}

/// Runs what could wait on a thread where that is harmless.
async fn helper<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    tokio::task::spawn_blocking(act).await.map_err(failed_helper)
}

fn failed_helper(error: tokio::task::JoinError) -> Problem {
    Problem::new(500, "internal", format!("a helper has failed: {error}"))
}

/// A document as an answer.
fn document(status: u16, value: &Value) -> axum::response::Response {
    use axum::response::IntoResponse;
    let status = axum::http::StatusCode::from_u16(status).unwrap_or_default();
    (status, axum::Json(value)).into_response()
}
