//! A real daemon over a real directory, for one test.
//!
//! Each test has its own run directory, backing directory and mountpoint, so tests run side by side. [`Mounted::end`] (and
//! the drop of a test that has failed) unmounts; a test that passed must call `end`, which checks that the mount is
//! still the one of the start, that the daemon lives, and that its log has no panic.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// The program under test: the one of this build, or, in a guest of the lab, the copy that `NEMESISFS` names.
pub fn executable() -> &'static str {
    static PATH: LazyLock<String> =
        LazyLock::new(|| std::env::var("NEMESISFS").unwrap_or_else(|_| env!("CARGO_BIN_EXE_nemesisfs").to_string()));
    &PATH
}

/// One mount, from its start to its checked end.
pub struct Mounted {
    dir: tempfile::TempDir,
    pub mountpoint: PathBuf,
    pub backing: PathBuf,
    pub socket: PathBuf,
    pub log: PathBuf,
    pub pid: u32,
    device: u64,
    ended: bool,
    /// Has the backing directory a filesystem of its own?
    own_disk: bool,
}

/// A program's end: status and what it said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        Said {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// One answer of the socket.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub body: Value,
}

impl Mounted {
    /// Mounts an empty directory on the disk.
    pub fn new() -> Mounted {
        Mounted::with(&[])
    }

    /// Mounts with more options of `mount`.
    pub fn with(options: &[&str]) -> Mounted {
        Mounted::below(&std::env::temp_dir(), options)
    }

    /// Mounts a directory on tmpfs.
    pub fn in_memory() -> Mounted {
        Mounted::below(Path::new("/dev/shm"), &[])
    }

    /// Mounts by a daemon that another program starts: `sh -c 'ulimit …; exec "$@"' sh`, for instance.
    pub fn started_by(launcher: &[&str]) -> Mounted {
        Mounted::start(&std::env::temp_dir(), launcher, &[])
    }

    fn below(parent: &Path, options: &[&str]) -> Mounted {
        Mounted::start(parent, &["env"], options)
    }

