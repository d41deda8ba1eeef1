//! Brings cores home that were written elsewhere: copied with all that belongs to them, durable, and under their name at
//! once. What does not fit stays where it is, in the list.
//!
//! On helper threads and the `machine` thread. Takes a lock of its own, and that of the part for an instant; never both
//! while it copies, for that may take minutes. Must never: remove a core before its copy is on the disk, or put one in
//! the place of another.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use nix::errno::Errno;
use nix::fcntl::{RenameFlags, renameat2};
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, Whence, fchown, lseek64};
use serde_json::json;

use super::book::{self, Away, Book};
use super::{EVENT, room};
use crate::host::state::{Deadline, Part};
use crate::host::{Machine, Refused, shown};
use crate::sys::{mounts, xattr};

/// One at a time carries.
const PART: &str = "coredump-home";
/// How soon it is tried again.
const AGAIN: Duration = Duration::from_secs(10);
/// What is left free where a core comes home to, which may be a database's disk: `KeepFree=` of coredump.conf(5), in percent
/// and at most.
const KEEP_PERCENT: u64 = 15;
const KEEP_MOST: u64 = 4 << 30;
/// How often another one is waited for, and how long each time.
const LOOKS: u32 = 20;
const LOOK: Duration = Duration::from_millis(50);
const PIECE: usize = 1 << 20;
/// So many cores may have one name.
const NAMESAKES: u32 = 100;

/// What came of it.
#[derive(Debug, Default)]
pub struct Carried {
    pub home: Vec<PathBuf>,
    pub away: Vec<PathBuf>,
    pub warnings: Vec<String>,
}

/// The right to carry; none while another one does, which is waited for shortly. Taken before cores are due, by who wants to
/// tell what came of them.
pub fn alone(machine: &Machine) -> Option<Part> {
    for _ in 0..LOOKS {
        match machine.state.try_part(PART) {
            Ok(None) => std::thread::sleep(LOOK),
            other => return other.ok().flatten(),
        }
    }
    None
}

/// Brings home what can be.
pub fn carry(machine: &Machine, alone: Option<Part>) -> Carried {
    let mut carried = Carried::default();
    let book = book::peek(&machine.state);
    if book.away.is_empty() {
        return carried;
    }
    // Another one is at it, and tells.
    let Some(_alone) = alone else { return carried };
    let mut reasons: HashMap<PathBuf, String> = HashMap::new();
    for away in book.away.iter().filter(|away| book.can_be_emptied(away)) {
        if let Err(reason) = empty(machine, away, &mut carried) {
            carried.warnings.push(format!("cores stay in {} as yet: {reason}", away.dir.display()));
            reasons.insert(away.dir.clone(), reason);
        }
    }
    carried.away = book.away.iter().flat_map(|away| cores(&away.dir)).collect();
    if let Err(failure) = settle(machine, &reasons) {
        carried.warnings.push(failure.to_string());
    }
    carried
}

/// Strikes out directories that are empty by now, and writes down why others are not.
fn settle(machine: &Machine, reasons: &HashMap<PathBuf, String>) -> Result<(), Refused> {
    let part = book::lock(machine)?;
    let mut book = Book::read(&part)?;
    let (left, emptied): (Vec<Away>, _) = book.away.drain(..).partition(|away| has_cores(&away.dir));
    book.away = left;
    for away in &mut book.away {
        away.again = Some(Deadline::after(AGAIN));
        away.why = reasons.get(&away.dir).cloned();
    }
    for away in emptied {
        let in_use = book.switch.as_ref().is_some_and(|switch| switch.fallback == away.dir);
        if !in_use {
            remove_if_ours(machine, &away);
        }
    }
    book.write(&part)
}

fn ours(machine: &Machine) -> PathBuf {
    machine.state.path().join("cores")
}

