//! What is done and timed: the list, and the operations on contents.
//!
//! Runs on the main thread, but for the writers of which there are several at once; no locks. An operation gives its time
//! itself, for what it must do before is not part of it. Must never depend on the target.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::files::{BLOCK, Files, WRITERS, next_offset, writer};
use crate::{metadata, sqlite};

pub struct Operation {
    pub name: &'static str,
    pub run: Run,
    /// Is it nothing but writes, so that a server that drops them is the floor of it?
    pub is_write: bool,
}

pub enum Run {
    /// One after the other: each is timed, and there are so many times fewer of them than the size of a batch.
    Each(fn(&mut Files) -> io::Result<Duration>, usize),
    /// A whole batch of a size at once, in every so manieth round.
    Batch(fn(&mut Files, usize) -> io::Result<Vec<Duration>>, usize),
}

/// Whole directories are made and taken away in every tenth round; their operations build on one another.
const SELDOM: usize = 10;

pub const OPERATIONS: &[Operation] = &[
    Operation { name: "4 KiB write, buffered", run: Run::Each(write_buffered, 1), is_write: true },
    Operation { name: "4 KiB write, O_DIRECT", run: Run::Each(write_direct, 1), is_write: true },
    Operation { name: "512 B append", run: Run::Each(append, 1), is_write: true },
    Operation { name: "4 KiB write + fsync", run: Run::Each(write_fsync, 40), is_write: false },
    Operation { name: "4 KiB write, 4 writers", run: Run::Batch(several_writers, 1), is_write: true },
    Operation { name: "4 KiB read, cached", run: Run::Each(read_cached, 1), is_write: false },
    Operation { name: "4 KiB read, cold", run: Run::Each(read_cold, 1), is_write: false },
    Operation { name: "create + unlink", run: Run::Each(create_unlink, 1), is_write: false },
    Operation { name: "stat", run: Run::Each(stat, 1), is_write: false },
    Operation { name: "10k: create", run: Run::Batch(metadata::create, SELDOM), is_write: false },
    Operation { name: "10k: stat", run: Run::Batch(metadata::stat, SELDOM), is_write: false },
    Operation { name: "10k: readdir", run: Run::Batch(metadata::readdir, SELDOM), is_write: false },
    Operation { name: "10k: readdir + stat", run: Run::Batch(metadata::readdir_stat, SELDOM), is_write: false },
    Operation { name: "10k: unlink", run: Run::Batch(metadata::unlink, SELDOM), is_write: false },
    Operation { name: "SQLite insert, WAL", run: Run::Each(sqlite::insert_wal, 10), is_write: false },
    Operation { name: "SQLite insert, journal", run: Run::Each(sqlite::insert_journal, 10), is_write: false },
];

impl Operation {
    pub fn is_due(&self, round: usize) -> bool {
        match self.run {
            Run::Each(..) => true,
            Run::Batch(_, every) => round.is_multiple_of(every),
        }
    }

    /// One target's turn. The first operations only warm the caches up.
    pub fn batch(&self, files: &mut Files, size: usize) -> io::Result<Vec<Duration>> {
        let (act, share) = match self.run {
            Run::Batch(act, _) => return act(files, size),
            Run::Each(act, share) => (act, share),
        };
        let count = size.div_ceil(share);
        let warming = count.div_ceil(20);
        let mut times = Vec::with_capacity(count);
        for n in 0..count + warming {
            match act(files) {
                Ok(time) if n >= warming => times.push(time),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Unsupported => break,
                Err(error) => return Err(error),
            }
        }
        // The appended file does not grow for ever.
        files.file("append")?.set_len(0)?;
        Ok(times)
    }
}

pub fn timed(act: impl FnOnce() -> io::Result<()>) -> io::Result<Duration> {
    let start = Instant::now();
    act()?;
    Ok(start.elapsed())
}

fn write_buffered(files: &mut Files) -> io::Result<Duration> {
    let offset = files.offset();
    let (file, block) = (files.file("write")?, files.block());
    timed(|| file.write_all_at(block, offset))
}

fn write_direct(files: &mut Files) -> io::Result<Duration> {
    let offset = files.offset();
    let (file, block) = (files.file("direct")?, files.block());
    timed(|| file.write_all_at(block, offset))
}

fn append(files: &mut Files) -> io::Result<Duration> {
    let (mut file, record) = (files.file("append")?, &files.block()[..512]);
    timed(|| file.write_all(record))
}

fn write_fsync(files: &mut Files) -> io::Result<Duration> {
    let offset = files.offset();
    let (file, block) = (files.file("write")?, files.block());
    timed(|| file.write_all_at(block, offset).and_then(|()| file.sync_all()))
}

/// Several threads at once; what is timed is each write. The mean tells the throughput.
fn several_writers(files: &mut Files, size: usize) -> io::Result<Vec<Duration>> {
    let (block, together) = (files.block(), Barrier::new(WRITERS));
    let opened = (0..WRITERS).map(|n| files.file(&writer(n))).collect::<io::Result<Vec<_>>>()?;
    let write = |n: usize| {
        let mut random = n as u64;
        together.wait();
        let one = |_| {
            let offset = next_offset(&mut random);
            timed(|| opened[n].write_all_at(block, offset))
        };
        (0..size).map(one).collect::<io::Result<Vec<_>>>()
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..WRITERS)
            .map(|n| {
                scope.spawn({
                    let write = &write;
                    move || write(n)
                })
            })
            .collect();
        let panicked = |_| Err(io::Error::other("a writer panicked"));
        let times = threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked));
        Ok(times.collect::<io::Result<Vec<_>>>()?.concat())
    })
}

fn read_cached(files: &mut Files) -> io::Result<Duration> {
    let offset = files.offset();
    let file = files.file("read")?;
    let mut block = [0; BLOCK];
    file.read_exact_at(&mut block, offset)?;
    timed(|| file.read_exact_at(&mut block, offset))
}

/// The cache of the file itself is dropped; what lies below a mount keeps its own.
fn read_cold(files: &mut Files) -> io::Result<Duration> {
    let offset = files.offset();
    let file = files.file("read")?;
    let mut block = [0; BLOCK];
    posix_fadvise(file, offset as i64, BLOCK as i64, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    timed(|| file.read_exact_at(&mut block, offset))
}

fn create_unlink(files: &mut Files) -> io::Result<Duration> {
    files.created += 1;
    let path = files.dir.join(format!("created-{}", files.created));
    timed(|| {
        drop(File::create(&path)?);
        fs::remove_file(&path)
    })
}

fn stat(files: &mut Files) -> io::Result<Duration> {
    let path = files.dir.join("written");
    timed(|| fs::symlink_metadata(&path).map(drop))
}
