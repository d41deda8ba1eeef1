//! `mount`: start a daemon, and say when it is ready.
//!
//! Thread: the main one. Locks: those of the state files, for an instant. Must never: look at the mountpoint, which may be
//! a dead mount.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use crate::client::ClientError;
use crate::daemon::{self, Options, machine};
use crate::host::state::StateDir;
use crate::instances::{self, lexical, without_touching};

use super::launch::{self, Launch, Report};
use super::rule;
use super::session::World;

#[derive(Debug, Clone, Args)]
pub struct MountArgs {
    /// Directory that has the files
    backing: PathBuf,
    /// Directory where they are seen; the same one mounts in place
    mountpoint: PathBuf,
    /// Name of the instance [default: the last part of the mountpoint]
    #[arg(long, value_name = "NAME", value_parser = instance_name)]
    instance: Option<String>,
    /// Where it listens [default: NAME.sock in the run directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Stay here, as systemd and containers want it
    #[arg(long)]
    foreground: bool,
    /// Where it logs [default: NAME.log in the run directory; with --foreground, standard error]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Rules that are in force from the first request on, as `rule apply` takes them
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
    /// How many threads read requests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    readers: Option<u16>,
    /// Files that the kernel serves by itself, at the speed of the backing filesystem, out of reach of faults in reads and
    /// writes (repeatable; without a leading slash at any depth)
    #[arg(long, value_name = "GLOB")]
    passthrough: Vec<String>,
    /// Of all draws that no rule seeds itself
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Mount options, separated by commas: ro, nosuid, nodev, noexec, noatime and their opposites
    #[arg(short = 'o', value_name = "OPTS", value_delimiter = ',')]
    options: Vec<String>,
    /// Where a child tells its parent that it is ready
    #[arg(long, hide = true)]
    ready_fd: Option<i32>,
}

pub fn run(world: &World, args: &MountArgs) -> u8 {
    let serve = |options, report: &Report| daemon::run(options, |line| report.ready(line));
    let done = match args.ready_fd {
        Some(fd) => launch::as_child(fd, |report| Ok(serve(prepare(world.run_dir, args)?, report))),
        None if args.foreground => prepare(world.run_dir, args).and_then(|mut options| {
            options.log = args.log.as_deref().map(lexical);
            launch::in_foreground(world, options.log.clone().as_deref(), |report| serve(options, report))
        }),
        None => prepare(world.run_dir, args)
            .and_then(|options| launch::launch(&launch_of(&options)))
            .map(|ready| launch::tell(world, &ready)),
    };
    done.unwrap_or_else(|error| world.console.error(&error))
}

/// Decides all that was left open.
fn prepare(run_dir: &Path, args: &MountArgs) -> Result<Options, ClientError> {
    let mountpoint = lexical(&args.mountpoint);
    let instance = match &args.instance {
        Some(name) => name.clone(),
        None => free_name(run_dir, &mountpoint)?,
    };
    let own = |given: &Option<PathBuf>, suffix: &str| match given {
        Some(path) => lexical(path),
        None => lexical(&run_dir.join(format!("{instance}{suffix}"))),
    };
    let (socket, log) = (own(&args.socket, ".sock"), own(&args.log, ".log"));
    let rules_file = args.rules.as_deref().map(lexical);
    let rules = match &rules_file {
        None => Vec::new(),
        Some(file) => rules_of(file)?,
    };
    let (backing, run_dir) = (lexical(&args.backing), lexical(run_dir));
    let options = Options {
        state: state_dir(&run_dir, &backing, &mountpoint),
        backing,
        mountpoint,
        instance,
        run_dir,
        socket,
        log: Some(log),
        rules_file,
        rules,
        readers: args.readers,
        seed: args.seed,
        passthrough: args.passthrough.clone(),
        // As of "$OPTS" without a word in it.
        mount_options: args.options.iter().filter(|word| !word.is_empty()).cloned().collect(),
    };
    keep_apart(&options).map(|()| options)
}

