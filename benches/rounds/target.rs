//! What is measured: the bare directory, mounts of ours, and competitors over a directory of their own each.
//!
//! Used by the main thread; no locks. A target that is up goes down when it is dropped, on every way out: its files are
//! closed, it is unmounted, its process is waited for. Must never wait for a server without an end.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::json;

use crate::files::Files;
use crate::server::{self, Kind};

const PROGRAM: &str = env!("CARGO_BIN_EXE_nemesisfs");
/// How long a server may take to come and to go.
const LIMIT: Duration = Duration::from_secs(10);
const USAGE: i32 = 2;

/// How a target comes to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    Bare,
    /// This filesystem, with so many rules that no request matches by its path.
    Ours {
        rules: usize,
        readers: Option<usize>,
        passthrough: bool,
    },
    /// One of `server.rs`.
    Server {
        kind: Kind,
        spin: bool,
    },
    /// A program of others, if it is there.
    Program(Program),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Bindfs,
    PassthroughLl,
}

#[derive(Clone, Debug)]
pub struct Target {
    pub name: String,
    pub how: How,
}

/// The first one is what all others are compared with. Ours come before `loopback`, which has as many readers.
pub fn targets(readers: &[usize], spin: bool) -> Vec<Target> {
    let ours = |rules, readers, passthrough| How::Ours { rules, readers, passthrough };
    let server = |kind, spin| How::Server { kind, spin };
    let mut all = vec![
        ("bare".to_owned(), How::Bare),
        ("idle".into(), ours(0, None, false)),
        ("1 rule".into(), ours(1, None, false)),
        ("1000 rules".into(), ours(1000, None, false)),
    ];
    all.extend(readers.iter().map(|count| (format!("{count} readers"), ours(0, Some(*count), false))));
    all.push(("floor".into(), server(Kind::Floor, false)));
    all.push(("loopback".into(), server(Kind::Loopback, false)));
    if spin {
        all.push(("spinning".into(), server(Kind::Loopback, true)));
    }
    all.push(("bindfs".into(), How::Program(Program::Bindfs)));
    all.push(("passthrough_ll".into(), How::Program(Program::PassthroughLl)));
    all.push(("passthrough".into(), ours(0, None, true)));
    all.push(("min. passthrough".into(), server(Kind::Passthrough, false)));
    all.into_iter().map(|(name, how)| Target { name, how }).collect()
}

/// What the targets have in common.
#[derive(Clone, Debug)]
pub struct Stage {
    pub home: PathBuf,
    /// One core for everything, or what the scheduler makes of it.
    pub pin: Option<usize>,
    /// Each reader on a core of its own, by turns.
    pub spread: bool,
    /// Readers of the servers to compare with: as many as ours has.
    pub readers: usize,
    /// Who serves and owns the files, where that is not us.
    pub user: Option<(u32, u32)>,
}

/// A mount or directory to work in.
pub struct Place {
    pub name: String,
    pub dir: PathBuf,
    how: How,
    served: Served,
}

enum Served {
    Nobody,
    Ours { home: PathBuf, pid: u32 },
    Child(Child),
}

/// Why a target is not up.
#[derive(Debug)]
pub enum Failed {
    /// It cannot be measured here.
    Missing(String),
    Error(io::Error),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        Failed::Error(error)
    }
}

impl Place {
    /// Makes the backing directory, has it filled, and mounts.
    pub fn up(target: &Target, stage: &Stage, fill: impl FnOnce(&Path) -> io::Result<()>) -> Result<Place, Failed> {
        let home = stage.home.join(target.name.replace(' ', "-"));
        let (backing, mountpoint) = (home.join("backing"), home.join("mnt"));
        fs::create_dir_all(&backing)?;
        fs::create_dir_all(&mountpoint)?;
        fill(&backing)?;
        let (name, how) = (target.name.clone(), target.how.clone());
        let served = match &target.how {
            How::Ours { rules, readers, passthrough } => {
                mount_ours(&home, &backing, &mountpoint, *rules, *readers, *passthrough)?
            }
            How::Server { kind, spin } => {
                let child = own_server(*kind, *spin, stage, &backing, &mountpoint)?;
                Served::Child(wait_until_mounted(child, &home, &mountpoint)?)
            }
            How::Program(program) => {
                let child = foreign_server(*program, stage.user, &backing, &mountpoint)?;
                Served::Child(wait_until_mounted(child, &home, &mountpoint)?)
            }
            How::Bare => Served::Nobody,
        };
        let dir = if how == How::Bare { backing } else { mountpoint };
        let place = Place { name, dir, how, served };
        place.place_threads(stage)?;
        Ok(place)
    }

