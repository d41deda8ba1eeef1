//! Ballast: files that really fill the backing filesystem, and that are removed for certain.
//!
//! Filled and removed by helpers of the control thread and at the end of the mount, never by a reader or by the control
//! thread. Two locks: the one of the files is held for as long as filling or removing takes, by helpers alone; the one of
//! the status for a few instructions. Each file is marked as ours before it has a name, so that the next daemon over the
//! directory finds what a killed one has left, and never touches what is not ours.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, OFlag, fallocate};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};
use parking_lot::Mutex;

use crate::sys::{dents, xattr};

/// The value is the inode number, so that a copy made with its attributes is not taken for ours.
const MARK: &CStr = c"user.nemesisfs.ballast";
const PREFIX: &str = "occupy_";
/// Of files whose filesystem takes no marks, what there is stands in such files of the run directory.
const STATE: &str = "ballast";
/// So many steps are taken, within limits. Between two are looks at the clock, the target and whether anybody still wants it.
const STEPS: u64 = 32;
const STEP: std::ops::RangeInclusive<u64> = 8 << 20..=1 << 30;
/// As good as nothing: xfs and btrfs never say 0.
const CRUMBS: u64 = 256 << 10;
/// How often progress is told.
const TELL: Duration = Duration::from_millis(200);

/// How full it is to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// Until so many bytes are available, as `df` shows it. At 0 nothing is left for root either.
    UntilFree(u64),
    /// Until this part is used, as `df` shows it.
    UsedPercent(f64),
}

/// How far it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub full: bool,
    pub file: String,
    pub allocated: u64,
    /// Bytes that are available now, and that are to be left.
    pub free: u64,
    pub target_free: u64,
}

/// Why there is no ballast.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("it was cleared before the target was reached")]
    Cleared,
    #[error("the deadline has passed with {free} bytes available instead of {target}")]
    Late { free: u64, target: u64 },
    #[error("no more can be allocated ({errno}), with {free} bytes available instead of {target}")]
    Stuck { errno: Errno, free: u64, target: u64 },
    #[error("the backing filesystem does not allocate without writing (fallocate: {0})")]
    NotSupported(Errno),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Failure {
        Failure::Io(errno.into())
    }
}

/// The ballast of one mount.
#[derive(Debug, Default)]
pub struct Ballast {
    /// Names and inode numbers.
    files: Mutex<Vec<(String, u64)>>,
    status: Mutex<Option<Status>>,
    /// Goes up when what is being filled is no longer wanted.
    epoch: AtomicU64,
    state: OnceLock<PathBuf>,
}

/// Of one filling: still wanted as long as the epoch is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

impl Ballast {
    /// Where the state file goes if one is needed.
    pub fn keep_state_in(&self, run_dir: &Path, instance: &str) {
        let _ = self.state.set(run_dir.join(format!("{instance}.{STATE}")));
    }

    pub fn status(&self) -> Option<Status> {
        self.status.lock().clone()
    }

    /// To be taken before a filling is handed to a helper: what cancels from then on stops it.
    pub fn ticket(&self) -> Ticket {
        Ticket(self.epoch.load(Acquire))
    }

    /// Stops what is being filled. It removes itself.
    pub fn cancel(&self) {
        self.epoch.fetch_add(1, AcqRel);
    }

    /// Fills the filesystem of a directory; in the place of the ballast that there was.
    ///
    /// # Errors
    /// When the target is not reached; then nothing is left of it.
    pub fn fill(
        &self,
        dir: &File,
        target: Target,
        deadline: Duration,
        ticket: Ticket,
        mut tell: impl FnMut(&Status),
    ) -> Result<Status, Failure> {
        let until = Instant::now() + deadline;
        let mut files = self.files.lock();
        self.unlink_all(dir, &mut files)?;
        let filled = self.fill_files(dir, target, until, ticket, &mut files, &mut tell);
        if filled.is_err() {
            self.unlink_all(dir, &mut files)?;
        }
        filled
    }

