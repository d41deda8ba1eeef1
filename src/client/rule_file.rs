//! Files of rules: TOML or JSON, one rule or many, or what a listing printed.
//!
//! Pure: called on the caller's thread with the text of a file. Locks: none. Must never: judge the rules, which is the
//! server's to do.

use serde_json::{Map, Value, json};

/// The set of rules in the text of a file, as a body of `PUT /v1/rules`. What the rules say is for the server to check.
///
/// # Errors
/// Why it is neither TOML nor JSON.
pub fn parse(text: &str) -> Result<Value, String> {
    let document: Value = if text.trim_start().starts_with(['{', '[']) && !text.trim_start().starts_with("[[") {
        // A table header of TOML begins like a list of JSON, and what fails as the one may be the other.
        serde_json::from_str(text).or_else(|error| toml::from_str(text).map_err(|_| error.to_string()))?
    } else {
        toml::from_str(text).map_err(|error| error.to_string())?
    };
    Ok(as_set(document))
}

fn as_set(document: Value) -> Value {
    match document {
        Value::Array(rules) => json!({"rules": rules.iter().map(stripped).collect::<Vec<_>>()}),
        Value::Object(fields) if fields.contains_key("rules") => {
            let mut fields = fields;
            fields.remove("cursor");
            fields.remove("pending");
            fields.remove("warnings");
            if let Some(Value::Array(rules)) = fields.get_mut("rules") {
                *rules = rules.iter().map(stripped).collect();
            }
            Value::Object(fields)
        }
        Value::Object(fields) if fields.is_empty() => json!({"rules": []}),
        rule => json!({"rules": [stripped(&rule)]}),
    }
}

fn stripped(rule: &Value) -> Value {
    rule.as_object().map_or_else(|| rule.clone(), definition)
}

/// What the server adds to a rule; a client that sends a rule back leaves it out.
const ADDED: [&str; 10] =
    ["acts_on", "matches", "injections", "created", "state", "cursor", "pending", "warnings", "met", "unfired"];

/// A rule as it was sent, from a rule as it was received.
pub fn definition(rule: &Map<String, Value>) -> Value {
    Value::Object(
        rule.iter().filter(|(key, _)| !ADDED.contains(&key.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_from_toml_and_json_one_or_many() {
        let rule = json!({"name": "a", "fault": {"kind": "drop"}});
        let set = json!({"rules": [rule]});
        for text in [
            "[[rules]]\nname = \"a\"\nfault = { kind = \"drop\" }\n",
            "name = \"a\"\n[fault]\nkind = \"drop\"\n",
            "  {\"rules\":[{\"name\":\"a\",\"fault\":{\"kind\":\"drop\"}}]}",
            "{\"name\":\"a\",\"fault\":{\"kind\":\"drop\"}}",
            "[{\"name\":\"a\",\"fault\":{\"kind\":\"drop\"}}]",
        ] {
            assert_eq!(parse(text).unwrap(), set, "{text}");
        }
        assert_eq!(parse("").unwrap(), json!({"rules": []}));
        assert_eq!(parse("[fault]\nkind = \"drop\"\n").unwrap(), json!({"rules": [{"fault": {"kind": "drop"}}]}));
    }

    #[test]
    fn a_listing_can_be_applied_again_and_other_unknown_fields_stay_for_the_server_to_refuse() {
        let listing =
            "{\"rules\":[{\"name\":\"a\",\"matches\":1,\"state\":\"armed\",\"x\":1}],\"cursor\":\"b-1\",\"y\":2}";
        assert_eq!(parse(listing).unwrap(), json!({"rules": [{"name": "a", "x": 1}], "y": 2}));
        assert!(parse("not a rule").is_err());
    }
}
