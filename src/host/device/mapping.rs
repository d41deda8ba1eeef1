//! Mappings of the device mapper: whether the kernel can, which are there, and how their tables are exchanged.
//!
//! Looks through sysfs, where nothing waits; changes by `dmsetup`. No locks of its own.

use std::fs;
use std::path::{Path, PathBuf};

use super::Refused;
use super::table::Mode;
use crate::host::tool::{self, ToolError, Tools, ask};

/// One that the kernel has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub name: String,
    pub uuid: String,
    pub is_suspended: bool,
    /// Its numbers.
    pub major: u32,
    pub minor: u32,
    /// `/dev/dm-0`.
    pub node: PathBuf,
}

/// What is done with the filesystem on top while the table is exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quiet {
    /// Nothing: what was not written stays in memory, to be dropped or failed.
    AsItIs,
    /// It is synchronised before.
    Synced,
    /// It is synchronised and frozen, so that nothing comes in between.
    Frozen,
}

pub fn node(name: &str) -> PathBuf {
    Path::new("/dev/mapper").join(name)
}

/// The mapping of a name.
pub fn find(name: &str) -> Option<Mapping> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    devices.filter_map(|entry| read(&entry.path())).find(|mapping| mapping.name == name)
}

fn read(dir: &Path) -> Option<Mapping> {
    let text = |file: &str| fs::read_to_string(dir.join(file)).map(|text| text.trim().to_string()).ok();
    let numbers = text("dev")?;
    let (major, minor) = numbers.split_once(':')?;
    Some(Mapping {
        name: text("dm/name")?,
        uuid: text("dm/uuid")?,
        is_suspended: text("dm/suspended")? == "1",
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        node: Path::new("/dev").join(dir.file_name()?),
    })
}

/// Whether this host has the device mapper and a target of it. Loads the kernel's modules for it.
///
/// # Errors
/// With what is missing.
pub fn supports(target: &str) -> Result<(), Refused> {
    if !nix::unistd::geteuid().is_root() {
        let detail = "devices need root: this daemon has it not";
        return Err(Refused::not_supported(detail).hint("rules of a mount fail requests without root"));
    }
    if !tool::is_there("dmsetup") {
        return Err(Refused::not_supported("dmsetup is not installed here").hint("on Debian: apt-get install dmsetup"));
    }
    let has_mapper = || Path::new("/sys/class/misc/device-mapper").exists();
    if !has_mapper() && (ask(&["modprobe", "dm-mod"]).is_err() || !has_mapper()) {
        let hint = "it needs CONFIG_BLK_DEV_DM; rules of a mount work here, and `tools/lab` has a kernel with it";
        return Err(Refused::not_supported("the kernel of this host has no device mapper").hint(hint));
    }
    let has_target = || is_loaded(target) || targets().iter().any(|known| known == target);
    if !has_target() {
        let _ = ask(&["modprobe", &format!("dm-{target}")]);
    }
    match has_target() {
        true => Ok(()),
        false => Err(Refused::not_supported(format!("the kernel of this host has no dm-{target}"))
            .hint("on Debian, and for cloud kernels of others, it is in a package of additional modules")),
    }
}

/// Is the module of a target loaded? Asked of sysfs, without a tool; one that is built in may be there without.
fn is_loaded(target: &str) -> bool {
    let state = Path::new("/sys/module").join(format!("dm_{}", target.replace('-', "_"))).join("initstate");
    fs::read_to_string(state).is_ok_and(|state| state.trim() == "live")
}

/// The targets that are loaded.
pub fn targets() -> Vec<String> {
    let listed = ask(&["dmsetup", "targets"]).unwrap_or_default();
    listed.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_string).collect()
}

/// Makes a mapping. Without udev nobody else makes its node.
pub fn create(tools: &mut Tools, name: &str, uuid: &str, table: &str) -> Result<(), ToolError> {
    tools.run(&["dmsetup", "create", name, "--uuid", uuid, "--table", table])?;
    if !node(name).exists() {
        tools.run(&["dmsetup", "mknodes", name])?;
    }
    Ok(())
}

/// Removes one; probes of the system may have it open for a moment.
pub fn remove(tools: &mut Tools, name: &str) -> Result<(), ToolError> {
    tools.run(&["dmsetup", "remove", "--retry", name])?;
    Ok(())
}

/// Exchanges the table. It is loaded first: what the kernel refuses has changed nothing.
///
/// # Errors
/// `not_supported` with the modes that the kernel lacks, or what dmsetup said.
pub fn switch(tools: &mut Tools, mapping: &Mapping, mode: &Mode, table: &str, quiet: Quiet) -> Result<(), Refused> {
    let name = mapping.name.as_str();
    if let Err(error) = tools.run(&["dmsetup", "load", name, "--table", table]) {
        let _ = ask(&["dmsetup", "clear", name]);
        return Err(lacking(name, mode, table).unwrap_or_else(|| error.into()));
    }
    // A device that stands still gets the new table when it goes on.
    if mapping.is_suspended {
        return Ok(());
    }
    let suspended = match quiet {
        Quiet::Frozen => tools.run(&["dmsetup", "suspend", name]),
        Quiet::AsItIs | Quiet::Synced => tools.run(&["dmsetup", "suspend", "--nolockfs", "--noflush", name]),
    };
    // Also after a failure: it may be suspended by half.
    let resumed = tools.run(&["dmsetup", "resume", name]);
    suspended?;
    resumed?;
    Ok(())
}

/// Which modes of several the kernel does not take even alone: asked by loading each into the slot that is not in use.
fn lacking(name: &str, mode: &Mode, table: &str) -> Option<Refused> {
    let words: Vec<&str> = table.split(' ').collect();
    let (sectors, below) = (words.get(1)?.parse().ok()?, words.get(3)?);
    let mut missing = Vec::new();
    for (word, alone) in mode.alone() {
        if ask(&["dmsetup", "load", name, "--table", &alone.table(below, sectors)]).is_err() {
            missing.push(word.to_string());
        }
        let _ = ask(&["dmsetup", "clear", name]);
    }
    let hint = "the reason is in the kernel's log: dmesg";
    match missing.is_empty() {
        true => None,
        false => {
            Some(Refused::not_supported(format!("the kernel of this host has no {}", missing.join(", "))).hint(hint))
        }
    }
}

/// What the kernel says of it: the table in force, and the status.
pub fn table_and_status(name: &str) -> (Option<String>, Option<String>) {
    let line = |verb: &[&str]| {
        let words: Vec<&str> = [&["dmsetup"], verb, &[name]].concat();
        ask(&words).ok().map(|text| text.trim().to_string())
    };
    (line(&["table"]), line(&["status", "--noflush"]))
}
