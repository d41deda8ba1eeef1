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
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_nemesisfs");

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

    fn below(parent: &Path, options: &[&str]) -> Mounted {
        let dir = tempfile::Builder::new().prefix("nemesisfs-test-").tempdir_in(parent).expect("a directory");
        let path = |name: &str| dir.path().join(name);
        for name in ["run", "backing", "mnt"] {
            fs::create_dir(path(name)).expect("a directory");
        }
        // Databases run as users of their own.
        for name in ["", "backing", "mnt"] {
            open_to_all(&path(name));
        }
        let (backing, mountpoint) = (path("backing"), path("mnt"));
        let log = path("run/t.log");
        let mut mounted = Mounted {
            socket: path("run/t.sock"),
            log: log.clone(),
            pid: 0,
            device: 0,
            ended: false,
            backing: backing.clone(),
            mountpoint: mountpoint.clone(),
            dir,
        };
        let said = mounted.run(["mount", "--instance", "t"].iter().chain(options).copied(), &[&backing, &mountpoint]);
        assert_eq!(said.code, 0, "mount: {said:?}");
        let word = |key: &str| {
            let found = said.out.split_whitespace().find_map(|word| word.strip_prefix(key));
            found.unwrap_or_else(|| panic!("no {key} in {said:?}")).to_string()
        };
        mounted.pid = word("pid=").parse().expect("a pid");
        mounted.device = fs::metadata(&mountpoint).expect("the mountpoint").dev();
        mounted
    }

    fn run<'a>(&self, words: impl Iterator<Item = &'a str>, paths: &[&Path]) -> Said {
        let mut command = Command::new(PROGRAM);
        command.args(words).args(paths).env("NEMESISFS_RUNDIR", self.run_dir()).env_remove("NEMESISFS_HOST");
        command.output().expect("the program runs").into()
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
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
        self.run(words.iter().copied(), &[])
    }

    /// Runs the command line on this instance; it must succeed.
    pub fn cli(&self, words: &[&str]) -> String {
        let said = self.try_cli(words);
        assert_eq!(said.code, 0, "nemesisfs {}: {said:?}", words.join(" "));
        said.out
    }

    /// One request on the socket.
    pub fn http(&self, method: &str, path: &str, body: Option<&Value>) -> Response {
        let body = body.map(Value::to_string).unwrap_or_default();
        let text = self.raw(&format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        ));
        parse_response(&text)
    }

    /// Says something on the socket, and gives all that comes back.
    pub fn raw(&self, text: &str) -> String {
        let mut stream = UnixStream::connect(&self.socket).expect("the socket");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        // A server that refuses may close before it has read everything.
        let _ = stream.write_all(text.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
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
        let said = self.try_cli(&["umount", "--instance", "t"]);
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
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log_text());
        }
    }
}

fn open_to_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("permissions");
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
    // A zombie has ended.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// Waits until something holds, or fails the test.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "in 20 s not: {what}");
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
