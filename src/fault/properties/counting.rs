//! Which request fires which rule, and what is counted: the engine against a model that was written from the contract.
//!
//! The model keeps maps and asks each rule in turn. It shares nothing with the engine but the words of operations.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};
use siphasher::sip::SipHasher13;

use super::{Request, SEED, compiled, config};
use crate::fault::{Decision, FileType, Firing, Op, Outcome, Plan, Rule, decide};

const SECOND: u64 = 1_000_000_000;
const PATHS: &[&str] = &["/a", "/b", "/dir/a", "/dir/b.wal"];

/// What a term does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Act {
    Error(i32),
    Latency(u64),
    Stall,
    /// A stall that ends in an error.
    Hang,
    Kill,
    Short,
    Off,
}

#[derive(Clone, Debug)]
struct Term {
    percent: u32,
    limit: Option<u64>,
    act: Act,
}

/// A rule as the model sees it.
#[derive(Clone, Debug)]
struct Sketch {
    ops: Vec<&'static str>,
    path: Option<&'static str>,
    regex: Option<&'static str>,
    pid: Option<u32>,
    uid: Option<u32>,
    offset: Option<(u64, u64)>,
    length: Option<(u64, u64)>,
    direct: Option<bool>,
    directory: Option<bool>,
    probability: f64,
    skip: u64,
    every: u64,
    times: Option<u64>,
    per: &'static str,
    after: u64,
    after_bytes: u64,
    after_rule: Option<usize>,
    cycle: Option<(u64, u64)>,
    life: Option<u64>,
    seed: Option<u64>,
    terms: Vec<Term>,
}

impl Term {
    fn text(&self) -> String {
        let percent = if self.percent == 100 { String::new() } else { format!("{}%", self.percent) };
        let limit = self.limit.map_or_else(String::new, |limit| format!("{limit}*"));
        let task = match self.act {
            Act::Error(errno) => format!("return({errno})"),
            Act::Latency(ms) => format!("sleep({ms})"),
            Act::Stall => "pause".into(),
            Act::Hang => "stall(then=error)".into(),
            Act::Kill => "kill(signal=SIGTERM)".into(),
            Act::Short => "short(max_bytes=1)".into(),
            Act::Off => "off".into(),
        };
        percent + &limit + &task
    }

    fn acts_on(&self, sketch: &Sketch, request: &Request) -> bool {
        let more_than_a_byte = request.range.is_some_and(|(_, length)| length > 1);
        let able = match (self.act, request.op) {
            (Act::Short, Op::Read) => request.direct != Some(true) || more_than_a_byte,
            (Act::Short, Op::Write) => more_than_a_byte,
            (Act::Short, _) => false,
            _ => true,
        };
        let words = if sketch.ops.is_empty() { &["*"][..] } else { &sketch.ops };
        able && words.iter().any(|word| means(word, request) && sketch.leaves(word, request.op))
    }
}

/// Does a word of `ops` mean the request?
fn means(word: &str, request: &Request) -> bool {
    match word {
        "*" => true,
        "data" => ["read", "write", "copy_file_range"].contains(&request.op.word()),
        "sync" => ["fsync", "fsyncdir", "flush"].contains(&request.op.word()),
        "truncate" => request.op.word() == "setattr" && request.truncates,
        "grow" => ["write", "copy_file_range", "fallocate"].contains(&request.op.word()) && request.grows,
        word => request.op.word() == word,
    }
}

const WITH_BYTES: &[&str] = &["read", "write", "copy_file_range", "fallocate", "setattr"];
const DIRECT_OR_NOT: &[&str] = &["read", "write", "open", "create"];

/// The operations of a group, and whether it has any of these.
fn has_some(group: &str, of: &[&str]) -> bool {
    let all: &[&str] = match group {
        "data" => &["read", "write", "copy_file_range"],
        "sync" => &["fsync", "fsyncdir", "flush"],
        "truncate" => &["setattr"],
        "grow" => &["write", "copy_file_range", "fallocate"],
        _ => WITH_BYTES,
    };
    all.iter().any(|op| of.contains(op))
}

