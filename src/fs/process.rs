//! Who is calling: from the thread that FUSE names to its process, name and the system call it is in.
//!
//! Reads procfs, which never blocks on the mount. Called by readers only for requests that a rule concerns, and by the
//! clock for parked ones. What was read of a thread is kept for a tenth of a second in the reader that read it: numbers
//! of threads are not used again that fast, and a burst of injections costs one look.

use std::cell::RefCell;
use std::fs;
use std::io::Read;
use std::time::{Duration, Instant};

use crate::event::record::Comm;

const KEEP: Duration = Duration::from_millis(100);
const KEPT: usize = 64;

/// A calling process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Process {
    pub pid: u32,
    pub comm: Comm,
}

thread_local! {
    static SEEN: RefCell<Vec<(u32, Instant, Process)>> = const { RefCell::new(Vec::new()) };
}

/// The process of a thread. Of thread 0, and of one that is gone, there is nothing to tell.
pub fn of_thread(tid: u32) -> Process {
    if tid == 0 {
        return Process::default();
    }
    let now = Instant::now();
    SEEN.with_borrow_mut(|seen| {
        if let Some((_, _, process)) = seen.iter().find(|(id, at, _)| *id == tid && now.duration_since(*at) < KEEP) {
            return *process;
        }
        let process = read(tid).unwrap_or(Process { pid: tid, ..Process::default() });
        seen.retain(|(id, at, _)| *id != tid && now.duration_since(*at) < KEEP);
        if seen.len() < KEPT {
            seen.push((tid, now, process));
        }
        process
    })
}

fn read(tid: u32) -> Option<Process> {
    let status = fs::read(format!("/proc/{tid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.split(|byte| *byte == b'\n').find(|line| line.starts_with(name.as_bytes()))?;
        Some(line[name.len()..].trim_ascii())
    };
    let pid = std::str::from_utf8(field("Tgid:")?).ok()?.parse().ok()?;
    Some(Process { pid, comm: Comm::new(field("Name:")?) })
}

/// The name of a process: that of its first thread.
pub fn name(pid: u32) -> Option<String> {
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(comm.trim_end_matches('\n').to_string())
}

/// Is a process this one, or one of its descendants, as far as the parents between them live?
pub fn descends_from(pid: u32, root: u32) -> bool {
    /// No chain of parents is longer.
    const DEEPEST: usize = 1024;
    let mut at = pid;
    for _ in 0..DEEPEST {
        if at == root {
            return true;
        }
        match parent(at) {
            Some(parent) if parent > 0 => at = parent,
            _ => return false,
        }
    }
    false
}

/// From `status` and not from `stat`: the kernel lets nobody read that of a process in exec, which may wait for us.
fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// When the thread was started, in the kernel's ticks: with its number, this names it for good. Never to be asked of the caller
/// of a flush: in exec it closes its files under a lock that this would wait for.
pub fn start_time(tid: u32) -> Option<u64> {
    // Below `task`, because above it the kernel adds up the times of all threads, of which there may be thousands.
    let stat = fs::read_to_string(format!("/proc/{tid}/task/{tid}/stat")).ok()?;
    // The name may contain anything, blanks and brackets too; fields are counted from its end.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Is the caller of a parked request beyond waiting: gone, or with a fatal signal pending?
pub fn is_dying(tid: u32, started: Option<u64>) -> bool {
    const SIGKILL_BIT: u64 = 1 << 8;
    let Ok(status) = fs::read_to_string(format!("/proc/{tid}/status")) else { return true };
    let pending = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .unwrap_or(0)
    };
    // The kernel marks a fatal signal of any number as pending SIGKILL in the thread.
    if (pending("SigPnd:") | pending("ShdPnd:")) & SIGKILL_BIT != 0 {
        return true;
    }
    started.is_some() && start_time(tid) != started
}

/// The bytes that the thread's read or write call is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallRange {
    pub start: u64,
    /// As far as it is known: of a vector of buffers it is not.
    pub length: u64,
    pub writes: bool,
}

/// What a thread waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// A plain read or write.
    Call(CallRange),
    /// A load from a mapping.
    Fault,
    /// Something else, or it cannot be seen.
    Unknown,
}

