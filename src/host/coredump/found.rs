//! Where cores go at present: what `kernel.core_pattern` says, who takes them, the directory that they lie in, how that
//! came to be mounted, and whether we may change any of it.
//!
//! Any thread that may wait for a disk. Takes no locks. Must never: change anything.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::host::shown;
use crate::sys::mounts::{self, Mount};

/// The number of the pid namespace that the machine began with: `PROC_PID_INIT_INO` of the kernel.
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";
/// The same of the mount namespace: `MNT_NS_INIT_INO`, since Linux 6.17; before, it had no number of its own.
const FIRST_MOUNT_NAMESPACE: &str = "mnt:[4026531832]";
/// Files that makers of containers leave in them.
const MARKS: [&str; 3] = ["/.dockerenv", "/run/.containerenv", "/run/systemd/container"];
const CAP_SYS_ADMIN: u32 = 21;
/// Where systemd looks for units, and where it puts those that it makes of fstab.
const UNITS: [&str; 5] = [
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "run/systemd/generator",
];
/// Where systemd looks for its configuration; the first has the last word.
const CONFIGS: [&str; 4] = ["etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd"];

/// The system that is looked at, which for a test is a directory.
#[derive(Clone, Debug)]
pub struct Ground {
    pub root: PathBuf,
    pub pattern: PathBuf,
    /// May we change it? None: look.
    pub hindrance: Option<Option<Hindrance>>,
}

impl Default for Ground {
    fn default() -> Ground {
        Ground { root: "/".into(), pattern: "/proc/sys/kernel/core_pattern".into(), hindrance: None }
    }
}

/// Why we cannot change where cores go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hindrance {
    /// We may not.
    Privilege(&'static str),
    /// What we would change is not what the kernel and systemd use.
    Container(String),
}

/// Who takes a core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taker {
    /// systemd-coredump, with its `Storage=`.
    Systemd {
        storage: String,
    },
    /// The kernel writes it into one directory.
    Directory,
    /// The kernel writes it into a directory that depends on the process: a name with `%` in it.
    Directories,
    /// The kernel writes it into the working directory of the process.
    WorkingDirectory,
    /// Another program.
    Program(String),
    Nobody,
}

/// How the core directory came to be a mountpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountedBy {
    Unit,
    Fstab,
    Bind,
    Filesystem,
}

#[derive(Clone, Debug)]
pub struct Found {
    pub pattern: String,
    pub taker: Taker,
    /// Where cores lie, with symlinks followed.
    pub directory: Option<PathBuf>,
    /// The name of its mount unit, if there is one.
    pub unit: Option<String>,
    pub mounted_by: Option<MountedBy>,
    /// What its filesystem is mounted by.
    pub mount: Option<Mount>,
}

impl Found {
    /// Looks. `without` says which mounts are ours, and do not count.
    ///
    /// # Errors
    /// When the pattern or the mount table cannot be read.
    pub fn look(ground: &Ground, without: impl Fn(&Mount) -> bool) -> std::io::Result<Found> {
        let pattern = fs::read_to_string(&ground.pattern)?.trim_end_matches('\n').to_string();
        let mut mounts = mounts::all()?;
        mounts.retain(|mount| !without(mount));
        let (taker, directory) = taker(ground, &pattern);
        let directory = directory.and_then(|directory| directory.canonicalize().ok());
        let unit = directory.as_deref().and_then(|directory| unit(ground, directory));
        let mounted_by = directory.as_deref().and_then(|directory| mounted_by(ground, directory, &unit, &mounts));
        let mount = directory.as_deref().and_then(|directory| mounts::holding(&mounts, directory)).cloned();
        Ok(Found { pattern, taker, directory, unit, mounted_by, mount })
    }

