//! Programs that crash, and what there must be in a core: helpers of [`crate::redirect`] and [`crate::cores`].

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The signals that the suites crash programs with, in turn.
pub const SIGNALS: [Signal; 3] = [Signal::SIGQUIT, Signal::SIGABRT, Signal::SIGSEGV];

/// A program that costs little to start, for many crashes. What it was started with may ignore signals.
const SMALL: [&str; 5] = ["env", "--default-signal", "sh", "-c", "ulimit -c unlimited; echo ready; read _"];

/// So many MiB that no compression makes smaller, and a program that sleeps with them.
const PROGRAM: &str = "open F, '/dev/urandom'; read F, $x, $ARGV[0] * 1048576; $SIG{QUIT} = 'DEFAULT'; $| = 1;
print \"ready\\n\"; sleep 100";

/// A program that is about to crash; it ends with the test at the latest.
pub struct Victim(Child);

impl Victim {
    /// In a directory, with so many MiB.
    pub fn new(dir: &Path, mib: u32) -> Victim {
        let mut victim = Victim::start(dir, mib);
        victim.await_ready();
        victim
    }

    fn start_small(dir: &Path) -> Victim {
        let mut command = Command::new(SMALL[0]);
        command.args(&SMALL[1..]).current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::piped());
        Victim(command.spawn().expect("sh"))
    }

    fn start(dir: &Path, mib: u32) -> Victim {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -c unlimited; exec perl -e \"$1\" \"$2\"", "sh", PROGRAM, &mib.to_string()]);
        Victim(command.current_dir(dir).stdout(Stdio::piped()).spawn().expect("perl"))
    }

    fn await_ready(&mut self) {
        let mut line = String::new();
        BufReader::new(self.0.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n");
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn kill(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).expect("a signal");
    }

    /// Waits until it is dead, which it is when the kernel has handed its core over.
    pub fn crashed(mut self, signal: Signal) -> u32 {
        let status = self.0.wait().expect("its end");
        assert_eq!(status.signal(), Some(signal as i32), "{status:?}");
        self.pid()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

/// Crashes a program, and gives its pid.
pub fn crash(dir: &Path, signal: Signal, mib: u32) -> u32 {
    let victim = Victim::new(dir, mib);
    victim.kill(signal);
    victim.crashed(signal)
}

/// Crashes so many small programs, some at a time, by all signals in turn. Gives their pids.
pub fn crash_many(dir: &Path, count: usize, at_a_time: usize) -> Vec<u32> {
    let mut pids = Vec::new();
    let signals: Vec<Signal> = SIGNALS.into_iter().cycle().take(count).collect();
    for some in signals.chunks(at_a_time) {
        let mut victims: Vec<(Victim, Signal)> =
            some.iter().map(|signal| (Victim::start_small(dir), *signal)).collect();
        victims.iter_mut().for_each(|(victim, _)| victim.await_ready());
        victims.iter().for_each(|(victim, signal)| victim.kill(*signal));
        pids.extend(victims.into_iter().map(|(victim, signal)| victim.crashed(signal)));
    }
    pids
}

/// The finished core of a process in a directory, by a name with its pid in it.
pub fn core_of(dir: &Path, pid: u32) -> Option<PathBuf> {
    let files = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let fits = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("core.") && name.split('.').any(|word| word == pid.to_string())
    };
    files.into_iter().find(fits)
}

/// Waits for it.
pub fn await_core(dir: &Path, pid: u32) -> PathBuf {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(core) = core_of(dir, pid) {
            return core;
        }
        assert!(Instant::now() < until, "no core of {pid} in {}: {:?}", dir.display(), names(dir));
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Is every segment of it there, and is it of that process?
///
/// # Errors
/// With what is missing.
pub fn check(core: &Path, pid: u32) -> Result<(), String> {
    let bytes = fs::read(core).map_err(|error| error.to_string())?;
    let number = |at: usize, size: usize| -> Result<u64, String> {
        let part = bytes.get(at..at + size).ok_or(format!("it ends before byte {at}"))?;
        Ok(part.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    if !bytes.starts_with(b"\x7fELF\x02\x01") || number(16, 2)? != 4 {
        return Err("it is no core".into());
    }
    let (table, size, count) = (number(32, 8)? as usize, number(54, 2)? as usize, number(56, 2)? as usize);
    let mut note = None;
    for header in (0..count).map(|i| table + i * size) {
        let (kind, offset, length) = (number(header, 4)?, number(header + 8, 8)?, number(header + 32, 8)?);
        if offset + length > bytes.len() as u64 {
            return Err(format!("a segment ends at byte {}, the file at {}", offset + length, bytes.len()));
        }
        note = if kind == 4 { Some(offset as usize) } else { note };
    }
    // The first note is that of the thread that died: 12 bytes of header, the name CORE, then prstatus.
    let found = number(note.ok_or("it has no notes")? + 20 + 32, 4)?;
    if found == u64::from(pid) { Ok(()) } else { Err(format!("it is the core of {found}")) }
}