    /// Mounts a filesystem of its own, of so many bytes, in a file: `mkfs.ext4 -q` makes it, for instance.
    pub fn on_own_disk(size: u64, mkfs: &[&str]) -> Mounted {
        Mounted::start_over(&std::env::temp_dir(), &["env"], &[], |dir| {
            let (image, backing) = (dir.join("image"), dir.join("backing"));
            fs::File::create(&image).and_then(|file| file.set_len(size)).expect("an image");
            let succeeds = |command: &mut Command| {
                let said: Said = command.output().expect("the program runs").into();
                assert_eq!(said.code, 0, "{command:?}: {said:?}");
            };
            succeeds(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image));
            succeeds(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&backing));
        })
    }

    fn start(parent: &Path, launcher: &[&str], options: &[&str]) -> Mounted {
        Mounted::start_over(parent, launcher, options, |_| ())
    }

    fn start_over(parent: &Path, launcher: &[&str], options: &[&str], prepare: impl FnOnce(&Path)) -> Mounted {
        let dir = tempfile::Builder::new().prefix("nemesisfs-test-").tempdir_in(parent).expect("a directory");
        let path = |name: &str| dir.path().join(name);
        for name in ["run", "backing", "mnt"] {
            fs::create_dir(path(name)).expect("a directory");
        }
        let (backing, mountpoint) = (path("backing"), path("mnt"));
        let log = path("run/t.log");
        let mut mounted = Mounted {
            socket: path("run/t.sock"),
            log: log.clone(),
            pid: 0,
            device: 0,
            ended: false,
            own_disk: false,
            backing: backing.clone(),
            mountpoint: mountpoint.clone(),
            dir,
        };
        prepare(mounted.dir.path());
        mounted.own_disk = is_mounted(&backing);
        // Databases run as users of their own.
        for path in [mounted.dir.path(), &backing, &mountpoint] {
            open_to_all(path);
        }
        let words = [executable(), "mount", "--instance", "t"];
        let words = launcher[1..].iter().chain(&words).chain(options).copied();
        let said = mounted.run(launcher[0], words, &[&backing, &mountpoint]);
        mounted.mounted(&said);
        mounted
    }

    fn mounted(&mut self, said: &Said) {
        assert_eq!(said.code, 0, "mount: {said:?}");
        let found = said.out.split_whitespace().find_map(|word| word.strip_prefix("pid="));
        self.pid = found.unwrap_or_else(|| panic!("no pid in {said:?}")).parse().expect("a pid");
        self.device = fs::metadata(&self.mountpoint).expect("the mountpoint").dev();
    }

    /// Kills the daemon as `kill -9` does.
    pub fn kill(&self) {
        kill(Pid::from_raw(self.pid as i32), Signal::SIGKILL).expect("a signal");
        eventually("the daemon's end", || !is_alive(self.pid));
    }

    /// Mounts again after the daemon was killed.
    pub fn mount_again(&mut self) {
        let words = [executable(), "mount", "--instance", "t"].into_iter();
        let said = self.run("env", words, &[&self.backing, &self.mountpoint]);
        self.mounted(&said);
    }

    fn run<'a>(&self, program: &str, words: impl Iterator<Item = &'a str>, paths: &[&Path]) -> Said {
        let mut command = Command::new(program);
        command.args(words).args(paths).env_remove("NEMESISFS_HOST");
        command.env("NEMESISFS_RUNDIR", self.run_dir()).env("NEMESISFS_STATEDIR", self.state_dir());
        command.output().expect("the program runs").into()
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Where its daemon writes what it does to the machine.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A directory beside the mount, for what a test needs elsewhere.
    pub fn aside(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).expect("a directory");
        open_to_all(&path);
        path
    }

    /// A path below the mountpoint.
    pub fn path(&self, name: &str) -> PathBuf {
        self.mountpoint.join(name)
    }

    /// Runs the command line on this instance, whatever comes of it.
    pub fn try_cli(&self, words: &[&str]) -> Said {
        self.run(executable(), words.iter().copied(), &[])
    }

    /// Runs a Python program in the mountpoint; it must end well. Its arguments are the backing directory, the daemon's
    /// process id and whatever else is given.
    pub fn python(&self, script: &str, more: &[&Path]) -> String {
        let pid = self.pid.to_string();
        let arguments = [self.backing.as_path(), Path::new(&pid)].into_iter().chain(more.iter().copied());
        let said = python(&self.mountpoint, script, arguments);
        assert_eq!(said.code, 0, "{}\n{}", said.out, said.err);
        said.out
    }

    /// Runs a Python program in the mountpoint and in an ordinary directory beside it: it must say the same.
    pub fn as_bare(&self, script: &str) -> String {
        let bare = python(&self.aside("bare"), script, []);
        assert_eq!(bare.code, 0, "in the bare directory: {}\n{}", bare.out, bare.err);
        let here = python(&self.mountpoint, script, []);
        assert_eq!(here.code, 0, "in the mount: {}\n{}", here.out, here.err);
        assert_eq!(here.out, bare.out, "mount (left) and bare directory (right)");
        bare.out
    }

    /// What `/v1/health` says of something.
    pub fn health(&self, key: &str) -> Value {
        self.http("GET", "/v1/health", None).body[key].clone()
    }

    /// Runs the command line on this instance; it must succeed.
    pub fn cli(&self, words: &[&str]) -> String {
        let said = self.try_cli(words);
        assert_eq!(said.code, 0, "nemesisfs {}: {said:?}", words.join(" "));
        said.out
    }

    /// One request on the socket.
    pub fn http(&self, method: &str, path: &str, body: Option<&Value>) -> Response {
        request(&self.socket, method, path, body)
    }

    /// Says something on the socket, and gives all that comes back.
    pub fn raw(&self, text: &str) -> String {
        say(&self.socket, text)
    }

    /// Puts a rule, which must be taken.
    pub fn rule(&self, name: &str, rule: Value) -> Value {
        let answer = self.http("PUT", &format!("/v1/rules/{name}"), Some(&rule));
        assert!(answer.status == 200 || answer.status == 201, "{rule}: {answer:?}");
        answer.body
    }

    /// Puts a rule that fails operations on a path with an error, so many times.
    pub fn error_rule(&self, name: &str, op: &str, path: &str, errno: &str, times: Option<u64>) -> Value {
        self.rule(
            name,
            json!({
                "match": {"ops": [op], "path": path}, "trigger": {"times": times},
                "fault": {"kind": "error", "errno": errno},
            }),
        )
    }

    pub fn reset(&self) {
        assert_eq!(self.http("POST", "/v1/reset", Some(&json!({}))).status, 200);
    }

    /// All events so far that are injections of a rule.
    pub fn injections(&self, rule: &str) -> Vec<Value> {
        let mut events = self.events();
        events.retain(|event| event["event"] == "injection" && event["rule"] == rule);
        events
    }

    /// All events so far.
    pub fn events(&self) -> Vec<Value> {
        let text = self.raw(
            "GET /v1/events?follow=false HTTP/1.1\r\nHost: localhost\r\nAccept: application/x-ndjson\r\n\
             Connection: close\r\n\r\n",
        );
        let lines = text.lines().filter(|line| line.starts_with('{'));
        lines.filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Opens the event stream with more headers; lines come as they are sent.
    pub fn stream(&self, query: &str, headers: &str) -> BufReader<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket).expect("the socket");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        write!(stream, "GET /v1/events{query} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").expect("a request");
        BufReader::new(stream)
    }

    /// Ends the mount, after checking that it is still what it was. The test must have closed its files.
    pub fn end(mut self) {
        self.check();
        let umount = || self.try_cli(&["umount", "--instance", "t"]);
        let mut said = umount();
        // What this test has closed, a child of another one has until it executes its program.
        for _ in 0..5 {
            if said.code != 1 || !said.err.contains("busy") {
                break;
            }
            said = umount();
        }
        self.ended = said.code == 0;
        assert_eq!(said.code, 0, "umount: {said:?}\nlog:\n{}", self.log_text());
        self.check_log();
    }

    /// Is it still the mount of the start, with its daemon?
    pub fn check(&self) {
        let device = fs::metadata(&self.mountpoint).map(|meta| meta.dev());
        assert_eq!(device.ok(), Some(self.device), "it is still the same mount");
        assert!(is_alive(self.pid), "the daemon lives; its log:\n{}", self.log_text());
        self.check_log();
    }

    fn check_log(&self) {
        assert!(!self.log_text().contains("panic"), "no panic in the log:\n{}", self.log_text());
    }

    pub fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.ended && is_alive(self.pid) {
            let _ = self.try_cli(&["umount", "--instance", "t", "--force"]);
        }
        if !self.ended && is_mounted(&self.mountpoint) {
            // A daemon that was killed has left it.
            let _ = nix::mount::umount2(&self.mountpoint, nix::mount::MntFlags::MNT_DETACH);
        }
        if self.own_disk {
            let unmounted = || nix::mount::umount2(&self.backing, nix::mount::MntFlags::empty()).is_ok();
            eventually("the backing filesystem can be unmounted", unmounted);
        }
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log_text());
        }
    }
}

