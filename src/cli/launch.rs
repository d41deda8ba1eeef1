//! Starts a daemon in the background, and hears when it is ready.
//!
//! This program starts itself again with a pipe, `--ready-fd`, and waits. The child makes a session of its own, with the
//! log file as its standard output and error, so that nothing of the parent's stays open (a shell over ssh would wait
//! for it). On the pipe it says one thing and closes it: `exit N`, a line end, and then what the parent prints: the
//! ready line, or `error: …` and `hint: …`.
//!
//! Thread: the main one; the parent reads the pipe on a second, so that waiting has an end. Locks: none. Must never: look
//! at a mountpoint, which may be a dead mount.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::Value;

use crate::client::ClientError;
use crate::daemon::Failure;
use crate::exit;
use crate::host::state::StateDir;

use super::session::World;

/// How long a daemon may take from its start to its ready line.
const START_LIMIT: Duration = Duration::from_secs(60);

/// What is to be started.
pub struct Launch<'a> {
    pub run_dir: &'a Path,
    pub state: &'a StateDir,
    pub log: &'a Path,
    /// The verb and what it needs to decide nothing by itself; `--ready-fd` comes before its operands.
    pub words: Vec<OsString>,
    pub operands: Vec<OsString>,
}

/// Where a daemon says that it is ready, or why it cannot be: once, to the parent or to the terminal. What is said
/// later goes to standard error, which is the log.
pub struct Report {
    once: Mutex<Option<Voice>>,
}

enum Voice {
    /// The pipe to the parent.
    Parent(File),
    /// The terminal of `--foreground`, with its standard error as it was before the log took its place.
    Terminal { quiet: bool, errors: Option<File> },
}

impl Report {
    fn new(voice: Voice) -> Self {
        Report { once: Mutex::new(Some(voice)) }
    }