    fn fill_files(
        &self,
        dir: &File,
        target: Target,
        until: Instant,
        ticket: Ticket,
        files: &mut Vec<(String, u64)>,
        tell: &mut impl FnMut(&Status),
    ) -> Result<Status, Failure> {
        let target = Resolved::of(dir, target)?;
        let mut file = self.make(dir, target.percent, files)?;
        let mut status = Status { full: false, allocated: 0, target_free: target.free, ..target.look(dir, files)? };
        let mut step = (target.left(dir)? / STEPS).clamp(*STEP.start(), *STEP.end());
        let (mut at, mut told) = (0, None::<Instant>);
        loop {
            if self.ticket() != ticket {
                return Err(Failure::Cleared);
            }
            let left = target.left(dir)?;
            status.free = target.look(dir, files)?.free;
            if left < target.block {
                break;
            }
            if Instant::now() >= until {
                return Err(Failure::Late { free: status.free, target: target.free });
            }
            if told.is_none_or(|at| at.elapsed() >= TELL) {
                told = Some(Instant::now());
                self.show(&status);
                tell(&status);
            }
            let want = (left.min(step) / target.block).max(1) * target.block;
            match fallocate(&file, FallocateFlags::empty(), at as i64, want as i64) {
                Ok(()) => {
                    at += want;
                    status.allocated += want;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::ENOSPC | Errno::EDQUOT) if want > target.block => step = want / 2,
                // Nobody gets any more, but for crumbs that the filesystem keeps to itself.
                Err(Errno::ENOSPC) if target.free == 0 && status.free <= CRUMBS => break,
                Err(Errno::EFBIG) if at > 0 => {
                    file = self.make(dir, target.percent, files)?;
                    at = 0;
                }
                Err(errno @ (Errno::EOPNOTSUPP | Errno::ENOSYS)) => return Err(Failure::NotSupported(errno)),
                Err(errno) => return Err(Failure::Stuck { errno, free: status.free, target: target.free }),
            }
        }
        status.full = true;
        self.show(&status);
        Ok(status)
    }

    fn show(&self, status: &Status) {
        *self.status.lock() = Some(status.clone());
    }

    /// Makes an empty file that is marked as ours.
    fn make(&self, dir: &File, percent: u64, files: &mut Vec<(String, u64)>) -> io::Result<OwnedFd> {
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let mut time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let unnamed = nix::fcntl::openat(dir, ".", flags | OFlag::O_TMPFILE, mode);
        loop {
            let name = format!("{PREFIX}{percent}percent.{time}");
            time += 1;
            let named = match &unnamed {
                Ok(file) => {
                    files.push((name.clone(), fstat(file)?.st_ino));
                    self.mark(dir, file, files)?;
                    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                    linkat(AT_FDCWD, path.as_str(), dir, name.as_str(), AtFlags::AT_SYMLINK_FOLLOW)
                        .and_then(|()| file.as_fd().try_clone_to_owned().map_err(|_| Errno::EMFILE))
                }
                // A filesystem that has no files without a name.
                Err(_) => nix::fcntl::openat(dir, name.as_str(), flags | OFlag::O_CREAT | OFlag::O_EXCL, mode),
            };
            match named {
                Ok(file) => {
                    if unnamed.is_err() {
                        files.push((name, fstat(&file)?.st_ino));
                        self.mark(dir, &file, files)?;
                    }
                    return Ok(file);
                }
                Err(Errno::EEXIST) => {
                    if unnamed.is_ok() {
                        files.pop();
                    }
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Marks the last of the files; in the run directory, where the filesystem takes no attributes.
    fn mark(&self, dir: &File, file: &OwnedFd, files: &[(String, u64)]) -> io::Result<()> {
        let Some((_, ino)) = files.last() else { return Ok(()) };
        match xattr::set(file, MARK, ino.to_string().as_bytes(), 0) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM | libc::ENOSPC)) => {
                let Some(path) = self.state.get() else { return Err(error) };
                let home = fstat(dir)?;
                let lines = files.iter().map(|(name, ino)| format!("{ino} {name}\n"));
                fs::write(path, format!("{} {}\n{}", home.st_dev, home.st_ino, lines.collect::<String>()))
            }
            other => other,
        }
    }

    /// Removes the ballast, also one that is still being filled. Tells whether there was any.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn remove(&self, dir: &File) -> io::Result<bool> {
        self.cancel();
        let was = self.status.lock().is_some();
        let mut files = self.files.lock();
        let was = was || !files.is_empty();
        self.unlink_all(dir, &mut files)?;
        Ok(was)
    }

