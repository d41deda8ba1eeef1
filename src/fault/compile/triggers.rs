//! Compiles `trigger`: when a rule fires.
//!
//! Pure, as all of the compiler.

use serde_json::Value;

use super::{Check, Problem, bytes};
use crate::fault::plan::{AfterRule, Cycle, Per, Trigger};
use crate::fault::spec::TriggerSpec;

/// Each turn is an event, and makes the kernel forget what could hide the rule.
pub const SHORTEST_CYCLE_NS: u64 = 20_000_000;

impl Check {
    /// The trigger, and the life of the rule in nanoseconds.
    pub(super) fn trigger(&mut self, rule: &str, spec: &TriggerSpec, seed: u64) -> (Trigger, Option<u64>) {
        if !(0.0..=1.0).contains(&spec.probability) {
            let detail = format!("trigger.probability: {} is not between 0 and 1", spec.probability);
            self.found(Problem::new("#/trigger/probability", detail));
        }
        if spec.every == 0 {
            let detail = "trigger.every: 0 would never fire";
            self.found(Problem::new("#/trigger/every", detail).hint("1 fires on each match"));
        }
        if spec.times == Some(0) {
            self.found(Problem::new("#/trigger/times", "trigger.times: 0 would never fire").hint("null has no limit"));
        }
        if spec.after_rule.as_deref() == Some(rule) {
            let detail = "trigger.after_rule: a rule that waits for itself would never fire";
            self.found(Problem::new("#/trigger/after_rule", detail));
        }
        let life = spec.r#for.as_deref().and_then(|text| self.duration("#/trigger/for", text));
        if life == Some(0) {
            self.found(Problem::new("#/trigger/for", "trigger.for: no time would never fire").hint("null has no end"));
        }
        let trigger = Trigger {
            probability: spec.probability,
            skip: spec.skip,
            every: spec.every.max(1),
            times: spec.times,
            per: self.per(&spec.per),
            after_ns: spec.after.as_deref().and_then(|text| self.duration("#/trigger/after", text)).unwrap_or(0),
            after_bytes: spec
                .after_bytes
                .as_ref()
                .and_then(|size| self.size("#/trigger/after_bytes", size))
                .unwrap_or(0),
            after_rule: spec.after_rule.as_deref().map(AfterRule::new),
            cycle: self.cycle(spec),
            seed: spec.seed.unwrap_or(seed),
        };
        (trigger, life)
    }

    fn per(&mut self, word: &str) -> Per {
        Per::parse(word).unwrap_or_else(|| {
            let problem = Problem::new("#/trigger/per", format!("trigger.per: {word:?} is nothing that is counted"));
            self.found(problem.nearest(word, Per::WORDS.iter().map(|(word, _)| *word)));
            Per::Mount
        })
    }

    fn cycle(&mut self, spec: &TriggerSpec) -> Option<Cycle> {
        let (up, down) = match (&spec.up, &spec.down) {
            (None, None) => return None,
            (Some(up), Some(down)) => (up, down),
            (up, _) => {
                let (there, missing) = if up.is_some() { ("up", "down") } else { ("down", "up") };
                let detail = format!("trigger.{missing}: \"{there}\" alone is no cycle");
                let hint = "up: how long the disk is well; down: how long it then fails";
                self.found(Problem::new(format!("#/trigger/{missing}"), detail).hint(hint));
                return None;
            }
        };
        let up_ns = self.duration("#/trigger/up", up)?;
        let down_ns = self.duration("#/trigger/down", down)?;
        if up_ns.saturating_add(down_ns) < SHORTEST_CYCLE_NS {
            let problem = Problem::new("#/trigger/down", "trigger.down: up and down together are shorter than 20ms");
            self.found(problem.hint("use \"probability\" or \"every\""));
            return None;
        }
        if down_ns == 0 {
            self.found(Problem::new("#/trigger/down", "trigger.down: a disk that is never down never fails"));
            return None;
        }
        Some(Cycle { up_ns, down_ns })
    }

    /// A size as a number or as text.
    pub(super) fn size(&mut self, pointer: &str, value: &Value) -> Option<u64> {
        let parsed = match value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => bytes(text),
            _ => None,
        };
        if parsed.is_none() {
            let detail = format!("{}: {value} is not a number of bytes", super::words(pointer));
            self.found(Problem::new(pointer, detail).hint("write 4096, \"4KiB\" or \"1MiB\""));
        }
        parsed
    }
}
