//! The command line: what the arguments mean, and which file does it. One file for each group of verbs.
//!
//! A command speaks to daemons by their sockets only (`crate::client`); `mount` alone becomes one. Nothing here touches
//! a mount. Words of the API are passed on as they are: the server checks them, and its hints are better.
//!
//! Thread: the main one, and one for each host that a command is for. Locks: those of the console. Must never: panic on
//! what the user typed, what a daemon answered, or a closed pipe.

mod args;
mod children;
mod console;
mod coredump;
mod coredump_agent;
mod damage;
mod device;
mod events;
mod host;
mod inspect;
mod launch;
mod list;
mod mode;
mod mount;
mod rule;
mod rule_args;
mod rule_text;
mod session;
mod space;
mod sweep;
mod sweep_report;
mod sweep_words;
mod table;
mod umount;
mod usage;

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::exit;
use crate::instances;

use args::Globals;
use console::Console;
use session::{World, on_each};

/// A disk that misbehaves on command, and says exactly what it did.
#[derive(Debug, Parser)]
#[command(name = "nemesisfs", version, max_term_width = 100, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    globals: Globals,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 refused or failed, 2 usage, 3 no instance answers, 4 no such thing, \
5 not supported on this host, 124 time ran out";

#[derive(Debug, Subcommand)]
enum Verb {
    /// Mount a directory, seen through the filesystem, and start its instance
    Mount(mount::MountArgs),
    /// Unmount and end an instance; not mounted is no error
    Umount(umount::UmountArgs),
    /// A daemon without a mount, for devices and coredumps; commands that need one start it by themselves
    Host(host::HostArgs),
    /// The instances on this host and their state
    List,
    /// One word for the whole mount
    Mode(mode::ModeArgs),
    /// Rules: where, when and what goes wrong
    #[command(subcommand)]
    Rule(rule::RuleCommand),
    /// What was done to whom
    Events(events::EventsArgs),
    /// Back to a disk that does nothing: no rules, no mode, no capacity, nothing held
    Reset {
        /// The machine too: devices removed, coredumps where they belong
        #[arg(long)]
        all: bool,
    },
    /// Run a command again and again, with the fault at the first, second, third … matching request
    Sweep(Box<sweep::SweepArgs>),
    /// How full the disk seems
    #[command(subcommand)]
    Space(space::SpaceCommand),
    /// Block devices that fail below a filesystem
    #[command(subcommand)]
    Device(device::DeviceCommand),
    /// Let readers see what a lying disk has really kept
    Evict {
        /// Of these paths only
        #[arg(value_name = "PATH")]
        path: Option<String>,
    },
    /// Give files back what they should have where they were damaged, or list where that is
    Repair(damage::RepairArgs),
    /// Where coredumps go while the disk is full
    #[command(subcommand)]
    Coredump(coredump::CoredumpCommand),
    /// The live state
    #[command(subcommand)]
    Inspect(inspect::InspectCommand),
    /// Completions for a shell
    Completions { shell: Shell },
}

/// The program.
pub fn main() -> ExitCode {
    main_from(std::env::args_os())
}

/// The program with other arguments than its own, the first of which is its name: for a program that has this one in
/// it, as the demo does. `mount` without `--foreground` starts the running program again with `mount` as its first
/// argument, which must end up here too.
pub fn main_from(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let mut cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(refused(&error, &arguments)),
    };
    // An environment variable that is set to nothing chooses nothing.
    cli.globals.host.retain(|word| !word.is_empty());
    let Globals { json, quiet, .. } = cli.globals;
    let console = Console::new(Box::new(io::stdout()), Box::new(io::stderr()), json, quiet);
    ExitCode::from(run(&cli, &instances::run_dir(), &console))
}

/// Says what is wrong with a command line, or gives the help that was asked for.
fn refused(error: &clap::Error, arguments: &[OsString]) -> u8 {
    let words: Vec<String> = arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let json = words.iter().take_while(|word| *word != "--").any(|word| word == "--json");
    match usage::explained(error, &words, Cli::command()) {
        Some(error) => Console::new(Box::new(io::stdout()), Box::new(io::stderr()), json, false).error(&error),
        None => {
            let _ = error.print();
            u8::try_from(error.exit_code()).unwrap_or(exit::USAGE)
        }
    }
}

fn run(cli: &Cli, run_dir: &Path, console: &Console) -> u8 {
    let world = World { globals: &cli.globals, run_dir, console };
    match &cli.verb {
        Verb::Mount(args) => mount::run(&world, args),
        Verb::Umount(args) => umount::run(&world, args),
        Verb::Host(args) => host::run(&world, args),
        Verb::List => list::run(&world),
        Verb::Mode(args) => mode::run(&world, args),
        Verb::Rule(command) => rule::run(&world, command),
        Verb::Events(args) => events::run(&world, args),
        Verb::Reset { all } => rule::reset_each(&world, *all),
        Verb::Sweep(args) => sweep::run(&world, args),
        Verb::Space(command) => space::run(&world, command),
        Verb::Device(command) => device::run(&world, command),
        Verb::Evict { path } => on_each(&world, &|session| space::evict(session, path.as_deref())),
        Verb::Repair(args) => damage::run(&world, args),
        Verb::Coredump(command) => coredump::run(&world, command),
        Verb::Inspect(command) => inspect::run(&world, command),
        Verb::Completions { shell } => completions(*shell, console),
    }
}

/// The generator panics on a stream that closes, so it writes to memory.
fn completions(shell: Shell, console: &Console) -> u8 {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "nemesisfs", &mut script);
    let _ = console.line(String::from_utf8_lossy(&script).trim_end());
    exit::DONE
}

#[cfg(test)]
mod tests;
