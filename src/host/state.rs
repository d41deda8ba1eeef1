//! The state files: what of this machine is ours, and how to undo it. One JSON file for each device and each lease, in a
//! directory that survives the daemon and the boot.
//!
//! On helper threads and the `machine` thread. One `flock` for each part, or for one document of it, held for as long as an
//! operation on the machine takes, across processes. Who takes both takes that of the document first. A file is in its
//! place whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::time::{ClockId, clock_gettime};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// How long an operation waits for another one of its part to end.
const PATIENCE: Duration = Duration::from_secs(60);
const TRY_AGAIN: Duration = Duration::from_millis(20);
/// As much is kept for a document that has to be written when nothing is free.
const RESERVE: usize = 16 << 10;

/// Where the state files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir(PathBuf);

impl StateDir {
    pub fn new(dir: impl Into<PathBuf>) -> StateDir {
        StateDir(dir.into())
    }

    /// `NEMESISFS_STATEDIR`, or `state` in a run directory that was chosen, or the system's for root, or the user's own.
    pub fn of_machine() -> StateDir {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let chosen = set("NEMESISFS_STATEDIR").or_else(|| set("NEMESISFS_RUNDIR").map(|dir| dir.join("state")));
        let user = nix::unistd::geteuid();
        let own = || match (user.is_root(), set("XDG_STATE_HOME"), set("HOME")) {
            (true, ..) => "/var/lib/nemesisfs".into(),
            (_, Some(dir), _) => dir.join("nemesisfs"),
            (_, None, home) => home.unwrap_or_else(|| "/".into()).join(".local/state/nemesisfs"),
        };
        StateDir(chosen.unwrap_or_else(own))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// One part (`devices`, `coredump`), ours alone until it is dropped. Makes its directory.
    ///
    /// # Errors
    /// When another operation holds it for a minute, or the directory cannot be made.
    pub fn part(&self, name: &str) -> io::Result<Part> {
        patiently(|| self.try_part(name))
    }

    /// The same without waiting: none when another operation holds it.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn try_part(&self, name: &str) -> io::Result<Option<Part>> {
        let dir = self.0.join(name);
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&dir)?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join(".lock"))?;
        Ok(lock(file)?.map(|lock| Part { _lock: lock, dir, alone: None }))
    }

    /// A part of which only this document is ours alone: what takes long with one holds up no other.
    ///
    /// # Errors
    /// When another operation holds it for a minute, or the directory cannot be made.
    pub fn document(&self, part: &str, name: &str) -> io::Result<Part> {
        patiently(|| self.try_document(part, name))
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn try_document(&self, part: &str, name: &str) -> io::Result<Option<Part>> {
        let dir = self.0.join(part);
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&dir)?;
        let place = dir.join(format!(".{name}.lock"));
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&place)?;
        let Some(lock) = lock(file)? else { return Ok(None) };
        // Who had it may have removed it, with the document.
        let is_there = fs::metadata(&place).is_ok_and(|there| lock.metadata().is_ok_and(|ours| is_same(&there, &ours)));
        Ok(is_there.then(|| Part { _lock: lock, dir, alone: Some(name.into()) }))
    }

    /// The documents of a part as they are now, without waiting for its lock. One that cannot be read is passed over and
    /// logged.
    pub fn peek<T: DeserializeOwned>(&self, name: &str) -> Vec<T> {
        all(&self.0.join(name))
    }

    /// Whether a part has documents.
    pub fn has_any(&self, name: &str) -> bool {
        !documents(&self.0.join(name)).is_empty()
    }
}

fn patiently(attempt: impl Fn() -> io::Result<Option<Part>>) -> io::Result<Part> {
    let until = Instant::now() + PATIENCE;
    loop {
        match attempt()? {
            Some(part) => return Ok(part),
            None if Instant::now() >= until => return Err(Errno::EWOULDBLOCK.into()),
            None => std::thread::sleep(TRY_AGAIN),
        }
    }
}

