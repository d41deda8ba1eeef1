//! `/v1/mode`: one word for the whole mount.
//!
//! On the control thread.

use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Answer, Control, InForce, Shared, body, document};
use crate::fault::Problem;
use crate::fault::compile::nanoseconds;
use crate::fault::spec::NotYet;
use crate::fs::Mode;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    mode: String,
    #[serde(default)]
    r#for: Option<String>,
    #[serde(default)]
    up: NotYet,
    #[serde(default)]
    down: NotYet,
}

impl Control {
    pub(super) fn show_mode(&self) -> Value {
        let (mode, rule) = self.core.arming.mode();
        let left = rule.and_then(|rule| rule.deadline_ns).map(|at| at.saturating_sub(self.ring().now_ns()));
        let left = left.map(|ns| humantime::format_duration(Duration::from_millis(ns / 1_000_000)).to_string());
        json!({"mode": mode.word(), "remaining": left, "cursor": self.cursor()})
    }

    pub(super) async fn set_mode(&self, mode: Mode, life: Option<(String, u64)>) -> InForce {
        let changed = self.core.arming.set_mode(mode, life.clone(), self.ring().now_ns());
        self.core.capacity.set_full(mode == Mode::Enospc);
        let in_force = self.in_force(changed).await;
        let life = life.map(|(text, _)| text);
        self.ring().change("mode", json!({"mode": mode.word(), "action": "set", "for": life}));
        in_force
    }
}

pub async fn show(State(control): Shared) -> Answer {
    Ok(document(200, &control.show_mode()))
}

pub async fn set(State(control): Shared, body: Body) -> Answer {
    let wanted: Wanted = body::read(body).await?;
    for (name, value) in [("up", &wanted.up), ("down", &wanted.down)] {
        if value.is_some() {
            let problem = Problem::new(format!("#/{name}"), format!("{name} is not built yet"));
            return Err(Problem { not_yet: true, ..problem }.into());
        }
    }
    let Some(mode) = Mode::parse(&wanted.mode) else {
        let problem = Problem::new("#/mode", format!("mode: unknown mode {:?}", wanted.mode));
        return Err(problem.nearest(&wanted.mode, Mode::ALL.iter().map(|(word, _)| *word)).into());
    };
    let life = match wanted.r#for {
        None => None,
        Some(text) => match nanoseconds(&text) {
            Some(ns) => Some((text, ns)),
            None => {
                let problem = Problem::new("#/for", format!("for: {text:?} is not a duration"));
                return Err(problem.hint("write \"10ms\", \"3s\" or \"5m\"").into());
            }
        },
    };
    let cursor = control.cursor();
    let in_force = control.set_mode(mode, life).await;
    let mut value = control.show_mode();
    in_force.tell(&mut value);
    value["cursor"] = cursor.into();
    Ok(document(200, &value))
}