impl Sketch {
    /// Conditions on bytes leave of a group those operations that they are about, if it has some; a single one stays.
    fn leaves(&self, word: &str, op: Op) -> bool {
        let stays = |of: &[&str]| word == op.word() || of.contains(&op.word()) || !has_some(word, of);
        ((self.offset.is_none() && self.length.is_none()) || stays(WITH_BYTES))
            && (self.direct.is_none() || stays(DIRECT_OR_NOT))
    }

    fn document(&self, name: &str) -> Value {
        let range = |(from, to): (u64, u64)| format!("{from}..{to}");
        let seconds = |count: u64| format!("{count}s");
        let some = |count: u64| (count > 0).then_some(count);
        let terms: Vec<String> = self.terms.iter().map(Term::text).collect();
        json!({
            "name": name,
            "match": {"ops": self.ops, "path": self.path, "path_regex": self.regex, "pid": self.pid, "uid": self.uid,
                "offset": self.offset.map(range), "length": self.length.map(range), "direct": self.direct,
                "type": self.directory.map(|is| if is { "directory" } else { "file" })},
            "trigger": {"probability": self.probability, "skip": self.skip, "every": self.every, "times": self.times,
                "per": self.per, "after": some(self.after).map(seconds), "after_bytes": some(self.after_bytes),
                "after_rule": self.after_rule.map(name_of), "up": self.cycle.map(|cycle| seconds(cycle.0)),
                "down": self.cycle.map(|cycle| seconds(cycle.1)), "for": self.life.map(seconds), "seed": self.seed},
            "fault": terms.join("->"),
        })
    }

    fn matches(&self, request: &Request) -> bool {
        let glob = |glob| match glob {
            "/*" => request.path.matches('/').count() == 1,
            "/dir/**" => request.path.starts_with("/dir/"),
            literal => request.path == literal,
        };
        let within = |(from, to): (u64, u64), value: u64| from <= value && value < to;
        let touches = |(from, to): (u64, u64)| {
            let (offset, length) = request.range?;
            let (offset, end) = (u128::from(offset), u128::from(offset) + u128::from(length));
            Some(offset < u128::from(to) && end > u128::from(from))
        };
        self.terms.iter().any(|term| term.act != Act::Off && term.acts_on(self, request))
            && self.path.is_none_or(glob)
            && self.regex.is_none_or(|end| request.path.ends_with(end.trim_end_matches('$')))
            && self.pid.is_none_or(|pid| pid == request.pid)
            && self.uid.is_none_or(|uid| uid == request.uid)
            && (!WITH_BYTES.contains(&request.op.word())
                || self.offset.is_none_or(|wanted| touches(wanted) == Some(true))
                    && self.length.is_none_or(|wanted| request.range.is_some_and(|(_, length)| within(wanted, length))))
            && (!DIRECT_OR_NOT.contains(&request.op.word())
                || self.direct.is_none_or(|wanted| request.direct == Some(wanted)))
            && self.directory.is_none_or(|wanted| wanted == (request.file_type == FileType::Directory))
            && self.life.is_none_or(|life| request.now_ns < life * SECOND)
    }
}

fn name_of(i: usize) -> String {
    format!("r{i}")
}

/// What one rule has counted, in the model.
#[derive(Clone, Debug, Default)]
struct Count {
    matches: u64,
    injections: u64,
    /// Has it fired, as of the end of a request?
    told: bool,
    scopes: HashMap<String, [u64; 3]>,
    terms: HashMap<usize, u64>,
}

const N: usize = 0;
const FIRED: usize = 1;
const BYTES: usize = 2;

struct Model<'a> {
    sketches: &'a [Sketch],
    counts: Vec<Count>,
}

/// A firing: the rule, its number, and what it does.
type Told = (String, u64, String);

/// A firing of the model, with what must be undone when it comes to nothing.
type Fired = (usize, usize, u64, String);

