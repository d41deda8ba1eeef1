//! The list of cores: those at home, those that lie elsewhere, and what coredumpctl knows of each, also of those that
//! were refused.
//!
//! On helper threads. Takes no locks. Must never: read a core.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Value, json};

use super::about;
use super::book::{self, Away, Book};
use super::found::{Found, Ground, Taker};
use super::home::cores;
use crate::event::record::rfc3339;
use crate::host::tool::{ToolError, ask};
use crate::host::{Machine, Refused, shown};
use crate::sys::mounts::{self, Mount};

/// All that are known.
///
/// # Errors
/// When the system cannot be read.
pub fn list(machine: &Machine) -> Result<Value, Refused> {
    let _at_work = machine.begin();
    let ground = Ground::default();
    let book = book::peek(&machine.state);
    let ours = |mount: &Mount| book.switch.as_ref().is_some_and(|switch| switch.means.is(mount));
    let found = Found::look(&ground, ours).map_err(|error| about(&ground.pattern, &error))?;
    let known = match found.taker {
        Taker::Systemd { .. } => coredumpctl(),
        _ => None,
    };
    let mut list = files(&found, &book);
    join(&mut list, known.iter().flatten());
    let away: Vec<Value> = book.away.iter().map(Away::json).collect();
    let directory = found.directory.as_deref().map(shown);
    Ok(json!({"cores": list, "coredumpctl": known.is_some(), "directory": directory, "away": away}))
}

/// Puts what coredumpctl knows to the files that it is about: written by that process, and shortly before the entry, for
/// pids come again. Of a core that was refused there is no file.
fn join<'a>(list: &mut Vec<Value>, known: impl Iterator<Item = &'a Value>) {
    let mut files: Vec<(usize, u64, u64)> = Vec::new();
    for (i, core) in list.iter().enumerate() {
        let named = core["name"].as_str().and_then(Named::of);
        files.extend(named.map(|named| (i, named.pid, named.micros)));
    }
    for known in known {
        let entered = known["time"].as_u64().unwrap_or_default();
        let fits = |&&(_, pid, micros): &&(usize, u64, u64)| known["pid"] == pid && micros <= entered;
        let nearest = files.iter().filter(fits).max_by_key(|(_, _, micros)| *micros).copied();
        match nearest.filter(|(i, ..)| known["corefile"] != "none" && list[*i]["coredumpctl"].is_null()) {
            Some((i, ..)) => list[i]["coredumpctl"] = known.clone(),
            None => list.push(without_file(known)),
        }
    }
}

/// Those that are files.
fn files(found: &Found, book: &Book) -> Vec<Value> {
    let is_covered = book.switch.as_ref().is_some_and(|switch| switch.means.home().is_some());
    let home = match is_covered {
        true => found.mount.as_ref().and_then(elsewhere),
        false => found.directory.clone(),
    };
    let home = home.filter(|_| found.taker != Taker::Directories);
    let at_home = home.iter().flat_map(|dir| cores(dir)).map(|core| (core, "home", None));
    let now = book.switch.iter().map(|switch| (&switch.fallback, switch.means.home()));
    let away = now.chain(book.away.iter().map(|away| (&away.dir, away.home.clone())));
    let away = away.flat_map(|(dir, home)| cores(dir).into_iter().map(move |core| (core, "away", home.clone())));
    let mut seen = HashSet::new();
    let each_once = at_home.chain(away).filter(|(core, ..)| seen.insert(core.clone()));
    let mut files: Vec<Value> = each_once.map(|(core, place, home)| file(&core, place, home.as_deref())).collect();
    files.sort_by(|a, b| a["time"].as_str().cmp(&b["time"].as_str()));
    files
}

/// Where else a directory can be seen that is covered: below another mount of its filesystem. Often nowhere: where mounts
/// are shared, ours is seen below that, too.
fn elsewhere(covered: &Mount) -> Option<PathBuf> {
    let table = mounts::all().ok()?;
    let seen = |mount: &Mount| {
        let path = mount.mountpoint.join(covered.root.strip_prefix(&mount.root).ok()?);
        (mounts::holding(&table, &path) == Some(mount) && path.is_dir()).then_some(path)
    };
    table.iter().filter(|mount| mount.device == covered.device).find_map(seen)
}