    pub fn json(&self) -> Value {
        let mount = self.mount.as_ref();
        json!({
            "core_pattern": self.pattern, "taker": self.taker.word(), "program": self.taker.program(),
            "directory": self.directory.as_deref().map(shown), "mounted_by": self.mounted_by.map(MountedBy::word), "unit": self.unit,
            "filesystem": mount.map(|mount| json!({
                "mountpoint": shown(&mount.mountpoint), "type": mount.filesystem, "source": mount.source,
                "root": shown(&mount.root),
            })),
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        let place = self.directory.as_deref().unwrap_or(Path::new("?")).display();
        let mounted = match (self.mounted_by, &self.unit) {
            (Some(MountedBy::Unit), Some(unit)) => format!(", mounted by {unit}"),
            (Some(by), _) => format!(", mounted by {}", by.word()),
            (None, Some(unit)) => format!(", which {unit} mounts when it is needed"),
            (None, None) => String::new(),
        };
        match &self.taker {
            Taker::Systemd { .. } => format!("systemd-coredump writes cores to {place}{mounted}"),
            Taker::Directory | Taker::Directories => format!("the kernel writes cores to {place}{mounted}"),
            Taker::WorkingDirectory => "the kernel writes cores to the working directory of each process".into(),
            Taker::Program(program) => format!("cores go to {program}"),
            Taker::Nobody => "kernel.core_pattern is empty: no cores are written".into(),
        }
    }
}

impl Taker {
    pub fn word(&self) -> &'static str {
        match self {
            Taker::Systemd { .. } => "systemd-coredump",
            Taker::Directory | Taker::Directories => "directory",
            Taker::WorkingDirectory => "working_directory",
            Taker::Program(_) => "program",
            Taker::Nobody => "nobody",
        }
    }

    fn program(&self) -> Option<&str> {
        match self {
            Taker::Program(program) => Some(program),
            _ => None,
        }
    }
}

impl MountedBy {
    pub fn word(self) -> &'static str {
        match self {
            MountedBy::Unit => "unit",
            MountedBy::Fstab => "fstab",
            MountedBy::Bind => "bind",
            MountedBy::Filesystem => "filesystem",
        }
    }
}

/// Who takes cores, and where they then lie, if that is one place.
fn taker(ground: &Ground, pattern: &str) -> (Taker, Option<PathBuf>) {
    if pattern.is_empty() {
        return (Taker::Nobody, None);
    }
    if let Some(line) = pattern.strip_prefix('|') {
        let program = line.split_whitespace().next().unwrap_or_default();
        return match Path::new(program).file_name().and_then(|name| name.to_str()) {
            Some("systemd-coredump") => {
                let storage = storage(ground);
                (Taker::Systemd { storage }, Some(ground.root.join("var/lib/systemd/coredump")))
            }
            _ => (Taker::Program(program.to_string()), None),
        };
    }
    if pattern.starts_with('@') {
        return (Taker::Program(format!("the socket {pattern}")), None);
    }
    let Some(parent) = Path::new(pattern).parent().filter(|_| pattern.starts_with('/')) else {
        return (Taker::WorkingDirectory, None);
    };
    let plain = parent.ancestors().find(|dir| !dir.to_string_lossy().contains('%'));
    let taker = if plain == Some(parent) { Taker::Directory } else { Taker::Directories };
    (taker, plain.map(Path::to_path_buf))
}

/// `Storage=` of systemd-coredump: the file, then the pieces, of equal names the one that counts, in the order of names.
fn storage(ground: &Ground) -> String {
    let mut files: Vec<PathBuf> = Vec::new();
    let main = CONFIGS.iter().map(|dir| ground.root.join(dir).join("coredump.conf"));
    files.extend(main.filter(|file| file.exists()).take(1));
    let mut pieces: Vec<PathBuf> = Vec::new();
    for dir in CONFIGS.iter().map(|dir| ground.root.join(dir).join("coredump.conf.d")) {
        for piece in fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()) {
            let fits = piece.extension().is_some_and(|extension| extension == "conf");
            if fits && pieces.iter().all(|known| known.file_name() != piece.file_name()) {
                pieces.push(piece);
            }
        }
    }
    pieces.sort_by(|a, b| a.file_name().cmp(&b.file_name()));
    files.extend(pieces);
    let text: String = files.iter().filter_map(|file| fs::read_to_string(file).ok()).map(|text| text + "\n").collect();
    let values = text.lines().filter_map(|line| line.trim().split_once('='));
    let storage = values.filter(|(key, value)| key.trim() == "Storage" && !value.trim().is_empty());
    storage.fold("external", |_, (_, value)| value.trim()).to_string()
}

fn unit(ground: &Ground, directory: &Path) -> Option<String> {
    let name = unit_name(directory);
    UNITS.iter().any(|dir| ground.root.join(dir).join(&name).exists()).then_some(name)
}

/// The name of a mount unit: systemd.unit(5), "String escaping".
pub fn unit_name(directory: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let path = directory.as_os_str().as_bytes();
    let path = path.strip_prefix(b"/").unwrap_or(path);
    let mut name = String::new();
    for (i, byte) in path.iter().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if i == 0 => name.push_str("\\x2e"),
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b':' | b'_' | b'.' => name.push(char::from(*byte)),
            other => name.push_str(&format!("\\x{other:02x}")),
        }
    }
    name + ".mount"
}

