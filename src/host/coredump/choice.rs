//! How to redirect, chosen from what was found. Pure.
//!
//! Any thread; no locks. Must never: look at the machine.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::found::{Found, MountedBy, Taker};
use crate::host::Refused;
use crate::sys::mounts::{self, Mount};

/// The longest `kernel.core_pattern` that the kernel keeps whole.
const LONGEST_PATTERN: usize = 127;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Cover the core directory with one of the fallback's filesystem.
    Bind { over: PathBuf, why: String },
    /// Name the fallback directory in `kernel.core_pattern`.
    Pattern { new: String, why: String },
    /// Cores do not go to what is filled.
    Nothing { why: String },
}

impl Choice {
    pub fn json(&self) -> Value {
        match self {
            Choice::Bind { why, .. } => json!({"means": "bind", "why": why}),
            Choice::Pattern { new, why } => json!({"means": "core_pattern", "core_pattern": new, "why": why}),
            Choice::Nothing { why } => json!({"means": null, "why": why}),
        }
    }

    pub fn why(&self) -> &str {
        match self {
            Choice::Bind { why, .. } | Choice::Pattern { why, .. } | Choice::Nothing { why } => why,
        }
    }
}

/// Chooses. `fallback` is the directory that cores are to go to, `fills` what is to be filled.
///
/// # Errors
/// When cores cannot be redirected, or not there.
pub fn choose(found: &Found, fallback: &Path, fills: &[PathBuf], mounts: &[Mount]) -> Result<Choice, Refused> {
    match &found.taker {
        Taker::Nobody => Err(Refused::not_supported(found.text()).hint("sysctl kernel.core_pattern")),
        Taker::Program(program) => Err(other_program(program)),
        Taker::Systemd { storage } if storage != "external" => {
            let detail = format!("systemd-coredump has Storage={storage}: it writes no files that could go elsewhere");
            Err(Refused::not_supported(detail).hint("Storage=external in /etc/systemd/coredump.conf"))
        }
        Taker::WorkingDirectory => pattern(found, fallback),
        Taker::Systemd { .. } | Taker::Directory | Taker::Directories => directory(found, fallback, fills, mounts),
    }
}

fn other_program(program: &str) -> Refused {
    let detail = format!("kernel.core_pattern hands cores to {program}, and only that knows where they then go");
    Refused::not_supported(detail).hint("tell that program to write elsewhere, or set core_pattern to a file")
}

fn directory(found: &Found, fallback: &Path, fills: &[PathBuf], mounts: &[Mount]) -> Result<Choice, Refused> {
    let (Some(directory), Some(mount)) = (&found.directory, &found.mount) else {
        let detail = format!("the core directory of kernel.core_pattern {:?} does not exist", found.pattern);
        return Err(Refused::not_supported(detail));
    };
    let place = directory.display();
    let device = |path: &Path| mounts::holding(mounts, path).map(|mount| mount.device.as_str());
    let to_be_filled = |of: &str| fills.iter().any(|path| device(path) == Some(of));
    let refuge = device(fallback).unwrap_or_default();
    is_refuge(fallback, fills, mounts)?;
    if fallback.starts_with(directory) {
        let detail = format!("{}, where cores should go instead, is below the core directory", fallback.display());
        return Err(Refused::conflict(detail).hint("--to DIR names another directory"));
    }
    // A unit that is not mounted at the moment is by the next core.
    let may_be_mounted = found.mounted_by.is_none() && found.unit.is_some();
    let why = if !fills.is_empty() && !to_be_filled(&mount.device) && !may_be_mounted {
        format!("cores go to {place}, on another filesystem than the one that is to be filled")
    } else if mount.device == refuge && found.mounted_by.is_none() && !may_be_mounted {
        format!("cores go to {place}, which has no mount: there is nothing to redirect")
    } else if found.taker == Taker::Directories {
        return pattern(found, fallback);
    } else {
        let why = format!("{place} is {}: covered by {}", reached_by(found), fallback.display());
        return Ok(Choice::Bind { over: directory.clone(), why });
    };
    Ok(Choice::Nothing { why })
}

/// Will there be room where cores are to go, when the rest is full?
///
/// # Errors
/// When it is to be filled too.
pub fn is_refuge(fallback: &Path, fills: &[PathBuf], mounts: &[Mount]) -> Result<(), Refused> {
    let device = |path: &Path| mounts::holding(mounts, path).map(|mount| mount.device.as_str());
    let refuge = device(fallback);
    if refuge.is_none() || fills.iter().all(|path| device(path) != refuge) {
        return Ok(());
    }
    let place = fallback.display();
    let detail = format!("{place}, where cores should go instead, is on the filesystem that is to be filled");
    Err(Refused::conflict(detail).hint("--to DIR names another directory"))
}