/// Runs a Python program in a directory, for at most a minute: what a client does with system calls of its own.
pub fn python<'a>(dir: &Path, script: &str, arguments: impl IntoIterator<Item = &'a Path>) -> Said {
    let script = format!("import signal; signal.alarm(60)\n{script}");
    let mut command = Command::new("python3");
    command.args(["-c", &script]).args(arguments).current_dir(dir).output().expect("python3 runs").into()
}

/// A copy of the program where other users reach it. Another process writes it: a child that any thread of this one forks
/// meanwhile would have it open for writing, and nobody could execute it.
pub fn executable_in(dir: &Path) -> String {
    let own = dir.join("nemesisfs");
    assert!(Command::new("cp").args([Path::new(executable()), &own]).status().expect("cp").success());
    own.display().to_string()
}

/// Runs a script of the shell, which ends at the first command that fails.
pub fn sh(script: &str) -> Said {
    Command::new("sh").args(["-euc", script]).output().expect("sh runs").into()
}

/// System calls of a daemon as strace sees them, from the moment that it looks to its end.
pub struct Trace {
    strace: Child,
    traced: Vec<u32>,
    pub output: PathBuf,
    ended: bool,
}

impl Trace {
    /// Of threads, or of a whole process with those that it starts (`-f`).
    pub fn of(mounted: &Mounted, tids: &[u32], options: &[&str]) -> Trace {
        let output = mounted.aside("trace").join("calls");
        let mut command = Command::new("strace");
        command.arg("-qqo").arg(&output).args(options);
        for tid in tids {
            command.args(["-p", &tid.to_string()]);
        }
        let strace = command.spawn().expect("strace runs");
        let trace = Trace { strace, traced: tids.to_vec(), output, ended: false };
        let threads = |pid: u32| {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect::<Vec<u32>>()
        };
        let looked_at: Vec<u32> = match options.contains(&"-f") {
            true => tids.iter().flat_map(|pid| threads(*pid)).collect(),
            false => tids.to_vec(),
        };
        for tid in looked_at {
            let ended = || !Path::new(&format!("/proc/{tid}")).exists();
            eventually("strace looks", || ended() || tracer(tid) == Some(trace.strace.id()));
        }
        trace
    }

