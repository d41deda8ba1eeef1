//! From what a client sent to a rule that can be asked, or to the list of what is wrong with it.
//!
//! Pure: called by the control thread. Everything is checked before anything is changed; each problem names its place
//! and, where there is one, the nearest right word.

mod faults;
mod kinds;
mod places;
mod triggers;
mod values;

use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use super::op::OpSet;
use super::plan::{Counters, Place, Rule};
use super::spec::RuleSpec;

pub use places::{name_glob, path_glob, rooted_glob};
pub use triggers::SHORTEST_CYCLE_NS;

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

    /// The detail, for who is told the place beside it.
    pub fn at_its_place(&self) -> &str {
        let place = words(&self.pointer);
        let rest = self.detail.strip_prefix(&place).and_then(|rest| rest.strip_prefix(": "));
        rest.unwrap_or(&self.detail)
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
    let letters = lower.chars().count();
    // No two words are nearer than their lengths: what a client has made long costs nothing.
    let most = |candidate: &str| 1 + candidate.len().max(word.len()) / 3;
    known
        .filter(|candidate| candidate.chars().count().abs_diff(letters) <= most(candidate))
        .map(|candidate| (strsim::damerau_levenshtein(&lower, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= most(candidate))
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
    let place = check.place(&spec.r#match);
    let (trigger, life_ns) = check.trigger(&spec.name, &spec.trigger, defaults.seed);
    let terms = check.terms(&spec.fault, &spec.r#match);
    let ops = terms.iter().map(|term| term.ops).fold(OpSet::default(), OpSet::with);
    if !ops.is_empty() {
        check.can_be_met(&spec.r#match, ops);
    }
    if !check.0.is_empty() {
        return Err(check.0);
    }
    Ok(Rule {
        name: spec.name.as_str().into(),
        place: Place { ops, ..place },
        trigger,
        labels: (!spec.labels.is_empty()).then(|| Arc::new(spec.labels.clone())),
        armed_ns: defaults.now_ns,
        deadline_ns: life_ns.map(|life| defaults.now_ns.saturating_add(life)),
        counters: Arc::new(Counters::new(terms.len())),
        terms: terms.into(),
        created: defaults.created,
        spec,
    })
}

/// The problems found so far.
struct Check(Vec<Problem>);

impl Check {
    fn found(&mut self, problem: Problem) {
        self.0.push(problem);
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

    fn duration(&mut self, pointer: &str, text: &str) -> Option<u64> {
        let parsed = nanoseconds(text);
        if parsed.is_none() {
            let detail = format!("{}: {text:?} is not a duration", words(pointer));
            self.found(Problem::new(pointer, detail).hint("write \"10ms\", \"3s\" or \"5m\""));
        }
        parsed
    }

    fn range(&mut self, pointer: &str, text: &str) -> Option<std::ops::Range<u64>> {
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

/// A name as a part of a JSON pointer (RFC 6901).
pub(super) fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

/// `#/match/ops/0` as people write it: `match.ops[0]`.
pub(super) fn words(pointer: &str) -> String {
    let mut words = String::new();
    for part in pointer.trim_start_matches('#').split('/').skip(1) {
        let part = part.replace("~1", "/").replace("~0", "~");
        match part.parse::<usize>() {
            Ok(number) => words += &format!("[{number}]"),
            Err(_) if words.is_empty() => words += &part,
            Err(_) => words += &format!(".{part}"),
        }
    }
    words
}
