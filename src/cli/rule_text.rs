//! A rule in words: the sentence that says what it does, and the command line that makes it again.
//!
//! Thread: the caller's. Locks: none. Must never: guess; a rule that no command line can express has none.

use serde_json::{Map, Value};

use super::args::quoted;

/// A field of a rule: its section, its name, its flag, and the value that it has when nobody sets it.
struct Field {
    section: &'static str,
    name: &'static str,
    flag: &'static str,
    default: Option<&'static str>,
}

const fn field(section: &'static str, name: &'static str, flag: &'static str) -> Field {
    Field { section, name, flag, default: None }
}

const fn field_or(section: &'static str, name: &'static str, flag: &'static str, default: &'static str) -> Field {
    Field { section, name, flag, default: Some(default) }
}

const FIELDS: &[Field] = &[
    field("fault", "kind", "--kind"),
    field("fault", "errno", "--errno"),
    field("fault", "timing", "--timing"),
    field("fault", "delay", "--delay"),
    field("fault", "jitter", "--jitter"),
    field("fault", "distribution", "--distribution"),
    field("fault", "then", "--then"),
    field("match", "ops", "--op"),
    field("match", "path", "--path"),
    field("match", "path_regex", "--path-regex"),
    field("match", "pid", "--pid"),
    field("match", "tree", "--tree"),
    field("match", "comm", "--comm"),
    field("match", "uid", "--uid"),
    field("match", "gid", "--gid"),
    field("match", "offset", "--offset"),
    field("match", "length", "--length"),
    field("match", "direct", "--direct"),
    field("match", "type", "--type"),
    field_or("trigger", "probability", "--probability", "1"),
    field_or("trigger", "skip", "--skip", "0"),
    field_or("trigger", "every", "--every", "1"),
    field("trigger", "times", "--times"),
    field_or("trigger", "per", "--per", "mount"),
    field("trigger", "after", "--after"),
    field("trigger", "after_bytes", "--after-bytes"),
    field("trigger", "after_rule", "--after-rule"),
    field("trigger", "for", "--for"),
    field("trigger", "up", "--up"),
    field("trigger", "down", "--down"),
    field("trigger", "seed", "--seed"),
];

/// The words of the command that makes this rule, without the program's name.
pub fn command(rule: &Value) -> Option<String> {
    let mut words = vec!["rule add".to_owned(), quoted(rule.get("name")?.as_str()?)];
    for section in ["fault", "match", "trigger"] {
        for (name, value) in rule.get(section).and_then(Value::as_object).into_iter().flatten() {
            words.extend(flag(section, name, value)?);
        }
    }
    if rule.get("enabled") == Some(&Value::Bool(false)) {
        words.push("--disabled".to_owned());
    }
    if rule.get("required") == Some(&Value::Bool(true)) {
        words.push("--required".to_owned());
    }
    for (key, value) in rule.get("labels").and_then(Value::as_object).into_iter().flatten() {
        words.push(format!("--label {}", quoted(&format!("{key}={}", value.as_str()?))));
    }
    Some(words.join(" "))
}

/// The words for one field: none when it says nothing, and no answer at all when there is no flag for it.
fn flag(section: &str, name: &str, value: &Value) -> Option<Option<String>> {
    let Some(text) = plain(value)? else {
        return Some(None);
    };
    let field = FIELDS.iter().find(|field| field.section == section && field.name == name)?;
    if field.default == Some(text.as_str()) {
        return Some(None);
    }
    Some(Some(format!("{} {}", field.flag, quoted(&text))))
}

/// A value as one word: nothing for what is absent, no answer for what is no word.
fn plain(value: &Value) -> Option<Option<String>> {
    match value {
        Value::Null => Some(None),
        Value::String(text) => Some(Some(text.clone())),
        Value::Number(number) => Some(Some(number.to_string().trim_end_matches(".0").to_owned())),
        Value::Bool(truth) => Some(Some(truth.to_string())),
        Value::Array(items) if items.is_empty() => Some(None),
        Value::Array(items) => {
            let words: Option<Vec<&str>> = items.iter().map(Value::as_str).collect();
            words.map(|words| Some(words.join(",")))
        }
        Value::Object(_) => None,
    }
}