fn mounted_by(ground: &Ground, directory: &Path, unit: &Option<String>, mounts: &[Mount]) -> Option<MountedBy> {
    let mount = mounts.iter().rev().find(|mount| mount.mountpoint == directory)?;
    let table = fs::read_to_string(ground.root.join("etc/fstab")).unwrap_or_default();
    let in_table = |line: &str| {
        !line.trim_start().starts_with('#') && line.split_whitespace().nth(1).map(Path::new) == Some(directory)
    };
    Some(if table.lines().any(in_table) {
        MountedBy::Fstab
    } else if unit.is_some() {
        MountedBy::Unit
    } else if mount.root != Path::new("/") {
        MountedBy::Bind
    } else {
        MountedBy::Filesystem
    })
}

/// Why this process cannot change where cores go, if it cannot.
pub fn hindrance(ground: &Ground) -> Option<Hindrance> {
    if let Some(known) = &ground.hindrance {
        return known.clone();
    }
    if let Some(container) = container()
        && !is_written_where_we_are(ground)
    {
        return Some(Hindrance::Container(container));
    }
    if !nix::unistd::geteuid().is_root() {
        return Some(Hindrance::Privilege("not root"));
    }
    (!has_capability(CAP_SYS_ADMIN)).then_some(Hindrance::Privilege("without CAP_SYS_ADMIN"))
}

/// The kernel starts its helper in the namespaces of the first process, and writes files as the dead process saw them: what
/// we mount over their directory holds for the processes of our container, which are those that we look after.
fn is_written_where_we_are(ground: &Ground) -> bool {
    let pattern = fs::read_to_string(&ground.pattern).unwrap_or_default();
    matches!(taker(ground, pattern.trim_end()).0, Taker::Directory | Taker::Directories)
}

/// A mark of a container is believed only where namespaces tell nothing: whole machines are made from such images.
fn container() -> Option<String> {
    let namespace = |path: &str| fs::read_link(path).ok().map(|link| link.to_string_lossy().into_owned());
    if namespace("/proc/self/ns/pid").is_some_and(|own| own != FIRST_PID_NAMESPACE) {
        return Some("a pid namespace of its own".into());
    }
    match (namespace("/proc/self/ns/mnt"), namespace("/proc/1/ns/mnt")) {
        (Some(own), _) if own == FIRST_MOUNT_NAMESPACE => return None,
        (Some(own), Some(first)) if own == first => return None,
        (Some(_), Some(_)) => return Some("a mount namespace of its own".into()),
        _ => {}
    }
    // The first process does not let us look.
    MARKS.iter().find(|mark| Path::new(mark).exists()).map(|mark| format!("a container: there is {mark}"))
}

fn has_capability(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).is_some_and(|bits| bits >> number & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_says_who_takes_cores_and_where_they_lie() {
        let ground = Ground { root: "/nowhere".into(), ..Ground::default() };
        let taken = |pattern: &str| taker(&ground, pattern);
        let systemd = Taker::Systemd { storage: "external".into() };
        let at = |path: &str| Some(PathBuf::from(path));
        let line = "|/usr/lib/systemd/systemd-coredump %P %u %g %s %t 9223372036854775808 %h";
        assert_eq!(taken(line), (systemd, at("/nowhere/var/lib/systemd/coredump")));
        assert_eq!(taken("/cores/core.%p"), (Taker::Directory, at("/cores")));
        assert_eq!(taken("/cores/%e/%u/core"), (Taker::Directories, at("/cores")));
        assert_eq!(taken("core"), (Taker::WorkingDirectory, None));
        assert_eq!(taken("cores/core.%p"), (Taker::WorkingDirectory, None));
        assert_eq!(taken("|/usr/share/apport/apport -p%p"), (Taker::Program("/usr/share/apport/apport".into()), None));
        assert_eq!(taken("@/run/cores.sock").0.word(), "program");
        assert_eq!(taken(""), (Taker::Nobody, None));
    }

    #[test]
    fn the_last_word_on_storage_has_the_piece_that_comes_last() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let file = dir.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        let ground = Ground { root: dir.path().into(), ..Ground::default() };
        assert_eq!(storage(&ground), "external");
        write("etc/systemd/coredump.conf", "[Coredump]\n#Storage=none\nStorage = journal");
        assert_eq!(storage(&ground), "journal");
        write("usr/lib/systemd/coredump.conf.d/50.conf", "[Coredump]\nStorage=none\n");
        assert_eq!(storage(&ground), "none");
        write("etc/systemd/coredump.conf.d/50.conf", "[Coredump]\nStorage=external\n");
        assert_eq!(storage(&ground), "external");
    }

    #[test]
    fn units_are_named_as_systemd_names_them() {
        assert_eq!(unit_name(Path::new("/var/lib/systemd/coredump")), "var-lib-systemd-coredump.mount");
        assert_eq!(unit_name(Path::new("/mnt/my-cores")), "mnt-my\\x2dcores.mount");
    }
}