impl Model<'_> {
    fn new(sketches: &[Sketch]) -> Model<'_> {
        Model { sketches, counts: vec![Count::default(); sketches.len()] }
    }

    /// All firings of one request, in the order delays, kills, stall, outcome.
    fn decide(&mut self, request: &Request) -> Vec<Told> {
        let (mut delays, mut kills, mut stall, mut outcome) = (Vec::new(), Vec::new(), None::<Fired>, Vec::new());
        for i in 0..self.sketches.len() {
            let Some((term, nth, scope)) = self.ask(i, request) else { continue };
            let told = |what: String| (name_of(i), nth, what);
            match self.sketches[i].terms[term].act {
                Act::Latency(ms) => delays.push(told(format!("delay {}", ms * 1_000_000))),
                Act::Kill => kills.push(told("kill".into())),
                Act::Stall if stall.is_some() => self.undo((i, term, nth, scope)),
                Act::Stall => stall = Some((i, term, nth, scope)),
                Act::Hang => {
                    if let Some(first) = stall.replace((i, term, nth, scope)) {
                        self.undo(first);
                    }
                    break;
                }
                Act::Error(errno) => {
                    outcome.push(told(format!("error {errno}")));
                    break;
                }
                Act::Short => {
                    outcome.push(told("alter".into()));
                    break;
                }
                Act::Off => unreachable!(),
            }
        }
        self.counts.iter_mut().for_each(|count| count.told = count.injections > 0);
        let stall = stall.map(|(i, _, nth, _)| (name_of(i), nth, "stall".to_string()));
        delays.into_iter().chain(kills).chain(stall).chain(outcome).collect()
    }

    fn undo(&mut self, (i, term, _, scope): Fired) {
        let count = &mut self.counts[i];
        count.injections -= 1;
        count.scopes.get_mut(&scope).unwrap()[FIRED] -= 1;
        *count.terms.get_mut(&term).unwrap() -= 1;
    }

    /// The term that fires, the number of the injection, and whose count it is.
    fn ask(&mut self, i: usize, request: &Request) -> Option<(usize, u64, String)> {
        let sketch = &self.sketches[i];
        if !sketch.matches(request) {
            return None;
        }
        let awaited = sketch.after_rule.is_none_or(|other| self.counts[other].told);
        let count = &mut self.counts[i];
        count.matches += 1;
        let scope = match sketch.per {
            "file" => request.path.to_string(),
            "process" => request.pid.to_string(),
            _ => String::new(),
        };
        let counts = count.scopes.entry(scope.clone()).or_default();
        let before = counts[BYTES];
        counts[BYTES] = before.saturating_add(request.range.map_or(0, |(_, length)| length));
        let down = sketch.cycle.is_none_or(|(up, down)| request.now_ns / SECOND % (up + down) >= up);
        if before < sketch.after_bytes || request.now_ns < sketch.after * SECOND || !down || !awaited {
            return None;
        }
        counts[N] += 1;
        let n = counts[N];
        let draw = |which: u64| draw(sketch.seed.unwrap_or(SEED), which, &name_of(i), n, sketch.per, request.path);
        let regular = n > sketch.skip && (n - sketch.skip - 1).is_multiple_of(sketch.every);
        if !regular || draw(0) >= sketch.probability || sketch.times.is_some_and(|times| counts[FIRED] >= times) {
            return None;
        }
        for (t, term) in sketch.terms.iter().enumerate() {
            let used = count.terms.entry(t).or_default();
            let chosen = draw(256 + t as u64) < f64::from(term.percent) / 100.0;
            if !chosen || !term.acts_on(sketch, request) || term.limit.is_some_and(|limit| *used >= limit) {
                continue;
            }
            *used += 1;
            if term.act == Act::Off {
                return None;
            }
            counts[FIRED] += 1;
            count.injections += 1;
            return Some((t, count.injections, scope));
        }
        None
    }
}

