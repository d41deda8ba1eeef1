//! The short forms of `--match` and `--fault`: a JSON object, pairs, a kind alone, or a term.
//!
//! Thread: the caller's. Locks: none. Must never: know the fields of a rule, which the server checks; `op` alone is read
//! as `ops`, as the flag is called.

use serde_json::{Map, Value, json};

/// `{"ops":["write"]}`, or `op=write,fsync,path=/db/*`. A piece without `=` goes on with the value before it.
pub fn place(text: &str) -> Result<Value, String> {
    match object(text)?.or_else(|| pairs(text)) {
        Some(place) => Ok(place),
        None => Err("write it as op=write,path=/db/* or as a JSON object".to_owned()),
    }
}

/// `{"kind":"error","errno":"EIO"}`, `kind=error,errno=EIO`, `drop`; all else is a term, and for the server to read.
pub fn fault(text: &str) -> Result<Value, String> {
    let is_nameless = |(kind, rest): (&str, &str)| is_word(kind) && pairs(rest).is_some();
    if text.split_once(',').is_some_and(is_nameless) {
        return Err(format!("the kind has no name before it; write it as kind={text}"));
    }
    let kind = || is_word(text).then(|| json!({"kind": text}));
    Ok(object(text)?.or_else(|| pairs(text)).or_else(kind).unwrap_or_else(|| json!(text)))
}

fn object(text: &str) -> Result<Option<Value>, String> {
    match text.trim_start().starts_with('{') {
        true => serde_json::from_str(text).map(Some).map_err(|error| error.to_string()),
        false => Ok(None),
    }
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

fn pairs(text: &str) -> Option<Value> {
    let mut found: Vec<(&str, String)> = Vec::new();
    for piece in text.split(',') {
        match (piece.split_once('=').filter(|(key, _)| is_word(key)), found.last_mut()) {
            (Some((key, value)), _) => found.push((key, value.to_owned())),
            (None, Some((_, value))) => *value = format!("{value},{piece}"),
            (None, None) => return None,
        }
    }
    Some(Value::Object(found.into_iter().map(|(key, value)| pair(key, &value)).collect::<Map<_, _>>()))
}

fn pair(key: &str, value: &str) -> (String, Value) {
    if key == "op" || key == "ops" {
        return ("ops".to_owned(), value.split(',').collect());
    }
    // What is written like a number or a truth is one.
    let plain = serde_json::from_str(value).ok().filter(|value: &Value| value.is_number() || value.is_boolean());
    (key.to_owned(), plain.unwrap_or_else(|| json!(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_pairs_or_an_object() {
        let expected = json!({"ops": ["write", "fsync"], "path": "/{a,b}*", "uid": 7, "direct": true});
        assert_eq!(place("op=write,fsync,path=/{a,b}*,uid=7,direct=true"), Ok(expected));
        assert_eq!(place(r#"{"ops":["write"]}"#), Ok(json!({"ops": ["write"]})));
        assert!(place("write").is_err() && place("{\"ops\"").is_err() && place("").is_err());
    }

    #[test]
    fn a_fault_is_pairs_an_object_a_kind_or_a_term() {
        assert_eq!(fault("kind=error,errno=EIO"), Ok(json!({"kind": "error", "errno": "EIO"})));
        assert_eq!(fault(r#"{"kind":"drop"}"#), Ok(json!({"kind": "drop"})));
        assert_eq!(fault("bad_sectors"), Ok(json!({"kind": "bad_sectors"})));
        assert_eq!(fault("50%return(EIO)"), Ok(json!("50%return(EIO)")));
        assert!(fault("error,errno=EIO").unwrap_err().ends_with("; write it as kind=error,errno=EIO"));
    }
}
