//! The instances of this host, as their state files tell: `RUNDIR/NAME.json`, on which a daemon holds an exclusive
//! lock for as long as it lives. A file that can be locked belongs to a daemon that is dead.
//!
//! Thread: the caller's. Locks: for an instant, a shared `flock` on a state file, to see whether it can be had; an
//! exclusive one while the leavings of a dead daemon are removed. Must never: touch a mountpoint, or wait for a lock.

use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::sys::mounts::{self, Mount};

/// What a daemon writes about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub instance: String,
    pub pid: i32,
    /// None of a daemon that serves the machine alone.
    pub mountpoint: Option<PathBuf>,
    pub backing: Option<PathBuf>,
    pub socket: PathBuf,
    #[serde(default)]
    pub log: Option<PathBuf>,
    /// The number of the mount's connection to the kernel.
    #[serde(default)]
    pub connection: Option<u32>,
}

/// A state file that was found, and whether its daemon lives.
#[derive(Debug, Clone)]
pub struct Instance {
    pub state: State,
    pub file: PathBuf,
    pub alive: bool,
}

/// The directory of sockets and state files: `NEMESISFS_RUNDIR`, or the system's for root, or the user's own.
pub fn run_dir() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(dir) = set("NEMESISFS_RUNDIR") {
        return dir;
    }
    let user = nix::unistd::geteuid();
    if user.is_root() {
        return "/run/nemesisfs".into();
    }
    set("XDG_RUNTIME_DIR").unwrap_or_else(|| format!("/run/user/{user}").into()).join("nemesisfs")
}

/// All instances with a state file in `dir`, by name. A directory that does not exist holds none; a file that is not
/// readable, or not yet written to its end, is passed over.
pub fn list(dir: &Path) -> io::Result<Vec<Instance>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found: Vec<Instance> = entries.flatten().filter_map(|entry| read(&entry.path())).collect();
    found.sort_by(|a, b| a.state.instance.cmp(&b.state.instance));
    Ok(found)
}

/// The instances of `dir` that live.
pub fn living(dir: &Path) -> io::Result<Vec<Instance>> {
    Ok(list(dir)?.into_iter().filter(|instance| instance.alive).collect())
}

fn read(file: &Path) -> Option<Instance> {
    if file.extension()? != "json" {
        return None;
    }
    let state: State = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    Some(Instance { state, alive: is_held(file), file: file.to_owned() })
}

/// Whether somebody holds the lock of this state file. A shared lock is tried, so that two who ask at once do not take
/// each other for the daemon.
pub fn is_held(file: &Path) -> bool {
    let Ok(open) = File::open(file) else {
        return false;
    };
    Flock::lock(open, FlockArg::LockSharedNonblock).is_err()
}

impl Instance {
    /// Whether this daemon has ended since it was found: its file is gone, free, or another daemon's, and its process
    /// is no more. Until then it holds the backing directory open.
    pub fn has_ended(&self) -> bool {
        self.has_let_go() && !is_running(self.state.pid)
    }

    fn has_let_go(&self) -> bool {
        match read(&self.file) {
            Some(now) => !now.alive || now.state.pid != self.state.pid,
            None => !is_held(&self.file),
        }
    }

    /// Whether it serves the mountpoint that the user calls `path`.
    pub fn is_mounted_at(&self, path: &Path) -> bool {
        self.state.mountpoint.as_deref().is_some_and(|mountpoint| same_place(mountpoint, path))
    }

    /// The connection of one that lives on without a place, since it was detached. What counts is what its own process
    /// sees.
    pub fn detached(&self) -> Option<u32> {
        let connection = self.state.connection.filter(|_| self.alive)?;
        let seen = mounts::seen_by(self.state.pid).ok()?;
        seen.iter().all(|mount| !mount.is_of(connection)).then_some(connection)
    }

    /// Whether a mount of ours is that of this daemon.
    pub fn serves(&self, mount: &Mount) -> bool {
        match self.state.connection {
            Some(connection) => mount.is_of(connection),
            None => mount.instance() == Some(&self.state.instance),
        }
    }

    /// Whether a mount of ours is what this daemon has left, when it died.
    pub fn has_left(&self, mount: &Mount) -> bool {
        self.serves(mount) && self.is_mounted_at(&mount.mountpoint)
    }