/// The draws, which must be the same for ever: SipHash-1-3 of name, count and path, keyed by the seed and the draw's number.
fn draw(seed: u64, which: u64, name: &str, n: u64, per: &str, path: &str) -> f64 {
    let mut hasher = SipHasher13::new_with_keys(seed, which);
    hasher.write(name.as_bytes());
    hasher.write(&n.to_le_bytes());
    if per == "file" {
        let mut key = SipHasher13::new();
        key.write(path.as_bytes());
        hasher.write(&key.finish().to_le_bytes());
    }
    (hasher.finish() >> 11) as f64 * 0.5f64.powi(53)
}

/// What the engine says, in the words of the model.
fn told(decision: &Decision) -> Vec<Told> {
    let one = |firing: &Firing, what: String| {
        firing.note_told();
        (firing.rule.name.to_string(), firing.nth, what)
    };
    let delays = decision.delays.iter().map(|firing| one(firing, format!("delay {}", firing.delay_ns)));
    let kills = decision.kills.iter().map(|firing| one(firing, "kill".into()));
    let stall = decision.stall.iter().map(|firing| one(firing, "stall".into()));
    let outcome = match &decision.outcome {
        Outcome::Proceed => None,
        Outcome::Error(errno, firing) => Some(one(firing, format!("error {errno}"))),
        Outcome::Alter(firing) => Some(one(firing, "alter".into())),
    };
    delays.chain(kills).chain(stall).chain(outcome).collect()
}

fn rules(sketches: &[Sketch]) -> Vec<Arc<Rule>> {
    let rule = |(i, sketch): (usize, &Sketch)| Arc::new(compiled(sketch.document(&name_of(i))).unwrap());
    let rules: Vec<Arc<Rule>> = sketches.iter().enumerate().map(rule).collect();
    for (rule, sketch) in rules.iter().zip(sketches) {
        if let (Some(after), Some(other)) = (&rule.trigger.after_rule, sketch.after_rule) {
            after.link(rules[other].counters.clone());
        }
    }
    rules
}

/// The same rules among many that match nothing, each in another way.
fn among_others(rules: Vec<Arc<Rule>>, others: usize) -> Vec<Arc<Rule>> {
    let other = |i: usize| {
        let place = match i % 4 {
            0 => json!({"path": format!("/none/{i}/*")}),
            1 => json!({"pid": 900 + i}),
            2 => json!({"uid": 900 + i}),
            _ => json!({"uid": 900, "offset": format!("{}..{}", i * 512, i * 512 + 700), "path": "/dir/**"}),
        };
        let fault = json!({"kind": "error", "errno": "EPERM", "force": true});
        Arc::new(compiled(json!({"name": format!("other{i}"), "match": place, "fault": fault})).unwrap())
    };
    let share = others / (rules.len() + 1);
    let mut all: Vec<Arc<Rule>> = (0..share).map(other).collect();
    for (i, rule) in rules.into_iter().enumerate() {
        all.push(rule);
        all.extend((0..share).map(|k| other((i + 1) * share + k)));
    }
    all
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => select(vec![libc::EIO, libc::ENOMEM]).prop_map(Act::Error),
        3 => (1u64..50).prop_map(Act::Latency),
        1 => Just(Act::Stall),
        1 => Just(Act::Hang),
        1 => Just(Act::Kill),
        2 => Just(Act::Short),
    ]
}

fn terms() -> impl Strategy<Value = Vec<Term>> {
    let acts = || act().prop_map(|act| Term { percent: 100, limit: None, act });
    let off = prop_oneof![4 => act(), 1 => Just(Act::Off)];
    let term = (select(vec![100, 100, 50, 10]), prop::option::of(0u64..4), off)
        .prop_map(|(percent, limit, act)| Term { percent, limit, act });
    let several = (prop::collection::vec(term, 0..3), acts()).prop_map(|(mut terms, last)| {
        terms.push(last);
        terms
    });
    prop_oneof![2 => acts().prop_map(|term| vec![term]), 1 => several]
}

fn seldom<T: Clone + std::fmt::Debug + 'static>(values: &[T]) -> impl Strategy<Value = Option<T>> + use<T> {
    prop::option::weighted(0.2, select(values.to_vec()))
}

