//! Compiles `fault`: what happens, and to which operations it can happen.
//!
//! Pure, as all of the compiler. Each kind reads its attributes from the document by name; numbers may come as text, as
//! command lines send them.

use std::ops::Range;
use std::str::FromStr;

use serde_json::{Map, Value};

use super::{Check, Problem, bytes, escaped, nearest};
use crate::fault::corrupt::{Corrupt, Mode};
use crate::fault::errno::{self, Refused};
use crate::fault::kind::{
    Amount, Attributes, BadSectors, Distribution, Elsewhere, Errors, Fault, KINDS, Kept, Kind, LONGEST_DELAY_NS,
    Latency, Portion, SECTOR, Target, Then, Throttle, Timing,
};
use crate::fault::op::{Op, OpSet};
use crate::fault::plan::Term;
use crate::fault::spec::FaultSpec;
use crate::fault::term;

impl Check {
    /// The terms of a rule: one for a kind, as many as there are for terms.
    pub(super) fn terms(&mut self, spec: &FaultSpec, ops: &[String]) -> Vec<Term> {
        self.known_ops(ops);
        let parsed = match spec {
            FaultSpec::Kind { .. } => vec![term::Term { chance: 1.0, limit: None, fault: Some(spec.clone()) }],
            FaultSpec::Terms(text) => match term::parse(text) {
                Ok(terms) => terms,
                Err(problem) => {
                    self.found(problem);
                    return Vec::new();
                }
            },
        };
        let mut compiled = Vec::new();
        let whole: Vec<&FaultSpec> = parsed.iter().filter_map(|term| term.fault.as_ref()).collect();
        if whole.is_empty() {
            self.found(Problem::new("#/fault", "fault: terms that do nothing"));
        }
        for term in &parsed {
            let (ops, fault) = match &term.fault {
                // What "off" lets pass is what the others would act on.
                None => (OpSet::all(), None),
                Some(spec) => {
                    let Some((fault, kind, able)) = self.fault(spec) else { continue };
                    (self.ops(ops, kind, able, &fault), Some(fault))
                }
            };
            compiled.push(Term { chance: term.chance, limit: term.limit, ops, fault });
        }
        let acting = compiled.iter().filter(|term| term.fault.is_some()).map(|term| term.ops);
        let acting = acting.fold(OpSet::default(), OpSet::with);
        compiled.iter_mut().filter(|term| term.fault.is_none()).for_each(|term| term.ops = acting);
        compiled
    }

    fn known_ops(&mut self, ops: &[String]) {
        for (i, word) in ops.iter().enumerate().filter(|(_, word)| OpSet::parse(word).is_none()) {
            let detail = format!("match.ops[{i}]: unknown operation {word:?}");
            let known = OpSet::words().collect::<Vec<_>>();
            self.found(Problem::new(format!("#/match/ops/{i}"), detail).nearest(word, known.into_iter()));
        }
    }

    /// The operations that are named, as far as the kind can act on them. An operation that is named by itself and cannot be
    /// acted on is wrong; a group stands for those of its operations that can.
    fn ops(&mut self, ops: &[String], kind: &Kind, able: OpSet, fault: &Fault) -> OpSet {
        if ops.is_empty() {
            return kind.usual.within(able);
        }
        let mut set = OpSet::default();
        for (i, word) in ops.iter().enumerate() {
            let Some(named) = OpSet::parse(word) else { continue };
            let part = match fault {
                // A setattr is lost as far as it changes the size.
                Fault::Drop => named.droppable(),
                _ => named.within(able),
            };
            if !Op::ALL.iter().any(|op| part.may_concern(*op) && able.may_concern(*op)) {
                self.found(unable(i, word, able, fault));
            }
            set = set.with(part);
        }
        set
    }

