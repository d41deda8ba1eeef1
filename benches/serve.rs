//! What our own part of a whole request costs, from the adapter's call to the reply: idle, with rules that do not match in
//! every way there is, and failed by a rule, with its event.
//!
//! Runs on criterion's thread in the place of a reader, with no mount: replies go nowhere. The backing file is real, so a
//! write that is done costs one `pwrite` more than one that fails. Must never assert a time.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fs::File;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use nemesisfs::event::Ring;
use nemesisfs::fault::RuleSpec;
use nemesisfs::fs::Core;
use nemesisfs::fs::call::{Answer, Call, Caller, Origin, Reply};
use serde_json::{Value, json};

/// One file of a backing directory, open.
struct Mounted {
    core: Arc<Core>,
    ino: u64,
    fh: u64,
    _dir: tempfile::TempDir,
}

/// This thread calls, so that there is a process to tell of.
fn caller() -> Caller {
    Caller { unique: 1, uid: 0, gid: 0, tid: std::process::id() }
}

impl Mounted {
    fn new() -> Mounted {
        // Memory, where there is such a directory: the disk is not what is measured.
        let parent = std::path::Path::new("/dev/shm");
        let parent = if parent.is_dir() { parent.to_path_buf() } else { std::env::temp_dir() };
        let dir = tempfile::Builder::new().prefix("nemesisfs-serve-").tempdir_in(parent).expect("a directory");
        std::fs::write(dir.path().join("file"), [0; 4096]).expect("a file");
        let backing = File::open(dir.path()).expect("the directory");
        let core = Arc::new(Core::new(backing, Arc::new(Ring::default()), 1).expect("a directory that is fit"));
        let perform = |call| core.perform(&caller(), &call, &mut Reply::None).expect("an answer");
        let lookup = Call::Lookup { parent: 1, name: Cow::Borrowed(OsStr::new("file")) };
        let Answer::Entry(entry) = perform(lookup) else { panic!("no entry") };
        let ino = entry.attr.ino.0;
        let Answer::Opened(fh, _) = perform(Call::Open { ino, flags: libc::O_WRONLY }) else { panic!("not opened") };
        Mounted { core, ino, fh, _dir: dir }
    }

    fn arm(&self, count: usize, matches: &Value) {
        for n in 0..count {
            let rule = json!({"name": format!("r{n}"), "match": matches, "fault": {"kind": "error", "errno": "EIO"}});
            let spec: RuleSpec = serde_json::from_value(rule).expect("a rule");
            self.core.arming.put(spec, 0).expect("a good rule");
        }
    }

    fn write(&self) {
        let (ino, fh, data) = (self.ino, self.fh, Cow::Borrowed(&[0x5a; 4096][..]));
        let call = Call::Write { ino, fh, offset: 0, data, flags: libc::O_WRONLY, origin: Origin::default() };
        self.core.serve(black_box(caller()), black_box(call), Reply::None);
    }
}

/// Rules that do not match this write, each for another reason.
fn elsewhere() -> [(&'static str, Value); 5] {
    [
        ("op", json!({"ops": ["fsync"], "path": "/file"})),
        ("path", json!({"ops": ["write"], "path": "/elsewhere/**"})),
        ("process", json!({"ops": ["write"], "path": "/file", "pid": 1})),
        ("uid", json!({"ops": ["write"], "path": "/file", "uid": 4711})),
        ("range", json!({"ops": ["write"], "path": "/file", "offset": "1MiB..2MiB"})),
    ]
}

fn passing(c: &mut Criterion) {
    let idle = Mounted::new();
    c.bench_function("write, no rules", |b| b.iter(|| idle.write()));
    for (other, matches) in elsewhere() {
        let mounted = Mounted::new();
        mounted.arm(1000, &matches);
        c.bench_function(&format!("write, 1000 rules, other {other}"), |b| b.iter(|| mounted.write()));
        assert!(mounted.core.arming.rules().iter().all(|rule| rule.counters.injections.load(Relaxed) == 0), "{other}");
    }
}

fn failing(c: &mut Criterion) {
    let mounted = Mounted::new();
    mounted.arm(1, &json!({"ops": ["write"], "path": "/file"}));
    c.bench_function("write that a rule fails, with its event", |b| b.iter(|| mounted.write()));
}

fn short() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
}

criterion_group! { name = benches; config = short(); targets = passing, failing }
criterion_main!(benches);