    /// Removes what a dead daemon left in the run directory. The lock keeps a daemon that starts under the same name
    /// from losing its new files.
    pub fn forget(&self) {
        let Ok(open) = File::open(&self.file) else {
            return;
        };
        if let Ok(_lock) = Flock::lock(open, FlockArg::LockExclusiveNonblock) {
            let _ = fs::remove_file(&self.state.socket);
            let _ = fs::remove_file(&self.file);
        }
    }
}

/// Whether there is such a process. One that nobody has waited for yet is not running, unless only its first thread has
/// ended: the others still hold what it had open.
fn is_running(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // What comes after the name, which may have blanks in it: the state first, the number of threads as the 18th.
    let Some((_, rest)) = stat.rsplit_once(')') else { return false };
    let mut fields = rest.split_whitespace();
    let has_ended = fields.next().is_some_and(|state| matches!(state, "Z" | "X"));
    let threads = fields.nth(16).and_then(|threads| threads.parse::<u32>().ok()).unwrap_or(0);
    !has_ended || threads > 1
}

/// The absolute form of a path, found without looking at what is mounted there: it may be dead, and every look would fail
/// or hang. Symbolic links are resolved, for the kernel's mount table has none.
pub fn without_touching(path: &Path) -> PathBuf {
    let absolute = lexical(path);
    mounts::place(&absolute).unwrap_or(absolute)
}

/// The absolute form of a path by its words alone.
pub fn lexical(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut words = PathBuf::new();
    for word in absolute.components() {
        match word {
            Component::ParentDir => {
                words.pop();
            }
            Component::CurDir => {}
            other => words.push(other),
        }
    }
    words
}

/// Whether two paths name one place, as far as this can be known without looking at it.
pub fn same_place(a: &Path, b: &Path) -> bool {
    lexical(a) == lexical(b) || without_touching(a) == without_touching(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_state(dir: &Path, name: &str) -> PathBuf {
        let state = State {
            instance: name.into(),
            // No process has this number.
            pid: i32::MAX,
            mountpoint: Some(format!("/mnt/{name}").into()),
            backing: Some("/b".into()),
            socket: dir.join(format!("{name}.sock")),
            log: None,
            connection: None,
        };
        let file = dir.join(format!("{name}.json"));
        fs::write(&file, serde_json::to_vec(&state).unwrap()).unwrap();
        file
    }

    fn hold(file: &Path) -> Flock<File> {
        Flock::lock(File::open(file).unwrap(), FlockArg::LockExclusiveNonblock).unwrap()
    }

    #[test]
    fn a_state_file_that_is_locked_belongs_to_a_living_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let file = write_state(dir.path(), "n1");
        write_state(dir.path(), "n2");
        let lock = hold(&file);
        let found = list(dir.path()).unwrap();
        assert_eq!(found.iter().map(|i| i.alive).collect::<Vec<_>>(), [true, false]);
        assert!(!found[0].has_ended());
        drop(lock);
        assert!(found[0].has_ended());
    }

    #[test]
    fn a_missing_directory_holds_no_instances_and_a_half_written_file_is_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(list(&dir.path().join("no")).unwrap().is_empty());
        fs::write(dir.path().join("n1.json"), "{\"inst").unwrap();
        assert!(list(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn only_a_dead_daemon_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let file = write_state(dir.path(), "n1");
        let lock = hold(&file);
        let found = list(dir.path()).unwrap().remove(0);
        found.forget();
        assert!(file.exists());
        drop(lock);
        found.forget();
        assert!(!file.exists());
    }

    #[test]
    fn a_mountpoint_is_found_by_a_path_through_a_symbolic_link() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("real/mnt")).unwrap();
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, dir.path().join(name)).unwrap();
        link("real", "link");
        link("link/../real/mnt", "last");
        link("round", "round");
        assert!(same_place(&dir.path().join("real/mnt"), &dir.path().join("link/mnt/")));
        assert!(same_place(&dir.path().join("real/mnt"), &dir.path().join("last/")));
        assert!(!same_place(&dir.path().join("real/mnt"), &dir.path().join("link")));
        assert!(!same_place(&dir.path().join("real/mnt"), &dir.path().join("round")));
    }
}