/// What a rule does, in one line: `error EIO on write,fsync of /pg_wal/**, once`.
pub fn sentence(rule: &Value) -> String {
    let text = |section: &str, name: &str| word(rule, section, name);
    let mut words = vec![text("fault", "kind").unwrap_or_else(|| "?".to_owned())];
    words.extend(text("fault", "errno"));
    words.extend(text("fault", "delay"));
    words.extend(text("fault", "jitter").map(|jitter| format!("±{jitter}")));
    words.push(format!("on {}", text("match", "ops").unwrap_or_else(|| "every operation".to_owned())));
    words.extend(text("match", "path").map(|path| format!("of {path}")));
    words.extend(text("match", "offset").map(|range| format!("in {range}")));
    words.extend(text("match", "pid").map(|pid| format!("by pid {pid}")));
    words.extend(text("match", "uid").map(|uid| format!("by uid {uid}")));
    let when: Vec<String> = conditions(&text).into_iter().map(|condition| format!(", {condition}")).collect();
    words.join(" ") + &when.concat()
}

fn conditions(text: &dyn Fn(&str, &str) -> Option<String>) -> Vec<String> {
    let set = |name: &str, neutral: &str| text("trigger", name).filter(|value| value != neutral);
    let times = set("times", "").map(|times| match times.as_str() {
        "1" => "once".to_owned(),
        times => format!("{times} times"),
    });
    [
        set("probability", "1").map(|p| format!("with probability {p}")),
        set("skip", "0").map(|n| format!("after {n} matches")),
        set("every", "1").map(|n| format!("every {n}. match")),
        times,
        set("for", "").map(|span| format!("for {span}")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn word(rule: &Value, section: &str, name: &str) -> Option<String> {
    plain(rule.get(section)?.get(name)?).flatten()
}

/// What the server adds to a rule; a client that sends a rule back leaves it out.
const ADDED: [&str; 7] = ["matches", "injections", "created", "state", "cursor", "pending", "warnings"];

/// A rule as it was sent, from a rule as it was received.
pub fn definition(rule: &Map<String, Value>) -> Value {
    Value::Object(
        rule.iter().filter(|(key, _)| !ADDED.contains(&key.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rule() -> Value {
        json!({"name": "wal-eio", "enabled": false, "required": false, "matches": 3, "state": "disabled",
            "match": {"ops": ["write", "fsync"], "path": "/pg_wal/**", "pid": null},
            "trigger": {"probability": 1.0, "skip": 0, "every": 1, "times": 1, "per": "mount", "for": "5m"},
            "fault": {"kind": "error", "errno": "EIO"}, "labels": {"ticket": "a b"}})
    }

    #[test]
    fn a_rule_is_told_by_what_it_does_where_and_when() {
        assert_eq!(sentence(&rule()), "error EIO on write,fsync of /pg_wal/**, once, for 5m");
        assert_eq!(sentence(&json!({"fault": {"kind": "stall"}})), "stall on every operation");
    }

    #[test]
    fn the_command_of_a_rule_says_only_what_is_not_the_default() {
        assert_eq!(
            command(&rule()).unwrap(),
            "rule add wal-eio --kind error --errno EIO --op write,fsync --path '/pg_wal/**' --times 1 --for 5m \
             --disabled --label 'ticket=a b'"
        );
    }

    #[test]
    fn a_rule_that_no_flags_express_has_no_command() {
        let errors = json!([{"errno": "EIO", "weight": 1}]);
        assert_eq!(command(&json!({"name": "a", "fault": {"kind": "error", "errors": errors}})), None);
    }
}
