//! `/v1/rules`: the set, one rule, waiting for a rule, releasing what it holds.
//!
//! On the control thread.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::Deserialize;
use serde_json::{Value, json};

use super::problem::Problem;
use super::redirect::Fills;
use super::{Answer, Control, Shared, body, document, events};
use crate::event::{Body as Event, Cursor, Read, Record, record::rfc3339};
use crate::fault::compile::nanoseconds;
use crate::fault::document::{rule as rule_of, rules as rules_of};
use crate::fault::{Rule, RuleSpec, why};
use crate::fs::Ended;

impl Control {
    /// A rule as clients see it, with the place on the stream behind which its next injections are.
    fn show_rule(&self, rule: &Rule, cursor: &str) -> Value {
        let mut value = serde_json::to_value(&rule.spec).unwrap_or_default();
        let counters = &rule.counters;
        value["acts_on"] = rule.place.ops.names().into();
        value["matches"] = counters.matches.load(Relaxed).into();
        value["injections"] = counters.injections.load(Relaxed).into();
        value["created"] = rfc3339(rule.created).into();
        value["state"] = rule.state(self.ring().now_ns()).word().into();
        if rule.spec.required {
            let funnel = &rule.counters.funnel;
            let met = [&funnel.looked, &funnel.ops, &funnel.path, &funnel.process, &funnel.range];
            let [requests, ops, path, process, range] = met.map(|counter| counter.load(Relaxed));
            value["met"] = json!({"requests": requests, "ops": ops, "path": path, "process": process, "range": range});
            value["unfired"] = why::unfired(rule, self.ring().now_ns()).into();
        }
        value["cursor"] = cursor.into();
        value
    }

    fn show_rules(&self, cursor: &str) -> Vec<Value> {
        let rules = self.core.arming.rules();
        let mode = self.core.arming.mode().1;
        let space = self.core.capacity.is_set().then(|| self.core.arming.space());
        rules.iter().chain(&mode).chain(&space).map(|rule| self.show_rule(rule, cursor)).collect()
    }

    fn rule(&self, name: &str) -> Result<Arc<Rule>, Problem> {
        let known = self.core.arming.rule(name).filter(|_| name != "space" || self.core.capacity.is_set());
        known.ok_or_else(|| Problem::no_rule(name))
    }

    /// One that is waited for: what has fired has fired, though the mode has ended since.
    fn awaited(&self, name: &str) -> Result<Arc<Rule>, Problem> {
        let known = self.core.arming.rule_or_ended(name);
        let has_been = |rule: &Arc<Rule>| self.core.capacity.is_set() || rule.counters.told.load(Relaxed) > 0;
        known.filter(|rule| name != "space" || has_been(rule)).ok_or_else(|| Problem::no_rule(name))
    }

    async fn put_rule(self: &Arc<Self>, spec: RuleSpec) -> Answer {
        let cursor = self.cursor();
        let fills = Fills::mount_if(spec.redirect_coredumps && spec.enabled);
        let put = async {
            let (rule, new, changed) = self.core.arming.put(spec, self.ring().now_ns())?;
            Ok((rule, new, self.in_force(changed).await))
        };
        let ((rule, new, mut in_force), warnings) = self.redirected(fills, put).await?;
        in_force.warnings.extend(warnings);
        let action = if new { "added" } else { "replaced" };
        let mut value = self.show_rule(&rule, &cursor);
        self.ring().change("rule", json!({"rule": &*rule.name, "action": action, "definition": rule.spec}));
        in_force.tell(&mut value);
        Ok(document(if new { 201 } else { 200 }, &value))
    }
}

pub async fn list(State(control): Shared) -> Answer {
    let cursor = control.cursor();
    Ok(document(200, &json!({"rules": control.show_rules(&cursor), "cursor": cursor})))
}

pub async fn replace(State(control): Shared, body: Body) -> Answer {
    let specs = rules_of(body::read(body).await?)?;
    let cursor = control.cursor();
    let names: Vec<String> = specs.iter().map(|spec| spec.name.clone()).collect();
    let fills = Fills::mount_if(specs.iter().any(|spec| spec.redirect_coredumps && spec.enabled));
    let replace = async {
        let changed = control.core.arming.replace(specs, control.ring().now_ns())?;
        Ok(control.in_force(changed).await)
    };
    let (mut in_force, warnings) = control.redirected(fills, replace).await?;
    in_force.warnings.extend(warnings);
    control.ring().change("rule", json!({"action": "replaced_all", "rules": names}));
    let mut value = json!({"rules": control.show_rules(&cursor), "cursor": cursor});
    in_force.tell(&mut value);
    Ok(document(200, &value))
}

