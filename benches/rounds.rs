//! Interleaved rounds of small operations on a bare directory and on mounts of it: what the mount costs.
//!
//! One thread does one operation after the other, and no target waits for another: in each round every target has its turn
//! at every operation, in an order that moves on, so that a machine that is slow for a while is slow for all of them. All
//! samples of all rounds are pooled. `tools/bench` starts it. Must never assert a time, or leave a mount behind.
//!
//! To add a competitor: one line in [`TARGETS`], with a function that sets a directory up and one that tears it down.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::time::{Duration, Instant};

use clap::Parser;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::{SigSet, Signal};
use serde_json::json;

const PROGRAM: &str = env!("CARGO_BIN_EXE_nemesisfs");

/// Interleaved rounds of small operations on a bare directory, on an idle mount and on mounts with rules.
#[derive(Debug, Parser)]
struct Options {
    /// Directory that the backing directories are made in
    #[arg(default_value = "/dev/shm")]
    dir: PathBuf,
    /// How many rounds
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// How many operations each target does of each kind in each round (a fortieth of it where the disk is waited for)
    #[arg(long, default_value_t = 1000)]
    size: usize,
    /// Only these operations: those whose name has this in it
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// A few operations, to see that it works: the figures mean nothing
    #[arg(long)]
    short: bool,
    /// What cargo adds for benchmarks
    #[arg(long, hide = true)]
    bench: bool,
}

/// Something that is measured: how it makes a directory to work in below its home, and how it goes away.
struct Target {
    name: &'static str,
    up: fn(&Path) -> io::Result<PathBuf>,
    down: fn(&Path) -> io::Result<()>,
}

/// The first one is what all others are compared with.
const TARGETS: &[Target] = &[
    Target { name: "bare", up: bare_directory, down: |_| Ok(()) },
    Target { name: "idle", up: |home| mount(home, 0), down: umount },
    Target { name: "1 rule", up: |home| mount(home, 1), down: umount },
    Target { name: "1000 rules", up: |home| mount(home, 1000), down: umount },
];

fn bare_directory(home: &Path) -> io::Result<PathBuf> {
    let dir = home.join("dir");
    fs::create_dir(&dir)?;
    Ok(dir)
}

/// This filesystem with so many rules that no request matches by its path.
fn mount(home: &Path, rules: usize) -> io::Result<PathBuf> {
    let (backing, mountpoint) = (home.join("backing"), home.join("mnt"));
    fs::create_dir(&backing)?;
    fs::create_dir(&mountpoint)?;
    let mut command = nemesisfs(home);
    command.args(["--quiet", "mount", "--instance", "bench"]);
    if rules > 0 {
        let file = home.join("rules.json");
        fs::write(&file, rules_elsewhere(rules).to_string())?;
        command.arg("--rules").arg(file);
    }
    succeed(command.arg(backing).arg(&mountpoint))?;
    Ok(mountpoint)
}

/// Rules of all operations that are measured, except `stat`: while a rule is armed for lookup or getattr, the kernel is
/// told to keep no attributes, which is another thing than asking a rule.
fn rules_elsewhere(count: usize) -> serde_json::Value {
    let rule = |n| {
        json!({"name": format!("r{n}"), "match": {"ops": ["data", "sync", "names"], "path": format!("/elsewhere/{n}/**")},
               "fault": {"kind": "error", "errno": "EIO"}})
    };
    json!({"rules": (0..count).map(rule).collect::<Vec<_>>()})
}

fn umount(home: &Path) -> io::Result<()> {
    succeed(nemesisfs(home).args(["--quiet", "umount", "--instance", "bench"]))
}

fn nemesisfs(home: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command.env("NEMESISFS_RUNDIR", home.join("run")).env_remove("NEMESISFS_HOST");
    command
}

fn succeed(command: &mut Command) -> io::Result<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// A target that is up. Goes down when it is dropped, whatever happened.
struct Up {
    target: &'static Target,
    home: PathBuf,
    files: Files,
}