fn sketch() -> impl Strategy<Value = Sketch> {
    let ops = prop_oneof![
        2 => Just(vec![]),
        2 => prop::collection::vec(select(vec!["read", "write", "data", "*", "grow"]), 1..3),
        1 => select(vec![vec!["write", "fsync"], vec!["sync", "read"], vec!["open", "*"]]),
    ];
    let place = (
        ops,
        seldom(&["/*", "/dir/**", "/a"]),
        seldom(&["/b$", "wal$"]),
        seldom(&[1u32, 2]),
        seldom(&[0u32, 1]),
        seldom(&[(0u64, 4096u64), (4096, 8192), (1 << 20, u64::MAX)]),
        seldom(&[(0u64, 100u64), (100, 5000), (0, 1)]),
        seldom(&[true, false]),
        seldom(&[true, false]),
    );
    let when = (
        prop_oneof![3 => Just(1.0), 1 => Just(0.5), 1 => 0.0..1.0],
        0u64..3,
        select(vec![1u64, 1, 2, 3]),
        prop::option::of(1u64..4),
        select(vec!["mount", "file", "process"]),
        select(vec![0u64, 0, 0, 3]),
        select(vec![0u64, 0, 0, 5000, u64::MAX]),
        seldom(&[(0u64, 2u64), (2, 1), (3, 3)]),
        seldom(&[5u64, 10]),
        seldom(&[1u64, u64::MAX]),
    );
    (place, when, terms()).prop_map(|(place, when, terms)| {
        let (ops, path, regex, pid, uid, offset, length, direct, directory) = place;
        let (probability, skip, every, times, per, after, after_bytes, cycle, life, seed) = when;
        // Only reads and writes can be short, and naming others is refused.
        let is_short = terms.iter().any(|term: &Term| term.act == Act::Short);
        let named_others = ["fsync", "sync", "open"].iter().any(|word| ops.contains(word));
        let ops = if is_short && named_others { vec![] } else { ops };
        Sketch {
            ops,
            path,
            regex,
            pid,
            uid,
            offset,
            length,
            direct,
            directory,
            probability,
            skip,
            every,
            times,
            per,
            after,
            after_bytes,
            after_rule: None,
            cycle,
            life,
            seed,
            terms,
        }
    })
}

/// Some rules, of which one in a few waits for another.
fn sketches() -> impl Strategy<Value = Vec<Sketch>> {
    let waits = prop::option::weighted(0.2, any::<prop::sample::Index>());
    prop::collection::vec((sketch(), waits), 1..6).prop_map(|drawn| {
        let count = drawn.len();
        let after =
            |i: usize, waits: Option<prop::sample::Index>| waits.map(|at| at.index(count)).filter(|at| *at != i);
        let with = |(i, (sketch, waits))| Sketch { after_rule: after(i, waits), ..sketch };
        drawn.into_iter().enumerate().map(with).collect()
    })
}

/// A request, and how many seconds it comes after the one before.
fn request() -> impl Strategy<Value = (Request, u64)> {
    let range = prop_oneof![
        4 => (select(vec![0u64, 1, 512, 4095, 4096, 8191, 8192, 1 << 21]), select(vec![0u64, 1, 99, 100, 4096])),
        1 => (select(vec![u64::MAX, u64::MAX - 1, 1 << 63]), select(vec![0u64, 1, u64::MAX])),
    ];
    let op = select(vec![
        Op::Read,
        Op::Write,
        Op::Write,
        Op::CopyFileRange,
        Op::Fallocate,
        Op::Fsync,
        Op::Setattr,
        Op::Open,
    ]);
    let who = (1u32..4, 0u32..3, select(PATHS.to_vec()));
    (op, who, prop::option::weighted(0.8, range), any::<[bool; 4]>(), prop::option::of(any::<bool>()), 0u64..3)
        .prop_map(|(op, (pid, uid, path), range, [truncates, grows, known, directory], direct, later)| {
            let file_type = if directory { FileType::Directory } else { FileType::File };
            (Request { op, path, pid, uid, range, direct, file_type, truncates, grows, now_ns: 0, known }, later / 2)
        })
}

