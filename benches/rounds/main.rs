//! Interleaved rounds of operations on a bare directory, on mounts of ours and on competitors: what the mount costs.
//!
//! One thread does one operation after the other, and no target waits for another: in each round every target has its turn
//! at every operation, in an order that moves on, so that a machine that is slow for a while is slow for all of them. All
//! samples of all rounds are pooled. `tools/bench` starts it. Must never assert a time, or leave a mount behind.
//!
//! To add a competitor: one line in [`target::targets`]. To add an operation: one line in [`operation::OPERATIONS`].

mod files;
mod machine;
mod metadata;
mod operation;
mod postgres;
mod report;
mod server;
mod sqlite;
mod target;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

use operation::{OPERATIONS, Operation};
use report::Samples;
use target::{Failed, Stage, Target, Up};

/// Interleaved rounds of operations on a bare directory, on mounts of it and on competitors.
#[derive(Debug, Parser)]
struct Options {
    /// Directory that the backing directories are made in
    #[arg(default_value = "/dev/shm")]
    dir: PathBuf,
    /// How many rounds
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// How many operations each target does of each kind in each round (fewer of the slow ones; ten times as many files)
    #[arg(long, default_value_t = 1000)]
    size: usize,
    /// Only operations whose names have this in them; can be given several times
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Only these targets, by name
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    targets: Vec<String>,
    /// The client and all threads of every server on one core, instead of where the scheduler puts them
    #[arg(long)]
    pin: bool,
    /// Also idle mounts with so many readers
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    readers: Vec<usize>,
    /// The readers of our mounts on a core each, by turns
    #[arg(long, conflicts_with = "pin")]
    spread: bool,
    /// Also a loopback whose one reader asks for requests without ever sleeping
    #[arg(long)]
    spin: bool,
    /// PostgreSQL with pgbench instead of these operations, on what can hold it: a third of the rounds
    #[arg(long, conflicts_with_all = ["pin", "spin"])]
    pgbench: bool,
    /// A few operations, to see that it works: the figures mean nothing
    #[arg(long)]
    short: bool,
    /// What cargo adds for benchmarks
    #[arg(long, hide = true)]
    bench: bool,
}

/// How the servers to compare with are started: this program, and `serve`.
#[derive(Debug, Parser)]
struct Serve {
    #[command(flatten)]
    options: server::Options,
}

impl Options {
    fn operations(&self) -> Vec<(usize, &'static Operation)> {
        let wanted = |operation: &Operation| {
            self.only.is_empty() || self.only.iter().any(|text| operation.name.contains(text.as_str()))
        };
        OPERATIONS.iter().enumerate().filter(|(_, operation)| wanted(operation)).collect()
    }

    fn targets(&self) -> Vec<Target> {
        let wanted = |target: &Target| self.targets.is_empty() || self.targets.contains(&target.name);
        target::targets(&self.readers, self.spin).into_iter().filter(wanted).collect()
    }
}

fn rounds(options: &Options, up: &mut [Up], stop: &AtomicBool) -> io::Result<Samples> {
    let mut samples = Samples::default();
    for round in 0..options.rounds {
        for (o, operation) in options.operations().into_iter().filter(|(_, operation)| operation.is_due(round)) {
            for turn in 0..up.len() {
                let t = (round + turn) % up.len();
                if stop.load(Relaxed) {
                    return Err(io::Error::other("interrupted"));
                }
                if up[t].place.drops_writes() && !operation.is_write {
                    continue;
                }
                up[t].place.spin(true)?;
                let times = operation.batch(&mut up[t].files, options.size);
                up[t].place.spin(false)?;
                let failed = |error| io::Error::other(format!("{} on {}: {error}", operation.name, up[t].place.name));
                samples.add(o, t, times.map_err(failed)?);
            }
        }
        print_progress(round + 1, options.rounds);
    }
    Ok(samples)
}

fn print_progress(done: usize, all: usize) {
    if io::IsTerminal::is_terminal(&io::stderr()) {
        eprint!("\rround {done} of {all}{}", if done == all { "\n" } else { "" });
    }
}

/// Ctrl-C only sets a mark, so that mounts are taken down on every way out. The servers inherit that they do not hear it.
fn stop_on_signal() -> io::Result<Arc<AtomicBool>> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block()?;
    let stop = Arc::new(AtomicBool::new(false));
    let mark = stop.clone();
    std::thread::Builder::new().spawn(move || signals.wait().map(|_| mark.store(true, Relaxed)))?;
    Ok(stop)
}

/// Servers that keep a descriptor for each file inherit room for all of them.
fn allow_many_descriptors() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

fn stage(options: &Options, home: &Path) -> io::Result<Stage> {
    let cores = target::cores()?;
    let pin = options.pin.then(|| cores.last().copied()).flatten();
    // Ours takes the place of this figure once it is up.
    Ok(Stage { home: home.into(), pin, spread: options.spread, readers: cores.len() + 1, user: None })
}

/// Brings up what can be measured here.
fn bring_up(options: &Options, stage: &mut Stage, stop: &AtomicBool) -> io::Result<Vec<Up>> {
    let mut all = Vec::new();
    for target in options.targets() {
        if stop.load(Relaxed) {
            return Err(io::Error::other("interrupted"));
        }
        match Up::new(&target, stage) {
            Ok(up) => {
                if target.name == "idle" {
                    stage.readers = up.place.readers().unwrap_or(stage.readers);
                }
                all.push(up);
            }
            Err(Failed::Missing(why)) => println!("{} is left out: {why}", target.name),
            Err(Failed::Error(error)) => return Err(io::Error::other(format!("{}: {error}", target.name))),
        }
    }
    Ok(all)
}

fn measure(options: &Options) -> io::Result<()> {
    let stop = stop_on_signal()?;
    allow_many_descriptors()?;
    println!("{}", machine::describe(&options.dir));
    let home = tempfile::Builder::new().prefix("nemesisfs-bench-").tempdir_in(&options.dir)?;
    let mut stage = stage(options, home.path())?;
    if options.pgbench {
        print!("{}", postgres::measure(&options.targets(), &stage, options.rounds.div_ceil(3), &stop)?);
        println!("\nload after {}", machine::load());
        return home.close();
    }
    let mut up = bring_up(options, &mut stage, &stop)?;
    let where_ = stage.pin.map_or_else(|| "left to the scheduler".into(), |core| format!("all on core {core}"));
    println!("{} rounds of {} operations, {} readers, {where_}", options.rounds, options.size, stage.readers);
    // Only now, so that the servers have seen how many cores there are.
    if let Some(core) = stage.pin {
        target::pin(Pid::from_raw(0), core)?;
    }
    let samples = rounds(options, &mut up, &stop)?;
    let names: Vec<_> = up.iter().map(|up| up.place.name.clone()).collect();
    drop(up);
    print!("{}", samples.report(&options.operations(), &names));
    println!("\nload after {}", machine::load());
    home.close()
}

fn run() -> io::Result<()> {
    let mut words = std::env::args_os();
    if words.nth(1).is_some_and(|word| word == "serve") {
        return server::run(&Serve::parse_from(std::iter::once("serve".into()).chain(words)).options);
    }
    let mut options = Options::parse();
    if options.short {
        (options.rounds, options.size) = (2, 50);
        println!("--short: the figures mean nothing");
    }
    measure(&options)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
