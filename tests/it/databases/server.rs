//! A server process of one test: started, awaited, and killed with all its children when the test ends, however it ends.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running server. It must be made after the mount on which it works, so that it is dropped first.
pub struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts one whose output goes to a log.
    pub fn start(mut command: Command, log: &Path) -> Server {
        let file = log_file(log);
        let second = file.try_clone().expect("a second descriptor of the log");
        command.stdin(Stdio::null()).stdout(file).stderr(second);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}; is its package installed?"));
        Server { child, log: log.to_path_buf() }
    }

    /// Waits until it answers. A server that ends instead fails the test with its last words.
    pub fn ready(mut self, mut answers: impl FnMut() -> bool) -> Server {
        let until = Instant::now() + Duration::from_secs(60);
        while !answers() {
            let ended = self.child.try_wait().expect("its state");
            assert!(ended.is_none(), "the server ended as it started: {ended:?}\n{}", self.last_words());
            assert!(Instant::now() < until, "the server does not answer\n{}", self.last_words());
            std::thread::sleep(Duration::from_millis(20));
        }
        self
    }

    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("its state").is_none()
    }

    /// How it ended by itself.
    pub fn ended(&mut self) -> ExitStatus {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.child.try_wait().expect("its state") {
                return status;
            }
            assert!(Instant::now() < until, "the server goes on\n{}", self.last_words());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Asks it to end, by a signal, and waits until it has.
    pub fn stop(mut self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("a signal");
        self.ended();
    }

    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for pid in descendants(self.child.id() as i32) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the end of {}:\n{}", self.log.display(), self.last_words());
        }
    }
}

/// A process and all below it. Once it is dead nobody could tell any more whose they were.
fn descendants(pid: i32) -> Vec<i32> {
    let mut found = vec![pid];
    let mut at = 0;
    while let Some(pid) = found.get(at) {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        found.extend(children.split_whitespace().filter_map(|child| child.parse::<i32>().ok()));
        at += 1;
    }
    found
}

fn log_file(path: &Path) -> File {
    OpenOptions::new().create(true).append(true).open(path).expect("a log file")
}

/// Asserts that a log has a line with all these words, and gives the line.
pub fn logged(log: &Path, words: &[&str]) -> String {
    let text = fs::read_to_string(log).expect("a log");
    let line = text.lines().find(|line| words.iter().all(|word| line.contains(word)));
    line.unwrap_or_else(|| panic!("no line with {words:?} in the log:\n{text}")).to_string()
}

/// Two TCP ports that nobody uses at the moment. Both are held until both are known: one could come twice.
pub fn free_ports() -> [u16; 2] {
    let listeners = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").expect("a port"));
    listeners.each_ref().map(|listener| listener.local_addr().expect("its address").port())
}