/// Removes a fallback directory that we made, when it is empty.
pub fn remove_if_ours(machine: &Machine, away: &Away) {
    let (ours, dir) = (ours(machine), &away.dir);
    if away.made {
        let _ = fs::remove_dir(dir);
    }
    if dir.parent().is_some_and(|parent| parent == ours || ours.canonicalize().is_ok_and(|ours| parent == ours)) {
        let _ = fs::remove_dir(dir);
        let _ = fs::remove_dir(ours);
    }
}

/// The cores in a directory: files that are there by name, finished.
pub fn cores(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_core = |entry: &fs::DirEntry| {
        entry.file_type().is_ok_and(|kind| kind.is_file()) && !entry.file_name().to_string_lossy().starts_with('.')
    };
    let mut cores: Vec<PathBuf> = entries.filter(is_core).map(|entry| entry.path()).collect();
    cores.sort();
    cores
}

pub fn has_cores(dir: &Path) -> bool {
    !cores(dir).is_empty()
}

fn empty(machine: &Machine, away: &Away, carried: &mut Carried) -> Result<(), String> {
    let Some(home) = &away.home else { return Ok(()) };
    if away.mounted && !mounts::at(home).is_ok_and(|mount| mount.is_some()) {
        return Err(format!("{} is not mounted", home.display()));
    }
    let open = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(home);
    let dir = open.map_err(|error| format!("{}: {error}", home.display()))?;
    let same = |a: fs::Metadata, b: fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    // Somebody may have redirected again a moment ago.
    if let (Ok(there), Ok(here)) = (dir.metadata(), fs::metadata(&away.dir))
        && same(there, here)
    {
        return Ok(());
    }
    let mut stays = None;
    for core in cores(&away.dir) {
        match bring(&core, &dir, home) {
            Ok((to, warning)) => {
                let (from, home) = (shown(core), shown(&to));
                machine.tell(EVENT, json!({"action": "brought_home", "from": from, "to": home, "warning": warning}));
                carried.warnings.extend(warning);
                carried.home.push(to);
            }
            Err(error) => {
                if away.again.is_none() {
                    machine.tell(EVENT, json!({"action": "stays", "core": shown(&core), "error": error.to_string()}));
                }
                stays = Some(format!("{}: {error}", core.display()));
            }
        }
    }
    stays.map_or(Ok(()), Err)
}

/// Copies one core into the directory, under its own name, and removes it where it was.
fn bring(core: &Path, dir: &File, home: &Path) -> io::Result<(PathBuf, Option<String>)> {
    let from = File::open(core)?;
    let there = from.metadata()?;
    is_room(there.blocks().saturating_mul(512), home)?;
    let name = core.file_name().unwrap_or_default();
    let temporary = home.join(format!(".nemesisfs-{}", name.to_string_lossy()));
    let _ = fs::remove_file(&temporary);
    let copied =
        copy(&from, &there, &temporary).and_then(|warning| Ok((publish(&temporary, dir, home, name)?, warning)));
    if copied.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    let (to, warning) = copied?;
    dir.sync_all()?;
    fs::remove_file(core)?;
    Ok((to, warning))
}

fn is_room(needs: u64, home: &Path) -> io::Result<()> {
    let (available, total) = room::available_and_total(home)?;
    let kept = (total / 100).saturating_mul(KEEP_PERCENT).min(KEEP_MOST);
    if available >= needs.saturating_add(kept) {
        return Ok(());
    }
    let size = |bytes| ByteSize::b(bytes).display().iec().to_string();
    let (needs, available, kept) = (size(needs), size(available), size(kept));
    let detail = format!("it needs {needs} of the {available} that are free at home, of which {kept} are to stay free");
    Err(io::Error::new(io::ErrorKind::StorageFull, detail))
}

