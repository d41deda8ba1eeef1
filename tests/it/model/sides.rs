//! The two sides of the model, each with a worker for every identity, and the comparison of what they answer.
//!
//! Runs on the thread of its test, one call at a time: the same call by the same identity on the bare directory and on
//! the mount. Must never go on after a difference: from there on the sides have a right to differ.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::tree::{Status, number};
use super::wire::{Answer, Arg, Question};
use super::worker;

/// `_LINUX_CAPABILITY_VERSION_3`
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// How many calls are told of when a difference was found.
const TRACE: usize = 40;
/// Longer than any call takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a worker may take to end.
const ENDING: Duration = Duration::from_secs(10);

pub const BARE: usize = 0;
pub const MOUNT: usize = 1;
/// The directory below the mount, which is only looked at.
const BACKING: usize = 2;

/// What of an answer has to be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Same {
    /// The result, and all that was written.
    All,
    /// The result, and as many bytes as it says.
    Data,
    /// The result alone.
    Result,
    /// `struct statx`, but for what differs by nature.
    Status,
    /// `struct flock`, with the process as the number of its worker.
    Lock,
    /// Success or the error: an address is each process's own.
    Success,
}

/// Who does something.
pub struct Identity {
    pub name: &'static str,
    pub uid: u32,
    pub gid: u32,
    pub groups: &'static [u32],
    pub umask: u32,
    /// The capabilities that it keeps, or for root those that it loses.
    pub keeps: &'static [u32],
    pub loses: &'static [u32],
    pub largest_file: Option<u64>,
}

pub struct Sides {
    workers: Vec<[Worker; 2]>,
    observers: [Worker; 3],
    trace: VecDeque<String>,
    title: String,
    names: Vec<&'static str>,
    /// Calls so far.
    pub calls: u64,
    /// From where on lines of the tree are not compared.
    ignored: &'static str,
}

impl Sides {
    /// Starts the workers. `title` says how to run this again.
    pub fn start(roots: [&Path; 3], identities: &[Identity], title: String, ignored: &'static str) -> Sides {
        let mut sides = Sides {
            workers: identities.iter().map(|_| [Worker::start(roots[BARE]), Worker::start(roots[MOUNT])]).collect(),
            observers: roots.map(Worker::start),
            trace: VecDeque::new(),
            title,
            names: identities.iter().map(|identity| identity.name).collect(),
            calls: 0,
            ignored,
        };
        for (who, identity) in identities.iter().enumerate() {
            sides.become_identity(who, identity);
        }
        sides.trace.clear();
        sides
    }