impl Up {
    fn new(target: &'static Target, parent: &Path) -> io::Result<Up> {
        let home = parent.join(target.name.replace(' ', "-"));
        fs::create_dir(&home)?;
        let dir = (target.up)(&home).map_err(|error| io::Error::other(format!("{}: {error}", target.name)))?;
        match Files::new(dir) {
            Ok(files) => Ok(Up { target, home, files }),
            Err(error) => {
                let _ = (target.down)(&home);
                Err(error)
            }
        }
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // What is open would keep the mount busy.
        self.files.close();
        if let Err(error) = (self.target.down)(&self.home) {
            eprintln!("{}: {error}", self.target.name);
        }
    }
}

const BLOCK: usize = 4096;
const BLOCKS: u64 = 4096;

/// The files that operations work on, opened once.
struct Files {
    dir: PathBuf,
    open: BTreeMap<&'static str, File>,
    /// Twice a block, of which one is aligned as direct writes need it.
    buffer: Vec<u8>,
    /// For the offsets: the same ones for every target.
    random: u64,
    created: u64,
}

impl Files {
    fn new(dir: PathBuf) -> io::Result<Files> {
        let content = vec![0x5a; BLOCK * BLOCKS as usize];
        for name in ["written", "read"] {
            fs::write(dir.join(name), &content)?;
        }
        let mut files = Files { dir, open: BTreeMap::new(), buffer: vec![0x5a; 2 * BLOCK], random: 1, created: 0 };
        let write = || OpenOptions::new().write(true).clone();
        files.open("write", write(), "written")?;
        // Not every filesystem takes direct writes: then that operation is not measured.
        let _ = files.open("direct", write().custom_flags(libc::O_DIRECT).clone(), "written");
        files.open("append", OpenOptions::new().append(true).create(true).clone(), "appended")?;
        files.open("read", OpenOptions::new().read(true).clone(), "read")?;
        // One block is asked for, and one is to be read.
        posix_fadvise(files.file("read")?, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        Ok(files)
    }

    fn open(&mut self, key: &'static str, options: OpenOptions, name: &str) -> io::Result<()> {
        self.open.insert(key, options.open(self.dir.join(name))?);
        Ok(())
    }

    fn close(&mut self) {
        self.open.clear();
    }

    fn file(&self, key: &str) -> io::Result<&File> {
        self.open.get(key).ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    fn block(&self) -> &[u8] {
        let start = self.buffer.as_ptr().align_offset(BLOCK);
        &self.buffer[start..start + BLOCK]
    }

    /// The next of the same pseudo-random offsets for all (a linear congruence).
    fn offset(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % BLOCKS * BLOCK as u64
    }
}

/// What is done and timed. It gives the time itself, for what it must do before is not part of it.
struct Operation {
    name: &'static str,
    run: fn(&mut Files) -> io::Result<Duration>,
    /// Does it wait for a disk, and is therefore done less often?
    waits: bool,
}

const OPERATIONS: &[Operation] = &[
    Operation { name: "4 KiB write, buffered", run: write_buffered, waits: false },
    Operation { name: "4 KiB write, O_DIRECT", run: write_direct, waits: false },
    Operation { name: "512 B append", run: append, waits: false },
    Operation { name: "4 KiB write + fsync", run: write_fsync, waits: true },
    Operation { name: "4 KiB read, cached", run: read_cached, waits: false },
    Operation { name: "4 KiB read, cold", run: read_cold, waits: false },
    Operation { name: "create + unlink", run: create_unlink, waits: false },
    Operation { name: "stat", run: stat, waits: false },
];

fn timed(act: impl FnOnce() -> io::Result<()>) -> io::Result<Duration> {
    let start = Instant::now();
    act()?;
    Ok(start.elapsed())
}

fn write_buffered(files: &mut Files) -> io::Result<Duration> {
    let offset = files.offset();
    let (file, block) = (files.file("write")?, files.block());
    timed(|| file.write_all_at(block, offset))
}

fn write_direct(files: &mut Files) -> io::Result<Duration> {
    let offset = files.offset();
    let (file, block) = (files.file("direct")?, files.block());
    timed(|| file.write_all_at(block, offset))
}

fn append(files: &mut Files) -> io::Result<Duration> {
    let (mut file, record) = (files.file("append")?, &files.block()[..512]);
    timed(|| file.write_all(record))
}

fn write_fsync(files: &mut Files) -> io::Result<Duration> {
    let offset = files.offset();
    let (file, block) = (files.file("write")?, files.block());
    timed(|| file.write_all_at(block, offset).and_then(|()| file.sync_all()))
}

fn read_cached(files: &mut Files) -> io::Result<Duration> {
    let offset = files.offset();
    let file = files.file("read")?;
    let mut block = [0; BLOCK];
    file.read_exact_at(&mut block, offset)?;
    timed(|| file.read_exact_at(&mut block, offset))
}

/// The cache of the file itself is dropped; what lies below a mount keeps its own.
fn read_cold(files: &mut Files) -> io::Result<Duration> {
    let offset = files.offset();
    let file = files.file("read")?;
    let mut block = [0; BLOCK];
    posix_fadvise(file, offset as i64, BLOCK as i64, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    timed(|| file.read_exact_at(&mut block, offset))
}

fn create_unlink(files: &mut Files) -> io::Result<Duration> {
    files.created += 1;
    let path = files.dir.join(format!("created-{}", files.created));
    timed(|| {
        drop(File::create(&path)?);
        fs::remove_file(&path)
    })
}

fn stat(files: &mut Files) -> io::Result<Duration> {
    let path = files.dir.join("written");
    timed(|| fs::symlink_metadata(&path).map(drop))
}

/// All samples of one operation on one target, in nanoseconds; none where the target does not take it.
type Samples = BTreeMap<(usize, usize), Vec<u64>>;

fn rounds(options: &Options, up: &mut [Up], stop: &AtomicBool) -> io::Result<Samples> {
    let mut samples = Samples::new();
    for round in 0..options.rounds {
        for (o, operation) in chosen(options) {
            for turn in 0..up.len() {
                let t = (round + turn) % up.len();
                if stop.load(Relaxed) {
                    return Err(io::Error::other("interrupted"));
                }
                let times = batch(operation, &mut up[t].files, options.size).map_err(|error| {
                    io::Error::other(format!("{} on {}: {error}", operation.name, up[t].target.name))
                })?;
                samples.entry((o, t)).or_default().extend(times);
            }
        }
        print_progress(round + 1, options.rounds);
    }
    Ok(samples)
}

fn chosen(options: &Options) -> impl Iterator<Item = (usize, &'static Operation)> {
    OPERATIONS.iter().enumerate().filter(|(_, operation)| operation.name.contains(&options.only))
}

/// One target's turn. The first operations only warm the caches up.
fn batch(operation: &Operation, files: &mut Files, size: usize) -> io::Result<Vec<u64>> {
    let count = if operation.waits { size.div_ceil(40) } else { size };
    let warming = count.div_ceil(20);
    let mut times = Vec::with_capacity(count);
    for n in 0..count + warming {
        match (operation.run)(files) {
            Ok(time) if n >= warming => times.push(time.as_nanos() as u64),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Unsupported => break,
            Err(error) => return Err(error),
        }
    }
    // The appended file does not grow for ever.
    files.file("append")?.set_len(0)?;
    Ok(times)
}

fn print_progress(done: usize, all: usize) {
    if io::IsTerminal::is_terminal(&io::stderr()) {
        eprint!("\rround {done} of {all}{}", if done == all { "\n" } else { "" });
    }
}

/// The sample that so many of a hundred are below, in microseconds.
fn percentile(sorted: &[u64], percent: usize) -> Option<f64> {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).map(|ns| *ns as f64 / 1e3)
}

fn report(options: &Options, mut samples: Samples) -> String {
    samples.values_mut().for_each(|times| times.sort_unstable());
    let at = |o, t, percent| samples.get(&(o, t)).and_then(|sorted| percentile(sorted, percent));
    let median = |o, t| at(o, t, 50);
    let ratio = |o, t| Some(median(o, t)? / median(o, 0)?);
    let mut text = String::new();
    table(&mut text, options, "median, µs", 0, median);
    table(&mut text, options, "median, as a multiple of the bare directory", 1, ratio);
    table(&mut text, options, "99th percentile, µs", 0, |o, t| at(o, t, 99));
    text
}

fn table(text: &mut String, options: &Options, title: &str, from: usize, cell: impl Fn(usize, usize) -> Option<f64>) {
    let names = TARGETS.iter().skip(from).map(|target| format!("{:>12}", target.name));
    let _ = writeln!(text, "\n{title}\n{:<24}{}", "", names.collect::<String>());
    for (o, operation) in chosen(options) {
        let cells = (from..TARGETS.len()).map(|t| cell(o, t).map_or_else(|| "-".into(), |value| format!("{value:.2}")));
        let _ = writeln!(text, "{:<24}{}", operation.name, cells.map(|cell| format!("{cell:>12}")).collect::<String>());
    }
}

/// What the figures depend on.
fn machine(dir: &Path) -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).and_then(|line| line.split_once(':'));
        line.map_or_else(|| "?".into(), |(_, value)| value.trim().to_owned())
    };
    let processor = field(&read("/proc/cpuinfo"), "model name");
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let kernel = read("/proc/sys/kernel/osrelease");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = read("/proc/loadavg").split_whitespace().take(3).collect::<Vec<_>>().join(" ");
    let filesystem = filesystem_of(dir).unwrap_or_else(|| "?".into());
    format!(
        "nemesisfs {}{}\nLinux {}, {cores} x {processor}, {memory}, load before {load}\n{} on {filesystem}",
        env!("CARGO_PKG_VERSION"),
        if cfg!(debug_assertions) { " (debug build: the figures mean nothing)" } else { "" },
        kernel.trim(),
        dir.display(),
    )
}

