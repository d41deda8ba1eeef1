//! The kernel's mount table, and what can be done to a mount: unmount it, detach it, abort the connection of a FUSE
//! mount through fusectl.
//!
//! Thread: the caller's, never a reader. Locks: none. Must never: look at a mountpoint, except in `is_disconnected`,
//! whose look is made by a thread that nobody waits for longer than two seconds.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};

/// The type under which the kernel lists a mount of ours.
pub const FILESYSTEM_TYPE: &str = "fuse.nemesisfs";

const FUSECTL: &str = "/sys/fs/fuse/connections";

/// So many symbolic links in a row are one that leads to itself, as the kernel has it.
const LINKS: usize = 40;

/// What stands before the instance's name in the source of a mount of ours.
pub const SOURCE: &str = "nemesisfs:";

/// One line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The minor number of its device, which is the number of a FUSE connection.
    pub minor: u32,
    /// The number of its filesystem, as `8:1`: one for all its mounts, and for all subvolumes of a btrfs.
    pub device: String,
    /// Which directory of the filesystem is seen there. Of a bind mount it is seldom `/`.
    pub root: PathBuf,
    pub mountpoint: PathBuf,
    /// Its own options, and those of the filesystem.
    pub options: String,
    pub filesystem_options: String,
    pub filesystem: String,
    pub source: String,
}

impl Mount {
    /// The instance that made it, which is in the source of a mount of ours.
    pub fn instance(&self) -> Option<&str> {
        if self.filesystem != FILESYSTEM_TYPE {
            return None;
        }
        Some(self.source.strip_prefix(SOURCE).unwrap_or(&self.source))
    }

    /// Whether it is a mount of this connection. That of a user may be of type `fuse` alone.
    pub fn is_of(&self, connection: u32) -> bool {
        (self.filesystem == "fuse" || self.filesystem.starts_with("fuse.")) && self.minor == connection
    }
}

/// All mounts that this process can see. Names may be any bytes.
pub fn all() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// All mounts that another process can see, which may be other ones.
pub fn seen_by(pid: i32) -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read(format!("/proc/{pid}/mountinfo"))?))
}

/// The uppermost mount at a place, by its resolved absolute path.
pub fn at(path: &Path) -> io::Result<Option<Mount>> {
    Ok(all()?.into_iter().rev().find(|mount| mount.mountpoint == path))
}

/// The place that a path names, as the mount table has it, found without looking at a mount there: it may be a dead one,
/// and every look would fail or hang. So the last part is followed, where it is a symbolic link, only if nothing is
/// mounted on it.
///
/// # Errors
/// When there is no way to where the place should be.
pub fn place(path: &Path) -> io::Result<PathBuf> {
    let mounts = all()?;
    let mut path = std::path::absolute(path)?;
    for _ in 0..LINKS {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { break };
        let parent = parent.canonicalize()?;
        let place = parent.join(name);
        if mounts.iter().any(|mount| mount.mountpoint == place) {
            return Ok(place);
        }
        match fs::read_link(&place) {
            Ok(target) => path = std::path::absolute(parent.join(target))?,
            Err(_) => return Ok(place),
        }
    }
    // The root, what ends in `..`, or a link that leads to itself.
    path.canonicalize()
}

fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// Reads `36 35 0:52 / /mnt rw,… shared:1 - fuse.nemesisfs nemesisfs:n1 rw,…`; see proc_pid_mountinfo(5).
fn parse_line(line: &[u8]) -> Option<Mount> {
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = words.iter().position(|word| *word == b"-")?;
    let text = |word: &[u8]| String::from_utf8_lossy(&unescape(word)).into_owned();
    let device = text(words.get(2)?);
    Some(Mount {
        minor: device.split_once(':')?.1.parse().ok()?,
        root: OsString::from_vec(unescape(words.get(3)?)).into(),
        mountpoint: OsString::from_vec(unescape(words.get(4)?)).into(),
        options: text(words.get(5)?),
        filesystem: text(words.get(dash + 1)?),
        source: text(words.get(dash + 2)?),
        filesystem_options: words.get(dash + 3).map(|word| text(word)).unwrap_or_default(),
        device,
    })
}

/// The mount by which a resolved absolute path is reached: of the nearest mountpoint above it the uppermost.
pub fn holding<'m>(mounts: &'m [Mount], path: &Path) -> Option<&'m Mount> {
    let above = mounts.iter().filter(|mount| path.starts_with(&mount.mountpoint));
    // Of equals the last one, which was mounted last.
    above.max_by_key(|mount| mount.mountpoint.as_os_str().len())
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        let (byte, left) = match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => (byte, &tail[3..]),
            None => (*first, tail),
        };
        plain.push(byte);
        rest = left;
    }
    plain
}

