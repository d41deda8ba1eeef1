//! Rules as documents: JSON bodies and the rules of files, with the place of what is wrong in them.
//!
//! Pure: called by the control thread and at start. Anything else than a rule of the contract is refused whole.

use serde::de::DeserializeOwned;

use super::compile::{Problem, escaped, nearest};
use super::spec::RuleSpec;

/// Reads a JSON document as `T`.
///
/// # Errors
/// One problem with a pointer to its place, and a suggestion for a misspelt field.
pub fn from_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, Problem> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let message = error.inner().to_string();
        problem(error.path(), &message)
    })?;
    json.end().map_err(|error| Problem::new("#", format!("not one JSON document: {error}")))?;
    Ok(value)
}

/// Reads a JSON value as `T`.
///
/// # Errors
/// As [`from_json`].
pub fn from_value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, Problem> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let message = error.inner().to_string();
        problem(error.path(), &message)
    })
}

fn problem(path: &serde_path_to_error::Path, message: &str) -> Problem {
    use serde_path_to_error::Segment;
    let parts: Vec<String> = path
        .iter()
        .filter_map(|segment| match segment {
            Segment::Seq { index } => Some(index.to_string()),
            Segment::Map { key } => Some(key.clone()),
            Segment::Enum { .. } | Segment::Unknown => None,
        })
        .collect();
    let message = without_line(message);
    let mut pointer = parts.clone();
    let mut hint = None;
    // What is known has no quotes in it; what a client has sent may.
    let unknown = message.strip_prefix("unknown field `").and_then(|rest| rest.rsplit_once("`, expected "));
    if let Some((unknown, expected)) = unknown {
        if pointer.last().map(String::as_str) != Some(unknown) {
            pointer.push(unknown.to_string());
        }
        let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
        hint = nearest(unknown, known.iter().copied()).map(|near| format!("did you mean \"{near}\"?"));
        hint = hint.or_else(|| Some(format!("one of: {}", known.join(" "))));
    }
    let place = if parts.is_empty() { String::new() } else { format!("{}: ", parts.join(".")) };
    let pointer = pointer.iter().map(|part| format!("/{}", escaped(part)));
    let pointer = format!("#{}", pointer.collect::<String>());
    Problem { hint, ..Problem::new(pointer, format!("{place}{}", message.replace('`', "\""))) }
}

/// serde counts lines of a body that nobody sees as lines.
fn without_line(message: &str) -> &str {
    let is_place = |place: &str| place.split(" column ").all(|number| number.parse::<u64>().is_ok());
    match message.rsplit_once(" at line ") {
        Some((before, place)) if is_place(place) => before,
        _ => message,
    }
}

/// A rule: as the contract has it, or terms alone (`"20%return(EIO)"`), which act on everything.
///
/// # Errors
/// As [`from_json`].
pub fn rule(document: serde_json::Value) -> Result<RuleSpec, Problem> {
    match document {
        serde_json::Value::String(terms) => from_value(serde_json::json!({"fault": terms})),
        other => from_value(other),
    }
}

/// A set of rules: `{"rules": [...]}`, a list, or one rule.
///
/// # Errors
/// As [`from_json`].
pub fn rules(document: serde_json::Value) -> Result<Vec<RuleSpec>, Problem> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Set {
        rules: Vec<RuleSpec>,
    }
    match &document {
        serde_json::Value::Array(_) => from_value(document),
        serde_json::Value::Object(object) if object.contains_key("fault") => Ok(vec![from_value(document)?]),
        _ => Ok(from_value::<Set>(document)?.rules),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_field_is_refused_with_its_place_and_the_right_one() {
        let text = br#"{"name":"a","match":{"pth":"/x"},"fault":{"kind":"error","errno":"EIO"}}"#;
        let problem = from_json::<RuleSpec>(text).unwrap_err();
        assert_eq!(problem.pointer, "#/match/pth");
        assert_eq!(problem.hint.as_deref(), Some("did you mean \"path\"?"));
    }

    #[test]
    fn a_wrong_type_is_refused_with_its_place() {
        let text = br#"{"name":"a","trigger":{"times":"two"},"fault":{"kind":"drop"}}"#;
        let problem = from_json::<RuleSpec>(text).unwrap_err();
        assert_eq!(problem.pointer, "#/trigger/times");
        assert!(problem.detail.starts_with("trigger.times: "), "{}", problem.detail);
    }
}