    /// A server that spins does so in its turns only: else it would take the others' processor. It must never be stopped
    /// by a signal: whoever looks at a process that closes a file on its mount would hang.
    pub fn spin(&mut self, on: bool) -> io::Result<()> {
        match (&self.how, &mut self.served) {
            (How::Server { spin: true, .. }, Served::Child(child)) => {
                let pipe = child.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
                pipe.write_all(if on { server::SPIN } else { server::SLEEP })?;
                // Until it has heard it.
                sleep(Duration::from_millis(5));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    pub fn drops_writes(&self) -> bool {
        matches!(self.how, How::Server { kind: Kind::Floor, .. })
    }

    fn pid(&self) -> Option<u32> {
        match &self.served {
            Served::Nobody => None,
            Served::Ours { pid, .. } => Some(*pid),
            Served::Child(child) => Some(child.id()),
        }
    }

    fn place_threads(&self, stage: &Stage) -> io::Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        if let Some(core) = stage.pin {
            return tasks(pid)?.try_for_each(|task| pin(task, core));
        }
        if stage.spread && matches!(self.served, Served::Ours { .. }) {
            let cores = cores()?;
            let turns = readers(pid)?.into_iter().zip(cores.iter().cycle());
            return turns.into_iter().try_for_each(|(task, core)| pin(task, *core));
        }
        Ok(())
    }

    /// How many threads read requests, where that is ours.
    pub fn readers(&self) -> Option<usize> {
        match &self.served {
            Served::Ours { pid, .. } => readers(*pid).ok().map(|readers| readers.len()),
            _ => None,
        }
    }

    fn down(&mut self) -> io::Result<()> {
        match &mut self.served {
            Served::Nobody => Ok(()),
            Served::Ours { home, .. } => {
                succeed(nemesisfs(home).args(["--quiet", "umount", "--instance", "bench"])).map(drop)
            }
            Served::Child(child) => {
                unmount(&self.dir)?;
                end(child)
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = self.down() {
            eprintln!("{}: {error}", self.name);
        }
    }
}

/// A target with the files that operations work on.
pub struct Up {
    pub files: Files,
    pub place: Place,
}

impl Up {
    pub fn new(target: &Target, stage: &Stage) -> Result<Up, Failed> {
        let place = Place::up(target, stage, Files::fill)?;
        Ok(Up { files: Files::new(place.dir.clone())?, place })
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // What is open would keep the mount busy.
        self.files.close();
    }
}

fn nemesisfs(home: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command.env("NEMESISFS_RUNDIR", home.join("run")).env_remove("NEMESISFS_HOST");
    command
}

fn mount_ours(
    home: &Path,
    backing: &Path,
    mountpoint: &Path,
    rules: usize,
    readers: Option<usize>,
    passthrough: bool,
) -> Result<Served, Failed> {
    let mut command = nemesisfs(home);
    command.args(["mount", "--instance", "bench"]);
    if rules > 0 {
        let file = home.join("rules.json");
        fs::write(&file, rules_elsewhere(rules).to_string())?;
        command.arg("--rules").arg(file);
    }
    if let Some(count) = readers {
        command.arg("--readers").arg(count.to_string());
    }
    if passthrough {
        command.args(["--passthrough", "**"]);
    }
    let output = command.arg(backing).arg(mountpoint).output()?;
    if passthrough && output.status.code() == Some(USAGE) {
        return Err(Failed::Missing("mount has no option --passthrough".into()));
    }
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()).into());
    }
    // The ready line has the daemon's pid.
    let ready = String::from_utf8_lossy(&output.stdout).into_owned();
    let pid = ready.split_whitespace().find_map(|word| word.strip_prefix("pid=")?.parse().ok());
    let pid = pid.ok_or_else(|| io::Error::other(format!("no pid in {ready:?}")))?;
    Ok(Served::Ours { home: home.to_path_buf(), pid })
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

fn own_server(kind: Kind, spin: bool, stage: &Stage, backing: &Path, mountpoint: &Path) -> io::Result<Child> {
    let kind = match kind {
        Kind::Floor => "floor",
        Kind::Loopback => "loopback",
        Kind::Passthrough => "passthrough",
    };
    let mut command = Command::new(std::env::current_exe()?);
    let readers = if spin { 1 } else { stage.readers };
    command.args(["serve", kind]).arg(backing).arg(mountpoint).args(["--readers", &readers.to_string()]);
    // It ends when the pipe does.
    command.stdin(Stdio::piped()).spawn()
}

fn foreign_server(
    program: Program,
    user: Option<(u32, u32)>,
    backing: &Path,
    mountpoint: &Path,
) -> Result<Child, Failed> {
    // In a session of its own, as a daemon is: the scheduler gives sessions their shares.
    let mut words = vec!["setsid".to_owned()];
    if let (Program::PassthroughLl, Some((uid, gid))) = (program, user) {
        // It makes files as itself: so it runs as their owner, with what it needs to mount.
        let capabilities = "+sys_admin,+dac_override";
        words.extend(["setpriv".into(), format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".into()]);
        words.extend([format!("--inh-caps={capabilities}"), format!("--ambient-caps={capabilities}")]);
    }
    let (backing, mountpoint) = (backing.display().to_string(), mountpoint.display().to_string());
    let name = match program {
        Program::Bindfs => {
            words.extend(["bindfs".into(), "-f".into(), backing, mountpoint]);
            "bindfs"
        }
        Program::PassthroughLl => {
            let options = format!("source={backing},allow_other,default_permissions");
            words.extend(["passthrough_ll".into(), "-f".into(), "-o".into(), options, mountpoint]);
            "passthrough_ll"
        }
    };
    if !is_installed(name) {
        return Err(Failed::Missing(format!("there is no {name}; tools/bench without --short gets it on Debian")));
    }
    Ok(Command::new(&words[0]).args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).spawn()?)
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Waits until another filesystem is at the mountpoint. A server that does not get there is ended.
fn wait_until_mounted(mut child: Child, home: &Path, mountpoint: &Path) -> io::Result<Child> {
    let until = Instant::now() + LIMIT;
    let own = fs::metadata(home)?.dev();
    loop {
        if fs::metadata(mountpoint).is_ok_and(|metadata| metadata.dev() != own) {
            return Ok(child);
        }
        if let Some(status) = child.try_wait()? {
            return Err(io::Error::other(format!("the server ended: {status}")));
        }
        if Instant::now() > until {
            let _ = umount2(mountpoint, MntFlags::MNT_DETACH);
            let _ = child.kill();
            let _ = child.wait();
            return Err(io::Error::other("the server does not mount"));
        }
        sleep(Duration::from_millis(2));
    }
}

/// Unmounts, also without root; what is still in use is at least detached.
fn unmount(mountpoint: &Path) -> io::Result<()> {
    match umount2(mountpoint, MntFlags::empty()) {
        Err(nix::errno::Errno::EPERM) => succeed(Command::new("fusermount3").arg("-u").arg(mountpoint)).map(drop),
        Err(error) => {
            umount2(mountpoint, MntFlags::MNT_DETACH)?;
            Err(error.into())
        }
        Ok(()) => Ok(()),
    }
}

/// A server whose mount is gone ends by itself.
fn end(child: &mut Child) -> io::Result<()> {
    let until = Instant::now() + LIMIT;
    while Instant::now() < until {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        sleep(Duration::from_millis(2));
    }
    child.kill()?;
    child.wait()?;
    Err(io::Error::other("the server did not end when it was unmounted"))
}

pub fn succeed(command: &mut Command) -> io::Result<String> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(io::Error::other(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// The threads of a process.
fn tasks(pid: u32) -> io::Result<impl Iterator<Item = Pid>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    Ok(entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw)))
}

/// The threads of a process that read requests, as fuser names them.
fn readers(pid: u32) -> io::Result<Vec<Pid>> {
    let name = |task: &Pid| fs::read_to_string(format!("/proc/{pid}/task/{task}/comm")).unwrap_or_default();
    Ok(tasks(pid)?.filter(|task| name(task).starts_with("fuser-")).collect())
}

/// The cores that we may use.
pub fn cores() -> io::Result<Vec<usize>> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|core| allowed.is_set(*core).unwrap_or(false)).collect())
}

/// Puts a thread on one core, and with it those that it starts.
pub fn pin(task: Pid, core: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    Ok(sched_setaffinity(task, &set)?)
}