/// Mounts a FUSE filesystem of ours with every permission check left to the kernel, for all users; gives the
/// connection. Needs root.
///
/// We do this ourselves, because fuser unmounts once more at the end of a session, by path: in place, that would be the
/// filesystem below.
pub fn mount(mountpoint: &Path, instance: &str, flags: MsFlags) -> io::Result<OwnedFd> {
    let open = nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_CLOEXEC;
    let device = nix::fcntl::open("/dev/fuse", open, nix::sys::stat::Mode::empty())?;
    let options =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", device.as_raw_fd());
    let source = format!("{SOURCE}{instance}");
    nix::mount::mount(Some(source.as_str()), mountpoint, Some(FILESYSTEM_TYPE), flags, Some(options.as_str()))?;
    Ok(device)
}

/// Unmounts by the system call, or by fusermount3 where the call is not allowed to this user.
pub fn unmount(mountpoint: &Path, detach: bool) -> Result<(), Errno> {
    let how = if detach { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    match nix::mount::umount2(mountpoint, how | MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EPERM) => fusermount(mountpoint, detach),
        // It is what was wanted: somebody else was faster.
        Err(Errno::EINVAL) if !still_there(mountpoint) => Ok(()),
        other => other,
    }
}

fn still_there(mountpoint: &Path) -> bool {
    at(mountpoint).ok().flatten().is_some()
}

fn fusermount(mountpoint: &Path, detach: bool) -> Result<(), Errno> {
    let how = if detach { "-uz" } else { "-u" };
    let status = Command::new("fusermount3")
        .arg(how)
        .arg("--")
        .arg(mountpoint)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        _ => Err(Errno::EPERM),
    }
}

/// Whether the connection of a mount is gone. This asks the mount, so it is only for one that no living daemon of
/// ours is known to serve. A look that hangs says that somebody still holds the connection.
pub fn is_disconnected(mountpoint: &Path) -> bool {
    let (answer, asked) = mpsc::channel();
    let path = mountpoint.to_owned();
    std::thread::spawn(move || {
        // Attributes may be cached for a second after the daemon's death; this is always asked.
        let _ = answer.send(nix::sys::statfs::statfs(&path).err());
    });
    matches!(asked.recv_timeout(Duration::from_secs(2)), Ok(Some(Errno::ENOTCONN)))
}

/// Cuts the connection of a mount, whatever its daemon is doing: every request on it fails from then on.
pub fn abort(minor: u32) -> io::Result<()> {
    let abort = Path::new(FUSECTL).join(minor.to_string()).join("abort");
    if !abort.exists() {
        let nothing: Option<&str> = None;
        nix::mount::mount(Some("fusectl"), FUSECTL, Some("fusectl"), MsFlags::empty(), nothing)?;
    }
    fs::write(abort, "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
90 22 0:57 / /mnt/with\\040space rw,nosuid - fuse.nemesisfs nemesisfs:n1 rw,user_id=0
91 22 0:58 / /mnt/b rw shared:4 master:2 - fuse sshfs rw
";

    #[test]
    fn a_mount_of_ours_is_known_by_its_type_and_names_its_instance() {
        let mounts = parse(TABLE.as_bytes());
        assert_eq!(mounts.iter().map(Mount::instance).collect::<Vec<_>>(), [None, Some("n1"), None]);
        assert_eq!(mounts[1].mountpoint, Path::new("/mnt/with space"));
        assert_eq!(mounts[1].minor, 57);
        assert_eq!((mounts[1].root.as_path(), mounts[1].options.as_str()), (Path::new("/"), "rw,nosuid"));
    }

    #[test]
    fn a_path_is_reached_by_the_last_mount_on_the_nearest_mountpoint_above_it() {
        let stacked = format!("{TABLE}92 22 8:1 /else /mnt/b rw - ext4 /dev/sda1 rw\n");
        let mounts = parse(stacked.as_bytes());
        let reached =
            |path: &str| holding(&mounts, Path::new(path)).map(|mount| (&*mount.device, mount.root.as_path()));
        assert_eq!(reached("/mnt/b/c"), Some(("8:1", Path::new("/else"))));
        assert_eq!(reached("/mnt/bc"), Some(("8:1", Path::new("/"))));
    }

    #[test]
    fn optional_fields_of_the_mount_table_do_not_shift_the_others() {
        assert_eq!(parse(TABLE.as_bytes())[2].source, "sshfs");
        assert_eq!(parse(b"rubbish\n\n\xff"), []);
    }
}
