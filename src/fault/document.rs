//! Rules as documents: JSON bodies and the rules of files, with the place of what is wrong in them.
//!
//! Pure: called by the control thread and at start. Anything else than a rule of the contract is refused whole.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::compile::{Problem, escaped, nearest, words};
use super::plan::State;
use super::spec::RuleSpec;
use super::strict::Document;

/// Reads a document as `T`.
///
/// # Errors
/// One problem with a pointer to its place, and a suggestion for a misspelt field.
pub fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, Problem> {
    serde_path_to_error::deserialize(Document(value)).map_err(|error| {
        let message = error.inner().to_string();
        problem(error.path(), &message)
    })
}

fn problem(path: &serde_path_to_error::Path, message: &str) -> Problem {
    use serde_path_to_error::Segment;
    let mut pointer = "#".to_string();
    let mut last = None;
    for segment in path.iter() {
        let part = match segment {
            Segment::Seq { index } => index.to_string(),
            Segment::Map { key } => key.clone(),
            Segment::Enum { .. } | Segment::Unknown => continue,
        };
        pointer = format!("{pointer}/{}", escaped(&part));
        last = Some(part);
    }
    let message = in_words_of_json(message);
    let place = if pointer == "#" { String::new() } else { format!("{}: ", words(&pointer)) };
    let mut hint = None;
    // What is known has no quotes in it; what a client has sent may.
    let unknown = message.strip_prefix("unknown field `").and_then(|rest| rest.rsplit_once("`, expected "));
    if let Some((unknown, expected)) = unknown {
        if last.as_deref() != Some(unknown) {
            pointer = format!("{pointer}/{}", escaped(unknown));
        }
        let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
        hint = nearest(unknown, known.iter().copied()).map(|near| format!("did you mean \"{near}\"?"));
        hint = hint.or_else(|| Some(format!("one of: {}", known.join(" "))));
    }
    Problem { hint, ..Problem::new(pointer, format!("{place}{}", message.replace('`', "\""))) }
}

/// serde tells types by their names in the code.
fn in_words_of_json(message: &str) -> String {
    let Some((found, expected)) = message.rsplit_once(", expected ") else { return message.to_string() };
    let expected = match expected {
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "u8" | "u16" | "u64" | "usize" => "a whole number from 0",
        "u32" => "a whole number from 0 to 4294967295",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "an array",
        "a map" => "an object",
        expected if expected.starts_with("struct ") => "an object",
        expected => expected,
    };
    let found = match found {
        "invalid type: map" => "invalid type: an object",
        "invalid type: sequence" => "invalid type: an array",
        found => found,
    };
    format!("{found}, expected {expected}")
}

/// Does the server add such a member to a rule when it shows it? It is neither asked for nor wrong in what a client sends
/// back. What only has its name is a slip: `matches` for `match`.
fn is_added(name: &str, value: &Value, rule: &Map<String, Value>) -> bool {
    match name {
        "matches" | "injections" => value.is_u64(),
        "created" | "cursor" => value.is_string(),
        "acts_on" | "pending" | "warnings" => value.is_array(),
        "met" => value.is_object(),
        "unfired" => value.is_string(),
        // Beside what it follows from, which counts.
        "state" => rule.contains_key("enabled") && State::ALL.iter().any(|state| value == state.word()),
        _ => false,
    }
}

/// What it adds to a set.
const ADDED_TO_SETS: [&str; 3] = ["cursor", "pending", "warnings"];

/// A rule as it was sent, from a rule as it is shown. What is null is not given.
pub fn definition(rule: Map<String, Value>) -> Map<String, Value> {
    let sent = rule.iter().filter(|(name, value)| !value.is_null() && !is_added(name, value, &rule));
    sent.map(|(name, value)| (name.clone(), given(name, value.clone()))).collect()
}

fn given(name: &str, mut value: Value) -> Value {
    if let ("match" | "trigger", Value::Object(parts)) = (name, &mut value) {
        parts.retain(|_, part| !part.is_null());
    }
    value
}

fn shown_or_sent(document: Value) -> Value {
    match document {
        Value::Object(rule) => Value::Object(definition(rule)),
        other => other,
    }
}

/// A rule: as the contract has it, or terms alone (`"20%return(EIO)"`), which act on everything.
///
/// # Errors
/// As [`from_value`].
pub fn rule(document: Value) -> Result<RuleSpec, Problem> {
    match document {
        Value::String(terms) => from_value(serde_json::json!({"fault": terms})),
        other => from_value(shown_or_sent(other)),
    }
}