fn requests(most: usize) -> impl Strategy<Value = Vec<Request>> {
    prop::collection::vec(request(), 1..most).prop_map(|mut drawn| {
        let mut now_ns = 0;
        for (request, later) in &mut drawn {
            now_ns += *later * SECOND;
            request.now_ns = now_ns;
        }
        drawn.into_iter().map(|(request, _)| request).collect()
    })
}

/// Nothing but counts decides: no time, no bytes, no other rule, and one term that decides whenever its turn comes.
fn counted() -> impl Strategy<Value = Sketch> {
    sketch().prop_map(|sketch| Sketch {
        after: 0,
        after_bytes: 0,
        cycle: None,
        life: None,
        terms: vec![Term { percent: 100, limit: None, act: Act::Error(5) }],
        ..sketch
    })
}

proptest! {
    #![proptest_config(config(70))]

    /// Decisions and counts are those of the model, and other rules that match nothing change none of it.
    #[test]
    fn the_engine_decides_and_counts_as_the_model(sketches in sketches(), requests in requests(60), others in 20usize..90) {
        let mut model = Model::new(&sketches);
        let few = Plan::new(1, rules(&sketches));
        let many = Plan::new(2, among_others(rules(&sketches), others));
        for request in &requests {
            let wanted = model.decide(request);
            prop_assert_eq!(&told(&decide(&few, request)), &wanted, "alone: {:?}", request);
            prop_assert_eq!(&told(&decide(&many, request)), &wanted, "among others: {:?}", request);
        }
        let counted = |plan: &Plan| -> Vec<(u64, u64)> {
            let ours = plan.rules.iter().filter(|rule| rule.name.starts_with('r'));
            ours.map(|rule| (rule.counters.matches.load(Relaxed), rule.counters.injections.load(Relaxed))).collect()
        };
        let wanted: Vec<(u64, u64)> = model.counts.iter().map(|count| (count.matches, count.injections)).collect();
        prop_assert_eq!(&counted(&few), &wanted);
        prop_assert_eq!(&counted(&many), &wanted);
    }
}

