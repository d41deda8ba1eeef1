//! `/v1/space`: how full the mount pretends to be.
//!
//! On the control thread; a helper counts the tree where that is needed.

use axum::body::Body;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Answer, Control, Shared, body, document, helper};
use crate::fault::Problem;
use crate::fault::compile::bytes;
use crate::fault::spec::NotYet;
use crate::fs::usage::{self, Size};

/// The request in force, as it was made.
#[derive(Debug, Default)]
pub struct Requested(Option<Value>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    #[serde(default)]
    r#virtual: Option<Virtual>,
    #[serde(default)]
    quota: NotYet,
    #[serde(default)]
    ballast: NotYet,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Virtual {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    free: Option<Amount>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    used: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size: Option<Amount>,
    #[serde(default, skip_serializing)]
    inodes: NotYet,
    #[serde(default, skip_serializing)]
    reserve: NotYet,
}

/// A number of bytes, as a number or with its unit.
#[derive(Clone, Deserialize, Serialize)]
#[serde(untagged)]
enum Amount {
    Bytes(u64),
    Text(String),
}

impl Amount {
    fn bytes(&self, pointer: &str) -> Result<u64, Problem> {
        match self {
            Amount::Bytes(number) => Ok(*number),
            Amount::Text(text) => bytes(text).ok_or_else(|| {
                Problem::new(pointer, format!("{text:?} is not a size")).hint("write \"0\", \"4KiB\" or \"10GiB\"")
            }),
        }
    }
}

fn not_yet(pointer: &str, what: &str) -> Problem {
    Problem { not_yet: true, ..Problem::new(pointer, format!("{what} is not built yet")) }
}

fn size_of(wanted: &Wanted) -> Result<Size, Problem> {
    for (name, value) in [("quota", &wanted.quota), ("ballast", &wanted.ballast)] {
        if value.is_some() {
            return Err(not_yet(&format!("#/{name}"), name));
        }
    }
    let Some(asked) = &wanted.r#virtual else {
        return Err(Problem::new("#/virtual", "nothing is asked for").hint("{\"virtual\":{\"free\":\"0\"}}"));
    };
    for (name, value) in [("inodes", &asked.inodes), ("reserve", &asked.reserve)] {
        if value.is_some() {
            return Err(not_yet(&format!("#/virtual/{name}"), &format!("virtual.{name}")));
        }
    }
    match (&asked.free, &asked.used, &asked.size) {
        (Some(free), None, None) => Ok(Size::Free(free.bytes("#/virtual/free")?)),
        (None, None, Some(size)) => Ok(Size::Total(size.bytes("#/virtual/size")?)),
        (None, Some(used), None) => {
            let percent = used.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
            let percent = percent.filter(|percent| *percent > 0.0 && *percent <= 100.0);
            percent.map(Size::UsedPercent).ok_or_else(|| {
                Problem::new("#/virtual/used", format!("virtual.used: {used:?} is not a percentage"))
                    .hint("write \"98%\"")
            })
        }
        _ => Err(Problem::new("#/virtual", "virtual: give one of free, used and size")),
    }
}

impl Control {
    async fn show_space(&self) -> Value {
        let core = self.core.clone();
        // The backing filesystem may hang; the mount itself is not asked.
        let statfs = helper(move || core.space_left()).await.ok().and_then(Result::ok);
        let capacity = &self.core.capacity;
        let requested = self.space.lock().await.0.clone();
        let account = capacity.size().map(|size| {
            let free = capacity.free();
            json!({"free": free, "size": size, "used": size.saturating_sub(free), "requested": requested})
        });
        let statfs = statfs.map(
            |s| json!({"blocks": s.blocks, "free": s.free, "available": s.available, "block_size": s.fragment_size}),
        );
        json!({"virtual": account, "statfs": statfs, "cursor": self.cursor()})
    }

    pub(super) async fn clear_space(&self) -> bool {
        let was = self.space.lock().await.0.take().is_some();
        self.core.capacity.clear();
        if was {
            self.ring().change("space", json!({"action": "cleared"}));
        }
        was
    }
}

pub async fn show(State(control): Shared) -> Answer {
    Ok(document(200, &control.show_space().await))
}

pub async fn set(State(control): Shared, body: Body) -> Answer {
    let wanted: Wanted = body::read(body).await?;
    let size = size_of(&wanted)?;
    let cursor = control.cursor();
    let core = control.core.clone();
    let mut requested = control.space.lock().await;
    let set = helper(move || usage::set_capacity(&core, size)).await?;
    set.map_err(|error| super::Problem::new(500, "internal", format!("the backing directory: {error}")))?;
    let asked = serde_json::to_value(&wanted.r#virtual).unwrap_or_default();
    requested.0 = Some(asked.clone());
    drop(requested);
    control.ring().change("space", json!({"action": "set", "virtual": asked}));
    let mut value = control.show_space().await;
    value["cursor"] = cursor.into();
    Ok(document(200, &value))
}

pub async fn clear(State(control): Shared) -> Answer {
    let cursor = control.cursor();
    control.clear_space().await;
    let mut value = control.show_space().await;
    value["cursor"] = cursor.into();
    Ok(document(200, &value))
}
