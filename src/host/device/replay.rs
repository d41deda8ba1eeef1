//! Marks in the log of writes, and what the disk was at one of them, written to a second disk.
//!
//! On a helper thread. The lock of the record is held for a mark, and until a replay has its files open: writing takes as long
//! as the log is. Must never: write over what is there.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::asked::{Filesystem, Ground};
use super::log::{Log, LogError, Replayed};
use super::record::Record;
use super::{Job, PART, Refused, absolute, at, disk, invalid, show, tell};
use crate::host::tool::{self, ask};
use crate::host::{Machine, shown};

/// The kernel writes the log a moment later.
const LATER: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// A mark has to fit into a sector of 512 bytes, with the entry.
const LONGEST_MARK: usize = 400;

/// A mark for the log.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AskedMark {
    mark: String,
}

/// What is to be replayed, and where.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AskedReplay {
    to: String,
    into: String,
    /// A disk that holds something may be overwritten.
    #[serde(default)]
    force: bool,
}

fn logged(job: &Job, name: &str) -> Result<(Record, PathBuf), Refused> {
    let record = job.ready(name)?;
    let Some(log) = &record.log else {
        let hint = "make it with a log: device create … --log-image FILE --log-size S";
        return Err(Refused::conflict(format!("device {name} logs no writes")).hint(hint));
    };
    // The file under a loop device is what the kernel writes to; reading the device could give what was there before.
    let source = log.ground.path().clone();
    Ok((record, source))
}

fn check_mark(field: &str, mark: &str) -> Result<(), Refused> {
    let fits = !mark.is_empty() && mark.len() <= LONGEST_MARK && mark.chars().all(|c| c.is_ascii_graphic());
    match fits {
        true => Ok(()),
        false => Err(invalid(field, format!("{field}: {mark:?} cannot be a mark"))
            .hint("letters, digits and signs without spaces, at most 400")),
    }
}

/// Puts a mark into the log: what was durable by now comes before it.
///
/// # Errors
/// When there is no log, or dmsetup says no.
pub fn mark(machine: &Machine, name: &str, asked: &AskedMark) -> Result<Value, Refused> {
    check_mark("mark", &asked.mark)?;
    let mut job = Job::begin(machine, name)?;
    let (record, _) = logged(&job, name)?;
    job.tools.run(&["dmsetup", "message", &record.log_name(), "0", "mark", &asked.mark])?;
    job.tell_more(&record, "marked", json!({"mark": asked.mark}));
    let mut answer = job.done(&record, None);
    answer["mark"] = asked.mark.as_str().into();
    Ok(answer)
}

/// Writes what the log has up to a mark.
///
/// # Errors
/// When there is no such mark, or the target is in use or there already: then nothing was written.
pub fn replay(machine: &Machine, name: &str, asked: &AskedReplay) -> Result<Value, Refused> {
    check_mark("to", &asked.to)?;
    let target = absolute("into", &asked.into)?;
    let _at_work = machine.begin();
    let job = Job::begin(machine, name)?;
    let (record, source) = logged(&job, name)?;
    let log = File::open(&source).map_err(at(source.display()))?;
    drop(job);
    let is_disk = fs::metadata(&target).is_ok_and(|found| !found.is_file());
    let size = disk::bytes(record.sectors);
    let ground = if is_disk { Ground::Device(target) } else { Ground::NewImage(target, size) };
    // Any filesystem: whatever is there is overwritten.
    let ground = disk::examine(&ground, Filesystem::Ext4, asked.force)?;
    if matches!(record.log.as_ref().map(|log| &log.ground), Some(Ground::Device(_))) {
        ask(&["blockdev".as_ref(), "--flushbufs".as_ref(), source.as_os_str()])?;
    }
    let log = Source { place: source, file: log };
    wait_for_mark(&log, &asked.to)?;
    let done = write(&log, &asked.to, &ground, size)?;
    let into = ground.path();
    let told_as = shown(into);
    let undo = matches!(ground, Ground::NewImage(..)).then(|| tool::line(&["rm".as_ref(), into.as_os_str()]));
    let told = json!({"to": asked.to, "into": told_as, "entries": done.entries});
    tell(machine, &record, "replayed", told);
    // It may be another one by now.
    let now = machine.state.peek::<Record>(PART).into_iter().find(|now| now.id == record.id);
    let mut answer = show::done(&now.unwrap_or(record), Vec::new(), None, Vec::new());
    answer["replayed"] = json!({
        "to": asked.to, "into": told_as, "entries": done.entries, "writes": done.writes, "discards": done.discards,
        "bytes": done.bytes, "undo": undo,
    });
    Ok(answer)
}

/// The log, which stays open: its name may go while it is read.
struct Source {
    place: PathBuf,
    file: File,
}

impl Source {
    fn read(&self) -> Result<Log<BufReader<&File>>, LogError> {
        (&self.file).rewind()?;
        Log::open(BufReader::new(&self.file))
    }
}

fn wait_for_mark(source: &Source, mark: &str) -> Result<(), Refused> {
    let until = Instant::now() + LATER;
    loop {
        let marks = source.read().and_then(|mut log| log.marks());
        match marks {
            Ok(marks) if marks.iter().any(|known| known == mark) => return Ok(()),
            Ok(marks) if Instant::now() > until => {
                return Err(failed(&source.place, LogError::NoMark { wanted: mark.into(), marks }));
            }
            Err(error) if Instant::now() > until => return Err(failed(&source.place, error)),
            _ => std::thread::sleep(LOOK_AGAIN),
        }
    }
}

fn write(source: &Source, mark: &str, ground: &Ground, size: u64) -> Result<Replayed, Refused> {
    let into = ground.path();
    let is_new = matches!(ground, Ground::NewImage(..));
    let mut options = OpenOptions::new();
    options.write(true).create_new(is_new).mode(0o600);
    if !is_new {
        // A disk is nobody else's for as long.
        options.custom_flags(libc::O_EXCL);
    }
    let target = options.open(into).map_err(at(into.display()))?;
    let written = (|| {
        if is_new {
            target.set_len(size)?;
        }
        let mut buffered = BufWriter::new(&target);
        let done = source.read()?.replay(mark, size, &mut buffered)?;
        buffered.flush()?;
        target.sync_all()?;
        Ok(done)
    })();
    written.map_err(|error| {
        if is_new {
            let _ = fs::remove_file(into);
        }
        failed(&source.place, error)
    })
}

fn failed(source: &Path, error: LogError) -> Refused {
    let refused = Refused::conflict(format!("{}: {error}", source.display()));
    match error {
        LogError::NoMark { marks, .. } => refused.hint(format!("it has: {}", marks.join(" "))),
        LogError::NoLog => refused.hint("the kernel writes the first part of the log with the first mark"),
        _ => refused,
    }
}
