//! What the fuzz targets do with their bytes: rules are read, checked, compiled and asked, as the daemon does it.
//!
//! Runs on the fuzzer's thread; a test of the project runs the seeds through the same functions. No I/O, no locks. A panic is
//! what is looked for, so each function must hold for any bytes at all.

use std::sync::Arc;
use std::time::SystemTime;

use globset::GlobMatcher;
use nemesisfs::client::rule_file;
use nemesisfs::fault::compile::Defaults;
use nemesisfs::fault::decide::key_of;
use nemesisfs::fault::{
    Decision, Facts, Fault, FileType, Firing, Op, Outcome, Plan, Problem, Rule, RuleSpec, compile, decide, document,
    term, why,
};
use serde_json::Value;

/// A JSON document, as a client sends it.
pub fn rule(bytes: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<Value>(bytes) {
        ask(document::rules(value));
    }
}

/// Terms, and a rule on everything that has them.
pub fn terms(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Err(problem) = term::parse(text) {
        has_its_place(&problem);
    }
    ask(document::rule(Value::from(text)).map(|spec| vec![RuleSpec { name: "terms".into(), ..spec }]));
}

/// The text of a file of rules.
pub fn toml(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match rule_file::parse(text) {
        Ok(set) => ask(document::rules(set)),
        Err(error) => assert!(!error.is_empty()),
    }
}

const CREATED: SystemTime = SystemTime::UNIX_EPOCH;

/// Compiles the rules of a document, and asks those that are good for decisions.
fn ask(specs: Result<Vec<RuleSpec>, Problem>) {
    let specs = match specs {
        Ok(specs) => specs,
        Err(problem) => return has_its_place(&problem),
    };
    let mut rules = Vec::new();
    for spec in specs {
        reads_back(&spec);
        match compile(spec, Defaults { seed: 7, now_ns: 1_000, created: CREATED }) {
            Ok(rule) => rules.push(Arc::new(rule)),
            Err(problems) => problems.iter().for_each(has_its_place),
        }
    }
    let plan = Plan::new(1, rules);
    for request in requests() {
        carry_out(decide(&plan, &request), &request);
        for rule in &plan.rules {
            let _ = (rule.state(request.now_ns), rule.next_turn_ns(request.now_ns), why::unfired(rule, request.now_ns));
        }
    }
    for rule in &plan.rules {
        let firings = rule.counters.injections.load(std::sync::atomic::Ordering::Relaxed);
        assert!(firings <= rule.counters.matches.load(std::sync::atomic::Ordering::Relaxed), "{rule:?}");
    }
}

/// A problem says where and what.
fn has_its_place(problem: &Problem) {
    assert!(problem.pointer == "#" || problem.pointer.starts_with("#/"), "{problem:?}");
    assert!(!problem.detail.is_empty(), "{problem:?}");
}

/// What is shown of a rule can be sent again, and is the same rule.
fn reads_back(spec: &RuleSpec) {
    let shown = serde_json::to_value(spec).expect("a rule is a document");
    let read = document::from_value::<RuleSpec>(shown).expect("the document of a rule is a rule");
    assert_eq!(read, *spec);
}

/// Does to a request what the filesystem would do by this decision.
fn carry_out(decision: Decision, request: &Request) {
    let _ = decision.delay_ns();
    for firing in decision.delays.iter().chain(&decision.kills).chain(&decision.stall) {
        let _ = firing.fault().word();
    }
    match &decision.outcome {
        Outcome::Proceed => {}
        Outcome::Error(errno, _) => assert!((1..512).contains(errno), "{errno}"),
        Outcome::Alter(firing) => alter(firing, request),
    }
}

fn alter(firing: &Firing, request: &Request) {
    let (offset, length) = request.range.unwrap_or_default();
    match firing.fault() {
        Fault::Short(portion) => assert!(portion.of(length).is_none_or(|part| part > 0 && part < length)),
        Fault::Torn { keep, .. } => {
            let end = offset.saturating_add(length);
            let ranges = keep.ranges(offset, length);
            assert!(
                ranges.iter().all(|range| offset <= range.start && range.end <= end),
                "{ranges:?} of {offset}..{end}"
            );
        }
        Fault::Corrupt(corrupt) => {
            let mut data = [0x5a; 700];
            let damaged = corrupt.damage(&mut data, |k| firing.draw(k));
            let changed = data.iter().filter(|byte| **byte != 0x5a).count();
            assert_eq!(damaged.iter().map(ExactSizeIterator::len).sum::<usize>(), changed);
        }
        Fault::Misdirect(elsewhere) => assert_ne!(elsewhere.of(offset), Some(offset)),
        Fault::Error { errors, .. } => assert!((1..512).contains(&errors.pick(request.op, firing.draw(0)))),
        _ => {}
    }
}

/// One request.
struct Request {
    op: Op,
    path: &'static [u8],
    id: u32,
    range: Option<(u64, u64)>,
    now_ns: u64,
}

/// Usual requests, and such as only a hostile program makes.
fn requests() -> Vec<Request> {
    const RANGES: [Option<(u64, u64)>; 8] = [
        None,
        Some((0, 4096)),
        Some((1000, 1)),
        Some((4096, 0)),
        Some((8192, 1 << 20)),
        Some((u64::MAX, u64::MAX)),
        Some((u64::MAX - 100, 50)),
        Some((i64::MAX as u64, 1 << 40)),
    ];
    const PATHS: [&[u8]; 4] = [b"/", b"/wal/0001", b"/a/b/c.sst", b"/\xff\xfe\n"];
    let ops = [Op::Write, Op::Read, Op::Fsync, Op::Setattr, Op::Lookup, Op::Fallocate, Op::Rename];
    let request = |i: usize| Request {
        op: ops[i % ops.len()],
        path: PATHS[i % PATHS.len()],
        id: [0, 1, 112, u32::MAX][i / 3 % 4],
        range: RANGES[i % RANGES.len()],
        now_ns: [1_000, 2_000_000_000, 0, u64::MAX][i / 16 % 4],
    };
    (0..64).map(request).collect()
}

impl Facts for Request {
    fn op(&self) -> Op {
        self.op
    }
    fn uid(&self) -> u32 {
        self.id
    }
    fn gid(&self) -> u32 {
        self.id
    }
    fn pid(&self) -> u32 {
        self.id
    }
    fn in_tree(&self, root: u32) -> bool {
        root == self.id
    }
    fn comm_matches(&self, name: &GlobMatcher) -> bool {
        name.is_match("postgres")
    }
    fn range(&self) -> Option<(u64, u64)> {
        self.range
    }
    fn bytes(&self) -> u64 {
        self.range.map_or(0, |(_, length)| length)
    }
    fn direct(&self) -> Option<bool> {
        self.range.map(|(offset, _)| offset % 512 == 0)
    }
    fn file_type(&self) -> Option<FileType> {
        Some(if self.path.ends_with(b"/") { FileType::Directory } else { FileType::File })
    }
    fn truncates(&self) -> bool {
        self.op == Op::Setattr
    }
    fn grows(&self) -> bool {
        matches!(self.op, Op::Write | Op::CopyFileRange | Op::Fallocate)
    }
    fn path_bits(&self, plan: &Plan) -> Option<Arc<[u64]>> {
        plan.is_large().then(|| plan.path_bits([self.path].into_iter()).into())
    }
    fn path_matches(&self, rule: &Rule) -> bool {
        rule.path_matches([self.path].into_iter())
    }
    fn path_key(&self) -> u64 {
        key_of(self.path)
    }
    fn now_ns(&self) -> u64 {
        self.now_ns
    }
}
