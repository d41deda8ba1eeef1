//! Programs that a command starts for its user: each in a process group of its own, waited for with a limit, and ended
//! with all that they have started.
//!
//! A leader that has ended is not reaped before its group is killed: until then the kernel gives its number to nobody
//! else. What the programs say goes to memory, where no reader has to keep up with it, and nothing waits for a daemon
//! that has inherited a pipe.
//!
//! Thread: the one that made it, which drives a small tokio runtime while a child runs. Locks: none. Must never: leave a
//! group behind, or lose a signal that came while no child ran.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};

/// How much of what a program said is kept: its end, where the reason stands.
const TAIL: u64 = 2048;
/// How long a killed program may take to be gone. One that waits in the filesystem is let go within 100 ms.
const DYING: Duration = Duration::from_secs(5);

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exit(i32),
    Signal(Signal),
    TimedOut,
}

impl Ended {
    pub fn well(self) -> bool {
        self == Ended::Exit(0)
    }

    /// As a shell tells it.
    pub fn code(self) -> i32 {
        match self {
            Ended::Exit(code) => code,
            Ended::Signal(signal) => 128 + signal as i32,
            Ended::TimedOut => 124,
        }
    }
}

/// A program's end, and the end of what it said.
#[derive(Debug)]
pub struct Done {
    pub ended: Ended,
    pub output: String,
}

/// Why there is no end to tell of.
#[derive(Debug)]
pub enum Broken {
    /// We are to end, by this signal.
    Interrupted(Signal),
    Failed(io::Error),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Broken::Failed(error)
    }
}

/// Children, and the signals that are about them or are to end us, which from then on end nothing by themselves.
pub struct Children {
    runtime: Runtime,
    ending: [(Signal, Signals); 3],
    child_ended: Signals,
    started: Vec<Child>,
}

