//! `/v1/coredump`: leases on where coredumps go, the list of cores, and the steps that an agent carries out.
//!
//! On the control thread; helpers look and switch.

use std::path::PathBuf;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::Deserialize;
use serde_json::{Value, json};

use super::problem::Problem;
use super::{Answer, OfAny, body, document, helper};
use crate::fault;
use crate::fault::compile::{bytes, nanoseconds};
use crate::host::coredump::{self, By, OnLow, Wanted, steps};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WantedLease {
    #[serde(default)]
    r#for: Option<String>,
    #[serde(default)]
    owner: Option<String>,
    #[serde(default)]
    to: Option<PathBuf>,
    #[serde(default)]
    fills: Vec<PathBuf>,
    #[serde(default)]
    need: Option<Value>,
    #[serde(default)]
    on_low: Option<String>,
    #[serde(default)]
    by: Option<String>,
    #[serde(default)]
    timeout: Option<String>,
    #[serde(default)]
    patience: Option<String>,
}

impl WantedLease {
    fn compile(self) -> Result<Wanted, Problem> {
        let usual = Wanted::default();
        Ok(Wanted {
            life: duration("for", self.r#for)?,
            owner: self.owner.unwrap_or_default(),
            to: self.to,
            fills: self.fills,
            need: self.need.map(|need| size("need", &need)).transpose()?,
            on_low: word("on_low", self.on_low, &[("warn", OnLow::Warn), ("refuse", OnLow::Refuse)])?,
            by: word("by", self.by, &[("auto", By::Auto), ("agent", By::Agent)])?,
            timeout: duration("timeout", self.timeout)?.unwrap_or(usual.timeout),
            patience: duration("patience", self.patience)?.unwrap_or(usual.patience),
        })
    }
}

fn duration(name: &str, text: Option<String>) -> Result<Option<Duration>, Problem> {
    let Some(text) = text else { return Ok(None) };
    let bad = || {
        let problem = fault::Problem::new(format!("#/{name}"), format!("{name}: {text:?} is not a duration"));
        Problem::of_body(problem.hint("write \"10ms\", \"3s\" or \"5m\""))
    };
    nanoseconds(&text).map(|ns| Some(Duration::from_nanos(ns))).ok_or_else(bad)
}

fn size(name: &str, value: &Value) -> Result<u64, Problem> {
    let number = value.as_u64().or_else(|| value.as_str().and_then(bytes));
    let bad = || {
        let problem = fault::Problem::new(format!("#/{name}"), format!("{name}: {value} is not a size"));
        Problem::of_body(problem.hint("write \"0\", \"500MiB\" or \"50GB\""))
    };
    number.ok_or_else(bad)
}

fn word<T: Copy + Default>(name: &str, given: Option<String>, known: &[(&str, T)]) -> Result<T, Problem> {
    let Some(given) = given else { return Ok(T::default()) };
    let found = known.iter().find(|(word, _)| *word == given).map(|(_, value)| *value);
    found.ok_or_else(|| {
        let problem = fault::Problem::new(format!("#/{name}"), format!("{name}: unknown word {given:?}"));
        Problem::of_body(problem.nearest(&given, known.iter().map(|(word, _)| *word)))
    })
}

pub async fn status(State(service): OfAny) -> Answer {
    let machine = service.machine.clone();
    let look = move || coredump::status(&machine).map(|status| (status, steps::waiting(&machine)));
    let (mut status, steps) = helper(look).await??;
    status["steps"] = steps.into();
    status["cursor"] = service.cursor().into();
    Ok(document(200, &status))
}

pub async fn cores(State(service): OfAny) -> Answer {
    let machine = service.machine.clone();
    Ok(document(200, &helper(move || coredump::list(&machine)).await??))
}

pub async fn list(State(service): OfAny) -> Answer {
    let machine = service.machine.clone();
    let leases = helper(move || coredump::leases(&machine)).await??;
    Ok(document(200, &json!({"leases": leases, "cursor": service.cursor()})))
}

pub async fn show(State(service): OfAny, Path(name): Path<String>) -> Answer {
    let none = || Problem::new(404, "not_found", format!("there is no lease {name:?}"));
    let (machine, wanted) = (service.machine.clone(), name.clone());
    let lease = helper(move || coredump::lease(&machine, &wanted)).await?;
    let lease = lease.ok_or_else(|| none().hint("nemesisfs coredump status"))?;
    Ok(document(200, &lease))
}

pub async fn take(State(service): OfAny, Path(name): Path<String>, RawQuery(query): RawQuery, body: Body) -> Answer {
    let query = body::query(query.as_deref(), &["renew"])?;
    let must_exist = match query.get("renew").and_then(Value::as_str) {
        None | Some("false") => false,
        Some("true" | "") => true,
        Some(other) => return Err(Problem::bad_request(format!("renew: {other:?} is not true or false"))),
    };
    let wanted = body::read::<WantedLease>(body).await?.compile()?;
    let (cursor, machine) = (service.cursor(), service.machine.clone());
    let taken = helper(move || match must_exist {
        true => coredump::renew(&machine, &name, &wanted),
        false => coredump::redirect(&machine, &name, &wanted),
    });
    let taken = taken.await??;
    let mut value = json!(taken);
    value["cursor"] = cursor.into();
    Ok(document(if taken.renewed { 200 } else { 201 }, &value))
}

pub async fn release(State(service): OfAny, Path(name): Path<String>, RawQuery(query): RawQuery) -> Answer {
    give_back(service, query, Some(name)).await
}

pub async fn release_all(State(service): OfAny, RawQuery(query): RawQuery) -> Answer {
    give_back(service, query, None).await
}

async fn give_back(service: super::AnyDaemon, query: Option<String>, name: Option<String>) -> Answer {
    let query = body::query(query.as_deref(), &["timeout"])?;
    let timeout = query.get("timeout").and_then(Value::as_str).map(ToOwned::to_owned);
    let timeout = duration("timeout", timeout)?.unwrap_or(coredump::TIMEOUT);
    let (cursor, machine) = (service.cursor(), service.machine.clone());
    let released = helper(move || match name {
        Some(name) => coredump::release(&machine, &name, timeout),
        None => coredump::release_all(&machine, timeout),
    });
    let released = released.await??;
    if released.is_nothing() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let mut value = json!(released);
    value["cursor"] = cursor.into();
    Ok(document(200, &value))
}

pub async fn list_steps(State(service): OfAny) -> Answer {
    let machine = service.machine.clone();
    let steps = helper(move || steps::waiting(&machine)).await?;
    Ok(document(200, &json!({"steps": steps, "cursor": service.cursor()})))
}

pub async fn acknowledge(State(service): OfAny, Path(id): Path<String>, body: Body) -> Answer {
    let answer = body::read(body).await?;
    let machine = service.machine.clone();
    helper(move || steps::acknowledge(&machine, &id, answer)).await??;
    Ok(document(200, &json!({"acknowledged": true})))
}