pub async fn clear(State(control): Shared) -> Answer {
    let cursor = control.cursor();
    let changed = control.core.arming.remove(|_| true);
    let removed: Vec<String> = changed.released.iter().map(|rule| rule.name.to_string()).collect();
    control.in_force(changed).await;
    control.ring().change("rule", json!({"action": "cleared", "rules": removed}));
    Ok(document(200, &json!({"removed": removed, "cursor": cursor})))
}

pub async fn show(State(control): Shared, Path(name): Path<String>) -> Answer {
    Ok(document(200, &control.show_rule(&*control.rule(&name)?, &control.cursor())))
}

pub async fn put(State(control): Shared, Path(name): Path<String>, body: Body) -> Answer {
    let mut spec: RuleSpec = rule_of(body::read(body).await?)?;
    if !spec.name.is_empty() && spec.name != name {
        let detail = format!("name: {:?} is not the {name:?} of the address", spec.name);
        return Err(crate::fault::Problem::new("#/name", detail).into());
    }
    spec.name = name;
    control.put_rule(spec).await
}

/// RFC 7396: what is null goes, what is an object is merged, all else replaces.
pub async fn patch(State(control): Shared, Path(name): Path<String>, body: Body) -> Answer {
    let patch = body::read(body).await?;
    let rule = control.rule(&name)?;
    let mut value = serde_json::to_value(&rule.spec).unwrap_or_default();
    merge(&mut value, patch);
    let spec: RuleSpec = rule_of(value)?;
    if spec.name != name {
        return Err(crate::fault::Problem::new("#/name", "name: a rule keeps its name").into());
    }
    control.put_rule(spec).await
}

fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let Some(target) = target.as_object_mut() else { return };
    for (key, value) in patch {
        match value {
            Value::Null => drop(target.remove(&key)),
            value => merge(target.entry(key).or_insert(Value::Null), value),
        }
    }
}

