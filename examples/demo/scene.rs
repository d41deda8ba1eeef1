//! The scene of a demo: a temporary directory with a mount on it, the stream of its events, the servers that were started.
//!
//! Shared by the thread that tells the story and the main one, which clears the scene. The lock of the commands is held
//! while one runs, so that the scene is never cleared while a mount is being made. Must never delete a directory that is
//! still mounted, or leave a server running.

use std::ffi::OsStr;
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use nemesisfs::client::{Client, Host, with_query};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use parking_lot::{Condvar, Mutex};
use serde_json::Value;
use tempfile::TempDir;

pub type Error = Box<dyn std::error::Error + Send + Sync>;
pub type Told = Result<(), Error>;

/// The first argument that makes this program the command line.
pub const AS_NEMESISFS: &str = "nemesisfs";

/// Events beyond these are only counted: a database that tries again and again would fill the screen.
const SHOWN: u64 = 8;

#[derive(Clone)]
pub struct Scene(Arc<Inner>);

struct Inner {
    home: Mutex<Option<TempDir>>,
    path: PathBuf,
    commands: Mutex<Commands>,
    servers: Mutex<Vec<Child>>,
    seen: Mutex<u64>,
    another: Condvar,
    steps: Mutex<u32>,
}

#[derive(Default)]
struct Commands {
    mounted: bool,
    /// The scene is being cleared: nothing may be started any more.
    closed: bool,
}

/// Blocks Ctrl-C in this thread and all that come after, and gives it as a message instead.
pub fn interrupts() -> Receiver<()> {
    let (sender, receiver) = bounded(1);
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    if signals.thread_block().is_ok() {
        std::thread::spawn(move || signals.wait().map(|_| sender.send(())));
    } else {
        // A channel without a sender would be taken for an interrupt.
        std::mem::forget(sender);
    }
    receiver
}