/// Nothing of the daemon may lie among the files of the mount: it would wait for itself, the database would see it, and a
/// rule could hit it.
fn keep_apart(options: &Options) -> Result<(), ClientError> {
    let log = options.log.as_deref().map(|log| ("the log", log, "--log"));
    let all = [
        ("the run directory", options.run_dir.as_path(), "NEMESISFS_RUNDIR"),
        ("the state directory", options.state.path(), "NEMESISFS_STATEDIR"),
        ("the socket", &options.socket, "--socket"),
    ];
    for (what, path, choice) in all.into_iter().chain(log) {
        let path = lexical(path);
        let place = match () {
            () if is_within(&path, &options.mountpoint) => "under the mountpoint",
            () if is_within(&path, &options.backing) => "in the backing directory",
            () => continue,
        };
        let detail = format!("{what} {} would lie {place}, among the files of the mount", path.display());
        return Err(ClientError::failed(detail).hint(format!("{choice} chooses another place")));
    }
    Ok(())
}

fn is_within(path: &Path, dir: &Path) -> bool {
    path.starts_with(dir) || resolved(path).starts_with(without_touching(dir))
}

/// Another user's than root lies below their home unless it was named, and that is the data directory of many a database's
/// user. They can do nothing to the machine that would have to outlive the run directory, so it lies there instead.
fn state_dir(run_dir: &Path, backing: &Path, mountpoint: &Path) -> StateDir {
    let usual = StateDir::of_machine();
    let is_own = !nix::unistd::geteuid().is_root()
        && std::env::var_os("NEMESISFS_STATEDIR").is_none_or(|named| named.is_empty());
    match is_own && [backing, mountpoint].iter().any(|dir| is_within(usual.path(), dir)) {
        true => StateDir::new(run_dir.join("state")),
        false => usual,
    }
}

/// A path with symbolic links followed, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    let there = |above: &Path| Some(above.canonicalize().ok()?.join(path.strip_prefix(above).ok()?));
    path.ancestors().find_map(there).unwrap_or_else(|| path.to_path_buf())
}

fn rules_of(file: &Path) -> Result<Vec<Value>, ClientError> {
    let set = rule::load(&file.to_string_lossy())?;
    match set.get("rules").and_then(Value::as_array) {
        Some(rules) => Ok(rules.clone()),
        None => Err(ClientError::failed(format!("{}: \"rules\" is not a list", file.display()))),
    }
}

/// The name of an instance is the name of files, and a word that needs no quotes.
fn instance_name(name: &str) -> Result<String, String> {
    if name == machine::NAME {
        Err(format!("{name} is the name of the daemon without a mount"))
    } else if safe(name) == name {
        Ok(name.to_owned())
    } else {
        Err("a name is made of letters, digits, dot, dash and underscore, and begins with none of the last three"
            .into())
    }
}

fn safe(name: &str) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let name: String = name.chars().map(|c| if fits(c) { c } else { '_' }).collect();
    match name.trim_start_matches(['.', '-', '_']) {
        "" => "root".to_owned(),
        name => name.chars().take(64).collect(),
    }
}

/// The last part of the mountpoint, with a number if an instance that lives has that name.
fn free_name(run_dir: &Path, mountpoint: &Path) -> Result<String, ClientError> {
    let name = safe(&mountpoint.file_name().unwrap_or_default().to_string_lossy());
    let living =
        instances::living(run_dir).map_err(|error| ClientError::failed(format!("{}: {error}", run_dir.display())))?;
    // The same mountpoint again is for the daemon to refuse, and not a reason for another name.
    let taken = |name: &str| {
        name == machine::NAME
            || living.iter().any(|other| {
                other.state.instance == name && (!other.is_mounted_at(mountpoint) || other.detached().is_some())
            })
    };
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    Ok(std::iter::once(name.clone()).chain(numbered).find(|name| !taken(name)).unwrap_or(name))
}

