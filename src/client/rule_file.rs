//! Files of rules: TOML or JSON, one rule or many, or what a listing printed.
//!
//! Pure: called on the caller's thread with the text of a file. Locks: none. Must never: judge the rules, which is the
//! server's to do.

use serde_json::{Value, json};

/// The set of rules in the text of a file, as a body of `PUT /v1/rules`. What the rules say is for the server to check.
///
/// # Errors
/// Why it is neither TOML nor JSON, or that there is nothing in it.
pub fn parse(text: &str) -> Result<Value, String> {
    let document: Value = if text.trim_start().starts_with(['{', '[']) && !text.trim_start().starts_with("[[") {
        // A table header of TOML begins like a list of JSON, and what fails as the one may be the other.
        serde_json::from_str(text).or_else(|error| toml::from_str(text).map_err(|_| error.to_string()))?
    } else {
        toml::from_str(text).map_err(|error| error.to_string())?
    };
    as_set(document)
}

fn as_set(document: Value) -> Result<Value, String> {
    match document {
        Value::Array(rules) => Ok(json!({"rules": rules})),
        // A generator of rules that has failed is not meant to remove them.
        Value::Object(fields) if fields.is_empty() => {
            Err("there is nothing in it; `rules = []`, or `rule clear`, removes all rules".into())
        }
        Value::Object(fields) if fields.contains_key("rules") => Ok(Value::Object(fields)),
        rule => Ok(json!({"rules": [rule]})),
    }
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
        assert_eq!(parse("[fault]\nkind = \"drop\"\n").unwrap(), json!({"rules": [{"fault": {"kind": "drop"}}]}));
    }

    #[test]
    fn nothing_is_no_set_and_an_empty_list_is_one() {
        for nothing in ["", " \n", "# nothing\n", "{}"] {
            assert!(parse(nothing).unwrap_err().contains("rules = []"), "{nothing:?}");
        }
        for none in ["[]", "{\"rules\":[]}", "rules = []\n"] {
            assert_eq!(parse(none).unwrap(), json!({"rules": []}));
        }
        assert!(parse("not a rule").is_err());
    }
}
