//! `/v1/mode`: one word for the whole mount.
//!
//! On the control thread.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::redirect::Fills;
use super::{Answer, Control, InForce, Shared, body, document};
use crate::fault::compile::{SHORTEST_CYCLE_NS, nanoseconds};
use crate::fault::{Life, Mode, Problem};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    mode: String,
    #[serde(default)]
    r#for: Option<String>,
    #[serde(default)]
    up: Option<String>,
    #[serde(default)]
    down: Option<String>,
    #[serde(default)]
    redirect_coredumps: bool,
}

impl Control {
    pub(super) fn show_mode(&self) -> Value {
        let (mode, rule) = self.core.arming.mode();
        let left = rule.as_ref().and_then(|rule| rule.deadline_ns).map(|at| at.saturating_sub(self.ring().now_ns()));
        let left = left.map(|ns| humantime::format_duration(Duration::from_millis(ns / 1_000_000)).to_string());
        let trigger = rule.as_ref().map(|rule| &rule.spec.trigger);
        let (lasts, up, down) =
            trigger.map_or((&None, &None, &None), |trigger| (&trigger.r#for, &trigger.up, &trigger.down));
        json!({"mode": mode.word(), "for": lasts, "remaining": left, "up": up, "down": down, "cursor": self.cursor()})
    }

    pub(super) async fn set_mode(self: &Arc<Self>, mode: Mode, life: Life) -> InForce {
        if mode == Mode::Enospc && life.up.is_none() {
            // Before its rule is in force: what the former mode lets go must meet a full disk.
            self.core.capacity.set_full(true);
        }
        let changed = self.core.arming.set_mode(mode, &life, self.ring().now_ns());
        self.core.follow_mode();
        let in_force = self.in_force(changed).await;
        let text = |part: Option<(String, u64)>| part.map(|(text, _)| text);
        let (lasts, up, down) = (text(life.lasts), text(life.up), text(life.down));
        self.ring().change("mode", json!({"mode": mode.word(), "action": "set", "for": lasts, "up": up, "down": down}));
        in_force
    }
}

/// A duration as it was written, and in nanoseconds.
fn duration(name: &str, text: Option<String>) -> Result<Option<(String, u64)>, Problem> {
    let Some(text) = text else { return Ok(None) };
    match nanoseconds(&text) {
        Some(ns) => Ok(Some((text, ns))),
        None => {
            let problem = Problem::new(format!("#/{name}"), format!("{name}: {text:?} is not a duration"));
            Err(problem.hint("write \"10ms\", \"3s\" or \"5m\""))
        }
    }
}

pub async fn show(State(control): Shared) -> Answer {
    Ok(document(200, &control.show_mode()))
}

pub async fn set(State(control): Shared, body: Body) -> Answer {
    let wanted: Wanted = body::read(body).await?;
    let Some(mode) = Mode::parse(&wanted.mode) else {
        let problem = Problem::new("#/mode", format!("mode: unknown mode {:?}", wanted.mode));
        return Err(problem.nearest(&wanted.mode, Mode::ALL.iter().map(|(word, _)| *word)).into());
    };
    let life = Life {
        redirect_coredumps: wanted.redirect_coredumps,
        lasts: duration("for", wanted.r#for)?,
        up: duration("up", wanted.up)?,
        down: duration("down", wanted.down)?,
    };
    if life.up.is_some() != life.down.is_some() {
        let missing = if life.up.is_some() { "down" } else { "up" };
        let problem = Problem::new(format!("#/{missing}"), format!("{missing}: one alone is no cycle"));
        return Err(problem.hint("up: how long the disk is well; down: how long it then fails").into());
    }
    let cycle = life.up.as_ref().zip(life.down.as_ref()).map(|((_, up), (_, down))| up.saturating_add(*down));
    if cycle.is_some_and(|cycle| cycle < SHORTEST_CYCLE_NS) {
        return Err(Problem::new("#/down", "down: up and down together are shorter than 20ms").into());
    }
    for (name, given) in [("for", &life.lasts), ("down", &life.down)] {
        if given.as_ref().is_some_and(|(_, ns)| *ns == 0) {
            return Err(Problem::new(format!("#/{name}"), format!("{name}: no time at all would never act")).into());
        }
    }
    let cursor = control.cursor();
    let fills = Fills::mount_if(wanted.redirect_coredumps);
    let set = async { Ok(control.set_mode(mode, life).await) };
    let (mut in_force, warnings) = control.redirected(fills, set).await?;
    in_force.warnings.extend(warnings);
    let mut value = control.show_mode();
    in_force.tell(&mut value);
    value["cursor"] = cursor.into();
    Ok(document(200, &value))
}