    fn unlink_all(&self, dir: &File, files: &mut Vec<(String, u64)>) -> io::Result<()> {
        while let Some((name, ino)) = files.last() {
            unlink(dir, name, *ino)?;
            files.pop();
        }
        *self.status.lock() = None;
        if let Some(path) = self.state.get() {
            let _ = fs::remove_file(path);
        }
        Ok(())
    }

    /// Removes what a daemon that was killed has left in a directory: its names.
    ///
    /// # Errors
    /// When the directory cannot be read, or a file not be removed.
    pub fn remove_left(&self, dir: &File, run_dir: &Path) -> io::Result<Vec<String>> {
        let mut left = marked(dir)?;
        for path in state_files(run_dir)? {
            let listed = listed(dir, &path)?;
            if !listed.is_empty() {
                left.extend(listed);
                fs::remove_file(path)?;
            }
        }
        for (name, ino) in &left {
            unlink(dir, name, *ino)?;
        }
        Ok(left.into_iter().map(|(name, _)| name).collect())
    }
}

/// A target in bytes.
struct Resolved {
    free: u64,
    percent: u64,
    block: u64,
}

impl Resolved {
    fn of(dir: &File, target: Target) -> io::Result<Resolved> {
        let now = fstatvfs(dir)?;
        let block = now.fragment_size();
        // Some tell more free than there is.
        let used = now.blocks().saturating_sub(now.blocks_free()) * block;
        // What `df` takes for all: without the blocks that are for root.
        let all = used + now.blocks_available() * block;
        let free = match target {
            Target::UntilFree(free) => free,
            Target::UsedPercent(percent) => (all as f64 * (100.0 - percent) / 100.0) as u64,
        };
        let percent = (100 * all.saturating_sub(free)).checked_div(all).unwrap_or(100);
        Ok(Resolved { free, percent, block })
    }

    /// Bytes that are too many.
    fn left(&self, dir: &File) -> io::Result<u64> {
        let now = fstatvfs(dir)?;
        let free = if self.free == 0 { now.blocks_free() } else { now.blocks_available() };
        Ok((free * now.fragment_size()).saturating_sub(self.free))
    }

    fn look(&self, dir: &File, files: &[(String, u64)]) -> io::Result<Status> {
        let now = fstatvfs(dir)?;
        let file = files.last().map(|(name, _)| name.clone()).unwrap_or_default();
        let free = now.blocks_available() * now.fragment_size();
        Ok(Status { full: false, file, allocated: 0, free, target_free: self.free })
    }
}

/// Removes a name if it is still that file.
fn unlink(dir: &File, name: &str, ino: u64) -> io::Result<()> {
    match nix::sys::stat::fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) if stat.st_ino == ino => Ok(unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)?),
        Ok(_) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The files of a directory that carry our mark.
fn marked(dir: &File) -> io::Result<Vec<(String, u64)>> {
    let listing = nix::fcntl::openat(dir, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut buffer = vec![0; 32 << 10];
    let mut found = Vec::new();
    loop {
        let read = dents::read(&listing, &mut buffer)?;
        if read == 0 {
            return Ok(found);
        }
        let names = dents::entries(&buffer[..read]).filter_map(|entry| entry.name.to_str().map(str::to_string));
        for name in names.filter(|name| name.starts_with(PREFIX)) {
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let Ok(file) = nix::fcntl::openat(dir, name.as_str(), flags, Mode::empty()) else { continue };
            let stat = fstat(&file)?;
            let mut value = [0; 24];
            let is_file = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
            let length = if is_file { xattr::get(&file, MARK, &mut value).unwrap_or(0) } else { 0 };
            if value[..length] == *stat.st_ino.to_string().as_bytes() {
                found.push((name, stat.st_ino));
            }
        }
    }
}

fn state_files(run_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(run_dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == STATE) {
            found.push(path);
        }
    }
    Ok(found)
}

