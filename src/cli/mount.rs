//! `mount`: start a daemon, and say when it is ready.
//!
//! Without `--foreground` this program starts itself again with a pipe, `--ready-fd`, and waits. The child makes a
//! session of its own, with the log file as its standard output and error, so that nothing of the parent's stays open
//! (a shell over ssh would wait for it). On the pipe it says one thing and closes it: `exit N`, a line end, and then
//! what the parent prints: the ready line, or `error: …` and `hint: …`.
//!
//! Thread: the main one; the parent reads the pipe on a second, so that waiting has an end. Locks: those of the state
//! files, for an instant. Must never: look at the mountpoint, which may be a dead mount.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use clap::Args;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::Value;

use crate::client::instances::{self, lexical};
use crate::client::{ClientError, exit};
use crate::daemon::{self, Options};
use crate::host::state::StateDir;

use super::rule;
use super::session::World;

/// How long a daemon may take from its start to its ready line.
const START_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Args)]
pub struct MountArgs {
    /// Directory that has the files
    backing: PathBuf,
    /// Directory where they are seen; the same one mounts in place
    mountpoint: PathBuf,
    /// Name of the instance [default: the last part of the mountpoint]
    #[arg(long, value_name = "NAME", value_parser = instance_name)]
    instance: Option<String>,
    /// Where it listens [default: NAME.sock in the run directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Stay here, as systemd and containers want it
    #[arg(long)]
    foreground: bool,
    /// Where it logs [default: NAME.log in the run directory; with --foreground, standard error]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Rules that are in force from the first request on, as `rule apply` takes them
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
    /// How many threads read requests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    readers: Option<u16>,
    /// Files that the kernel serves by itself, at the speed of the backing filesystem, out of reach of faults in reads and
    /// writes (repeatable; without a leading slash at any depth)
    #[arg(long, value_name = "GLOB")]
    passthrough: Vec<String>,
    /// Of all draws that no rule seeds itself
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Mount options, separated by commas
    #[arg(short = 'o', value_name = "OPTS", value_delimiter = ',')]
    options: Vec<String>,
    /// Where a child tells its parent that it is ready
    #[arg(long, hide = true)]
    ready_fd: Option<i32>,
}

/// Mounts and serves until the mount has ended.
fn serve(options: Options, report: &Report) -> u8 {
    match daemon::run(options, |line| report.ready(line)) {
        Ok(()) => exit::DONE,
        Err(failure) => report.failed(failure.exit, &failure.error, failure.hint.as_deref()),
    }
}