    /// The fault, its kind, and the operations that it can act on.
    fn fault(&mut self, spec: &FaultSpec) -> Option<(Fault, &'static Kind, OpSet)> {
        let FaultSpec::Kind { kind: word, attributes } = spec else { return None };
        let Some(kind) = Kind::find(word) else {
            let detail = format!("fault.kind: unknown kind {word:?}");
            let known = KINDS.iter().filter(|kind| kind.built).map(|kind| kind.word);
            self.found(Problem::new("#/fault/kind", detail).nearest(word, known));
            return None;
        };
        for name in attributes.keys().filter(|name| !kind.attributes.contains(&name.as_str())) {
            let detail = format!("fault.{name}: the kind {word:?} has no such attribute");
            let known = kind.attributes.iter().copied().chain(["kind"]);
            self.found(Problem::new(pointer(&escaped(name)), detail).nearest(name, known));
        }
        if !kind.built {
            let detail = format!("fault.kind: {word:?} is not built yet");
            self.found(Problem { not_yet: true, ..Problem::new("#/fault/kind", detail) });
            return None;
        }
        let mut read = Reader { check: self, kind, attributes };
        let fault = match kind.word {
            "error" => read.error(),
            "short" => read.short(),
            "drop" => Some(Fault::Drop),
            "torn" => read.torn(),
            "corrupt" => read.corrupt().map(Fault::Corrupt),
            "misdirect" => read.misdirect(),
            "bad_sectors" => read.bad_sectors().map(Fault::BadSectors),
            "latency" => read.latency().map(Fault::Latency),
            "throttle" => read.throttle().map(Fault::Throttle),
            "stall" => read.stall(),
            "attr" => read.attr(),
            "kill" => read.kill(),
            _ => None,
        }?;
        let able = read.able(&fault);
        Some((fault, kind, able))
    }
}

fn unable(i: usize, word: &str, able: OpSet, fault: &Fault) -> Problem {
    let pointer = format!("#/match/ops/{i}");
    let errors = match fault {
        Fault::Error { errors, .. } => Some(errors.clone()),
        Fault::Stall { then: Then::Error(errno), .. } => Some(Errors::One(*errno)),
        _ => None,
    };
    let problem = match (fault, errors) {
        (_, Some(errors)) => {
            let errno = match errors {
                Errors::One(errno) => errno::name(errno).map_or_else(|| errno.to_string(), str::to_string),
                _ => "one of these errors".into(),
            };
            let detail = format!("match.ops[{i}]: no storage makes {word:?} fail with {errno}");
            let hint = "the manual page of the operation lists what it can give; with \"force\": true it is given all the same";
            return Problem::new(pointer, detail).hint(hint);
        }
        (Fault::Drop, _) => Problem::new(pointer, format!("match.ops[{i}]: {word:?} cannot be dropped")),
        (other, _) => {
            Problem::new(pointer, format!("match.ops[{i}]: the kind {:?} cannot act on {word:?}", other.word()))
        }
    };
    let mut words: Vec<&str> = Op::ALL.iter().filter(|op| able.has(**op)).map(|op| op.word()).collect();
    if matches!(fault, Fault::Drop) {
        words.push("truncate");
    }
    problem.hint(format!("it acts on {}", words.join(" ")))
}

/// The attributes of one kind.
struct Reader<'a> {
    check: &'a mut Check,
    kind: &'static Kind,
    attributes: &'a Map<String, Value>,
}

fn pointer(name: &str) -> String {
    format!("#/fault/{name}")
}

