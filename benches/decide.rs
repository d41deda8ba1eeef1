//! What one decision costs: the idle check, and plans of 0, 1 and 1,000 rules that fail to match in different ways.
//!
//! Runs on criterion's thread, with no mount and no daemon. The facts are a request's as `fs::serve` presents them: which
//! paths match is known to the inode after the first request of a plan. Must never assert a time.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use criterion::{Criterion, criterion_group, criterion_main};
use globset::GlobMatcher;
use nemesisfs::fault::compile::Defaults;
use nemesisfs::fault::decide::key_of;
use nemesisfs::fault::{Facts, FileType, Op, Plan, Rule, RuleSpec, compile, decide};
use nemesisfs::fs::arming::Arming;
use parking_lot::Mutex;
use serde_json::{Value, json};

const PATH: &[u8] = b"/pg_wal/000000010000000000000001";
const OUR_PID: u32 = 4711;

/// A 4 KiB write of the process [`OUR_PID`] to [`PATH`].
struct Write {
    /// As the inode keeps them: by plan, under a lock.
    bits: Mutex<Option<(u64, Arc<[u64]>)>>,
}

impl Write {
    fn new() -> Write {
        Write { bits: Mutex::new(None) }
    }
}

impl Facts for Write {
    fn op(&self) -> Op {
        Op::Write
    }

    fn uid(&self) -> u32 {
        112
    }

    fn gid(&self) -> u32 {
        112
    }

    fn in_tree(&self, root: u32) -> bool {
        root == OUR_PID
    }

    fn comm_matches(&self, name: &GlobMatcher) -> bool {
        name.is_match("postgres")
    }

    fn bytes(&self) -> u64 {
        4096
    }

    fn direct(&self) -> Option<bool> {
        Some(false)
    }

    fn file_type(&self) -> Option<FileType> {
        Some(FileType::File)
    }

    fn path_key(&self) -> u64 {
        key_of(PATH)
    }

    /// A daemon looks the thread up in a cache; here the thread is the process.
    fn pid(&self) -> u32 {
        black_box(OUR_PID)
    }

    fn range(&self) -> Option<(u64, u64)> {
        Some((8192, 4096))
    }

    fn truncates(&self) -> bool {
        false
    }

    fn grows(&self) -> bool {
        false
    }

    fn path_bits(&self, plan: &Plan) -> Option<Arc<[u64]>> {
        let mut cached = self.bits.lock();
        match &*cached {
            Some((id, bits)) if *id == plan.id => Some(bits.clone()),
            _ => {
                let bits: Arc<[u64]> = plan.path_bits(std::iter::once(PATH)).into();
                *cached = Some((plan.id, bits.clone()));
                Some(bits)
            }
        }
    }

    fn path_matches(&self, rule: &Rule) -> bool {
        rule.path_matches(std::iter::once(PATH))
    }

    fn now_ns(&self) -> u64 {
        0
    }
}

/// A name, and what such rules match: never this request, but for `fires`.
fn kinds_of_rules() -> [(&'static str, Value); 6] {
    [
        ("other path", json!({"ops": ["write"], "path": "/base/**"})),
        ("other op", json!({"ops": ["fsync"], "path": "/pg_wal/**"})),
        ("other pid", json!({"ops": ["write"], "pid": 1})),
        ("other uid", json!({"ops": ["write"], "uid": 1})),
        ("other range", json!({"ops": ["write"], "offset": "1MiB..2MiB"})),
        ("fires", json!({"ops": ["write"], "path": "/pg_wal/**"})),
    ]
}

fn spec(name: String, matches: &Value) -> RuleSpec {
    let rule = json!({"name": name, "match": matches, "fault": {"kind": "error", "errno": "EIO"}});
    serde_json::from_value(rule).expect("a rule")
}

/// So many rules; of those that fire only the last does, so that all the others are asked first.
fn plan(count: usize, kind: &str) -> Plan {
    let of = |wanted: &str| kinds_of_rules().into_iter().find(|(name, _)| *name == wanted).expect("a kind").1;
    let (most, last) = (of(if kind == "fires" { "other pid" } else { kind }), of(kind));
    let defaults = Defaults { seed: 1, now_ns: 0, created: SystemTime::UNIX_EPOCH };
    let rule = |i: usize| {
        let matches = if i + 1 == count { &last } else { &most };
        Arc::new(compile(spec(format!("r{i}"), matches), defaults).expect("a good rule"))
    };
    Plan::new(1, (0..count).map(rule).collect())
}

fn idle_check(c: &mut Criterion) {
    let idle = Arming::new(1);
    c.bench_function("idle check, no rules", |b| b.iter(|| black_box(&idle).concerns(black_box(Op::Write))));
    let armed = Arming::new(1);
    let reads = json!({"ops": ["read"]});
    armed.put(spec("r".into(), &reads), 0).expect("a good rule");
    c.bench_function("idle check, a rule for another op", |b| b.iter(|| black_box(&armed).concerns(Op::Write)));
}

fn decisions(c: &mut Criterion) {
    let request = Write::new();
    let empty = Plan::new(0, Vec::new());
    c.bench_function("decide, 0 rules", |b| b.iter(|| decide(black_box(&empty), black_box(&request))));
    for count in [1, 1000] {
        for (kind, _) in kinds_of_rules() {
            let (plan, request) = (plan(count, kind), Write::new());
            let decision = decide(&plan, &request);
            assert_eq!(decision.is_nothing(), kind != "fires", "{kind}");
            c.bench_function(&format!("decide, {count} rules, {kind}"), |b| {
                b.iter(|| decide(black_box(&plan), black_box(&request)));
            });
        }
    }
}

/// What the first request to a file after a change of the rules pays.
fn path_bits(c: &mut Criterion) {
    let plan = plan(1000, "other path");
    c.bench_function("path bits of 1000 rules, not cached", |b| {
        b.iter(|| plan.path_bits(black_box(std::iter::once(PATH))));
    });
}

fn short() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
}

criterion_group! { name = benches; config = short(); targets = idle_check, decisions, path_bits }
criterion_main!(benches);
