//! One event: what was done to which request of whom, or which state changed.
//!
//! Pure data. Readers build it on the hot path without allocating: names and labels are shared with the rule, the path
//! with the inode. Only the control thread turns it into JSON.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::fault::errno;

/// An event in its place on the stream.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its number in the ring, from 1.
    pub seq: u64,
    /// Wall clock, nanoseconds since the epoch.
    pub time_ns: u64,
    pub monotonic_ns: u64,
    pub body: Body,
}

// Most are injections, and those are made without allocating.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug)]
pub enum Body {
    Injection(Injection),
    Change(Arc<Change>),
}

/// One firing of a rule, and what the program saw of it.
#[derive(Clone, Debug, Default)]
pub struct Injection {
    pub rule: Arc<str>,
    /// The kind's word; `space` for a refusal by the capacity.
    pub kind: &'static str,
    pub op: &'static str,
    /// As seen under the mountpoint; any bytes.
    pub path: Option<Arc<[u8]>>,
    /// Of an operation with two paths, the new one.
    pub to: Option<Arc<[u8]>>,
    pub ino: u64,
    pub fh: Option<u64>,
    pub offset: Option<u64>,
    /// Bytes asked for.
    pub length: Option<u64>,
    /// Bytes that were done all the same, of a request cut short.
    pub done: Option<u64>,
    /// Bytes of the file that are other than was asked for: damaged, lost, or written in the wrong place.
    pub changed: Option<Arc<Vec<Range<u64>>>>,
    /// The process; 0 for write-back by the kernel, or a caller outside our pid namespace.
    pub pid: u32,
    /// The thread, as FUSE tells it.
    pub tid: u32,
    pub uid: u32,
    pub comm: Comm,
    pub errno: Option<i32>,
    pub delay_ns: u64,
    /// The rule's how-manieth injection.
    pub nth: u64,
    /// The kernel asked again for what had already failed: the same error, not a new one.
    pub repeat: bool,
    /// The reader that decided.
    pub worker: u32,
    pub labels: Option<Arc<BTreeMap<String, String>>>,
}

/// The name of a process, as the kernel keeps it: at most 15 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Comm([u8; 16]);

impl Comm {
    pub fn new(name: &[u8]) -> Comm {
        let mut comm = [0; 16];
        let length = name.len().min(15);
        comm[..length].copy_from_slice(&name[..length]);
        Comm(comm)
    }

    pub fn text(&self) -> String {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(self.0.len());
        String::from_utf8_lossy(&self.0[..end]).into_owned()
    }
}

/// A change of state: its event name and what belongs to it.
#[derive(Debug)]
pub struct Change {
    pub event: &'static str,
    pub detail: Map<String, Value>,
}

impl Record {
    /// The event's name on the stream.
    pub fn event(&self) -> &'static str {
        match &self.body {
            Body::Injection(_) => "injection",
            Body::Change(change) => change.event,
        }
    }

    /// The JSON of the contract.
    pub fn json(&self, boot_id: &str, instance: &str) -> Value {
        let time = UNIX_EPOCH + Duration::from_nanos(self.time_ns);
        let mut object = Map::new();
        object.insert("id".into(), format!("{boot_id}-{}", self.seq).into());
        object.insert("event".into(), self.event().into());
        object.insert("time".into(), rfc3339(time).into());
        object.insert("monotonic_ns".into(), self.monotonic_ns.into());
        object.insert("instance".into(), instance.into());
        match &self.body {
            Body::Injection(injection) => injection.fill(&mut object),
            Body::Change(change) => object.extend(change.detail.clone()),
        }
        Value::Object(object)
    }
}

/// A moment as the contract writes it.
pub fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_nanos(time).to_string()
}

impl Injection {
    fn fill(&self, object: &mut Map<String, Value>) {
        let text = |path: &Option<Arc<[u8]>>| path.as_ref().map(|path| String::from_utf8_lossy(path).into_owned());
        let (path, to) = (text(&self.path), text(&self.to));
        let errno = self.errno.map(|n| errno::name(n).map_or_else(|| n.to_string(), str::to_string));
        let place = |range: &Range<u64>| json!({"offset": range.start, "length": range.end - range.start});
        let changed: Option<Vec<Value>> = self.changed.as_ref().map(|ranges| ranges.iter().map(place).collect());
        let fields = json!({
            "rule": &*self.rule, "kind": self.kind, "op": self.op, "path": path, "to": to, "ino": self.ino, "fh": self.fh,
            "offset": self.offset, "length": self.length, "done": self.done, "changed": changed, "pid": self.pid, "tid": self.tid,
            "uid": self.uid, "comm": self.comm.text(), "errno": errno, "delay_ns": self.delay_ns, "nth": self.nth,
            "repeat": self.repeat, "worker": self.worker, "labels": self.labels.as_deref().cloned().unwrap_or_default(),
        });
        if let Value::Object(fields) = fields {
            object.extend(fields);
        }
    }
}