impl Reader<'_> {
    fn found(&mut self, name: &str, what: &str, hint: &str) {
        let problem = Problem::new(pointer(name), format!("fault.{name}: {what}"));
        self.check.found(if hint.is_empty() { problem } else { problem.hint(hint) });
    }

    /// An attribute as `read` takes it: nothing when it is absent, or wrong, which is noted.
    fn get<T>(&mut self, name: &str, hint: &str, read: impl FnOnce(&Value) -> Option<T>) -> Option<T> {
        let value = self.attributes.get(name)?;
        let parsed = read(value);
        if parsed.is_none() {
            self.found(name, &format!("{value} is none"), hint);
        }
        parsed
    }

    fn has(&self, name: &str) -> bool {
        self.attributes.contains_key(name)
    }

    fn count(&mut self, name: &str) -> Option<u64> {
        self.get(name, "a number", whole)
    }

    fn size(&mut self, name: &str) -> Option<u64> {
        let value = self.attributes.get(name)?.clone();
        self.check.size(&pointer(name), &value)
    }

    fn duration(&mut self, name: &str) -> Option<u64> {
        let text = self.get(name, "write \"10ms\", \"3s\" or \"5m\"", |value| value.as_str().map(str::to_string))?;
        self.check.duration(&pointer(name), &text)
    }

    fn truth(&mut self, name: &str) -> bool {
        let read = |value: &Value| match value {
            Value::Bool(truth) => Some(*truth),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        self.get(name, "true or false", read).unwrap_or(false)
    }

    /// One of a few words.
    fn word<T: Copy>(&mut self, name: &str, known: &[(&'static str, T)], default: T) -> T {
        let Some(value) = self.attributes.get(name) else { return default };
        let text = value.as_str().unwrap_or_default();
        if let Some((_, found)) = known.iter().find(|(word, _)| *word == text) {
            return *found;
        }
        let problem = Problem::new(pointer(name), format!("fault.{name}: unknown word {value}"));
        self.check.found(problem.nearest(text, known.iter().map(|(word, _)| *word)));
        default
    }

    fn needs(&mut self, names: &[&str], hint: &str) -> bool {
        let there = names.iter().any(|name| self.has(name));
        if !there {
            let detail = format!("the kind {:?} needs {}", self.kind.word, names.join(" or "));
            self.found(names[0], &detail, hint);
        }
        there
    }

    fn not_both(&mut self, one: &str, other: &str) {
        if self.has(one) && self.has(other) {
            self.found(other, &format!("{one:?} says it already"), "give one of them");
        }
    }

    /// The operations that a fault can act on.
    fn able(&mut self, fault: &Fault) -> OpSet {
        match fault {
            Fault::Error { errors, .. } => self.able_to_fail(errors),
            Fault::Stall { then: Then::Error(errno), .. } | Fault::Torn { then: Then::Error(errno), .. } => {
                self.able_to_fail(&Errors::One(*errno))
            }
            Fault::BadSectors(bad) => self.able_to_fail(&Errors::One(bad.errno)),
            Fault::Corrupt(_) => self.word(
                "when",
                &[("read", OpSet::of(&[Op::Read])), ("write", OpSet::of(&[Op::Write]))],
                self.kind.able,
            ),
            _ => self.kind.able,
        }
    }

    /// The operations of the kind that can give these errors, or all, where that is forced.
    fn able_to_fail(&mut self, errors: &Errors) -> OpSet {
        if self.truth("force") {
            return self.kind.able;
        }
        let possible = Op::ALL.iter().copied().filter(|op| errors.are_possible(*op));
        let possible = possible.fold(OpSet::default(), |set, op| set.with(OpSet::of(&[op])));
        let able = self.kind.able.within(possible);
        if able.is_empty() {
            let hint = "the manual page of the operation lists what it can give; with \"force\": true it is given all the same";
            self.found("errno", "no storage makes what this kind acts on fail so", hint);
        }
        able
    }

    fn errno(&mut self, name: &str, value: &Value) -> Option<i32> {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
        let detail = match errno::parse(&text) {
            Ok(errno) => return Some(errno),
            Err(Refused::Unknown) => {
                let problem =
                    Problem::new(pointer(name), format!("fault.{}: unknown error {text:?}", name.replace('/', ".")));
                self.check.found(problem.nearest(&text, errno::names().filter(|name| *name != "ENOSYS")));
                return None;
            }
            Err(Refused::Sticky) => "ENOSYS: the kernel would never ask for that operation again on this mount",
            Err(Refused::OutOfRange) => "outside 1 to 511: the kernel would let the caller hang",
        };
        self.found(name, detail, "");
        None
    }

    fn error(&mut self) -> Option<Fault> {
        let errors = self.errors();
        let timing = self.word("timing", &[("before", Timing::Before), ("after", Timing::After)], Timing::Before);
        Some(Fault::Error { errors: errors?, timing })
    }

    fn errors(&mut self) -> Option<Errors> {
        self.not_both("errno", "errors");
        self.not_both("errno", "any");
        self.not_both("errors", "any");
        if self.truth("any") {
            return Some(Errors::Any);
        }
        if let Some(list) = self.attributes.get("errors") {
            return self.weighted(list);
        }
        match self.attributes.get("errno") {
            Some(Value::String(word)) if word == "any" => Some(Errors::Any),
            Some(value) => self.errno("errno", value).map(Errors::One),
            None => {
                self.found("errno", "the kind \"error\" needs one", "EIO, ENOSPC, …, or \"any\"");
                None
            }
        }
    }

    /// `[{"errno":"EIO","weight":3}, …]`, or `EIO=3,ENOSPC=1` as text.
    fn weighted(&mut self, list: &Value) -> Option<Errors> {
        let items: Vec<(Value, Option<f64>)> = match list {
            Value::Array(items) => items.iter().map(weight_of).collect(),
            Value::String(text) => text.split(',').map(weight_of_text).collect(),
            _ => Vec::new(),
        };
        let mut all = Vec::new();
        for (i, (errno, weight)) in items.into_iter().enumerate() {
            let Some(weight) = weight.filter(|weight| weight.is_finite() && *weight > 0.0) else {
                self.found(
                    &format!("errors/{i}"),
                    "no error with a weight above 0",
                    "{\"errno\": \"EIO\", \"weight\": 3}",
                );
                return None;
            };
            all.push((self.errno(&format!("errors/{i}"), &errno)?, weight));
        }
        if all.is_empty() {
            self.found(
                "errors",
                "no errors",
                "[{\"errno\": \"EIO\", \"weight\": 3}, {\"errno\": \"ENOSPC\", \"weight\": 1}]",
            );
            return None;
        }
        let sum: f64 = all.iter().map(|(_, weight)| weight).sum();
        all.iter_mut().for_each(|(_, weight)| *weight /= sum);
        Some(Errors::Weighted(all))
    }

    fn short(&mut self) -> Option<Fault> {
        self.needs(&["max_bytes", "fraction"], "\"max_bytes\": 100, or \"fraction\": 0.5").then_some(())?;
        self.not_both("max_bytes", "fraction");
        if self.has("fraction") {
            let fraction = self.get("fraction", "between 0 and 1", part)?;
            return Some(Fault::Short(Portion::Fraction(fraction)));
        }
        let most = self.size("max_bytes")?;
        if most == 0 {
            let hint = "0 bytes of a read mean the end of the file, and of a write no program expects them";
            self.found("max_bytes", "0 is not short but nothing", hint);
        }
        Some(Fault::Short(Portion::AtMost(most)))
    }

    fn torn(&mut self) -> Option<Fault> {
        let hint = "512, \"50%\", \"3 sectors\", \"1,3/4\", {\"parts\": 4, \"persist\": [1, 3]}";
        let keep = if self.has("keep") { self.get("keep", hint, kept)? } else { Kept::Fraction(0.5) };
        if let Some(Value::String(word)) = self.attributes.get("then")
            && word == "power_cut"
        {
            let detail = "fault.then: \"power_cut\" is not built yet";
            self.check.found(Problem { not_yet: true, ..Problem::new("#/fault/then", detail) });
            return None;
        }
        Some(Fault::Torn { keep, then: self.then()? })
    }

    fn then(&mut self) -> Option<Then> {
        match self.word("then", &[("ok", false), ("error", true)], false) {
            false if self.has("errno") => {
                let detail = format!("a {} that ends in \"ok\" tells no error", self.kind.word);
                self.found("errno", &detail, "set \"then\": \"error\"");
                None
            }
            false => Some(Then::Ok),
            true => match self.attributes.get("errno") {
                None => Some(Then::Error(libc::EIO)),
                Some(value) => self.errno("errno", value).map(Then::Error),
            },
        }
    }

    fn stall(&mut self) -> Option<Fault> {
        let limit_ns = self.duration("delay");
        Some(Fault::Stall { limit_ns, then: self.then()? })
    }

    fn corrupt(&mut self) -> Option<Corrupt> {
        const MODES: &[(&str, u8)] = &[("bitflip", 0), ("zero", 1), ("random", 2), ("byte", 3)];
        let mode = self.word("mode", MODES, 0);
        let takes = |name: &str| match name {
            "bits" => mode == 0,
            "value" => mode == 3,
            "length" => mode != 3,
            _ => true,
        };
        for name in ["bits", "value", "length"] {
            if self.has(name) && !takes(name) {
                let word = MODES[usize::from(mode)].0;
                self.found(name, &format!("the mode {word:?} has no such attribute"), "");
            }
        }
        let positive = |value: &Value| whole(value).filter(|number| *number > 0);
        let bits = self.get("bits", "1 to 4096: more is the mode \"random\"", |value| {
            positive(value).filter(|bits| *bits <= 4096)
        });
        let bits = bits.unwrap_or(1);
        let nth = self.get("nth", "the byte of the request, from 1", positive);
        let length = self.size("length");
        if length == Some(0) {
            self.found("length", "0 bytes are no damage", "");
        }
        let value = self.get("value", "a byte: 0 to 255, or \"0xff\"", byte);
        if mode == 3 && value.is_none() && !self.has("value") {
            self.found("value", "the mode \"byte\" needs one", "a byte: 0 to 255, or \"0xff\"");
        }
        let mode = match mode {
            0 => Mode::Bitflip { bits },
            1 => Mode::Zero,
            2 => Mode::Random,
            _ => Mode::Byte { value: value? },
        };
        Some(Corrupt { mode, length, nth })
    }

    fn misdirect(&mut self) -> Option<Fault> {
        self.needs(&["offset_delta", "to"], "\"offset_delta\": \"+4KiB\", or \"to\": 0").then_some(())?;
        self.not_both("offset_delta", "to");
        if self.has("to") {
            return self.size("to").map(|place| Fault::Misdirect(Elsewhere::To(place)));
        }
        let delta = self.get("offset_delta", "\"+4KiB\", \"-8192\"", signed)?;
        if delta == 0 {
            self.found("offset_delta", "0 is the right place", "");
        }
        Some(Fault::Misdirect(Elsewhere::By(delta)))
    }

    fn bad_sectors(&mut self) -> Option<BadSectors> {
        self.needs(&["ranges"], "[\"8KiB..12KiB\"]").then_some(())?;
        let texts = self.get("ranges", "[\"8KiB..12KiB\"]", texts)?;
        let ranges: Vec<Range<u64>> = texts
            .iter()
            .enumerate()
            .filter_map(|(i, text)| self.check.range(&format!("#/fault/ranges/{i}"), text))
            .collect();
        let errno = match self.attributes.get("errno") {
            None => libc::EIO,
            Some(value) => self.errno("errno", value)?,
        };
        // A disk has no part of a sector.
        let sectors = |range: Range<u64>| {
            range.start / SECTOR * SECTOR..range.end.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX)
        };
        let ranges = ranges.into_iter().map(sectors).collect();
        Some(BadSectors { ranges, errno, heal_on_write: self.truth("heal_on_write") })
    }

    fn latency(&mut self) -> Option<Latency> {
        self.needs(&["delay"], "write \"10ms\"").then_some(())?;
        let delay_ns = self.duration("delay");
        if delay_ns.is_some_and(|ns| ns > LONGEST_DELAY_NS) {
            self.found("delay", "longer than a day", "use the kind \"stall\"");
        }
        let jitter_ns = self.duration("jitter").unwrap_or(0);
        let usual = if self.has("jitter") { Distribution::Uniform } else { Distribution::Fixed };
        let distribution = self.word("distribution", Distribution::WORDS, usual);
        Some(Latency { delay_ns: delay_ns?, jitter_ns, distribution })
    }

    fn throttle(&mut self) -> Option<Throttle> {
        let hint = "\"bytes_per_second\": \"4MiB\", \"ops_per_second\": 100";
        self.needs(&["bytes_per_second", "ops_per_second"], hint).then_some(())?;
        let bytes_per_second = self.size("bytes_per_second").map(|rate| rate as f64);
        let ops_per_second = self.get("ops_per_second", "a number", real);
        for (name, rate) in [("bytes_per_second", bytes_per_second), ("ops_per_second", ops_per_second)] {
            if rate.is_some_and(|rate| rate <= 0.0) {
                self.found(name, "0 would never end", "use the kind \"stall\"");
                return None;
            }
        }
        let burst = if bytes_per_second.is_some() { self.size("burst") } else { self.count("burst") };
        Some(Throttle { bytes_per_second, ops_per_second, burst: burst.unwrap_or(0) as f64 })
    }

    fn attr(&mut self) -> Option<Fault> {
        self.needs(self.kind.attributes, "\"size\": \"+1\", \"mtime\": \"-1day\", \"perm\": \"0600\"").then_some(())?;
        let amount = "a number, or one with its sign: \"+1\"";
        let time = "\"-1day\", \"+1h\", \"2020-01-01T00:00:00Z\", or seconds since the epoch";
        Some(Fault::Attr(Box::new(Attributes {
            size: self.get("size", amount, size_amount),
            blocks: self.get("blocks", amount, size_amount),
            perm: self.get("perm", "in octal: \"0600\"", perm),
            uid: self.get("uid", "a number", id),
            gid: self.get("gid", "a number", id),
            nlink: self.get("nlink", amount, size_amount),
            atime: self.get("atime", time, time_amount),
            mtime: self.get("mtime", time, time_amount),
            ctime: self.get("ctime", time, time_amount),
        })))
    }

    fn kill(&mut self) -> Option<Fault> {
        let target = self.word("target", &[("caller", Target::Caller), ("mount", Target::Mount)], Target::Caller);
        let Some(value) = self.attributes.get("signal") else {
            return Some(Fault::Kill { signal: libc::SIGKILL, target });
        };
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
        let signal = match text.parse::<i32>() {
            Ok(number) => nix::sys::signal::Signal::try_from(number),
            Err(_) => nix::sys::signal::Signal::from_str(&text),
        };
        match signal {
            Ok(signal) => Some(Fault::Kill { signal: signal as i32, target }),
            Err(_) => {
                let known = nix::sys::signal::Signal::iterator().map(nix::sys::signal::Signal::as_str);
                let near = nearest(&text, known).map(|near| format!("did you mean {near:?}?"));
                self.found(
                    "signal",
                    &format!("unknown signal {text:?}"),
                    &near.unwrap_or_else(|| "SIGKILL, SIGTERM, …".into()),
                );
                None
            }
        }
    }
}

fn whole(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

fn real(value: &Value) -> Option<f64> {
    let number = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    number.filter(|number| number.is_finite())
}

fn id(value: &Value) -> Option<u32> {
    whole(value)?.try_into().ok()
}

/// More than nothing, less than all.
fn part(value: &Value) -> Option<f64> {
    let percent = value.as_str().and_then(|text| text.trim().strip_suffix('%')).map(|text| text.trim().parse::<f64>());
    let fraction = match percent {
        Some(percent) => percent.ok().map(|percent| percent / 100.0),
        None => real(value),
    };
    fraction.filter(|fraction| *fraction > 0.0 && *fraction < 1.0)
}

fn byte(value: &Value) -> Option<u8> {
    match value.as_str().and_then(|text| text.trim().strip_prefix("0x")) {
        Some(hex) => u8::from_str_radix(hex, 16).ok(),
        None => whole(value)?.try_into().ok(),
    }
}

/// `+4KiB`, `-8192`, `100`.
fn signed(value: &Value) -> Option<i64> {
    match value {
        Value::Number(number) => number.as_i64(),
        Value::String(text) => match text.trim().strip_prefix('-') {
            Some(rest) => i64::try_from(bytes(rest)?).ok().map(|number| -number),
            None => i64::try_from(bytes(text.trim().trim_start_matches('+'))?).ok(),
        },
        _ => None,
    }
}

/// With a sign it is a difference.
fn size_amount(value: &Value) -> Option<Amount> {
    let differs = match value {
        Value::String(text) => text.trim().starts_with(['+', '-']),
        _ => false,
    };
    let number = i128::from(signed(value)?);
    match differs {
        true => Some(Amount::MoreBy(number)),
        false => Some(Amount::Is(number)).filter(|_| number >= 0),
    }
}

fn time_amount(value: &Value) -> Option<Amount> {
    let Value::String(text) = value else {
        return value.as_i64().map(|seconds| Amount::Is(i128::from(seconds) * 1_000_000_000));
    };
    let text = text.trim();
    if let Some(later) = text.strip_prefix('+') {
        return humantime::parse_duration(later).ok().map(|span| Amount::MoreBy(span.as_nanos() as i128));
    }
    if let Some(earlier) = text.strip_prefix('-') {
        return humantime::parse_duration(earlier).ok().map(|span| Amount::MoreBy(-(span.as_nanos() as i128)));
    }
    if let Ok(seconds) = text.parse::<i64>() {
        return Some(Amount::Is(i128::from(seconds) * 1_000_000_000));
    }
    let moment = humantime::parse_rfc3339_weak(text).ok()?;
    let since = moment.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(Amount::Is(since.as_nanos() as i128))
}

fn perm(value: &Value) -> Option<u16> {
    // A number in JSON would be read as decimal by one and as octal by the other.
    u16::from_str_radix(value.as_str()?.trim().trim_start_matches("0o"), 8).ok().filter(|mode| *mode <= 0o7777)
}

/// `["a..b", …]`, or `a..b,c..d` as text.
fn texts(value: &Value) -> Option<Vec<String>> {
    let texts: Option<Vec<String>> = match value {
        Value::Array(items) => items.iter().map(|item| item.as_str().map(str::to_string)).collect(),
        Value::String(text) => Some(text.split(',').map(|part| part.trim().to_string()).collect()),
        _ => None,
    };
    texts.filter(|texts| !texts.is_empty())
}

fn weight_of(item: &Value) -> (Value, Option<f64>) {
    match item {
        Value::String(_) => (item.clone(), Some(1.0)),
        Value::Object(fields) if fields.keys().all(|name| ["errno", "weight"].contains(&name.as_str())) => {
            let weight = fields.get("weight").map_or(Some(1.0), real);
            (fields.get("errno").cloned().unwrap_or_default(), weight)
        }
        _ => (Value::Null, None),
    }
}

fn weight_of_text(text: &str) -> (Value, Option<f64>) {
    match text.split_once('=') {
        None => (text.trim().into(), Some(1.0)),
        Some((errno, weight)) => (errno.trim().into(), weight.trim().parse().ok()),
    }
}

/// The forms of `keep`.
fn kept(value: &Value) -> Option<Kept> {
    match value {
        Value::Object(fields) => kept_fields(fields),
        Value::String(text) => {
            let text = text.trim();
            if let Some((persist, of)) = text.split_once('/') {
                let persist = persist.split(',').map(|part| part.trim().parse().ok()).collect::<Option<Vec<u64>>>()?;
                return parts(of.trim().parse().ok()?, persist);
            }
            if let Some(count) = text.strip_suffix("sectors").or_else(|| text.strip_suffix("sector")) {
                return count.trim().parse().ok().map(Kept::Sectors);
            }
            if text.ends_with('%') {
                return part(value).map(Kept::Fraction);
            }
            bytes(text).map(Kept::Bytes)
        }
        value => whole(value).map(Kept::Bytes),
    }
}

fn kept_fields(fields: &Map<String, Value>) -> Option<Kept> {
    let only = |names: &[&str]| fields.keys().all(|name| names.contains(&name.as_str()));
    if let Some(count) = fields.get("bytes").filter(|_| only(&["bytes"])) {
        return count.as_str().map_or_else(|| whole(count), bytes).map(Kept::Bytes);
    }
    if let Some(count) = fields.get("sectors").filter(|_| only(&["sectors"])) {
        return whole(count).map(Kept::Sectors);
    }
    let (of, persist) = (fields.get("parts")?, fields.get("persist")?);
    let persist = persist.as_array()?.iter().map(whole).collect::<Option<Vec<u64>>>()?;
    only(&["parts", "persist"]).then(|| parts(whole(of)?, persist)).flatten()
}

fn parts(of: u64, persist: Vec<u64>) -> Option<Kept> {
    let good = of > 0 && !persist.is_empty() && persist.iter().all(|part| (1..=of).contains(part));
    good.then_some(Kept::Parts { of, persist })
}
