//! What clients send: bodies and queries, read whole, with a limit, or refused.
//!
//! Used by the handlers on the control thread.

use axum::body::Body;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::problem::Problem;
use crate::fault;
use crate::fault::compile::nearest;
use crate::fault::document;

/// No document of ours is nearly as large.
pub const LIMIT: usize = 1 << 20;

/// Reads a body whole.
pub async fn bytes(body: Body) -> Result<Vec<u8>, Problem> {
    match axum::body::to_bytes(body, LIMIT).await {
        Ok(bytes) => Ok(bytes.into()),
        Err(error) if is_too_large(&error) => Err(Problem::new(413, "body_too_large", "the body is larger than 1 MiB")),
        Err(error) => Err(Problem::bad_request(format!("the body cannot be read: {error}"))),
    }
}

fn is_too_large(error: &(dyn std::error::Error + 'static)) -> bool {
    error.is::<http_body_util::LengthLimitError>() || error.source().is_some_and(is_too_large)
}

/// Reads a body as an object; an empty one is `{}`. A list would be taken for the fields in their order.
pub async fn read<T: DeserializeOwned>(body: Body) -> Result<T, Problem> {
    let text = bytes(body).await?;
    if text.trim_ascii_start().starts_with(b"[") {
        return Err(fault::Problem::new("#", "a list, where an object is wanted").hint("write {…}").into());
    }
    parse(text)
}

/// Reads a body that may be of any form.
pub async fn read_any(body: Body) -> Result<Value, Problem> {
    parse(bytes(body).await?)
}

fn parse<T: DeserializeOwned>(text: Vec<u8>) -> Result<T, Problem> {
    let text = if text.trim_ascii().is_empty() { b"{}".to_vec() } else { text };
    Ok(document::from_json(&text)?)
}

/// Reads a query into named values; a name that is not known is refused with the nearest one that is.
pub fn query(query: Option<&str>, known: &[&str]) -> Result<Map<String, Value>, Problem> {
    let mut values = Map::new();
    for (name, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        if !known.contains(&&*name) {
            let near = nearest(&name, known.iter().copied()).map(|near| format!("did you mean {near:?}?"));
            let hint = near.unwrap_or_else(|| match known {
                [] => "this route takes none: what a change wants is in its body".into(),
                known => format!("one of: {}", known.join(" ")),
            });
            return Err(Problem::bad_request(format!("unknown parameter {name:?}")).hint(hint));
        }
        values.insert(name.into_owned(), Value::String(value.into_owned()));
    }
    Ok(values)
}

/// A value of a query as a number.
pub fn number(values: &Map<String, Value>, name: &str) -> Result<Option<u64>, Problem> {
    let Some(text) = values.get(name).and_then(Value::as_str) else { return Ok(None) };
    let bad = |_| Problem::bad_request(format!("{name}: {text:?} is not a number"));
    text.parse().map(Some).map_err(bad)
}
