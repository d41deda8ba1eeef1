//! Compiles the attributes of a fault: each kind has a reader of its own.
//!
//! Pure, as all of the compiler. A new kind is a reader here, a line in `fault/kind.rs` and an arm where it acts.

use std::ops::Range;
use std::str::FromStr;

use nix::sys::signal::Signal;
use serde_json::{Map, Value};

use super::values::{
    byte, id, kept, part, perm, real, signed, size_amount, texts, time_amount, weight_of, weight_of_text, whole,
};
use super::{Check, Problem, nearest, words};
use crate::fault::corrupt::{Corrupt, Mode};
use crate::fault::errno::{self, Refused};
use crate::fault::kind::{
    Attributes, BadSectors, Distribution, Elsewhere, Errors, Fault, Kept, Kind, LONGEST_DELAY_NS, Latency, Portion,
    SECTOR, Target, Then, Throttle, Timing,
};
use crate::fault::op::{Op, OpSet};

/// The attributes of one kind.
pub(super) struct Reader<'a> {
    pub(super) check: &'a mut Check,
    pub(super) kind: &'static Kind,
    pub(super) attributes: &'a Map<String, Value>,
}

pub(super) fn pointer(name: &str) -> String {
    format!("#/fault/{name}")
}

impl Reader<'_> {
    /// What the kind does; nothing when an attribute that it needs is absent or wrong, which is noted.
    pub(super) fn fault(&mut self) -> Option<Fault> {
        match self.kind.word {
            "error" => self.error(),
            "short" => self.short(),
            "drop" => Some(Fault::Drop),
            "torn" => self.torn(),
            "corrupt" => self.corrupt().map(Fault::Corrupt),
            "misdirect" => self.misdirect(),
            "bad_sectors" => self.bad_sectors().map(Fault::BadSectors),
            "latency" => self.latency().map(Fault::Latency),
            "throttle" => self.throttle().map(Fault::Throttle),
            "stall" => self.stall(),
            "attr" => self.attr(),
            "kill" => self.kill(),
            _ => None,
        }
    }

    fn found(&mut self, name: &str, what: &str, hint: &str) {
        let problem = Problem::new(pointer(name), format!("{}: {what}", words(&pointer(name))));
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
    pub(super) fn able(&mut self, fault: &Fault) -> OpSet {
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
                let detail = format!("{}: unknown error {text:?}", words(&pointer(name)));
                let problem = Problem::new(pointer(name), detail);
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
        if self.has("jitter") && matches!(distribution, Distribution::Fixed | Distribution::Exponential) {
            self.found("jitter", "this distribution has none", "\"uniform\" and \"normal\" have one");
        }
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
            Ok(number) => Signal::try_from(number),
            Err(_) => Signal::from_str(&text).or_else(|_| Signal::from_str(&format!("SIG{text}"))),
        };
        match signal {
            Ok(signal) => Some(Fault::Kill { signal: signal as i32, target }),
            Err(_) => {
                let known = Signal::iterator().map(Signal::as_str);
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

#[cfg(test)]
mod tests {
    use crate::fault::Fault;
    use crate::fault::compile::{Defaults, compile};
    use crate::fault::document::rule;

    #[test]
    fn a_signal_has_its_name_with_or_without_sig() {
        for word in ["KILL", "SIGKILL", "9"] {
            let document = serde_json::json!({"name": "a", "fault": {"kind": "kill", "signal": word}});
            let defaults = Defaults { seed: 0, now_ns: 0, created: std::time::SystemTime::UNIX_EPOCH };
            let compiled = compile(rule(document).unwrap(), defaults).unwrap();
            assert!(
                compiled.faults().all(|fault| matches!(fault, Fault::Kill { signal: libc::SIGKILL, .. })),
                "{word}"
            );
        }
    }
}