/// A set of rules: `{"rules": [...]}`, or one rule.
///
/// # Errors
/// As [`from_value`].
pub fn rules(document: Value) -> Result<Vec<RuleSpec>, Problem> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Set {
        rules: Vec<RuleSpec>,
    }
    match document {
        Value::Object(one) if one.contains_key("fault") => Ok(vec![from_value(Value::Object(definition(one)))?]),
        Value::Object(mut set) => {
            set.retain(|name, _| !ADDED_TO_SETS.contains(&name.as_str()));
            if let Some(Value::Array(rules)) = set.get_mut("rules") {
                rules.iter_mut().for_each(|rule| *rule = shown_or_sent(rule.take()));
            }
            Ok(from_value::<Set>(Value::Object(set))?.rules)
        }
        other => Ok(from_value::<Set>(other)?.rules),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> Problem {
        from_value::<RuleSpec>(serde_json::from_str(text).unwrap()).unwrap_err()
    }

    #[test]
    fn a_misspelt_field_is_refused_with_its_place_and_the_right_one() {
        let text = r#"{"name":"a","match":{"pth":"/x"},"fault":{"kind":"error","errno":"EIO"}}"#;
        let problem = wrong(text);
        assert_eq!(problem.pointer, "#/match/pth");
        assert_eq!(problem.hint.as_deref(), Some("did you mean \"path\"?"));
    }

    #[test]
    fn a_wrong_type_is_refused_with_its_place() {
        let text = r#"{"name":"a","trigger":{"times":"two"},"fault":{"kind":"drop"}}"#;
        let problem = wrong(text);
        assert_eq!(problem.pointer, "#/trigger/times");
        assert!(problem.detail.starts_with("trigger.times: "), "{}", problem.detail);
    }
    #[test]
    fn an_array_is_no_object_at_any_depth() {
        for (text, pointer) in [
            (r#"["a",true,false,false,{},{},{"kind":"drop"},{}]"#, "#"),
            (r#"{"match":[["write"]],"fault":{"kind":"drop"}}"#, "#/match"),
            (r#"{"trigger":[],"fault":{"kind":"drop"}}"#, "#/trigger"),
        ] {
            let problem = wrong(text);
            assert_eq!(problem.pointer, pointer, "{problem:?}");
            assert!(problem.detail.ends_with("invalid type: an array, expected an object"), "{problem:?}");
        }
    }

    #[test]
    fn a_wrong_type_is_told_in_words_of_json() {
        for (trigger, told) in [
            (r#"{"skip":[]}"#, "trigger.skip: invalid type: an array, expected a whole number from 0"),
            (r#"{"skip":-1}"#, "trigger.skip: invalid value: integer \"-1\", expected a whole number from 0"),
            (r#"{"probability":{}}"#, "trigger.probability: invalid type: an object, expected a number"),
        ] {
            let text = format!(r#"{{"trigger":{trigger},"fault":{{"kind":"drop"}}}}"#);
            assert_eq!(wrong(&text).detail, told);
        }
    }

    #[test]
    fn the_place_in_a_detail_is_written_as_the_compiler_writes_it() {
        let set = serde_json::json!({"rules": [{"fault": {"kind": "drop"}}, {"fault": {"kind": "drop"}, "match": {"ops": [1]}}]});
        let problem = rules(set).unwrap_err();
        assert_eq!(problem.pointer, "#/rules/1/match/ops/0");
        assert!(problem.detail.starts_with("rules[1].match.ops[0]: "), "{}", problem.detail);
        for (fault, place) in [
            (serde_json::json!({"kind": "error", "errors": ["EWHAT"]}), "fault.errors[0]: "),
            (serde_json::json!({"kind": "bad_sectors", "ranges": ["x"]}), "fault.ranges[0]: "),
        ] {
            let defaults =
                crate::fault::compile::Defaults { seed: 0, now_ns: 0, created: std::time::SystemTime::UNIX_EPOCH };
            let problems =
                crate::fault::compile(rule(serde_json::json!({"name": "a", "fault": fault})).unwrap(), defaults);
            let detail = &problems.unwrap_err()[0].detail;
            assert!(detail.starts_with(place), "{detail}");
        }
    }
    #[test]
    fn a_listing_is_a_set_again_and_other_unknown_fields_are_refused() {
        let shown = serde_json::json!({"name": "a", "enabled": true, "matches": 1, "state": "armed", "fault": {"kind": "drop"}, "acts_on": ["write"]});
        let sent = rule(serde_json::json!({"name": "a", "fault": {"kind": "drop"}})).unwrap();
        assert_eq!(rule(shown.clone()).unwrap(), sent);
        let listing = serde_json::json!({"rules": [shown], "cursor": "b-1", "pending": []});
        assert_eq!(rules(listing).unwrap(), [sent]);
        let odd = serde_json::json!({"rules": [], "mactches": 1});
        assert_eq!(rules(odd).unwrap_err().pointer, "#/mactches");
    }
}