    fn take(&self) -> Option<Voice> {
        self.once.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The mountpoint and the socket answer. `line` is the stable line of the contract.
    pub fn ready(&self, line: &str) {
        let line = line.trim_end();
        match self.take() {
            Some(Voice::Parent(mut pipe)) => {
                let _ = writeln!(pipe, "exit 0\n{line}");
            }
            Some(Voice::Terminal { quiet: false, .. }) => {
                let _ = writeln!(io::stdout(), "{line}");
            }
            Some(Voice::Terminal { quiet: true, .. }) | None => {}
        }
        // Nothing waits for this, unless systemd does.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    }

    /// The daemon has ended, well or badly. Gives the exit code.
    fn end_of(&self, ended: Result<(), Failure>) -> u8 {
        match ended {
            Ok(()) => exit::DONE,
            Err(failure) => self.failed(failure.exit, &failure.error, failure.hint.as_deref()),
        }
    }

    /// The daemon cannot start, or had to end. Gives the exit code back.
    fn failed(&self, exit: u8, error: &str, hint: Option<&str>) -> u8 {
        let hint = hint.map(|hint| format!("hint: {hint}\n")).unwrap_or_default();
        let text = format!("error: {error}\n{hint}");
        let _ = match self.take() {
            Some(Voice::Parent(mut pipe)) => {
                // The log keeps what the parent is told.
                let _ = io::stderr().write_all(text.as_bytes());
                pipe.write_all(format!("exit {exit}\n{text}").as_bytes())
            }
            Some(Voice::Terminal { errors: Some(mut errors), .. }) => errors.write_all(text.as_bytes()),
            Some(Voice::Terminal { errors: None, .. }) | None => io::stderr().write_all(text.as_bytes()),
        };
        exit
    }
}

/// Runs the daemon here and now, and says so to the terminal.
pub fn in_foreground(
    world: &World,
    log: Option<&Path>,
    serve: impl FnOnce(&Report) -> Result<(), Failure>,
) -> Result<u8, ClientError> {
    let errors = match log {
        None => None,
        Some(log) => Some(errors_into(log).map_err(|error| cannot_open(log, &error))?),
    };
    let report = Report::new(Voice::Terminal { quiet: world.console.quiet, errors });
    Ok(report.end_of(serve(&report)))
}

/// Puts the log in the place of standard error, and gives what that was.
fn errors_into(log: &Path) -> io::Result<File> {
    let log = open_log(log)?;
    let before = nix::unistd::dup(io::stderr())?;
    nix::unistd::dup2_stderr(log)?;
    fcntl(&before, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(before.into())
}

/// Runs the daemon as the child of [`start`]. What is wrong before it serves is for the parent too.
pub fn as_child(
    fd: i32,
    serve: impl FnOnce(&Report) -> Result<Result<(), Failure>, ClientError>,
) -> Result<u8, ClientError> {
    close_what_was_inherited(fd);
    // Opening the pipe anew makes it a file of ours that no program we start inherits.
    let pipe = OpenOptions::new().write(true).open(format!("/proc/self/fd/{fd}"));
    let pipe = pipe.map_err(|error| ClientError::usage(format!("--ready-fd {fd}: {error}")))?;
    let _ = nix::unistd::close(fd);
    let report = Report::new(Voice::Parent(pipe));
    if let Err(error) = nix::unistd::setsid() {
        return Ok(report.failed(exit::FAILED, &format!("setsid: {error}"), None));
    }
    Ok(match serve(&report) {
        Ok(ended) => report.end_of(ended),
        Err(error) => {
            let hint = error.problem.get("hint").and_then(Value::as_str);
            report.failed(error.exit, error.detail(), hint)
        }
    })
}

/// Whatever else the parent's parent had open (a test runner's own pipe, say) would otherwise stay open as long as the
/// daemon lives, and somebody would wait for its end. Nothing of this process's own is open yet.
pub fn close_what_was_inherited(ready_fd: i32) {
    let Ok(open) = fs::read_dir("/proc/self/fd") else {
        return;
    };
    let numbers: Vec<i32> = open.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for fd in numbers.into_iter().filter(|fd| *fd > 2 && *fd != ready_fd) {
        // That of the listing itself is among them, and closed already.
        let _ = nix::unistd::close(fd);
    }
}

/// Starts a daemon and waits until it is ready. Gives its ready line.
///
/// # Errors
/// What the daemon says, or how it died.
pub fn launch(launch: &Launch) -> Result<String, ClientError> {
    let log = launch.log;
    let end_of_log = fs::metadata(log).map(|meta| meta.len()).unwrap_or_default();
    let verb = launch.words.first().map(|verb| verb.to_string_lossy()).unwrap_or_default();
    let output = open_log(log).map_err(|error| cannot_open(log, &error))?;
    let (reader, mut daemon) =
        start(launch, output).map_err(|error| ClientError::failed(format!("{verb}: {error}")))?;
    match hear(reader) {
        Some(words) if !words.is_empty() => told(&words),
        Some(_) => Err(died(&mut daemon, log, end_of_log)),
        None => {
            end(&daemon);
            let limit = humantime::format_duration(START_LIMIT);
            Err(ClientError::timed_out(format!("the daemon is not ready after {limit}, and was told to end"))
                .hint(format!("its log is {}", log.display())))
        }
    }
}

/// Prints the ready line.
pub fn tell(world: &World, message: &str) -> u8 {
    for line in message.lines() {
        let told =
            if world.console.json { world.console.document(&as_document(line)) } else { world.console.line(line) };
        if told.is_err() {
            break;
        }
    }
    exit::DONE
}

fn open_log(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

fn cannot_open(log: &Path, error: &io::Error) -> ClientError {
    ClientError::failed(format!("the log {} cannot be opened: {error}", log.display()))
        .hint("NEMESISFS_RUNDIR names another run directory, --log FILE another log")
}

/// This program. By its own name the process is listed as what it is; the link still works when the file was replaced.
pub fn program() -> Command {
    let path = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(path.unwrap_or_else(|| "/proc/self/exe".into()));
    command.arg0("nemesisfs");
    command
}

/// Starts this program again. The only end of the pipe that stays open here is the one for reading.
fn start(launch: &Launch, log: File) -> io::Result<(OwnedFd, Child)> {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    fcntl(&writer, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let mut command = program();
    command
        .args(&launch.words)
        .arg("--ready-fd")
        .arg(std::os::fd::AsRawFd::as_raw_fd(&writer).to_string())
        .arg("--")
        .args(&launch.operands)
        .env("NEMESISFS_RUNDIR", launch.run_dir)
        .env("NEMESISFS_STATEDIR", launch.state.path())
        .env_remove("NEMESISFS_HOST")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let child = command.spawn()?;
    Ok((reader, child))
}

/// All that the child says, which is nothing when it dies; no answer when it takes too long.
fn hear(reader: OwnedFd) -> Option<String> {
    let (said, heard) = mpsc::channel();
    std::thread::spawn(move || {
        let mut words = Vec::new();
        let _ = File::from(reader).read_to_end(&mut words);
        let _ = said.send(String::from_utf8_lossy(&words).into_owned());
    });
    heard.recv_timeout(START_LIMIT).ok()
}

/// Reads what the child has said.
fn told(words: &str) -> Result<String, ClientError> {
    let (head, message) = words.split_once('\n').unwrap_or((words, ""));
    let code = head.strip_prefix("exit ").and_then(|code| code.parse().ok()).unwrap_or(exit::FAILED);
    if code == exit::DONE {
        return Ok(message.to_owned());
    }
    let mut told = ClientError::failed(line_of(message, "error: ").unwrap_or(message));
    told.exit = code;
    Err(match line_of(message, "hint: ") {
        Some(hint) => told.hint(hint),
        None => told,
    })
}

fn line_of<'a>(message: &'a str, prefix: &str) -> Option<&'a str> {
    message.lines().find_map(|line| line.strip_prefix(prefix))
}

/// `ready instance=n1 mount=/mnt …` as a document. A value may have blanks in it, so it ends where the next key begins.
fn as_document(line: &str) -> Value {
    const KEYS: [&str; 5] = ["instance", "mount", "socket", "pid", "log"];
    let starts: Vec<(usize, &str)> =
        KEYS.iter().filter_map(|key| line.find(&format!(" {key}=")).map(|at| (at, *key))).collect();
    let mut document = serde_json::Map::new();
    for (at, key) in &starts {
        let from = at + key.len() + 2;
        let to = starts.iter().map(|(other, _)| *other).filter(|other| other > at).min().unwrap_or(line.len());
        let text = line.get(from..to).unwrap_or_default();
        let number = if *key == "pid" { text.parse::<i64>().ok() } else { None };
        document.insert((*key).to_owned(), number.map_or_else(|| Value::from(text), Value::from));
    }
    Value::Object(document)
}

fn died(daemon: &mut Child, log: &Path, end_of_log: u64) -> ClientError {
    let how = daemon.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
    let last = last_lines(log, end_of_log).unwrap_or_default();
    let said = if last.is_empty() { "and logged nothing".to_owned() } else { format!("and logged:\n{last}") };
    ClientError::failed(format!("the daemon died before it was ready ({how}) {said}"))
        .hint(format!("its log is {}", log.display()))
}

/// The last lines of what was logged since the start.
fn last_lines(log: &Path, from: u64) -> io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(from.max(length.saturating_sub(16 * 1024))))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let lines: Vec<String> = text.lines().map(|line| format!("  {line}")).collect();
    Ok(lines.get(lines.len().saturating_sub(10)..).unwrap_or_default().join("\n"))
}

/// A daemon that is told to end unmounts what it has mounted.
fn end(daemon: &Child) {
    if let Ok(pid) = i32::try_from(daemon.id()) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_ready_line_is_a_document_whatever_blanks_its_paths_have() {
        let line = "ready instance=n1 mount=/mnt/a b socket=/r/n1.sock pid=12 log=/r/n1.log";
        assert_eq!(
            as_document(line),
            json!({"instance": "n1", "mount": "/mnt/a b", "socket": "/r/n1.sock", "pid": 12, "log": "/r/n1.log"})
        );
    }

    #[test]
    fn the_child_says_one_thing_and_closes_the_pipe() {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let report = Report::new(Voice::Parent(writer.into()));
        report.ready("ready instance=n1\n");
        assert_eq!(hear(reader).as_deref(), Some("exit 0\nready instance=n1\n"));
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let report = Report::new(Voice::Parent(writer.into()));
        assert_eq!(report.failed(5, "no FUSE here", Some("modprobe fuse")), 5);
        assert_eq!(hear(reader).as_deref(), Some("exit 5\nerror: no FUSE here\nhint: modprobe fuse\n"));
    }

    #[test]
    fn of_a_log_only_what_is_new_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "old\nnew 1\nnew 2\n").unwrap();
        assert_eq!(last_lines(&log, 4).unwrap(), "  new 1\n  new 2");
    }
}