/// The files that a state file lists, if it is about this directory.
fn listed(dir: &File, path: &Path) -> io::Result<Vec<(String, u64)>> {
    let text = fs::read_to_string(path)?;
    let home = dir.metadata()?;
    let mut lines = text.lines();
    if lines.next() != Some(&format!("{} {}", home.dev(), home.ino())) {
        return Ok(Vec::new());
    }
    let files = lines.filter_map(|line| line.split_once(' '));
    Ok(files.filter_map(|(ino, name)| Some((name.to_string(), ino.parse().ok()?))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_is_found_by_its_mark_and_nothing_else_is_touched() {
        let temp = tempfile::tempdir().unwrap();
        let run = tempfile::tempdir().unwrap();
        let dir = File::open(temp.path()).unwrap();
        let mut files = Vec::new();
        Ballast::default().make(&dir, 90, &mut files).unwrap();
        Ballast::default().make(&dir, 90, &mut files).unwrap();
        let ours: Vec<String> = files.iter().map(|(name, _)| name.clone()).collect();
        fs::write(temp.path().join("occupy_90percent.1"), "a user's own").unwrap();
        // A copy with its attributes.
        let copy = File::create(temp.path().join("occupy_90percent.2")).unwrap();
        xattr::set(&copy, MARK, files[0].1.to_string().as_bytes(), 0).unwrap();
        let mut left = Ballast::default().remove_left(&dir, run.path()).unwrap();
        left.sort();
        assert_eq!(left, ours);
        let mut kept: Vec<_> = fs::read_dir(temp.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        kept.sort();
        assert_eq!(kept, ["occupy_90percent.1", "occupy_90percent.2"]);
    }

    #[test]
    fn what_was_cancelled_or_cannot_be_reached_leaves_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let dir = File::open(temp.path()).unwrap();
        let now = fstatvfs(&dir).unwrap();
        let target = Target::UntilFree(now.blocks_available() * now.fragment_size() - (1 << 20));
        let ballast = Ballast::default();
        let stale = ballast.ticket();
        ballast.cancel();
        let minute = Duration::from_secs(60);
        let failed = ballast.fill(&dir, target, minute, stale, |_| ()).unwrap_err();
        assert!(matches!(failed, Failure::Cleared), "{failed}");
        let failed = ballast.fill(&dir, target, Duration::ZERO, ballast.ticket(), |_| ()).unwrap_err();
        assert!(matches!(failed, Failure::Late { .. }), "{failed}");
        assert_eq!((fs::read_dir(temp.path()).unwrap().count(), ballast.status()), (0, None));
        assert!(ballast.fill(&dir, target, minute, ballast.ticket(), |_| ()).unwrap().full);
        assert!(ballast.remove(&dir).unwrap() && !ballast.remove(&dir).unwrap());
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn without_marks_the_run_directory_knows_what_was_left() {
        let (temp, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let run = tempfile::tempdir().unwrap();
        let dir = File::open(temp.path()).unwrap();
        fs::write(temp.path().join("occupy_1percent.1"), "left").unwrap();
        fs::write(temp.path().join("occupy_1percent.2"), "another file by now").unwrap();
        let home = dir.metadata().unwrap();
        let ino = fs::metadata(temp.path().join("occupy_1percent.1")).unwrap().ino();
        let text = format!("{} {}\n{ino} occupy_1percent.1\n{ino} occupy_1percent.2\n", home.dev(), home.ino());
        fs::write(run.path().join("n.ballast"), text).unwrap();
        let elsewhere = File::open(other.path()).unwrap();
        assert!(Ballast::default().remove_left(&elsewhere, run.path()).unwrap().is_empty());
        Ballast::default().remove_left(&dir, run.path()).unwrap();
        assert!(!temp.path().join("occupy_1percent.1").exists());
        assert!(temp.path().join("occupy_1percent.2").exists());
        assert!(!run.path().join("n.ballast").exists());
    }
}