pub async fn remove(State(control): Shared, Path(name): Path<String>) -> Answer {
    for (reserved, hint) in [("mode", "nemesisfs mode allow_writes"), ("space", "nemesisfs space clear")] {
        if name == reserved && control.rule(reserved).is_ok() {
            let detail = format!("the rule {name:?} is changed by PUT /v1/{name}");
            return Err(Problem::new(409, "conflict", detail).hint(hint));
        }
    }
    let cursor = control.cursor();
    let changed = control.core.arming.remove(|rule| *rule.name == *name);
    if changed.released.is_empty() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let in_force = control.in_force(changed).await;
    control.ring().change("rule", json!({"rule": name, "action": "removed"}));
    let mut answer = json!({"removed": [name], "cursor": cursor});
    in_force.tell(&mut answer);
    Ok(document(200, &answer))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Release {
    count: Option<usize>,
}

pub async fn release(State(control): Shared, Path(name): Path<String>, body: Body) -> Answer {
    let release: Release = body::read(body).await?;
    control.rule(&name)?;
    let cursor = control.cursor();
    let limit = release.count.unwrap_or(usize::MAX);
    let held = control.core.parking.take(limit, |parked| parked.is_held_by(&name));
    let released = held.len();
    control.core.resume(held, Ended::Released);
    control.ring().change("request", json!({"rule": name, "action": "released", "count": released}));
    Ok(document(200, &json!({"released": released, "cursor": cursor})))
}

/// What a client waits for.
struct Wanted {
    injections: u64,
    since: Option<Cursor>,
}

pub async fn wait(State(control): Shared, Path(name): Path<String>, RawQuery(query): RawQuery) -> Answer {
    let query = body::query(query.as_deref(), &["injections", "since", "for"])?;
    let since = body::text(&query, "since").map(|id| control.after(id)).transpose()?;
    let injections = body::number(&query, "injections")?.unwrap_or(1);
    if injections == 0 {
        return Err(Problem::bad_request("injections: 0 are no firing to wait for").hint("1, or leave it out"));
    }
    let wanted = Wanted { injections, since };
    let limit = match body::text(&query, "for") {
        None => Duration::from_secs(30),
        Some(text) => nanoseconds(text)
            .map(Duration::from_nanos)
            .ok_or_else(|| Problem::bad_request(format!("for: {text:?} is not a duration")).hint("write \"30s\""))?,
    };
    control.awaited(&name)?;
    match tokio::time::timeout(limit, control.fired(&name, &wanted)).await {
        Ok(Ok(record)) => {
            let event = record.map(|record| control.record_json(&record));
            Ok(document(200, &json!({"fired": true, "event": event})))
        }
        Ok(Err(gone)) => Err(gone),
        Err(_) => {
            let rule = control.awaited(&name)?;
            let (matches, state) = (rule.counters.matches.load(Relaxed), rule.state(control.ring().now_ns()));
            Ok(document(200, &json!({"fired": false, "matches": matches, "state": state.word()})))
        }
    }
}

impl Control {
    /// Waits until a rule has fired so often since a place on the stream, or in its life; gives the last of these
    /// firings, unless the ring has lost it.
    async fn fired(&self, name: &str, wanted: &Wanted) -> Result<Option<Record>, Problem> {
        let mut at = wanted.since.unwrap_or_else(|| self.ring().oldest());
        let mut firings = 0;
        loop {
            let published = self.published.notified();
            tokio::pin!(published);
            published.as_mut().enable();
            self.ring().listen();
            let rule = self.awaited(name)?;
            let Some(since) = wanted.since else {
                if rule.counters.told.load(Relaxed) >= wanted.injections {
                    return Ok(self.last_firing(&rule));
                }
                self.goes_on(name)?;
                published.await;
                continue;
            };
            let found = self.count_firings(name, wanted.injections, &mut at, &mut firings);
            if found.is_some() {
                return Ok(found);
            }
            // Of what the ring has lost, this alone is certain: that it has fired, not how often.
            if wanted.injections == 1 && rule.counters.newest.load(Relaxed) >= since.0 {
                return Ok(self.last_firing(&rule));
            }
            self.goes_on(name)?;
            published.await;
        }
    }

    /// Reads on from a place; the record that makes it so many firings.
    fn count_firings(&self, name: &str, wanted: u64, at: &mut Cursor, firings: &mut u64) -> Option<Record> {
        loop {
            match self.ring().read(*at) {
                Read::Event(record) => {
                    *at = Cursor(at.0 + 1);
                    *firings += u64::from(is_firing_of(&record, name));
                    if *firings >= wanted {
                        return Some(*record);
                    }
                }
                Read::Gap { next, .. } => *at = next,
                Read::Empty => return None,
            }
        }
    }

    /// The newest firing of a rule, if the ring still has it.
    fn last_firing(&self, rule: &Rule) -> Option<Record> {
        let (oldest, end) = (self.ring().oldest().0, self.ring().cursor().0);
        let created = rule.created.duration_since(std::time::UNIX_EPOCH).map_or(0, |age| age.as_nanos() as u64);
        (oldest..end).rev().find_map(|seq| match self.ring().read(Cursor(seq)) {
            Read::Event(record) if record.time_ns >= created && is_firing_of(&record, &rule.name) => Some(*record),
            _ => None,
        })
    }

    /// Unless the last event has been published: then nothing can be waited for any more.
    fn goes_on(&self, name: &str) -> Result<(), Problem> {
        let last = Cursor(self.ring().cursor().0.saturating_sub(1));
        match self.ring().read(last) {
            Read::Event(record) if record.event() == "bye" => {
                Err(Problem::new(404, "not_found", format!("the instance has ended, and with it the rule {name:?}")))
            }
            _ => Ok(()),
        }
    }

    /// The place after an event's id.
    fn after(&self, id: &str) -> Result<Cursor, Problem> {
        match events::parse_id(id, &self.identity.boot_id) {
            Some(events::Id::Ours(seq)) => Ok(Cursor(seq.saturating_add(1))),
            Some(events::Id::Earlier) => Ok(self.ring().oldest()),
            None => Err(Problem::bad_request(format!("since: {id:?} is not the id of an event"))),
        }
    }
}

/// Is the record a firing of this rule, and not the kernel's repetition of one?
fn is_firing_of(record: &Record, name: &str) -> bool {
    matches!(&record.body, Event::Injection(injection) if *injection.rule == *name && !injection.repeat)
}