fn lock(file: File) -> io::Result<Option<Flock<File>>> {
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

fn is_same(one: &fs::Metadata, other: &fs::Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// A part of the state, locked.
#[derive(Debug)]
pub struct Part {
    _lock: Flock<File>,
    dir: PathBuf,
    /// The only document that the lock is for.
    alone: Option<String>,
}

impl Drop for Part {
    /// The lock's file goes with the document, while it is still locked.
    fn drop(&mut self) {
        if let Some(name) = self.alone.as_ref().filter(|name| !self.file(name).exists()) {
            let _ = fs::remove_file(self.dir.join(format!(".{name}.lock")));
        }
    }
}

impl Part {
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Its documents, by name.
    pub fn all<T: DeserializeOwned>(&self) -> Vec<T> {
        all(&self.dir)
    }

    /// # Errors
    /// When it is there and cannot be read; that there is none is no error.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> io::Result<Option<T>> {
        match fs::read(self.file(name)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a document so that it is there whole after a crash of the machine. Also where the filesystem is full: what is
    /// to be undone may be what has filled it.
    ///
    /// # Errors
    /// When it cannot be written; then the old one stays.
    pub fn put<T: Serialize>(&self, name: &str, document: &T) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(document)?;
        let written = match self.write(name, &bytes) {
            Err(error) if error.kind() == io::ErrorKind::StorageFull && fs::remove_file(self.reserve()).is_ok() => {
                self.write(name, &bytes)
            }
            other => other,
        };
        self.keep_reserve();
        written
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let (file, new) = (self.file(name), self.dir.join(format!(".{name}.new")));
        let mut open = File::create(&new)?;
        let written = open.write_all(bytes).and_then(|()| open.sync_all());
        if let Err(error) = written {
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        fs::rename(&new, &file)?;
        File::open(&self.dir)?.sync_all()
    }

    fn reserve(&self) -> PathBuf {
        self.dir.join(".reserve")
    }

    /// Best effort: without room there was none to keep.
    fn keep_reserve(&self) {
        let reserve = self.reserve();
        if !reserve.exists() && fs::write(&reserve, [0; RESERVE]).is_err() {
            let _ = fs::remove_file(&reserve);
        }
    }

    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.file(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => File::open(&self.dir)?.sync_all()?,
        }
        if documents(&self.dir).is_empty() {
            let _ = fs::remove_file(self.reserve());
        }
        Ok(())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }
}

fn documents(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    files
}

fn all<T: DeserializeOwned>(dir: &Path) -> Vec<T> {
    let read = |file: &PathBuf| match fs::read(file).map(|bytes| serde_json::from_slice(&bytes)) {
        Ok(Ok(document)) => Some(document),
        Ok(Err(error)) => {
            tracing::error!(%error, file = %file.display(), "a state file that cannot be read");
            None
        }
        Err(_) => None,
    };
    documents(dir).iter().filter_map(read).collect()
}

/// A name as users may give it to a device or a lease: it becomes part of file names and command lines.
pub fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    (1..=64).contains(&name.len()) && name.chars().all(fits) && !name.starts_with(['.', '-'])
}

/// A moment of this boot, for all processes. That of an earlier boot has passed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deadline {
    boot: String,
    /// Nanoseconds of `CLOCK_BOOTTIME`.
    at_ns: u64,
}

impl Deadline {
    pub fn after(life: Duration) -> Deadline {
        let life = u64::try_from(life.as_nanos()).unwrap_or(u64::MAX);
        Deadline { boot: boot(), at_ns: boottime_ns().saturating_add(life) }
    }

    /// How long until then; zero when it has passed.
    pub fn left(&self) -> Duration {
        if self.boot != boot() {
            return Duration::ZERO;
        }
        Duration::from_nanos(self.at_ns.saturating_sub(boottime_ns()))
    }

    pub fn has_passed(&self) -> bool {
        self.left().is_zero()
    }
}

/// Which boot of the machine this is.
pub fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string()
}

fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_comes_back_and_one_that_is_not_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let part = StateDir::new(dir.path()).part("devices").unwrap();
        assert_eq!(part.get::<String>("a").unwrap(), None);
        part.put("a", &"first").unwrap();
        part.put("a", &"second").unwrap();
        assert_eq!(part.get::<String>("a").unwrap().as_deref(), Some("second"));
        assert_eq!(part.all::<String>(), ["second"]);
        part.remove("a").unwrap();
        part.remove("a").unwrap();
        assert!(part.all::<String>().is_empty());
    }

    #[test]
    fn a_part_is_held_by_one_at_a_time_and_another_part_by_another() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        let held = state.part("devices").unwrap();
        assert!(state.try_part("devices").unwrap().is_none());
        let _other = state.part("coredump").unwrap();
        let waiting = std::thread::spawn(move || state.part("devices").map(drop));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished());
        drop(held);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn a_document_is_held_by_one_at_a_time_and_its_lock_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        let held = state.document("devices", "a").unwrap();
        assert!(state.try_document("devices", "a").unwrap().is_none());
        let _other = state.document("devices", "b").unwrap();
        let _part = state.part("devices").unwrap();
        held.put("a", &"there").unwrap();
        drop(held);
        let place = dir.path().join("devices/.a.lock");
        assert!(place.exists());
        let held = state.document("devices", "a").unwrap();
        held.remove("a").unwrap();
        let waiting = std::thread::spawn(move || state.document("devices", "a").map(drop));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished());
        drop(held);
        waiting.join().unwrap().unwrap();
        assert!(!place.exists());
    }

    #[test]
    fn a_deadline_of_an_earlier_boot_has_passed() {
        let deadline = Deadline::after(Duration::from_secs(60));
        assert!(!deadline.has_passed() && deadline.left() <= Duration::from_secs(60));
        assert!(Deadline { boot: "another".into(), ..deadline }.has_passed());
        assert!(Deadline::after(Duration::ZERO).has_passed());
    }

    #[test]
    fn names_are_what_may_stand_in_file_names_and_command_lines() {
        for good in ["d0", "a-b_c.1"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".a", "-a", "a/b", "a b", "a;b", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