proptest! {
    #![proptest_config(config(30))]

    /// Whichever thread comes first: as many matches as requests that match, as many firings as one thread would get.
    #[test]
    fn threads_change_no_count(sketch in counted(), requests in requests(200)) {
        let sketches = [sketch];
        let mut model = Model::new(&sketches);
        requests.iter().for_each(|request| drop(model.decide(request)));
        let plan = Plan::new(1, rules(&sketches));
        let part = |thread: usize| requests.iter().skip(thread).step_by(4);
        let count = |thread| part(thread).filter(|request| !decide(&plan, *request).is_nothing()).count();
        let fired = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|thread| scope.spawn(move || count(thread))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap() as u64).sum::<u64>()
        });
        let counters = &plan.rules[0].counters;
        prop_assert_eq!(counters.matches.load(Relaxed), model.counts[0].matches);
        prop_assert_eq!(counters.injections.load(Relaxed), model.counts[0].injections);
        prop_assert_eq!(fired, model.counts[0].injections);
    }

    /// Of terms with counts each acts so often and no more, whatever the threads.
    #[test]
    fn terms_are_used_up_once(first in 0u64..40, second in 1u64..40, each in 1usize..60, times in prop::option::of(1u64..60)) {
        let fault = format!("{first}*return(EIO)->{second}*return(ENOSPC)");
        let rule = compiled(json!({"name": "r", "fault": fault, "trigger": {"times": times}})).unwrap();
        let plan = Plan::new(1, vec![Arc::new(rule)]);
        let request = Request { op: Op::Write, ..plain() };
        let count = || (0..each).fold([0; 2], |[eio, enospc], _| match decide(&plan, &request).outcome {
            Outcome::Error(libc::EIO, _) => [eio + 1, enospc],
            Outcome::Error(libc::ENOSPC, _) => [eio, enospc + 1],
            _ => [eio, enospc],
        });
        let done = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(count)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).fold([0; 2], |sum, part| [sum[0] + part[0], sum[1] + part[1]])
        });
        let all = (4 * each as u64).min(times.unwrap_or(u64::MAX)).min(first + second);
        prop_assert_eq!(done[0] + done[1], all);
        prop_assert_eq!(plan.rules[0].counters.injections.load(Relaxed), all);
        prop_assert!(done[0] <= first && done[1] <= second, "{:?}", done);
        prop_assert!(times.is_some() || done[0] == first.min(4 * each as u64), "{:?}", done);
    }

    /// Counted by file, what happens to a file does not depend on what is done to others meanwhile, nor on the threads.
    #[test]
    fn by_file_the_same_seed_gives_the_same_injections(sketches in sketches(), requests in requests(80)) {
        let by_file = |sketch: Sketch| {
            let mut terms = sketch.terms;
            terms.iter_mut().for_each(|term| term.limit = None);
            Sketch { per: "file", after_rule: None, terms, ..sketch }
        };
        let sketches: Vec<Sketch> = sketches.into_iter().map(by_file).collect();
        let of_file = |plan: &Plan, path: &str| -> Vec<(usize, String, String)> {
            let mine = requests.iter().filter(|request| request.path == path).enumerate();
            mine.flat_map(|(k, request)| told(&decide(plan, request)).into_iter().map(move |(rule, _, what)| (k, rule, what))).collect()
        };
        let plan = Plan::new(1, rules(&sketches));
        let one_after_the_other: Vec<_> = PATHS.iter().map(|path| of_file(&plan, path)).collect();
        let plan = Plan::new(2, rules(&sketches));
        let (of_file, plan) = (&of_file, &plan);
        let at_once: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = PATHS.iter().map(|path| scope.spawn(move || of_file(plan, path))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        prop_assert_eq!(one_after_the_other, at_once);
    }

    /// What a firing came to nothing for can happen again; numbers and counts agree.
    #[test]
    fn a_revoked_firing_is_none(times in 1u64..5, revoked in prop::collection::btree_set(0usize..12, 0..6)) {
        let rule = compiled(json!({"name": "r", "fault": "drop", "trigger": {"times": times}})).unwrap();
        let plan = Plan::new(1, vec![Arc::new(rule)]);
        let mut stand = 0;
        for i in 0..20 {
            let Outcome::Alter(firing) = decide(&plan, &plain()).outcome else { continue };
            match BTreeSet::contains(&revoked, &i) {
                true => firing.revoke(),
                false => stand += 1,
            }
        }
        prop_assert_eq!(stand, times);
        prop_assert_eq!(plan.rules[0].counters.injections.load(Relaxed), times);
    }
}

fn plain() -> Request {
    Request {
        op: Op::Write,
        path: "/a",
        pid: 1,
        uid: 0,
        range: Some((0, 4096)),
        direct: Some(false),
        file_type: FileType::File,
        truncates: false,
        grows: false,
        now_ns: 0,
        known: false,
    }
}

/// What one file may not have any more takes nothing from the terms that another file is owed.
#[test]
fn a_term_is_used_up_by_firings_alone() {
    let trigger = json!({"per": "file", "times": 1});
    let rule = compiled(json!({"name": "r", "fault": "2*return(EIO)", "trigger": trigger})).unwrap();
    let plan = Plan::new(1, vec![Arc::new(rule)]);
    let fired = ["/a", "/a", "/a", "/b", "/b"].map(|path| !decide(&plan, &Request { path, ..plain() }).is_nothing());
    assert_eq!(fired, [true, false, false, true, false]);
}

/// `grow` means the operations that the kind can act on.
#[test]
fn a_kind_on_what_grows_acts_on_no_other_operation() {
    let rule = compiled(json!({"name": "r", "fault": "short(max_bytes=1)", "match": {"ops": ["grow"]}})).unwrap();
    let plan = Plan::new(1, vec![Arc::new(rule)]);
    let fires = [Op::Write, Op::Fallocate, Op::CopyFileRange]
        .map(|op| !decide(&plan, &Request { op, grows: true, ..plain() }).is_nothing());
    assert_eq!(fires, [true, false, false]);
}