/// The type of the mount that a directory lies on: of those that hold it, the one with the longest path.
fn filesystem_of(dir: &Path) -> Option<String> {
    let real = dir.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let words = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let holding = words.filter(|words| words.len() > 2 && real.starts_with(words[1]));
    holding.max_by_key(|words| words[1].len()).map(|words| words[2].to_owned())
}

/// Ctrl-C only sets a mark, so that mounts are taken down on every way out.
fn stop_on_signal() -> io::Result<Arc<AtomicBool>> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block()?;
    let stop = Arc::new(AtomicBool::new(false));
    let mark = stop.clone();
    std::thread::Builder::new().spawn(move || signals.wait().map(|_| mark.store(true, Relaxed)))?;
    Ok(stop)
}

fn measure(options: &Options) -> io::Result<()> {
    let stop = stop_on_signal()?;
    println!("{}", machine(&options.dir));
    println!("{} rounds of {} operations each, one thread", options.rounds, options.size);
    let home = tempfile::Builder::new().prefix("nemesisfs-bench-").tempdir_in(&options.dir)?;
    let mut up = TARGETS.iter().map(|target| Up::new(target, home.path())).collect::<io::Result<Vec<_>>>()?;
    let samples = rounds(options, &mut up, &stop)?;
    drop(up);
    print!("{}", report(options, samples));
    home.close()
}

fn main() -> std::process::ExitCode {
    let mut options = Options::parse();
    if options.short {
        (options.rounds, options.size) = (2, 100);
        println!("--short: the figures mean nothing");
    }
    match measure(&options) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
