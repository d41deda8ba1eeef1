//! The files that operations work on, and what they keep from one operation to the next.
//!
//! Used by the main thread; no locks. Filled in the backing directory, before anything is mounted over it, so that a
//! server that drops its writes has contents to serve too. Must never differ from one target to another.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rusqlite::Connection;

pub const BLOCK: usize = 4096;
const BLOCKS: u64 = 4096;
/// Threads that write at once, each to a file of its own.
pub const WRITERS: usize = 4;

pub struct Files {
    pub dir: PathBuf,
    open: BTreeMap<String, File>,
    pub databases: BTreeMap<&'static str, Connection>,
    /// Twice a block, of which one is aligned as direct writes need it.
    buffer: Vec<u8>,
    /// For the offsets: the same ones for every target.
    random: u64,
    pub created: u64,
    /// When names were last made or looked up.
    pub looked: Instant,
}

impl Files {
    /// Puts the contents there.
    pub fn fill(backing: &Path) -> io::Result<()> {
        let content = vec![0x5a; BLOCK * BLOCKS as usize];
        fs::write(backing.join("written"), &content)?;
        fs::write(backing.join("read"), &content)?;
        (0..WRITERS).try_for_each(|n| fs::write(backing.join(writer(n)), &content))?;
        fs::write(backing.join("appended"), "")
    }

    pub fn new(dir: PathBuf) -> io::Result<Files> {
        let (open, databases) = (BTreeMap::new(), BTreeMap::new());
        let buffer = vec![0x5a; 2 * BLOCK];
        let mut files = Files { dir, open, databases, buffer, random: 1, created: 0, looked: Instant::now() };
        let write = || OpenOptions::new().write(true).clone();
        files.open("write", write(), "written")?;
        // Not every filesystem takes direct writes: then that operation is not measured.
        let _ = files.open("direct", write().custom_flags(libc::O_DIRECT).clone(), "written");
        files.open("append", OpenOptions::new().append(true).clone(), "appended")?;
        files.open("read", OpenOptions::new().read(true).clone(), "read")?;
        (0..WRITERS).try_for_each(|n| files.open(&writer(n), write(), &writer(n)))?;
        // One block is asked for, and one is to be read.
        posix_fadvise(files.file("read")?, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        Ok(files)
    }

    fn open(&mut self, key: &str, options: OpenOptions, name: &str) -> io::Result<()> {
        self.open.insert(key.into(), options.open(self.dir.join(name))?);
        Ok(())
    }

    pub fn close(&mut self) {
        self.open.clear();
        self.databases.clear();
    }

    pub fn file(&self, key: &str) -> io::Result<&File> {
        self.open.get(key).ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    pub fn block(&self) -> &[u8] {
        let start = self.buffer.as_ptr().align_offset(BLOCK);
        &self.buffer[start..start + BLOCK]
    }

    /// The next of the same pseudo-random offsets for all.
    pub fn offset(&mut self) -> u64 {
        next_offset(&mut self.random)
    }
}

/// The file of one of several writers.
pub fn writer(n: usize) -> String {
    format!("writer-{n}")
}

/// A linear congruence.
pub fn next_offset(random: &mut u64) -> u64 {
    *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*random >> 33) % BLOCKS * BLOCK as u64
}