/// What the child is told, so that it decides nothing anew.
fn launch_of(prepared: &Options) -> Launch<'_> {
    let mut words: Vec<OsString> = vec!["mount".into()];
    let mut flag = |name: &str, value: OsString| words.extend([name.into(), value]);
    flag("--instance", prepared.instance.clone().into());
    flag("--socket", prepared.socket.clone().into());
    for (name, file) in [("--log", &prepared.log), ("--rules", &prepared.rules_file)] {
        if let Some(file) = file {
            flag(name, file.clone().into());
        }
    }
    if let Some(readers) = prepared.readers {
        flag("--readers", readers.to_string().into());
    }
    if let Some(seed) = prepared.seed {
        flag("--seed", seed.to_string().into());
    }
    for glob in &prepared.passthrough {
        flag("--passthrough", glob.into());
    }
    if !prepared.mount_options.is_empty() {
        flag("-o", prepared.mount_options.join(",").into());
    }
    Launch {
        run_dir: &prepared.run_dir,
        state: &prepared.state,
        log: prepared.log.as_deref().unwrap_or(Path::new("/dev/null")),
        words,
        operands: vec![prepared.backing.clone().into(), prepared.mountpoint.clone().into()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;
    use crate::instances::State;
    use nix::fcntl::{Flock, FlockArg};
    use std::fs::{self, File};

    fn args(mountpoint: &str) -> MountArgs {
        MountArgs {
            backing: "/backing".into(),
            mountpoint: mountpoint.into(),
            instance: None,
            socket: None,
            foreground: false,
            log: None,
            rules: None,
            readers: None,
            seed: None,
            passthrough: Vec::new(),
            options: Vec::new(),
            ready_fd: None,
        }
    }

    #[test]
    fn an_instance_is_named_after_its_mountpoint_and_numbered_when_that_name_lives() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(prepare(dir.path(), &args("/mnt/my data/")).unwrap().instance, "my_data");
        let state = State {
            instance: "data".into(),
            pid: 1,
            mountpoint: Some("/a/data".into()),
            backing: Some("/b".into()),
            socket: "/s".into(),
            log: None,
            connection: None,
        };
        let file = dir.path().join("data.json");
        fs::write(&file, serde_json::to_vec(&state).unwrap()).unwrap();
        assert_eq!(prepare(dir.path(), &args("/mnt/data")).unwrap().instance, "data");
        let _lock = Flock::lock(File::open(&file).unwrap(), FlockArg::LockExclusiveNonblock).unwrap();
        let prepared = prepare(dir.path(), &args("/mnt/data")).unwrap();
        assert_eq!(prepared.instance, "data-2");
        assert_eq!(prepared.socket, dir.path().join("data-2.sock"));
        assert_eq!(prepare(dir.path(), &args("/a/data")).unwrap().instance, "data");
    }

    #[test]
    fn nothing_of_the_daemon_may_lie_in_the_backing_directory_or_under_the_mountpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["x", "run"] {
            fs::create_dir(path(name)).unwrap();
        }
        std::os::unix::fs::symlink("x", path("link")).unwrap();
        for at in ["x", "link"] {
            let real = path("x");
            for (backing, mountpoint) in [(at, "elsewhere"), ("elsewhere", at), ("x", at)] {
                let wanted = MountArgs { backing: path(backing), ..args(&path(mountpoint).display().to_string()) };
                assert!(prepare(&path("run"), &wanted).is_ok());
                for below in [real.join("log"), path("link/log"), path("x/../x/no/such/log"), path("no/../link/log")] {
                    let given = |log: Option<&PathBuf>, socket: Option<&PathBuf>| MountArgs {
                        log: log.cloned(),
                        socket: socket.cloned(),
                        ..wanted.clone()
                    };
                    for (what, given, run_dir) in [
                        ("--log", given(Some(&below), None), path("run")),
                        ("--socket", given(None, Some(&below)), path("run")),
                        ("NEMESISFS_RUNDIR", given(None, None), below.clone()),
                    ] {
                        let refused = prepare(&run_dir, &given).unwrap_err();
                        let hint = refused.problem["hint"].as_str().unwrap();
                        assert!(refused.exit == exit::FAILED && hint.contains(what), "{below:?}: {refused}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_child_gets_every_decision_in_its_arguments() {
        use clap::Parser;
        let dir = tempfile::tempdir().unwrap();
        let mut wanted = args("/mnt/-x");
        wanted.readers = Some(3);
        wanted.seed = Some(7);
        wanted.options = vec!["ro".into(), "noexec".into()];
        wanted.passthrough = vec!["/a/**".into(), "*.sst".into()];
        let prepared = prepare(dir.path(), &wanted).unwrap();
        let launch = launch_of(&prepared);
        let ready_fd = ["--ready-fd", "9", "--"].map(OsString::from);
        let words = std::iter::once("nemesisfs".into()).chain(launch.words).chain(ready_fd).chain(launch.operands);
        let cli = crate::cli::Cli::try_parse_from(words).unwrap();
        let crate::cli::Verb::Mount(read) = cli.verb else { panic!("not a mount") };
        assert_eq!(read.ready_fd, Some(9));
        assert_eq!(prepare(dir.path(), &read).unwrap(), prepared);
    }
}
