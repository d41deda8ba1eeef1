//! `/v1/evict` and `/v1/repair`: what readers see against what the disk has, and what it should have.
//!
//! On the control thread; the work is done by a helper, because the kernel may write back mapped pages first.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use globset::GlobMatcher;
use serde::Deserialize;
use serde_json::{Value, json};

use super::problem::Problem;
use super::{Answer, Control, Shared, body, document};
use crate::durability::{Evicted, Original};
use crate::event::record::rfc3339;
use crate::fault::{self, compile::rooted_glob};

/// As much of the original bytes is shown; all of them are kept.
const SHOWN: usize = 64;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    #[serde(default)]
    path: Option<String>,
}

impl Wanted {
    fn glob(&self) -> Result<Option<GlobMatcher>, Problem> {
        glob(self.path.as_deref()).map_err(Problem::of_body)
    }
}

fn glob(path: Option<&str>) -> Result<Option<GlobMatcher>, fault::Problem> {
    path.map(|path| Ok(rooted_glob("#/path", path)?.compile_matcher())).transpose()
}

/// What a helper reports of its files under a name, or that it is not done yet: then an event will tell.
async fn report(
    control: &Control,
    name: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<Vec<Value>, Problem>>,
) -> Answer {
    let cursor = control.cursor();
    let files = match tokio::time::timeout(limit, work).await {
        Ok(files) => files?,
        Err(_) => {
            let pending = "a waiting request holds a file's pages: an event tells when it is done";
            return Ok(document(200, &json!({name: [], "pending": [pending], "cursor": cursor})));
        }
    };
    match files.iter().find(|one| one.get("error").is_some()).cloned() {
        Some(failed) => {
            Err(Problem::new(500, "internal", format!("not all could be done: {failed}")).with(name, files.into()))
        }
        None => Ok(document(200, &json!({name: files, "pending": [], "cursor": cursor}))),
    }
}

pub async fn evict(State(control): Shared, body: Body) -> Answer {
    let glob = body::read::<Wanted>(body).await?.glob()?;
    let core = control.core.clone();
    // The helper tells the stream by itself: it may take longer than the client is made to wait.
    let work = control.looks.damage.ask(move || {
        let evicted: Vec<Value> = core.evict_all(glob.as_ref()).into_iter().map(evicted).collect();
        core.ring.change("space", json!({"action": "evicted", "files": evicted}));
        evicted
    });
    report(&control, "evicted", super::FORGET_LIMIT, work).await
}

fn evicted((path, result): (String, std::io::Result<Evicted>)) -> Value {
    match result {
        Ok(evicted) => json!({"path": path, "writes": evicted.writes, "bytes": evicted.bytes}),
        Err(error) => json!({"path": path, "error": error.to_string()}),
    }
}

pub async fn repair(State(control): Shared, body: Body) -> Answer {
    let glob = body::read::<Wanted>(body).await?.glob()?;
    let core = control.core.clone();
    let work = control.looks.damage.ask(move || {
        let repaired: Vec<Value> = core.repair_all(glob.as_ref()).into_iter().map(repaired).collect();
        core.ring.change("rule", json!({"action": "repaired", "files": repaired}));
        repaired
    });
    report(&control, "repaired", super::FORGET_LIMIT, work).await
}

fn repaired((path, result): (String, std::io::Result<Vec<Original>>)) -> Value {
    match result {
        Ok(places) => json!({"path": path, "places": places.iter().map(shown).collect::<Vec<_>>()}),
        Err(error) => json!({"path": path, "error": error.to_string()}),
    }
}

/// A damaged place with the injection that made it.
fn shown(place: &Original) -> Value {
    let bytes: String = place.bytes.iter().take(SHOWN).map(|byte| format!("{byte:02x}")).collect();
    json!({
        "offset": place.offset, "length": place.bytes.len(), "rule": &*place.mark.rule, "nth": place.mark.nth,
        "time": rfc3339(place.mark.at), "original": bytes,
    })
}

/// Did we make this bad page? All places that were damaged and not written since, or those of one path, or those that
/// touch a range of it.
pub async fn list(State(control): Shared, RawQuery(query): RawQuery) -> Answer {
    let query = body::query(query.as_deref(), &["path", "offset", "length"])?;
    let glob = glob(query.get("path").and_then(Value::as_str)).map_err(Problem::of_parameter)?;
    let (offset, length) = (body::number::<u64>(&query, "offset")?, body::number(&query, "length")?);
    let wanted = match (offset, length) {
        (None, None) => 0..u64::MAX,
        (None, Some(_)) => return Err(Problem::bad_request("length: of what? There is no offset")),
        (Some(offset), length) => offset..offset.saturating_add(length.unwrap_or(1)),
    };
    let core = control.core.clone();
    let damaged = control.looks.damage.ask(move || core.damaged(glob.as_ref())).await?;
    let touches = |place: &&Original| place.range().start < wanted.end && place.range().end > wanted.start;
    let file = |(path, places): (String, Vec<Original>)| {
        let places: Vec<Value> = places.iter().filter(touches).map(shown).collect();
        (!places.is_empty()).then(|| json!({"path": path, "places": places}))
    };
    let files: Vec<Value> = damaged.into_iter().filter_map(file).collect();
    Ok(document(200, &json!({"damaged": files, "cursor": control.cursor()})))
}