fn reached_by(found: &Found) -> String {
    match (found.mounted_by, &found.unit) {
        (Some(MountedBy::Unit), Some(unit)) => format!("mounted by the unit {unit}, which is left alone"),
        (Some(MountedBy::Fstab), _) => "mounted by a line of fstab".into(),
        (Some(MountedBy::Bind), _) => "bind-mounted".into(),
        (Some(_), _) => "a filesystem of its own".into(),
        (None, Some(unit)) => format!("mounted by the unit {unit} when it is needed"),
        (None, None) => "on a filesystem other than that of the fallback".into(),
    }
}

/// The last part of the pattern, made to differ from core to core, in the fallback directory.
fn pattern(found: &Found, fallback: &Path) -> Result<Choice, Refused> {
    let name = found.pattern.rsplit('/').next().unwrap_or("core");
    let tells_apart = name.contains("%p") || name.contains("%P");
    let dir = fallback.display().to_string().replace('%', "%%");
    let new = format!("{dir}/{name}{}", if tells_apart { "" } else { ".%P.%t" });
    if new.len() > LONGEST_PATTERN {
        let detail =
            format!("kernel.core_pattern {new:?} is longer than the {LONGEST_PATTERN} bytes that the kernel keeps");
        return Err(Refused::invalid(detail).hint("--to DIR names a directory with a shorter path"));
    }
    let why = format!("{}: kernel.core_pattern is set to {new}, for the whole machine", found.text());
    Ok(Choice::Pattern { new, why })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Kind;

    fn mount(device: &str, at: &str) -> Mount {
        Mount {
            minor: 1,
            device: device.into(),
            root: "/".into(),
            mountpoint: at.into(),
            options: "rw".into(),
            filesystem_options: "rw".into(),
            filesystem: "ext4".into(),
            source: "/dev/x".into(),
        }
    }

    fn mounts() -> Vec<Mount> {
        vec![mount("8:1", "/"), mount("8:2", "/data"), mount("8:2", "/cores"), mount("8:3", "/other")]
    }

    fn found(taker: Taker, directory: &str) -> Found {
        let mount = mounts::holding(&mounts(), Path::new(directory)).cloned();
        let mounted_by = mount.iter().any(|mount| mount.mountpoint == Path::new(directory)).then_some(MountedBy::Bind);
        let pattern = "core".into();
        Found { pattern, taker, directory: Some(directory.into()), unit: None, mounted_by, mount }
    }

    fn chosen(found: &Found, fallback: &str, fills: &[&str]) -> Result<Choice, Kind> {
        let fills: Vec<PathBuf> = fills.iter().map(PathBuf::from).collect();
        choose(found, Path::new(fallback), &fills, &mounts()).map_err(|failure| failure.kind)
    }

    #[test]
    fn a_core_directory_of_another_filesystem_is_covered_and_one_of_the_root_is_left_alone() {
        let bound = |choice| matches!(choice, Ok(Choice::Bind { .. }));
        let nothing = |choice| matches!(choice, Ok(Choice::Nothing { .. }));
        assert!(bound(chosen(&found(Taker::Directory, "/cores"), "/var/fallback", &[])));
        assert!(bound(chosen(&found(Taker::Directory, "/cores"), "/var/fallback", &["/data/db"])));
        assert!(bound(chosen(&found(Taker::Directory, "/data/cores"), "/var/fallback", &[])));
        assert!(nothing(chosen(&found(Taker::Directory, "/var/cores"), "/var/fallback", &[])));
        assert!(nothing(chosen(&found(Taker::Directory, "/cores"), "/var/fallback", &["/other"])));
        let unit = Found { unit: Some("x.mount".into()), ..found(Taker::Directory, "/var/cores") };
        assert!(bound(chosen(&unit, "/var/fallback", &["/data"])), "its unit would mount it for the next core");
    }

    #[test]
    fn a_fallback_that_is_filled_too_or_lies_below_is_refused() {
        let cores = found(Taker::Directory, "/cores");
        assert_eq!(chosen(&cores, "/data/fallback", &["/data"]), Err(Kind::Conflict));
        assert_eq!(chosen(&cores, "/cores/fallback", &[]), Err(Kind::Conflict));
    }

    #[test]
    fn what_cannot_be_redirected_is_refused_with_its_name() {
        for taker in [Taker::Program("/x/apport".into()), Taker::Nobody, Taker::Systemd { storage: "journal".into() }] {
            assert_eq!(chosen(&found(taker, "/cores"), "/var/fallback", &[]), Err(Kind::NotSupported));
        }
    }

    #[test]
    fn a_pattern_without_a_directory_is_changed_so_that_cores_have_names_of_their_own() {
        let working = |pattern: &str| {
            let working = Found { pattern: pattern.into(), ..found(Taker::WorkingDirectory, "/") };
            match chosen(&working, "/var/fallback", &[]).unwrap() {
                Choice::Pattern { new, .. } => new,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(working("core"), "/var/fallback/core.%P.%t");
        assert_eq!(working("cores/core.%p"), "/var/fallback/core.%p");
        let long = chosen(&found(Taker::WorkingDirectory, "/"), &format!("/{}", "x".repeat(130)), &[]);
        assert_eq!(long, Err(Kind::Invalid));
    }
}