    /// Its lines so far. A call is in them before it returns to the daemon.
    pub fn lines(&self) -> Vec<String> {
        fs::read_to_string(&self.output).unwrap_or_default().lines().map(str::to_string).collect()
    }

    /// All its lines.
    pub fn end(mut self) -> Vec<String> {
        assert!(self.stop(), "strace ends, and has written all that it saw");
        self.lines()
    }

    /// False when it had to be killed: it may not have written all.
    fn stop(&mut self) -> bool {
        if std::mem::replace(&mut self.ended, true) {
            return true;
        }
        // It lets go of the daemon first. Of one that has died it takes leave by itself, and asked meanwhile it may wait for ever
        // for the first thread, which the kernel gives away after all others.
        if self.traced.iter().any(|tid| is_alive(*tid)) {
            let _ = kill(Pid::from_raw(self.strace.id() as i32), Signal::SIGINT);
        }
        let ended = (0..1000).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            !matches!(self.strace.try_wait(), Ok(None))
        });
        if !ended {
            let _ = (self.strace.kill(), self.strace.wait());
        }
        ended
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Who traces a thread.
fn tracer(tid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim().parse().ok()
}

/// A number of bytes that `/proc/PID/status` tells.
pub fn memory(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("the field");
    let kib = line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>();
    kib.expect("a number") << 10
}

pub fn is_mounted(path: &Path) -> bool {
    let table = fs::read("/proc/self/mountinfo").expect("the mount table");
    String::from_utf8_lossy(&table).lines().any(|line| line.split(' ').nth(4) == path.to_str())
}

fn open_to_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("permissions");
}

/// One request on a socket.
pub fn request(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Response {
    let body = body.map(Value::to_string).unwrap_or_default();
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    parse_response(&say(socket, &text))
}

fn say(socket: &Path, text: &str) -> String {
    let mut stream = UnixStream::connect(socket).expect("the socket");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
    // A server that refuses may close before it has read everything.
    let _ = stream.write_all(text.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn parse_response(text: &str) -> Response {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((text, ""));
    let status = head.split_whitespace().nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    // Bodies of ours are one JSON document, also when they come in chunks.
    let (start, end) = (body.find('{'), body.rfind('}'));
    let json = start.zip(end).and_then(|(start, end)| serde_json::from_str(&body[start..=end]).ok());
    Response { status, body: json.unwrap_or(Value::Null) }
}

pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, rest)) = stat.rsplit_once(')') else { return false };
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // A zombie has ended, if no other thread of it still holds what it had open.
    let threads = fields.get(17).and_then(|threads| threads.parse().ok()).unwrap_or(0);
    fields.first() != Some(&"Z") || threads > 1
}

/// Waits until something holds, or fails the test.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < until, "in a minute not: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs something that may hang on a thread of its own, so that the test does not.
pub fn within<T: Send + 'static>(limit: Duration, act: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(act()));
    receiver.recv_timeout(limit).ok()
}

/// The next server-sent event with a name: its id and data.
pub fn next_event(stream: &mut impl BufRead, name: &str) -> (Option<String>, Value) {
    let (mut event, mut id, mut data) = (String::new(), None, Value::Null);
    let until = Instant::now() + Duration::from_secs(40);
    loop {
        // Comments keep the connection alive for ever.
        assert!(Instant::now() < until, "no event {name}");
        let mut line = String::new();
        let read = stream.read_line(&mut line).expect("the stream goes on");
        assert_ne!(read, 0, "the stream ended before {name}");
        let line = line.trim_end();
        if let Some(value) = line.strip_prefix("event: ") {
            event = value.to_string();
        } else if let Some(value) = line.strip_prefix("id: ") {
            id = Some(value.to_string());
        } else if let Some(value) = line.strip_prefix("data: ") {
            data = serde_json::from_str(value).expect("JSON");
        } else if line.is_empty() && event == name {
            return (id, data);
        } else if line.is_empty() {
            (event, id, data) = (String::new(), None, Value::Null);
        }
    }
}