fn copy(from: &File, there: &fs::Metadata, temporary: &Path) -> io::Result<Option<String>> {
    let to = OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    copy_data(from, &to, there.len())?;
    fchown(&to, Some(Uid::from_raw(there.uid())), Some(Gid::from_raw(there.gid())))?;
    to.set_permissions(there.permissions())?;
    let warning = copy_attributes(from, &to).err().map(|error| format!("extended attributes were not copied: {error}"));
    let time = |seconds, nanoseconds| TimeSpec::new(seconds, nanoseconds);
    futimens(&to, &time(there.atime(), there.atime_nsec()), &time(there.mtime(), there.mtime_nsec()))?;
    to.sync_all()?;
    Ok(warning)
}

/// Piece by piece, without the holes, of which cores have many.
fn copy_data(from: &File, to: &File, length: u64) -> io::Result<()> {
    to.set_len(length)?;
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < length {
        let start = match lseek64(from, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            // A filesystem that knows no holes.
            Err(_) => at,
        };
        let end = lseek64(from, start as i64, Whence::SeekHole).map_or(length, |end| end as u64);
        at = start;
        while at < end {
            let want = piece.len().min((end - at) as usize);
            let got = from.read_at(&mut piece[..want], at)?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            to.write_all_at(&piece[..got], at)?;
            at += got as u64;
        }
    }
    Ok(())
}

/// Those of systemd say whose core it is; its access list lets the owner read it.
fn copy_attributes(from: &File, to: &File) -> io::Result<()> {
    let mut names = vec![0; xattr::list(from, &mut [])?];
    let length = xattr::list(from, &mut names)?;
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = CString::new(name)?;
        xattr::set(to, &name, &attribute(from, &name)?, 0)?;
    }
    Ok(())
}

fn attribute(file: &File, name: &CStr) -> io::Result<Vec<u8>> {
    let mut value = vec![0; xattr::get(file, name, &mut [])?];
    let length = xattr::get(file, name, &mut value)?;
    value.truncate(length);
    Ok(value)
}

/// Gives the copy its name, or if a core has that already, one with a number.
fn publish(temporary: &Path, dir: &File, home: &Path, name: &OsStr) -> io::Result<PathBuf> {
    let source = temporary.file_name().unwrap_or_default();
    for number in 0..NAMESAKES {
        let mut name = name.to_os_string();
        if number > 0 {
            name.push(format!(".{number}"));
        }
        match renameat2(dir, source, dir, name.as_os_str(), RenameFlags::RENAME_NOREPLACE) {
            Err(Errno::EEXIST) => continue,
            other => return other.map(|()| home.join(name)).map_err(io::Error::from),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_comes_home_with_its_holes_attributes_owner_and_time_and_replaces_none() {
        let dir = tempfile::tempdir().unwrap();
        let (away, home) = (dir.path().join("away"), dir.path().join("home"));
        fs::create_dir(&away).unwrap();
        fs::create_dir(&home).unwrap();
        let core = away.join("core.x");
        let file = File::create(&core).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(b"last", 8 << 20).unwrap();
        xattr::set(&file, c"user.coredump.pid", b"7", 0).unwrap();
        std::os::unix::fs::chown(&core, Some(1234), Some(2345)).unwrap();
        let before = fs::metadata(&core).unwrap();
        fs::write(home.join("core.x"), "another").unwrap();
        let (to, warning) = bring(&core, &File::open(&home).unwrap(), &home).unwrap();
        assert_eq!((to.clone(), warning), (home.join("core.x.1"), None));
        assert_eq!(fs::read(home.join("core.x")).unwrap(), b"another");
        let (there, file) = (fs::metadata(&to).unwrap(), File::open(&to).unwrap());
        assert_eq!((there.uid(), there.gid(), there.mode()), (1234, 2345, before.mode()));
        assert_eq!((there.len(), there.mtime_nsec()), (before.len(), before.mtime_nsec()));
        assert!(there.blocks() * 512 < 1 << 20, "its holes are holes");
        let mut end = [0; 4];
        file.read_exact_at(&mut end, 8 << 20).unwrap();
        assert_eq!(&end, b"last");
        assert_eq!(attribute(&file, c"user.coredump.pid").unwrap(), b"7");
        assert!(!core.exists() && cores(&away).is_empty());
    }
}
