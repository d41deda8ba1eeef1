//! Why a rule has not fired, in words.
//!
//! Pure: called by the control thread with a rule that must fire, and keeps its funnel for that.

use std::sync::atomic::Ordering::Relaxed;

use super::plan::{Per, Rule, State};

/// The reason why a required rule has not fired; nothing when it has, or need not.
pub fn unfired(rule: &Rule, now_ns: u64) -> Option<String> {
    rule.is_awaited().then(|| reason(rule, now_ns))
}

fn reason(rule: &Rule, now_ns: u64) -> String {
    let funnel = &rule.counters.funnel;
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed);
    let looked = read(&funnel.looked);
    let spec = &rule.spec.r#match;
    if !rule.spec.enabled {
        return "it is disabled".into();
    }
    let expired = if rule.state(now_ns) == State::Expired { "its life has ended; " } else { "" };
    if looked == 0 {
        return format!("{expired}no request has come since it was armed");
    }
    let ops = if spec.ops.is_empty() { rule.spec_kind() } else { spec.ops.join(",") };
    let path: Vec<String> = [
        spec.path.as_ref().map(|path| format!("path {path}")),
        spec.path_regex.as_ref().map(|regex| format!("path_regex {regex}")),
        spec.r#type.as_ref().map(|kind| format!("type {kind}")),
    ]
    .into_iter()
    .flatten()
    .collect();
    let process: Vec<String> = [
        spec.pid.map(|pid| format!("pid {pid}")),
        spec.tree.map(|pid| format!("tree {pid}")),
        spec.comm.as_ref().map(|comm| format!("comm {comm}")),
        spec.uid.map(|uid| format!("uid {uid}")),
        spec.gid.map(|gid| format!("gid {gid}")),
    ]
    .into_iter()
    .flatten()
    .collect();
    let range: Vec<String> = [
        spec.offset.as_ref().map(|range| format!("offset {range}")),
        spec.length.as_ref().map(|range| format!("length {range}")),
        spec.direct.map(|direct| format!("direct {direct}")),
        rule.faults().any(|fault| matches!(fault, super::Fault::BadSectors(_))).then(|| "a bad sector".into()),
    ]
    .into_iter()
    .flatten()
    .collect();
    // Each with how many were left before it.
    let stages = [
        (looked, read(&funnel.ops), "operation", format!("op {ops}")),
        (read(&funnel.ops), read(&funnel.path), "path", path.join(", ")),
        (read(&funnel.path), read(&funnel.process), "process", process.join(", ")),
        (read(&funnel.process), read(&funnel.range), "range", range.join(", ")),
    ];
    for (before, left, name, wanted) in stages {
        if left == 0 {
            let before = if before == looked { String::new() } else { format!(", {before} met what is asked before") };
            return format!("{expired}{looked} requests were looked at{before}, and none met the {name}: {wanted}");
        }
    }
    let (met, matches) = (read(&funnel.range), read(&rule.counters.matches));
    if matches == 0 {
        let what = if expired.is_empty() { "a rule before it in the set decided all of them" } else { "too late" };
        return format!("{expired}{looked} requests were looked at, {met} met all its conditions, and {what}");
    }
    let matched = format!("{expired}{looked} requests were looked at, {matches} matched");
    // Decided and not told yet.
    match read(&rule.counters.injections) {
        0 => format!("{matched}, and none met the trigger: {}", trigger(rule)),
        waiting => format!("{matched}, and {waiting} of them wait behind a delay or a stall of another rule"),
    }
}

fn trigger(rule: &Rule) -> String {
    let (trigger, spec) = (&rule.trigger, &rule.spec.trigger);
    if rule.counters.awake_matches() == 0 {
        let waits: Vec<String> = [
            spec.after.as_ref().map(|after| format!("after {after}")),
            spec.after_bytes.as_ref().map(|bytes| format!("after_bytes {bytes}")),
            spec.after_rule.as_ref().map(|name| format!("after_rule {name}")),
            spec.up.as_ref().map(|up| format!("up {up}")),
        ]
        .into_iter()
        .flatten()
        .collect();
        return format!("all came before {}", waits.join(", "));
    }
    let per = Per::WORDS.iter().find(|(_, per)| *per == trigger.per).map_or("", |(word, _)| word);
    let awake = rule.counters.awake_matches();
    let mut limits = Vec::new();
    if trigger.skip > 0 {
        limits.push(format!("skip {}", trigger.skip));
    }
    if trigger.every > 1 {
        limits.push(format!("every {}", trigger.every));
    }
    if trigger.probability < 1.0 {
        limits.push(format!("probability {}", trigger.probability));
    }
    if limits.is_empty() && rule.faults().any(|fault| matches!(fault, super::Fault::Stall { .. })) {
        limits.push("another stall held them already".into());
    }
    if limits.is_empty() {
        limits.push(format!("the kind {:?} had nothing to do", rule.spec_kind()));
    }
    format!("{}, of {awake} counted per {per}", limits.join(", "))
}

impl Rule {
    fn spec_kind(&self) -> String {
        self.faults().next().map_or_else(String::new, |fault| fault.word().to_string())
    }
}
