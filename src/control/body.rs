//! What clients send: bodies and queries, read whole, with a limit, or refused.
//!
//! Used by the handlers on the control thread.

use std::str::FromStr;

use axum::body::Body;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::problem::Problem;
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

/// Reads a body as a document; an empty one is `{}`. What a rule says is for the reader of rules to judge.
pub async fn read<T: DeserializeOwned>(body: Body) -> Result<T, Problem> {
    let text = bytes(body).await?;
    let text: &[u8] = if text.trim_ascii().is_empty() { b"{}" } else { &text };
    let no_json = |error| Problem::bad_request(format!("the body is not JSON: {error}"));
    document::from_value(serde_json::from_slice(text).map_err(no_json)?).map_err(Problem::of_body)
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

/// A value of a query. One that says nothing is not given.
pub fn text<'a>(values: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    values.get(name).and_then(Value::as_str).filter(|text| !text.is_empty())
}

/// A value of a query as a number.
pub fn number<N: FromStr>(values: &Map<String, Value>, name: &str) -> Result<Option<N>, Problem> {
    let Some(text) = text(values, name) else { return Ok(None) };
    let bad = |_| Problem::bad_request(format!("{name}: {text:?} is not a number"));
    text.parse().map(Some).map_err(bad)
}