    fn become_identity(&mut self, who: usize, identity: &Identity) {
        let (low, high) = self.capabilities_of(who, identity);
        let words = |words: &[u32]| Arg::In(words.iter().flat_map(|word| word.to_ne_bytes()).collect(), 0);
        let id = |id: u32| number(id.into());
        let ignore = Arg::In([1u64, 0, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect(), 0);
        let limit = |bytes: u64| Arg::In([bytes, bytes].iter().flat_map(|word| word.to_ne_bytes()).collect(), 0);
        let (uid, gid) = (identity.uid, identity.gid);
        let mut calls = vec![
            ("umask", libc::SYS_umask, vec![id(identity.umask)]),
            ("rt_sigaction", libc::SYS_rt_sigaction, vec![number(libc::SIGXFSZ.into()), ignore, id(0), id(8)]),
            ("setgroups", libc::SYS_setgroups, vec![number(identity.groups.len() as i64), words(identity.groups)]),
            ("setresgid", libc::SYS_setresgid, vec![id(gid), id(gid), id(gid)]),
        ];
        if let Some(largest) = identity.largest_file {
            let resource = number(libc::RLIMIT_FSIZE as i64);
            calls.push(("prlimit64", libc::SYS_prlimit64, vec![id(0), resource, limit(largest), id(0)]));
        }
        if uid != 0 {
            calls.push(("prctl", libc::SYS_prctl, vec![number(libc::PR_SET_KEEPCAPS.into()), id(1)]));
            calls.push(("setresuid", libc::SYS_setresuid, vec![id(uid), id(uid), id(uid)]));
        }
        let data = words(&[low, low, 0, high, high, 0]);
        calls.push(("capset", libc::SYS_capset, vec![words(&[CAPABILITY_VERSION, 0]), data]));
        for (name, call, args) in calls {
            let result = self.call(who, name, call, &args, Same::Result).result;
            assert!(result >= 0, "{name}: {result}");
        }
    }

    /// The capabilities that an identity is to have, in two words: root starts with all that we have.
    fn capabilities_of(&mut self, who: usize, identity: &Identity) -> (u32, u32) {
        let bits = |capabilities: &[u32]| capabilities.iter().fold(0u32, |all, capability| all | 1 << capability);
        if identity.uid != 0 {
            return (bits(identity.keeps), 0);
        }
        let header: Vec<u8> = [CAPABILITY_VERSION, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let args = [Arg::In(header, 0), Arg::Out(24, 0)];
        let data = self.call(who, "capget", libc::SYS_capget, &args, Same::All).written.concat();
        let permitted = |at: usize| u32::from_ne_bytes(*data[at..].first_chunk().expect("a word"));
        (permitted(4) & !bits(identity.loses), permitted(16))
    }

    /// The same call on both sides.
    pub fn call(&mut self, who: usize, name: &str, call: i64, args: &[Arg], same: Same) -> Answer {
        let [bare, _] = self.call_each(who, name, call, [args, args], same);
        bare
    }

    /// A call with arguments that each side has its own of: addresses.
    pub fn call_each(&mut self, who: usize, name: &str, call: i64, args: [&[Arg]; 2], same: Same) -> [Answer; 2] {
        let answers = self.both(who, name, call, args);
        self.note(format!("{}: {name}({}) = {}", self.names[who], show(args[BARE]), answers[BARE].result));
        let [bare, mount] = &answers;
        let [told_bare, told_mount] = [self.told(bare, same, BARE), self.told(mount, same, MOUNT)];
        if told_bare != told_mount {
            self.fail(&format!("bare:  {told_bare}\nmount: {told_mount}"));
        }
        answers
    }

    /// The same call on both sides, compared by the caller.
    pub fn both(&mut self, who: usize, name: &str, call: i64, args: [&[Arg]; 2]) -> [Answer; 2] {
        self.calls += 1;
        for side in [BARE, MOUNT] {
            self.workers[who][side].ask(&Question::Call(call, args[side].to_vec()));
        }
        let [bare, mount] = [BARE, MOUNT].map(|side| self.workers[who][side].answer());
        let (Ok(bare), Ok(mount)) = (&bare, &mount) else {
            self.note(format!("{}: {name}({})", self.names[who], show(args[BARE])));
            self.fail(&format!("no answer in {PATIENCE:?}; bare: {bare:?}, mount: {mount:?}"));
        };
        [bare.clone(), mount.clone()]
    }

    /// The number of the process that is the worker of an identity, on each side.
    pub fn pids(&self, who: usize) -> [u32; 2] {
        [BARE, MOUNT].map(|side| self.workers[who][side].child.id())
    }

    fn told(&self, answer: &Answer, same: Same, side: usize) -> String {
        let result = answer.result;
        let written = || answer.written.concat();
        let upto = |length: i64| written().get(..length.max(0) as usize).unwrap_or_default().escape_ascii().to_string();
        match same {
            Same::Result => show_result(result),
            Same::Success => show_result(result.min(0)),
            Same::All => format!("{}, {}", show_result(result), written().escape_ascii()),
            Same::Data => format!("{}, {}", show_result(result), upto(result)),
            Same::Status if result < 0 => show_result(result),
            Same::Status => self.told_status(&Status::read(&written())),
            Same::Lock => format!("{}, {}", show_result(result), self.told_lock(&written(), side)),
        }
    }

    fn told_status(&self, status: &Status) -> String {
        let Status { mode, nlink, uid, gid, size, block_size, device, .. } = status;
        let mtime = status.mtime();
        format!(
            "mode={mode:o} nlink={nlink} uid={uid} gid={gid} size={size} unit={block_size} device={device:?} \
             mtime={mtime}"
        )
    }

    fn told_lock(&self, lock: &[u8], side: usize) -> String {
        let (head, pid) = lock.split_at(24);
        let pid = u32::from_ne_bytes(*pid.first_chunk().expect("a process"));
        let who = self.workers.iter().position(|workers| workers[side].child.id() == pid);
        format!("{} {}", head.escape_ascii(), who.map_or_else(|| pid.to_string(), |who| format!("worker {who}")))
    }

    /// Compares all that can be found out about the trees.
    pub fn compare_trees(&mut self) {
        for observer in &mut self.observers {
            observer.ask(&Question::Walk);
        }
        let walked = [BARE, MOUNT, BACKING].map(|side| self.observers[side].answer().expect("a walk"));
        let text = |side: usize, part: usize| String::from_utf8_lossy(&walked[side].written[part]).into_owned();
        for (side, name) in [(MOUNT, "mount"), (BACKING, "backing directory")] {
            if let Some(difference) = difference(&text(BARE, 0), &text(side, 0), self.ignored) {
                self.fail(&format!("the trees differ, bare and {name}:\n{difference}"));
            }
        }
        if let Some(difference) = difference(&text(BACKING, 1), &text(MOUNT, 1), "\n") {
            self.fail(&format!("the inode numbers differ, backing directory and mount:\n{difference}"));
        }
    }

    fn note(&mut self, line: String) {
        if self.trace.len() == TRACE && std::env::var("NEMESISFS_MODEL_TRACE").is_err() {
            self.trace.pop_front();
        }
        self.trace.push_back(line);
    }

    /// Notes something that is no call.
    pub fn remark(&mut self, line: &str) {
        self.note(format!("-- {line}"));
    }

    pub fn fail(&self, difference: &str) -> ! {
        let trace: Vec<&str> = self.trace.iter().map(String::as_str).collect();
        panic!(
            "\nthe mount is not the bare directory, at call {}:\n{}\n\n{difference}\n\nto run it again: {}\n",
            self.calls,
            trace.join("\n"),
            self.title
        );
    }
}

/// The lines that differ before what is to be ignored.
fn difference(left: &str, right: &str, ignored: &str) -> Option<String> {
    let line = |line: &str| line.rsplit_once(ignored).map_or(line, |(line, _)| line).to_string();
    let lines = |text: &str| -> Vec<String> { text.lines().map(line).collect() };
    let (left, right) = (lines(left), lines(right));
    let missing = |of: &[String], from: &[String], sign: &str| -> String {
        of.iter().filter(|line| !from.contains(line)).map(|line| format!("{sign} {line}\n")).collect()
    };
    let told = missing(&left, &right, "-") + &missing(&right, &left, "+");
    (!told.is_empty()).then_some(told)
}

fn show_result(result: i64) -> String {
    match result {
        -4095..0 => format!("{:?}", nix::errno::Errno::from_raw(-result as i32)),
        result => result.to_string(),
    }
}

fn show(args: &[Arg]) -> String {
    let shown: Vec<String> = args.iter().map(show_arg).collect();
    shown.join(", ")
}

fn show_arg(arg: &Arg) -> String {
    match arg {
        Arg::Number(word) if *word as i64 == i64::from(libc::AT_FDCWD) => "AT_FDCWD".to_string(),
        Arg::Number(word) if (*word as i64) < 4096 => (*word as i64).to_string(),
        Arg::Number(word) => format!("{word:#x}"),
        Arg::In(bytes, 0) | Arg::InOut(bytes) => show_bytes(bytes),
        Arg::In(bytes, skew) => format!("{} at +{skew}", show_bytes(bytes)),
        Arg::Out(length, 0) => format!("[{length}]"),
        Arg::Out(length, skew) => format!("[{length}] at +{skew}"),
        Arg::Vector(parts) => format!("[{}]", show(parts)),
    }
}

fn show_bytes(bytes: &[u8]) -> String {
    match bytes {
        [text @ .., 0] if !text.contains(&0) => format!("\"{}\"", text.escape_ascii()),
        bytes if bytes.len() > 48 => format!("{} bytes of {:#04x}", bytes.len(), bytes[0]),
        bytes => format!("b\"{}\"", bytes.escape_ascii()),
    }
}

/// A process, and the way to it.
struct Worker {
    child: Child,
    socket: Option<UnixStream>,
}

impl Worker {
    fn start(root: &Path) -> Worker {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        ours.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command
            .args(["--exact", "model::a_worker_of_the_model", "--test-threads=1"])
            .env(worker::ROOT, root)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            // It ends when its socket does, not by Ctrl-C: it may have to clear up.
            .process_group(0);
        Worker { child: command.spawn().expect("a worker"), socket: Some(ours) }
    }

    fn socket(&self) -> &UnixStream {
        self.socket.as_ref().expect("a worker at work")
    }

    fn ask(&mut self, question: &Question) {
        // A worker that has ended gives no answer.
        let _ = question.send(self.socket());
    }

    fn answer(&mut self) -> std::io::Result<Answer> {
        Answer::receive(self.socket())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.socket.take());
        let until = Instant::now() + ENDING;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > until {
                // It hangs in the mount, whose end will let it go.
                let _ = self.child.kill();
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
