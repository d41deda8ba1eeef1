//! How much room there is where cores are redirected to.
//!
//! Any thread that may wait for a disk; no locks. Must never: count what is reserved for root, which fills up last.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use nix::sys::statvfs::statvfs;
use serde::Serialize;

use super::about;
use crate::host::{Refused, shown};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Room {
    pub path: String,
    pub available: u64,
    pub need: u64,
    pub enough: bool,
}

impl Room {
    /// Looks, at the directory or at the nearest one above it that exists.
    pub fn look(dir: &Path, need: u64) -> Result<Room, Refused> {
        let path = nearest(dir);
        let available = available(&path).map_err(|error| about(&path, &error))?;
        Ok(Room { path: shown(dir), available, need, enough: available >= need })
    }

    /// For people, when it is not enough.
    pub fn complaint(&self) -> Option<String> {
        let size = |bytes| ByteSize::b(bytes).display().iec().to_string();
        let path = &self.path;
        let text = || format!("{path} has {} free, and cores should have {}", size(self.available), size(self.need));
        (!self.enough).then(text)
    }
}

/// The nearest directory that exists, with symlinks followed.
fn nearest(dir: &Path) -> PathBuf {
    dir.ancestors().find_map(|dir| dir.canonicalize().ok()).unwrap_or_else(|| "/".into())
}

/// A path with symlinks followed, as far as it exists.
pub fn resolved(path: &Path) -> PathBuf {
    let there = |dir: &Path| Some((dir.canonicalize().ok()?, path.strip_prefix(dir).ok()?.to_path_buf()));
    match path.ancestors().find_map(there) {
        Some((dir, rest)) if rest == Path::new("") => dir,
        Some((dir, rest)) => dir.join(rest),
        None => path.to_path_buf(),
    }
}

fn available(path: &Path) -> std::io::Result<u64> {
    available_and_total(path).map(|(available, _)| available)
}

/// In bytes, of the whole filesystem.
pub fn available_and_total(path: &Path) -> std::io::Result<(u64, u64)> {
    let statvfs = statvfs(path)?;
    let bytes = |blocks: u64| blocks.saturating_mul(statvfs.fragment_size());
    Ok((bytes(statvfs.blocks_available()), bytes(statvfs.blocks())))
}
