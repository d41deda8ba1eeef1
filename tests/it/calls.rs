//! System calls as programs make them, on each way to a file, for the tests of the engine.
//!
//! One call of a function here is one system call, so that what a test sees is what the kernel told a program.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use serde_json::{Value, json};

use crate::support::Mounted;

pub const PAGE: usize = 4096;

/// How a program gets at a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through the page cache.
    Cached,
    /// Past it.
    Direct,
    /// Through it, at the end of the file.
    Append,
}

/// When it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    BeforeArming,
    AfterArming,
}

pub const WAYS: [Way; 3] = [Way::Cached, Way::Direct, Way::Append];
pub const TIMES: [Opened; 2] = [Opened::BeforeArming, Opened::AfterArming];

/// Every way with every time.
pub fn ways() -> impl Iterator<Item = (Way, Opened)> {
    WAYS.into_iter().flat_map(|way| TIMES.map(|opened| (way, opened)))
}

/// An open file, and the way to it.
pub struct Handle {
    pub file: File,
    pub way: Way,
}

impl Handle {
    pub fn open(way: Way, mounted: &Mounted, name: &str) -> Handle {
        let flags = match way {
            Way::Cached => 0,
            Way::Direct => libc::O_DIRECT,
            Way::Append => libc::O_APPEND,
        };
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).custom_flags(flags).open(mounted.path(name));
        Handle { file: file.expect("the file opens"), way }
    }

    /// One `pwrite`. Of a file that is open for appending, the kernel puts it at the end.
    pub fn write(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        match self.way {
            Way::Direct => aligned(data.len(), |buffer| {
                buffer.copy_from_slice(data);
                self.file.write_at(buffer, offset)
            }),
            _ => self.file.write_at(data, offset),
        }
    }

    /// One `pread`: the bytes that the program got.
    pub fn read(&self, length: usize, offset: u64) -> io::Result<Vec<u8>> {
        let read = |buffer: &mut [u8]| {
            // What is not read must not look like zeros of the filesystem.
            buffer.fill(0xEE);
            let got = self.file.read_at(buffer, offset)?;
            Ok(buffer[..got].to_vec())
        };
        match self.way {
            Way::Direct => aligned(length, read),
            _ => read(&mut vec![0; length]),
        }
    }
}

/// Memory that direct I/O takes.
fn aligned<T>(length: usize, act: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut buffer = vec![0; length + PAGE];
    let start = buffer.as_ptr().align_offset(PAGE);
    act(&mut buffer[start..start + length])
}

/// A file of bytes that tell their place, made behind the mount's back.
pub fn prepared(mounted: &Mounted, name: &str, size: usize) -> Vec<u8> {
    let contents = pattern(size, 0);
    std::fs::write(mounted.backing.join(name), &contents).expect("a file");
    contents
}

/// Bytes of which each is other than that of another `salt` at its place, and none is zero.
pub fn pattern(size: usize, salt: usize) -> Vec<u8> {
    (0..size).map(|i| ((i * 7 + i / PAGE + salt * 101) % 255 + 1) as u8).collect()
}

/// Opens a file before or after a rule is armed.
pub fn armed(mounted: &Mounted, name: &str, (way, opened): (Way, Opened), rule: Value) -> Handle {
    let early = (opened == Opened::BeforeArming).then(|| {
        let handle = Handle::open(way, mounted, name);
        // What it reads is in the kernel's cache.
        handle.read(PAGE, 0).expect("it can be read");
        handle
    });
    mounted.rule("r", rule);
    early.unwrap_or_else(|| Handle::open(way, mounted, name))
}

/// A rule that fires once on one operation.
pub fn once(op: &str, fault: Value) -> Value {
    json!({"match": {"ops": [op]}, "trigger": {"times": 1}, "fault": fault})
}

/// What is in the backing directory.
pub fn stored(mounted: &Mounted, name: &str) -> Vec<u8> {
    std::fs::read(mounted.backing.join(name)).expect("the backing file")
}

/// What a reader of the mount sees who comes now.
pub fn seen(mounted: &Mounted, name: &str) -> Vec<u8> {
    std::fs::read(mounted.path(name)).expect("the file can be read")
}

/// The contents, with other bytes at a place; longer, with zeros, if need be.
pub fn patched(contents: &[u8], offset: usize, data: &[u8]) -> Vec<u8> {
    let mut patched = contents.to_vec();
    patched.resize(contents.len().max(offset + data.len()), 0);
    patched[offset..offset + data.len()].copy_from_slice(data);
    patched
}

/// The error of a call; 0 for none.
pub fn errno<T>(result: io::Result<T>) -> i32 {
    result.err().map_or(0, |error| error.raw_os_error().unwrap_or(-1))
}

/// Injections of a rule that are no repetitions by the kernel.
pub fn counted(mounted: &Mounted, rule: &str) -> Vec<Value> {
    let mut events = mounted.injections(rule);
    events.retain(|event| event["repeat"] == false);
    events
}

/// The only injection of a rule.
pub fn only(mounted: &Mounted, rule: &str) -> Value {
    let mut events = counted(mounted, rule);
    assert_eq!(events.len(), 1, "{events:?}");
    events.remove(0)
}

/// The bytes of the file that an event tells to be other than was asked for.
pub fn changed(event: &Value) -> Vec<usize> {
    let places = event["changed"].as_array().unwrap_or_else(|| panic!("{event}"));
    let number = |place: &Value, name: &str| place[name].as_u64().expect("a number") as usize;
    places.iter().flat_map(|place| number(place, "offset")..number(place, "offset") + number(place, "length")).collect()
}

/// The places at which two contents differ.
pub fn differences(one: &[u8], other: &[u8]) -> Vec<usize> {
    assert_eq!(one.len(), other.len(), "the size");
    (0..one.len()).filter(|at| one[*at] != other[*at]).collect()
}

/// A number that the server tells of a rule.
pub fn number(mounted: &Mounted, rule: &str, key: &str) -> u64 {
    let body = mounted.http("GET", &format!("/v1/rules/{rule}"), None).body;
    body[key].as_u64().unwrap_or_else(|| panic!("{body}"))
}

/// Makes every reader see what the disk has.
pub fn evict(mounted: &Mounted) {
    let answer = mounted.http("POST", "/v1/evict", Some(&json!({})));
    assert_eq!((answer.status, answer.body["pending"].as_array().map(Vec::len)), (200, Some(0)), "{answer:?}");
}

/// Fails unless two contents are the same; says where they differ, and not what they are.
#[track_caller]
pub fn same(found: &[u8], wanted: &[u8], what: &str) {
    let differ: Vec<usize> = (0..found.len().min(wanted.len())).filter(|i| found[*i] != wanted[*i]).collect();
    let (sizes, ends) = ((found.len(), wanted.len()), (differ.first(), differ.last()));
    assert!(found == wanted, "{what}: sizes {sizes:?}, {} bytes differ, {ends:?} the first and last", differ.len());
}