fn file(core: &Path, place: &str, home: Option<&Path>) -> Value {
    let name = core.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let there = fs::metadata(core).ok();
    let time = there.as_ref().and_then(|there| there.modified().ok()).unwrap_or(SystemTime::UNIX_EPOCH);
    let named = Named::of(&name);
    json!({
        "name": name, "path": shown(core), "place": place, "belongs": home.map(|home| shown(home.join(&name))),
        "bytes": there.as_ref().map(fs::Metadata::len), "allocated": there.as_ref().map(|there| there.blocks() * 512),
        "time": rfc3339(time), "pid": named.as_ref().map(|named| named.pid), "comm": named.map(|named| named.comm),
        "coredumpctl": null,
    })
}

fn without_file(known: &Value) -> Value {
    let micros = known["time"].as_u64().unwrap_or_default();
    let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_micros(micros);
    json!({
        "name": null, "path": null, "place": "nowhere", "belongs": null, "bytes": null, "allocated": null,
        "time": rfc3339(time), "pid": known["pid"], "comm": null, "coredumpctl": known,
    })
}

/// What systemd-coredump puts into a name: `core.COMM.UID.BOOT.PID.TIME`, and an ending if it is compressed.
struct Named {
    comm: String,
    pid: u64,
    /// When it died.
    micros: u64,
}

impl Named {
    fn of(name: &str) -> Option<Named> {
        let name = [".zst", ".lz4", ".xz"].iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name);
        let mut words = name.strip_prefix("core.")?.rsplitn(5, '.');
        let (micros, pid, boot) = (words.next()?, words.next()?, words.next()?);
        let (_uid, comm) = (words.next()?, words.next()?);
        let (pid, micros) = (pid.parse().ok()?, micros.parse().ok()?);
        (boot.len() == 32).then_some(Named { comm: comm.into(), pid, micros })
    }
}

/// What coredumpctl lists; none where it is not there.
fn coredumpctl() -> Option<Vec<Value>> {
    match ask(&["coredumpctl", "--no-pager", "--json=short", "list"]) {
        Ok(text) => serde_json::from_str(&text).ok(),
        // So it says that there are none.
        Err(ToolError::Failed { code: Some(1), .. }) => Some(Vec::new()),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_systemd_tell_process_and_program() {
        let boot = "0123456789abcdef0123456789abcdef";
        let named = Named::of(&format!("core.my.prog.0.{boot}.4711.1700000000000000.zst")).unwrap();
        assert_eq!((named.comm.as_str(), named.pid), ("my.prog", 4711));
        assert_eq!(named.micros, 1_700_000_000_000_000);
        assert!(Named::of("core.4711").is_none() && Named::of("core.a.b.c.d.e").is_none());
    }

    #[test]
    fn an_entry_is_put_to_the_file_of_its_process_and_time_for_pids_come_again() {
        let boot = "0123456789abcdef0123456789abcdef";
        let file = |time: u64| json!({"name": format!("core.x.0.{boot}.7.{time}"), "pid": 7, "coredumpctl": null});
        let entry = |time: u64, word: &str| json!({"pid": 7, "time": time, "corefile": word});
        let mut list = vec![file(1_000_000), file(9_000_000)];
        let known = [entry(500_000, "missing"), entry(1_200_000, "missing"), entry(5_000_000, "none")];
        join(&mut list, known.iter().chain(&[entry(9_300_000, "present")]));
        assert_eq!((list.len(), list[0]["coredumpctl"]["time"].as_u64()), (4, Some(1_200_000)));
        assert_eq!(list[1]["coredumpctl"]["corefile"], "present");
        assert!(list[2..].iter().all(|core| core["place"] == "nowhere"), "{list:?}");
    }
}