/// A thread that has just sent a request goes to sleep within this.
const ASLEEP: Duration = Duration::from_millis(5);

/// A number and eight words in hexadecimal.
const LONGEST_LINE: usize = 256;

thread_local! {
    /// Callers that did not go to sleep (asynchronous I/O, a thread that polls): each is waited for once in a while.
    static AWAKE: RefCell<Vec<(u32, Instant)>> = const { RefCell::new(Vec::new()) };
}

/// What the thread waits in. The kernel makes several requests of one call; only this tells where the call began.
pub fn waits_in(tid: u32) -> Waiting {
    let begin = Instant::now();
    let was_awake = AWAKE.with_borrow_mut(|awake| {
        awake.retain(|(_, at)| begin.duration_since(*at) < KEEP);
        awake.iter().any(|(id, _)| *id == tid)
    });
    loop {
        let mut line = [0; LONGEST_LINE];
        let read = fs::File::open(format!("/proc/{tid}/syscall")).and_then(|mut file| file.read(&mut line));
        let Ok(text) = read.map(|length| std::str::from_utf8(&line[..length]).unwrap_or_default()) else {
            return Waiting::Unknown;
        };
        if !text.starts_with("running") {
            return call_in(tid, text);
        }
        if was_awake {
            return Waiting::Unknown;
        }
        if begin.elapsed() > ASLEEP {
            AWAKE.with_borrow_mut(|awake| awake.push((tid, begin)));
            return Waiting::Unknown;
        }
        std::thread::yield_now();
    }
}

/// Does the thread wait for a plain read, and not for a mapping?
pub fn is_in_read(tid: u32) -> bool {
    matches!(waits_in(tid), Waiting::Call(call) if !call.writes)
}

/// Does the thread wait for a plain write?
pub fn is_in_write(tid: u32) -> bool {
    matches!(waits_in(tid), Waiting::Call(call) if call.writes)
}

/// Reads `17 0x3 0x7f… 0x1000 0x2000 …`: number and arguments, or -1 when it is in no call.
fn call_in(tid: u32, text: &str) -> Waiting {
    let mut words = text.split_ascii_whitespace();
    let Some(number) = words.next().and_then(|word| word.parse::<i64>().ok()) else { return Waiting::Unknown };
    if number == -1 {
        return Waiting::Fault;
    }
    let arguments: Vec<u64> =
        words.filter_map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok()).collect();
    let argument = |n: usize| arguments.get(n).copied();
    let at_position = || argument(0).and_then(|fd| position(tid, fd));
    let start = match number {
        libc::SYS_pread64 | libc::SYS_pwrite64 | libc::SYS_preadv | libc::SYS_pwritev => argument(3),
        // An offset of -1 means the position of the file.
        libc::SYS_preadv2 | libc::SYS_pwritev2 => argument(3).filter(|at| *at != u64::MAX).or_else(at_position),
        libc::SYS_read | libc::SYS_write | libc::SYS_readv | libc::SYS_writev => at_position(),
        _ => None,
    };
    let plain = [libc::SYS_read, libc::SYS_write, libc::SYS_pread64, libc::SYS_pwrite64].contains(&number);
    let length = if plain { argument(2) } else { Some(u64::MAX) };
    let writes = [libc::SYS_write, libc::SYS_pwrite64, libc::SYS_writev, libc::SYS_pwritev, libc::SYS_pwritev2]
        .contains(&number);
    match start.zip(length) {
        Some((start, length)) => Waiting::Call(CallRange { start, length, writes }),
        None => Waiting::Unknown,
    }
}

fn position(tid: u32, fd: u64) -> Option<u64> {
    let info = fs::read_to_string(format!("/proc/{tid}/fdinfo/{fd}")).ok()?;
    info.lines().find_map(|line| line.strip_prefix("pos:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_told_from_its_process() {
        let pid = std::process::id();
        let tid = std::thread::spawn(|| nix::unistd::gettid().as_raw() as u32);
        let alive = nix::unistd::gettid().as_raw() as u32;
        assert_eq!(of_thread(alive).pid, pid);
        assert!(!is_dying(alive, start_time(alive)));
        let gone = tid.join().unwrap();
        assert!(is_dying(gone, Some(1)));
    }
}
