//! One directory with many files: ten times as many as the size of a batch.
//!
//! Runs on the main thread; no locks. The operations follow one another in each round: the files are made, looked at in
//! three ways, and removed. Before each look what the kernel was told of them has expired, so that the mount is asked.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::files::Files;
use crate::operation::timed;

/// The peers and we let the kernel keep names and attributes for a second.
const EXPIRED: Duration = Duration::from_millis(1100);

fn directory(files: &Files) -> PathBuf {
    files.dir.join("many")
}

fn paths(files: &Files, size: usize) -> impl Iterator<Item = PathBuf> {
    let dir = directory(files);
    (0..10 * size).map(move |n| dir.join(format!("file-{n:06}")))
}

fn let_names_expire(files: &Files) {
    std::thread::sleep(EXPIRED.saturating_sub(files.looked.elapsed()));
}

pub fn create(files: &mut Files, size: usize) -> io::Result<Vec<Duration>> {
    fs::create_dir(directory(files))?;
    let times = paths(files, size).map(|path| timed(|| File::create(&path).map(drop))).collect();
    files.looked = Instant::now();
    times
}

pub fn stat(files: &mut Files, size: usize) -> io::Result<Vec<Duration>> {
    let_names_expire(files);
    let times = paths(files, size).map(|path| timed(|| fs::symlink_metadata(&path).map(drop))).collect();
    files.looked = Instant::now();
    times
}

/// The time of the whole, divided by the files: one sample.
fn each_file(files: &mut Files, size: usize, look: impl FnOnce(PathBuf) -> io::Result<usize>) -> io::Result<Duration> {
    let_names_expire(files);
    let (dir, start) = (directory(files), Instant::now());
    let seen = look(dir)?;
    let took = start.elapsed();
    files.looked = Instant::now();
    match seen == 10 * size {
        true => Ok(took / seen as u32),
        false => Err(io::Error::other(format!("{seen} names of {}", 10 * size))),
    }
}

pub fn readdir(files: &mut Files, size: usize) -> io::Result<Vec<Duration>> {
    let list = |dir| fs::read_dir(dir)?.try_fold(0, |seen, entry| entry.map(|_| seen + 1));
    Ok(vec![each_file(files, size, list)?])
}

/// As `ls -l` does it.
pub fn readdir_stat(files: &mut Files, size: usize) -> io::Result<Vec<Duration>> {
    let look = |seen: usize, entry: io::Result<fs::DirEntry>| entry?.metadata().map(|_| seen + 1);
    let list = |dir| fs::read_dir(dir)?.try_fold(0, look);
    Ok(vec![each_file(files, size, list)?])
}

pub fn unlink(files: &mut Files, size: usize) -> io::Result<Vec<Duration>> {
    let times = paths(files, size).map(|path| timed(|| fs::remove_file(&path))).collect();
    fs::remove_dir(directory(files))?;
    times
}
