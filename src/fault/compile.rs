//! From what a client sent to a rule that can be asked, or to the list of what is wrong with it.
//!
//! Pure: called by the control thread. Everything is checked before anything is changed; each problem names its place
//! and, where there is one, the nearest right word.

use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use globset::{Glob, GlobBuilder, GlobMatcher};

use super::errno::{self, Refused};
use super::kind::{Distribution, Fault, KINDS, Kind, LONGEST_DELAY_NS, Latency, Then};
use super::op::{Op, OpSet};
use super::plan::{Rule, Trigger};
use super::spec::{FaultSpec, MatchSpec, RuleSpec, TriggerSpec};

/// Names that clients cannot take.
pub const RESERVED: &[&str] = &["mode", "space"];

/// Something wrong with a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// JSON pointer to the place, `#/match/ops/0`.
    pub pointer: String,
    pub detail: String,
    pub hint: Option<String>,
    /// Declared by the contract, and only not built yet.
    pub not_yet: bool,
}

impl Problem {
    pub fn new(pointer: impl Into<String>, detail: impl Into<String>) -> Problem {
        Problem { pointer: pointer.into(), detail: detail.into(), hint: None, not_yet: false }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Problem {
        self.hint = Some(hint.into());
        self
    }

    /// With "did you mean", when a known word is near enough.
    pub fn nearest<'a>(self, word: &str, known: impl Iterator<Item = &'a str> + Clone) -> Problem {
        match nearest(word, known.clone()) {
            Some(near) => self.hint(format!("did you mean \"{near}\"?")),
            None => self.hint(format!("one of: {}", known.collect::<Vec<_>>().join(" "))),
        }
    }
}