pub fn run(world: &World, args: &MountArgs) -> u8 {
    let done = match args.ready_fd {
        Some(fd) => child(world, args, fd),
        None if args.foreground => foreground(world, args),
        None => parent(world, args),
    };
    done.unwrap_or_else(|error| world.console.error(&error))
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

    /// The daemon cannot start, or had to end. Gives the exit code back.
    pub fn failed(&self, exit: u8, error: &str, hint: Option<&str>) -> u8 {
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

fn foreground(world: &World, args: &MountArgs) -> Result<u8, ClientError> {
    let mut prepared = prepare(world.run_dir, args)?;
    prepared.log.clone_from(&args.log.as_deref().map(lexical));
    let errors = match &prepared.log {
        None => None,
        Some(log) => Some(errors_into(log).map_err(|error| cannot_open(log, &error))?),
    };
    let report = Report::new(Voice::Terminal { quiet: world.console.quiet, errors });
    Ok(serve(prepared, &report))
}

/// Puts the log in the place of standard error, and gives what that was.
fn errors_into(log: &Path) -> io::Result<File> {
    let log = open_log(log)?;
    let before = nix::unistd::dup(io::stderr())?;
    nix::unistd::dup2_stderr(log)?;
    fcntl(&before, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(before.into())
}

fn child(world: &World, args: &MountArgs, fd: i32) -> Result<u8, ClientError> {
    close_what_was_inherited(fd);
    // Opening the pipe anew makes it a file of ours that no program we start inherits.
    let pipe = OpenOptions::new().write(true).open(format!("/proc/self/fd/{fd}"));
    let pipe = pipe.map_err(|error| ClientError::usage(format!("--ready-fd {fd}: {error}")))?;
    let _ = nix::unistd::close(fd);
    let report = Report::new(Voice::Parent(pipe));
    if let Err(error) = nix::unistd::setsid() {
        return Ok(report.failed(exit::FAILED, &format!("setsid: {error}"), None));
    }
    match prepare(world.run_dir, args) {
        Ok(prepared) => Ok(serve(prepared, &report)),
        Err(error) => {
            let hint = error.problem.get("hint").and_then(Value::as_str);
            Ok(report.failed(error.exit, error.detail(), hint))
        }
    }
}

/// Whatever else the parent's parent had open (a test runner's own pipe, say) would otherwise stay open as long as the
/// daemon lives, and somebody would wait for its end. Nothing of this process's own is open yet.
fn close_what_was_inherited(ready_fd: i32) {
    let Ok(open) = fs::read_dir("/proc/self/fd") else {
        return;
    };
    let numbers: Vec<i32> = open.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for fd in numbers.into_iter().filter(|fd| *fd > 2 && *fd != ready_fd) {
        // That of the listing itself is among them, and closed already.
        let _ = nix::unistd::close(fd);
    }
}

fn parent(world: &World, args: &MountArgs) -> Result<u8, ClientError> {
    let prepared = prepare(world.run_dir, args)?;
    let log = prepared.log.as_deref().unwrap_or(Path::new("/dev/null"));
    let end_of_log = fs::metadata(log).map(|meta| meta.len()).unwrap_or_default();
    let (reader, mut daemon) = start(&prepared).map_err(|error| ClientError::failed(format!("mount: {error}")))?;
    match hear(reader) {
        Some(words) if !words.is_empty() => Ok(tell(world, &words)),
        Some(_) => Err(died(&mut daemon, log, end_of_log)),
        None => {
            end(&daemon);
            let limit = humantime::format_duration(START_LIMIT);
            Err(ClientError::timed_out(format!("the daemon is not ready after {limit}, and was told to end"))
                .hint(format!("its log is {}", log.display())))
        }
    }
}

/// Decides all that was left open.
fn prepare(run_dir: &Path, args: &MountArgs) -> Result<Options, ClientError> {
    let mountpoint = lexical(&args.mountpoint);
    let instance = match &args.instance {
        Some(name) => name.clone(),
        None => free_name(run_dir, &mountpoint)?,
    };
    let own = |given: &Option<PathBuf>, suffix: &str| match given {
        Some(path) => lexical(path),
        None => lexical(&run_dir.join(format!("{instance}{suffix}"))),
    };
    let (socket, log) = (own(&args.socket, ".sock"), own(&args.log, ".log"));
    for (what, path) in [("the socket", &socket), ("the log", &log), ("the run directory", &lexical(run_dir))] {
        if path.starts_with(&mountpoint) {
            let detail = format!("{what} {} would lie under the mountpoint", path.display());
            return Err(ClientError::failed(detail).hint("use --socket, --log, NEMESISFS_RUNDIR"));
        }
    }
    let rules_file = args.rules.as_deref().map(lexical);
    let rules = match &rules_file {
        None => Vec::new(),
        Some(file) => rules_of(file)?,
    };
    Ok(Options {
        backing: lexical(&args.backing),
        mountpoint,
        instance,
        run_dir: lexical(run_dir),
        state: StateDir::of_machine(),
        socket,
        log: Some(log),
        rules_file,
        rules,
        readers: args.readers,
        seed: args.seed,
        passthrough: args.passthrough.clone(),
        mount_options: args.options.clone(),
    })
}

fn rules_of(file: &Path) -> Result<Vec<Value>, ClientError> {
    let set = rule::load(&file.to_string_lossy())?;
    match set.get("rules").and_then(Value::as_array) {
        Some(rules) => Ok(rules.clone()),
        None => Err(ClientError::failed(format!("{}: \"rules\" is not a list", file.display()))),
    }
}

/// The name of an instance is the name of files, and a word that needs no quotes.
fn instance_name(name: &str) -> Result<String, String> {
    if safe(name) == name {
        Ok(name.to_owned())
    } else {
        Err("a name is made of letters, digits, dot, dash and underscore, and begins with none of the last three"
            .into())
    }
}

fn safe(name: &str) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let name: String = name.chars().map(|c| if fits(c) { c } else { '_' }).collect();
    match name.trim_start_matches(['.', '-', '_']) {
        "" => "root".to_owned(),
        name => name.chars().take(64).collect(),
    }
}

/// The last part of the mountpoint, with a number if an instance that lives has that name.
fn free_name(run_dir: &Path, mountpoint: &Path) -> Result<String, ClientError> {
    let name = safe(&mountpoint.file_name().unwrap_or_default().to_string_lossy());
    let living =
        instances::living(run_dir).map_err(|error| ClientError::failed(format!("{}: {error}", run_dir.display())))?;
    // The same mountpoint again is for the daemon to refuse, and not a reason for another name.
    let taken =
        |name: &str| living.iter().any(|other| other.state.instance == name && !other.is_mounted_at(mountpoint));
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    Ok(std::iter::once(name.clone()).chain(numbered).find(|name| !taken(name)).unwrap_or(name))
}

fn open_log(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

fn cannot_open(log: &Path, error: &io::Error) -> ClientError {
    ClientError::failed(format!("the log {} cannot be opened: {error}", log.display())).hint("--log FILE names another")
}

/// The words of the child's command line.
fn child_words(prepared: &Options, ready_fd: i32) -> Vec<std::ffi::OsString> {
    let mut words: Vec<std::ffi::OsString> = vec!["mount".into()];
    let mut flag = |name: &str, value: std::ffi::OsString| words.extend([name.into(), value]);
    flag("--instance", prepared.instance.clone().into());
    flag("--socket", prepared.socket.clone().into());
    for (name, file) in [("--log", &prepared.log), ("--rules", &prepared.rules_file)] {
        if let Some(file) = file {
            flag(name, file.clone().into());
        }
    }
    if let Some(readers) = prepared.readers {
        flag("--readers", readers.to_string().into());
    }
    if let Some(seed) = prepared.seed {
        flag("--seed", seed.to_string().into());
    }
    for glob in &prepared.passthrough {
        flag("--passthrough", glob.into());
    }
    if !prepared.mount_options.is_empty() {
        flag("-o", prepared.mount_options.join(",").into());
    }
    flag("--ready-fd", ready_fd.to_string().into());
    words.extend(["--".into(), prepared.backing.clone().into(), prepared.mountpoint.clone().into()]);
    words
}

/// Starts this program again. The only end of the pipe that stays open here is the one for reading.
fn start(prepared: &Options) -> io::Result<(OwnedFd, Child)> {
    let log = open_log(prepared.log.as_deref().unwrap_or(Path::new("/dev/null")))?;
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    fcntl(&writer, FcntlArg::F_SETFD(FdFlag::empty()))?;
    // By its own name the process is listed as what it is; the link still works when the file was replaced.
    let program = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(program.unwrap_or_else(|| "/proc/self/exe".into()));
    command
        .arg0("nemesisfs")
        .args(child_words(prepared, std::os::fd::AsRawFd::as_raw_fd(&writer)))
        .env("NEMESISFS_RUNDIR", &prepared.run_dir)
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

fn tell(world: &World, words: &str) -> u8 {
    let (head, message) = words.split_once('\n').unwrap_or((words, ""));
    let code = head.strip_prefix("exit ").and_then(|code| code.parse().ok()).unwrap_or(exit::FAILED);
    if code != exit::DONE {
        let mut told = ClientError::failed(line_of(message, "error: ").unwrap_or(message));
        told.exit = code;
        return world.console.error(&match line_of(message, "hint: ") {
            Some(hint) => told.hint(hint),
            None => told,
        });
    }
    for line in message.lines() {
        let told =
            if world.console.json { world.console.document(&as_document(line)) } else { world.console.line(line) };
        if told.is_err() {
            break;
        }
    }
    code
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
    use crate::client::instances::State;
    use nix::fcntl::{Flock, FlockArg};
    use serde_json::json;

    fn args(mountpoint: &str) -> MountArgs {
        MountArgs {
            backing: "/backing".into(),
            mountpoint: mountpoint.into(),
            instance: None,
            socket: None,
            foreground: false,
            log: None,
            rules: None,
            readers: None,
            seed: None,
            passthrough: Vec::new(),
            options: Vec::new(),
            ready_fd: None,
        }
    }

    #[test]
    fn an_instance_is_named_after_its_mountpoint_and_numbered_when_that_name_lives() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(prepare(dir.path(), &args("/mnt/my data/")).unwrap().instance, "my_data");
        let state = State {
            instance: "data".into(),
            pid: 1,
            mountpoint: Some("/a/data".into()),
            backing: Some("/b".into()),
            socket: "/s".into(),
            log: None,
        };
        let file = dir.path().join("data.json");
        fs::write(&file, serde_json::to_vec(&state).unwrap()).unwrap();
        assert_eq!(prepare(dir.path(), &args("/mnt/data")).unwrap().instance, "data");
        let _lock = Flock::lock(File::open(&file).unwrap(), FlockArg::LockExclusiveNonblock).unwrap();
        let prepared = prepare(dir.path(), &args("/mnt/data")).unwrap();
        assert_eq!(prepared.instance, "data-2");
        assert_eq!(prepared.socket, dir.path().join("data-2.sock"));
        assert_eq!(prepare(dir.path(), &args("/a/data")).unwrap().instance, "data");
    }

    #[test]
    fn nothing_of_the_daemon_may_lie_under_the_mountpoint() {
        let dir = tempfile::tempdir().unwrap();
        let mut under = args("/mnt/x");
        under.log = Some("/mnt/x/../x/log".into());
        assert_eq!(prepare(dir.path(), &under).unwrap_err().exit, exit::FAILED);
        assert!(prepare(dir.path(), &args(&dir.path().display().to_string())).is_err());
    }

    #[test]
    fn the_child_gets_every_decision_in_its_arguments() {
        use clap::Parser;
        let dir = tempfile::tempdir().unwrap();
        let mut wanted = args("/mnt/-x");
        wanted.readers = Some(3);
        wanted.seed = Some(7);
        wanted.options = vec!["ro".into(), "noexec".into()];
        wanted.passthrough = vec!["/a/**".into(), "*.sst".into()];
        let prepared = prepare(dir.path(), &wanted).unwrap();
        let words = std::iter::once("nemesisfs".into()).chain(child_words(&prepared, 9));
        let cli = crate::cli::Cli::try_parse_from(words).unwrap();
        let crate::cli::Verb::Mount(read) = cli.verb else { panic!("not a mount") };
        assert_eq!(read.ready_fd, Some(9));
        assert_eq!(prepare(dir.path(), &read).unwrap(), prepared);
    }

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