impl Children {
    pub fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        let ending = [
            (Signal::SIGINT, signal(SignalKind::interrupt())?),
            (Signal::SIGTERM, signal(SignalKind::terminate())?),
            (Signal::SIGHUP, signal(SignalKind::hangup())?),
        ];
        let child_ended = signal(SignalKind::child())?;
        drop(entered);
        Ok(Children { runtime, ending, child_ended, started: Vec::new() })
    }

    /// Runs a program to its end, which comes at the limit at the latest. What it has left running in its group runs on
    /// until [`Children::end`].
    pub fn run(&mut self, command: &mut Command, limit: Duration) -> Result<Done, Broken> {
        let said = File::from(memfd_create(c"output", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?);
        command.process_group(0).stdin(Stdio::null());
        command.stdout(said.try_clone()?).stderr(said.try_clone()?);
        let child = command.spawn()?;
        let pid = Pid::from_raw(child.id().cast_signed());
        self.started.push(child);
        let ended = self.wait(pid, limit);
        if !matches!(ended, Ok(Some(_))) {
            end_group(pid);
        }
        Ok(Done { ended: ended?.unwrap_or(Ended::TimedOut), output: tail(&said)? })
    }

    /// Runs a program in our own group, on our own terminal, to its end. Signals that are to end us are handed on to it,
    /// but for the one that a terminal has sent it already.
    pub fn follow(&mut self, command: &mut Command) -> io::Result<Ended> {
        let mut child = command.spawn()?;
        let pid = Pid::from_raw(child.id().cast_signed());
        let by_terminal = io::IsTerminal::is_terminal(&io::stdin());
        let ended = loop {
            match self.wait(pid, Duration::MAX) {
                Ok(Some(ended)) => break ended,
                Ok(None) => {}
                Err(Broken::Interrupted(Signal::SIGINT)) if by_terminal => {}
                Err(Broken::Interrupted(signal)) => {
                    let _ = kill(pid, signal);
                }
                Err(Broken::Failed(error)) => return Err(error),
            }
        };
        child.wait()?;
        Ok(ended)
    }

    /// How it ended, unless it has not within the limit.
    fn wait(&mut self, pid: Pid, limit: Duration) -> Result<Option<Ended>, Broken> {
        let Children { runtime, ending: [int, term, hup], child_ended, .. } = self;
        runtime.block_on(async {
            let late = tokio::time::sleep(limit);
            tokio::pin!(late);
            loop {
                let stop = tokio::select! {
                    biased;
                    _ = int.1.recv() => int.0,
                    _ = term.1.recv() => term.0,
                    _ = hup.1.recv() => hup.0,
                    () = std::future::ready(()), if ended(pid)?.is_some() => return Ok(ended(pid)?),
                    _ = child_ended.recv() => continue,
                    () = &mut late => return Ok(None),
                };
                return Err(Broken::Interrupted(stop));
            }
        })
    }

    /// Ends all groups that are left, and reaps their leaders.
    pub fn end(&mut self) {
        for mut child in self.started.drain(..) {
            end_group(Pid::from_raw(child.id().cast_signed()));
            let _ = child.wait();
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.end();
    }
}

/// Kills a group, and waits until none of it runs: what it was about to write would otherwise come later than whatever
/// is done next.
fn end_group(group: Pid) {
    let until = Instant::now() + DYING;
    let _ = killpg(group, Signal::SIGKILL);
    while runs(group) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Is there a process of the group that is more than a zombie?
fn runs(group: Pid) -> bool {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.map(|entry| entry.path()).any(|path| {
        let stat = std::fs::read_to_string(path.join("stat")).unwrap_or_default();
        // `PID (COMM) STATE PARENT GROUP …`; the name may have anything in it.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().take(3).collect();
        let [state, _, of] = fields[..] else { return false };
        // The first thread of a process is a zombie while others still run.
        let threads = || std::fs::read_dir(path.join("task")).map_or(0, Iterator::count);
        of.parse() == Ok(group.as_raw()) && (state != "Z" || threads() > 1)
    })
}

/// Whether and how a child has ended, without reaping it.
fn ended(pid: Pid) -> io::Result<Option<Ended>> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    Ok(match waitid(Id::Pid(pid), flags)? {
        WaitStatus::Exited(_, code) => Some(Ended::Exit(code)),
        WaitStatus::Signaled(_, signal, _) => Some(Ended::Signal(signal)),
        _ => None,
    })
}

fn tail(said: &File) -> io::Result<String> {
    let length = said.metadata()?.len();
    let kept = length.min(TAIL);
    let mut bytes = vec![0; kept as usize];
    said.read_exact_at(&mut bytes, length - kept)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(children: &mut Children, script: &str, limit: Duration) -> Done {
        children.run(Command::new("sh").args(["-c", script]), limit).unwrap()
    }

    #[test]
    fn a_program_ends_by_itself_by_a_signal_or_at_the_limit() {
        let mut children = Children::new().unwrap();
        let long = Duration::from_secs(20);
        let done = run(&mut children, "echo a; echo b >&2; exit 3", long);
        assert_eq!((done.ended, done.output.as_str()), (Ended::Exit(3), "a\nb"));
        assert_eq!(run(&mut children, "kill -ABRT $$", long).ended, Ended::Signal(Signal::SIGABRT));
        let done = run(&mut children, "echo a; sleep 60", Duration::from_secs(2));
        assert_eq!((done.ended, done.output.as_str()), (Ended::TimedOut, "a"));
        let done = run(&mut children, "head -c 5000 /dev/zero | tr '\\0' x; echo end", long);
        assert!(done.output.len() < 2100 && done.output.ends_with("xend"));
    }

    #[test]
    fn what_a_program_leaves_running_ends_with_its_group() {
        let mut children = Children::new().unwrap();
        let done = run(&mut children, "sleep 60 & echo $!", Duration::from_secs(20));
        let left = Pid::from_raw(done.output.parse().unwrap());
        assert!(nix::sys::signal::kill(left, None).is_ok(), "it runs on");
        children.end();
        let stat = std::fs::read_to_string(format!("/proc/{left}/stat"));
        assert!(stat.is_err() || stat.as_ref().is_ok_and(|stat| stat.contains(") Z ")), "{stat:?}");
    }
}