/// The known word most like this one, if any is like it at all.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_lowercase();
    known
        .map(|candidate| (strsim::damerau_levenshtein(&lower, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len().max(word.len()) / 3)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// What the compiler takes from the mount.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    /// Seed of rules that bring none.
    pub seed: u64,
    /// Monotonic nanoseconds: lives are counted from here.
    pub now_ns: u64,
    pub created: SystemTime,
}

/// Checks and compiles one rule.
///
/// # Errors
/// All that is wrong with it, in the order of the contract.
pub fn compile(spec: RuleSpec, defaults: Defaults) -> Result<Rule, Vec<Problem>> {
    let mut check = Check(Vec::new());
    check.name(&spec.name);
    if spec.required {
        check.not_yet("#/required");
    }
    let place = check.place(&spec.r#match);
    let (trigger, life_ns) = check.trigger(&spec.trigger, defaults.seed);
    let fault = check.fault(&spec.fault);
    let ops = check.ops(&spec.r#match.ops, fault.as_ref());
    match fault {
        Some(fault) if check.0.is_empty() => Ok(Rule {
            name: spec.name.as_str().into(),
            ops,
            path: place.path,
            pid: spec.r#match.pid,
            uid: spec.r#match.uid,
            offset: place.offset,
            trigger,
            fault,
            labels: (!spec.labels.is_empty()).then(|| Arc::new(spec.labels.clone())),
            deadline_ns: life_ns.map(|life| defaults.now_ns.saturating_add(life)),
            counters: Arc::default(),
            created: defaults.created,
            spec,
        }),
        _ => Err(check.0),
    }
}

/// The problems found so far.
/// A glob over paths below the mountpoint: `*` stops at a slash, `**` does not.
///
/// # Errors
/// When it is none.
pub fn path_glob(glob: &str) -> Result<Glob, globset::Error> {
    GlobBuilder::new(glob).literal_separator(true).build()
}

struct Check(Vec<Problem>);

struct Place {
    path: Option<GlobMatcher>,
    offset: Option<Range<u64>>,
}

impl Check {
    fn found(&mut self, problem: Problem) {
        self.0.push(problem);
    }

    fn not_yet(&mut self, pointer: &str) {
        let detail = format!("{} is not built yet", words(pointer));
        self.0.push(Problem { not_yet: true, ..Problem::new(pointer, detail) });
    }

    fn name(&mut self, name: &str) {
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.len() > 64 || !name.chars().all(good) {
            let detail = format!("name: {name:?} is not 1 to 64 letters, digits, dots, dashes, underscores");
            self.found(Problem::new("#/name", detail));
        } else if RESERVED.contains(&name) {
            let detail = format!("name: {name:?} is reserved");
            self.found(Problem::new("#/name", detail).hint("use PUT /v1/mode or PUT /v1/space"));
        }
    }

    fn place(&mut self, spec: &MatchSpec) -> Place {
        for (field, value) in [
            ("path_regex", &spec.path_regex),
            ("tree", &spec.tree),
            ("comm", &spec.comm),
            ("gid", &spec.gid),
            ("length", &spec.length),
            ("direct", &spec.direct),
            ("type", &spec.r#type),
        ] {
            if value.is_some() {
                self.not_yet(&format!("#/match/{field}"));
            }
        }
        Place {
            path: spec.path.as_deref().and_then(|path| self.path(path)),
            offset: spec.offset.as_deref().and_then(|range| self.range("#/match/offset", range)),
        }
    }

    fn path(&mut self, path: &str) -> Option<GlobMatcher> {
        if !path.starts_with('/') {
            let detail = format!("match.path: {path:?} does not start with \"/\", the mountpoint");
            self.found(Problem::new("#/match/path", detail).hint(format!("did you mean \"/{path}\"?")));
            return None;
        }
        match path_glob(path) {
            Ok(glob) => Some(glob.compile_matcher()),
            Err(error) => {
                self.found(Problem::new("#/match/path", format!("match.path: {error}")));
                None
            }
        }
    }

    fn range(&mut self, pointer: &str, text: &str) -> Option<Range<u64>> {
        let parsed = text.split_once("..").and_then(|(from, to)| {
            let start = if from.is_empty() { 0 } else { bytes(from)? };
            let end = if to.is_empty() { u64::MAX } else { bytes(to)? };
            (start < end).then_some(start..end)
        });
        if parsed.is_none() {
            let detail = format!("{}: {text:?} is not a range of bytes", words(pointer));
            self.found(Problem::new(pointer, detail).hint("write \"0..1MiB\", \"4KiB..\" or \"..512\""));
        }
        parsed
    }

    fn ops(&mut self, ops: &[String], fault: Option<&Fault>) -> OpSet {
        let dropping = fault == Some(&Fault::Drop);
        let mut set = OpSet::default();
        for (i, word) in ops.iter().enumerate() {
            let pointer = format!("#/match/ops/{i}");
            let Some(part) = OpSet::parse(word) else {
                let detail = format!("match.ops[{i}]: unknown operation {word:?}");
                let known = OpSet::words().collect::<Vec<_>>();
                self.found(Problem::new(pointer, detail).nearest(word, known.into_iter()));
                continue;
            };
            if dropping && part.droppable().is_empty() {
                let detail = format!("match.ops[{i}]: {word:?} cannot be dropped");
                let hint = "a drop loses write, copy_file_range, fallocate, truncate, fsync or fsyncdir";
                self.found(Problem::new(pointer, detail).hint(hint));
            }
            set = set.with(part);
        }
        match (ops.is_empty(), dropping) {
            (true, true) => OpSet::of(&[Op::Write]),
            (true, false) => OpSet::all(),
            (false, true) => set.droppable(),
            (false, false) => set,
        }
    }

    fn trigger(&mut self, spec: &TriggerSpec, seed: u64) -> (Trigger, Option<u64>) {
        if !(0.0..=1.0).contains(&spec.probability) {
            let detail = format!("trigger.probability: {} is not between 0 and 1", spec.probability);
            self.found(Problem::new("#/trigger/probability", detail));
        }
        if spec.every == 0 {
            let detail = "trigger.every: 0 would never fire";
            self.found(Problem::new("#/trigger/every", detail).hint("1 fires on each match"));
        }
        if spec.per.as_ref().is_some_and(|per| per != "mount") {
            self.not_yet("#/trigger/per");
        }
        for (field, value) in [
            ("after", &spec.after),
            ("after_bytes", &spec.after_bytes),
            ("after_rule", &spec.after_rule),
            ("up", &spec.up),
            ("down", &spec.down),
        ] {
            if value.is_some() {
                self.not_yet(&format!("#/trigger/{field}"));
            }
        }
        if spec.times == Some(0) {
            self.found(Problem::new("#/trigger/times", "trigger.times: 0 would never fire").hint("null has no limit"));
        }
        let life = spec.r#for.as_deref().and_then(|text| self.duration("#/trigger/for", text));
        let trigger = Trigger {
            probability: spec.probability,
            skip: spec.skip,
            every: spec.every.max(1),
            times: spec.times,
            seed: spec.seed.unwrap_or(seed),
        };
        (trigger, life)
    }

    fn duration(&mut self, pointer: &str, text: &str) -> Option<u64> {
        match nanoseconds(text) {
            Some(ns) => Some(ns),
            None => {
                let detail = format!("{}: {text:?} is not a duration", words(pointer));
                self.found(Problem::new(pointer, detail).hint("write \"10ms\", \"3s\" or \"5m\""));
                None
            }
        }
    }

    fn fault(&mut self, spec: &FaultSpec) -> Option<Fault> {
        let Some(kind) = Kind::find(&spec.kind) else {
            let detail = format!("fault.kind: unknown kind {:?}", spec.kind);
            let known = KINDS.iter().map(|kind| kind.word);
            self.found(Problem::new("#/fault/kind", detail).nearest(&spec.kind, known));
            return None;
        };
        self.attributes(kind, spec);
        if !kind.built {
            let detail = format!("fault.kind: {:?} is not built yet", kind.word);
            self.0.push(Problem { not_yet: true, ..Problem::new("#/fault/kind", detail) });
            return None;
        }
        match kind.word {
            "error" => self.errno(spec.errno.as_deref(), None).map(|errno| Fault::Error { errno }),
            "drop" => Some(Fault::Drop),
            "latency" => self.latency(spec).map(Fault::Latency),
            "stall" => self.then(spec).map(|then| Fault::Stall { then }),
            _ => None,
        }
    }

    /// Refuses attributes that the kind does not take.
    fn attributes(&mut self, kind: &Kind, spec: &FaultSpec) {
        let typed = [
            ("errno", spec.errno.is_some()),
            ("delay", spec.delay.is_some()),
            ("jitter", spec.jitter.is_some()),
            ("distribution", spec.distribution.is_some()),
            ("then", spec.then.is_some()),
        ];
        let given = typed.iter().filter(|(_, given)| *given).map(|(name, _)| *name);
        let rest = spec.rest.iter().filter(|(_, value)| !value.is_null());
        let neutral = |name: &str, value: &serde_json::Value| name == "timing" && value == "before";
        let rest = rest.filter(|(name, value)| !neutral(name, value)).map(|(name, _)| name.as_str());
        for name in given.chain(rest) {
            if kind.attributes.contains(&name) {
                continue;
            }
            let pointer = format!("#/fault/{name}");
            if kind.later.contains(&name) {
                self.not_yet(&pointer);
                continue;
            }
            let detail = format!("fault.{name}: the kind {:?} has no such attribute", kind.word);
            let known = kind.attributes.iter().chain(kind.later).copied();
            self.found(Problem::new(pointer, detail).nearest(name, known.chain(["kind"])));
        }
    }

    fn errno(&mut self, word: Option<&str>, default: Option<i32>) -> Option<i32> {
        let Some(word) = word else {
            if default.is_none() {
                let detail = "fault.errno: the kind \"error\" needs one";
                self.found(Problem::new("#/fault/errno", detail).hint("EIO, ENOSPC, …"));
            }
            return default;
        };
        let detail = match errno::parse(word) {
            Ok(errno) => return Some(errno),
            Err(Refused::Unknown) => {
                let known = errno::names().filter(|name| *name != "ENOSYS").collect::<Vec<_>>();
                let problem = Problem::new("#/fault/errno", format!("fault.errno: unknown error {word:?}"));
                self.found(problem.nearest(word, known.into_iter()));
                return None;
            }
            Err(Refused::Sticky) => {
                "fault.errno: the kernel takes ENOSYS to mean \"never again\" and stops asking for the whole mount"
            }
            Err(Refused::OutOfRange) => {
                "fault.errno: the kernel rejects numbers outside 1 to 511 and leaves the caller hanging"
            }
        };
        self.found(Problem::new("#/fault/errno", detail));
        None
    }

    fn latency(&mut self, spec: &FaultSpec) -> Option<Latency> {
        let Some(delay) = spec.delay.as_deref() else {
            let detail = "fault.delay: the kind \"latency\" needs one";
            self.found(Problem::new("#/fault/delay", detail).hint("write \"10ms\""));
            return None;
        };
        let delay_ns = self.duration("#/fault/delay", delay)?;
        if delay_ns > LONGEST_DELAY_NS {
            let detail = "fault.delay: longer than a day";
            self.found(Problem::new("#/fault/delay", detail).hint("use the kind \"stall\""));
        }
        let jitter_ns = match spec.jitter.as_deref() {
            Some(text) => self.duration("#/fault/jitter", text)?,
            None => 0,
        };
        let distribution = match spec.distribution.as_deref() {
            None if spec.jitter.is_some() => Distribution::Uniform,
            None => Distribution::Fixed,
            Some(word) => self.distribution(word)?,
        };
        Some(Latency { delay_ns, jitter_ns, distribution })
    }

    fn distribution(&mut self, word: &str) -> Option<Distribution> {
        let parsed = Distribution::parse(word);
        if parsed.is_none() {
            let problem =
                Problem::new("#/fault/distribution", format!("fault.distribution: unknown distribution {word:?}"));
            self.found(problem.nearest(word, Distribution::WORDS.iter().copied()));
        }
        parsed
    }

    fn then(&mut self, spec: &FaultSpec) -> Option<Then> {
        match spec.then.as_deref() {
            None | Some("ok") if spec.errno.is_some() => {
                let detail = "fault.errno: a stall that ends in \"ok\" tells no error";
                self.found(Problem::new("#/fault/errno", detail).hint("set \"then\": \"error\""));
                None
            }
            None | Some("ok") => Some(Then::Ok),
            Some("error") => self.errno(spec.errno.as_deref(), Some(libc::EIO)).map(Then::Error),
            Some(word) => {
                let problem = Problem::new("#/fault/then", format!("fault.then: unknown ending {word:?}"));
                self.found(problem.nearest(word, ["ok", "error"].into_iter()));
                None
            }
        }
    }
}

/// A number of bytes: `4096`, `4KiB`, `1MiB`.
pub fn bytes(text: &str) -> Option<u64> {
    bytesize::ByteSize::from_str(text.trim()).ok().map(|size| size.as_u64())
}

/// A duration in nanoseconds: `10ms`, `3s`, `5m`.
pub fn nanoseconds(text: &str) -> Option<u64> {
    let duration = humantime::parse_duration(text.trim()).ok()?;
    u64::try_from(duration.as_nanos()).ok()
}

/// `#/match/ops` as people write it: `match.ops`.
fn words(pointer: &str) -> String {
    pointer.trim_start_matches("#/").replace('/', ".")
}