impl Scene {
    pub fn new() -> Result<Scene, Error> {
        let home = tempfile::Builder::new().prefix("nemesisfs-demo-").tempdir()?;
        let path = home.path().to_owned();
        // A database server is a user of its own, and has to get through.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        for name in ["backing", "mnt", "run"] {
            fs::create_dir(path.join(name))?;
        }
        Ok(Scene(Arc::new(Inner {
            home: Mutex::new(Some(home)),
            path,
            commands: Mutex::default(),
            servers: Mutex::default(),
            seen: Mutex::new(0),
            another: Condvar::new(),
            steps: Mutex::new(0),
        })))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path.join(name)
    }

    pub fn mountpoint(&self) -> PathBuf {
        self.path("mnt")
    }

    pub fn backing(&self) -> PathBuf {
        self.path("backing")
    }

    /// The headline of the next step.
    pub fn step(&self, what: &str) {
        let mut steps = self.0.steps.lock();
        *steps += 1;
        println!("\n{}. {what}", *steps);
    }

    pub fn say(&self, what: &str) {
        for line in what.lines() {
            println!("   {line}");
        }
    }

    /// Shows a command of another program as one would type it.
    pub fn show(&self, command: &str) {
        println!("   $ {command}");
    }

    /// Mounts, and follows the events from then on.
    pub fn mount(&self) -> Told {
        let (backing, mountpoint) = (self.backing(), self.mountpoint());
        self.nemesisfs([
            "mount".as_ref(),
            "--instance".as_ref(),
            "demo".as_ref(),
            backing.as_os_str(),
            mountpoint.as_os_str(),
        ])?;
        self.0.commands.lock().mounted = true;
        self.follow()
    }

    /// Runs the command line, and shows the command and what it says.
    pub fn nemesisfs<'a>(&self, words: impl IntoIterator<Item = &'a OsStr>) -> Told {
        let words: Vec<&OsStr> = words.into_iter().collect();
        let shown: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        self.show(&format!("nemesisfs {}", shell_words(&shown)));
        let commands = self.0.commands.lock();
        if commands.closed {
            return Err("interrupted".into());
        }
        let output = self.command(&words)?.output()?;
        drop(commands);
        self.say(&String::from_utf8_lossy(&output.stdout));
        if output.status.success() {
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).trim().trim_start_matches("error: ").to_owned().into())
    }

    fn command(&self, words: &[&OsStr]) -> Result<Command, Error> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(AS_NEMESISFS).args(words);
        command.env("NEMESISFS_RUNDIR", self.path("run")).env_remove("NEMESISFS_HOST");
        Ok(command)
    }

    /// Prints the injections as they arrive, on a thread that ends with the stream.
    fn follow(&self) -> Told {
        let client = Client::new(Host::Unix(self.path("run/demo.sock")), Duration::from_secs(5))?;
        let path = with_query("/v1/events", [("kind", Some("injection".into()))]);
        let scene = self.clone();
        let (greeted, greeting) = bounded(1);
        std::thread::spawn(move || {
            let ended = client.stream_events(&path, |event| {
                // From the greeting on, nothing is missed.
                let _ = greeted.try_send(());
                scene.show_event(&event);
                ControlFlow::Continue(())
            });
            drop(ended);
        });
        greeting.recv_timeout(Duration::from_secs(10)).map_err(|_| "the stream of events does not begin".into())
    }

    fn show_event(&self, event: &Value) {
        if event["event"] != "injection" {
            return;
        }
        let mut seen = self.0.seen.lock();
        *seen += 1;
        if *seen <= SHOWN {
            println!("   event | {}", event_line(event));
        } else if *seen == SHOWN + 1 {
            println!("   event | … and more of them");
        }
        self.0.another.notify_all();
    }

    /// Waits until at least one injection was seen, and gives their number.
    pub fn injections(&self) -> Result<u64, Error> {
        let until = Instant::now() + Duration::from_secs(5);
        let mut seen = self.0.seen.lock();
        while *seen == 0 {
            if self.0.another.wait_until(&mut seen, until).timed_out() {
                return Err("no injection was seen on the stream of events".into());
            }
        }
        Ok(*seen)
    }

    /// Starts a server, which is ended with the scene at the latest.
    pub fn start_server(&self, command: &mut Command) -> Told {
        let commands = self.0.commands.lock();
        if commands.closed {
            return Err("interrupted".into());
        }
        self.0.servers.lock().push(command.spawn()?);
        Ok(())
    }

    /// Waits until the server that was started last has ended, by itself or by a signal.
    pub fn end_server(&self, signal: Option<Signal>) -> Told {
        let Some(mut server) = self.0.servers.lock().pop() else {
            return Ok(());
        };
        end(&mut server, signal)
    }

    /// Unmounts and removes everything, and says so.
    pub fn clear(&self, orderly: bool) -> Told {
        let mut commands = self.0.commands.lock();
        commands.closed = true;
        for mut server in self.0.servers.lock().drain(..) {
            let _ = end(&mut server, Some(Signal::SIGQUIT));
        }
        let unmounted = self.unmount(orderly);
        commands.mounted = false;
        let Some(home) = self.0.home.lock().take() else {
            return Ok(());
        };
        if let Err(error) = unmounted {
            let left = home.keep();
            return Err(format!("{error}; left behind: {}", left.display()).into());
        }
        home.close()?;
        if orderly {
            self.say("No mount, no process and no file is left.");
        }
        Ok(())
    }

    /// Not mounted is no error. After a story that broke off, files may still be open: then by force.
    fn unmount(&self, orderly: bool) -> Told {
        let umount = |more: &[&str]| -> Told {
            let words: Vec<&str> = ["umount", "--instance", "demo"].iter().chain(more).copied().collect();
            if orderly {
                self.step("The end");
                self.show(&format!("nemesisfs {}", words.join(" ")));
            }
            let words: Vec<&OsStr> = words.iter().map(OsStr::new).collect();
            let output = self.command(&words)?.output()?;
            let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            if output.status.success() { Ok(()) } else { Err(error.into()) }
        };
        match umount(&[]) {
            Err(_) if !orderly => umount(&["--force"]),
            result => result,
        }
    }
}

/// Ends a server: by a signal, if it is to be told, and after half a minute without mercy.
fn end(server: &mut Child, signal: Option<Signal>) -> Told {
    let pid = Pid::from_raw(i32::try_from(server.id())?);
    if let (Some(signal), None) = (signal, server.try_wait()?) {
        let _ = kill(pid, signal);
    }
    let until = Instant::now() + Duration::from_secs(30);
    while server.try_wait()?.is_none() {
        if Instant::now() > until {
            server.kill()?;
            server.wait()?;
            return Err("the server did not end by itself".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// One injection, as a person reads it.
fn event_line(event: &Value) -> String {
    let text = |key: &str| event[key].as_str().unwrap_or("-").to_owned();
    let clock = text("time")
        .split_once('T')
        .map_or_else(|| "-".into(), |(_, clock)| clock.chars().take(12).collect::<String>());
    let range = match (event["offset"].as_u64(), event["length"].as_u64()) {
        (Some(offset), Some(length)) => format!(" ({length} bytes at {offset})"),
        _ => String::new(),
    };
    let (rule, op, path, errno) = (text("rule"), text("op"), text("path"), text("errno"));
    format!("{clock}  rule {rule:?} made {op} of {path}{range} fail with {errno} [{} {}]", text("comm"), event["pid"])
}

/// Words as a shell takes them.
fn shell_words(words: &[impl AsRef<str>]) -> String {
    shlex::try_join(words.iter().map(AsRef::as_ref)).unwrap_or_default()
}

/// The free space of the filesystem that a file is on, in KiB, as `df` shows it.
pub fn free_kib(path: &Path) -> Result<u64, Error> {
    let statvfs = nix::sys::statvfs::statvfs(path)?;
    Ok(statvfs.blocks_available() * statvfs.fragment_size() / 1024)
}
