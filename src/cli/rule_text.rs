//! A rule in words: the sentence that says what it does, and the command line that makes it again.
//!
//! Thread: the caller's. Locks: none. Must never: guess; a rule that no command line can express has none.

use serde_json::Value;

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
    field("fault", "errors", "--errors"),
    field("fault", "any", "--any"),
    field("fault", "timing", "--timing"),
    field("fault", "force", "--force"),
    field("fault", "max_bytes", "--max-bytes"),
    field("fault", "fraction", "--fraction"),
    field("fault", "keep", "--keep"),
    field("fault", "then", "--then"),
    field("fault", "mode", "--mode"),
    field("fault", "bits", "--bits"),
    field("fault", "nth", "--nth"),
    field("fault", "value", "--value"),
    field("fault", "when", "--when"),
    field("fault", "offset_delta", "--offset-delta"),
    field("fault", "ranges", "--ranges"),
    field("fault", "heal_on_write", "--heal-on-write"),
    field("fault", "delay", "--delay"),
    field("fault", "jitter", "--jitter"),
    field("fault", "distribution", "--distribution"),
    field("fault", "bytes_per_second", "--bytes-per-second"),
    field("fault", "ops_per_second", "--ops-per-second"),
    field("fault", "burst", "--burst"),
    field("fault", "signal", "--signal"),
    field("fault", "target", "--target"),
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

/// Flags that take no value.
const SWITCHES: [&str; 3] = ["any", "force", "heal_on_write"];

/// The words of the command that makes this rule, without the program's name.
pub fn command(rule: &Value) -> Option<String> {
    // A name that begins with a dash would be read as a flag.
    let name = rule.get("name")?.as_str().filter(|name| !name.starts_with('-'))?;
    let mut words = vec!["rule add".to_owned(), quoted(name)];
    for section in ["fault", "match", "trigger"] {
        words.extend(flags(rule, section)?);
    }
    if rule.get("enabled") == Some(&Value::Bool(false)) {
        words.push("--disabled".to_owned());
    }
    for (name, flag) in [("required", "--required"), ("redirect_coredumps", "--redirect-coredumps")] {
        if rule.get(name) == Some(&Value::Bool(true)) {
            words.push(flag.to_owned());
        }
    }
    for (key, value) in rule.get("labels").and_then(Value::as_object).into_iter().flatten() {
        if key.is_empty() || key.contains('=') {
            return None;
        }
        let between = if key.starts_with('-') { '=' } else { ' ' };
        words.push(format!("--label{between}{}", quoted(&format!("{key}={}", value.as_str()?))));
    }
    // No command line has such a character.
    Some(words.join(" ")).filter(|words| !words.contains('\0'))
}

/// The words for one section of a rule, if there are flags for all that it says.
pub fn flags(rule: &Value, section: &str) -> Option<Vec<String>> {
    let fields = match rule.get(section) {
        None => return Some(Vec::new()),
        // The terms of a rule that has no kind.
        Some(Value::String(terms)) => return Some(vec![format!("--terms {}", quoted(terms))]),
        Some(section) => section.as_object()?,
    };
    let words = fields.iter().map(|(name, value)| flag(section, name, value));
    Some(words.collect::<Option<Vec<_>>>()?.into_iter().flatten().collect())
}

/// The words for one field: none when it says nothing, and no answer at all when there is no flag for it.
fn flag(section: &str, name: &str, value: &Value) -> Option<Option<String>> {
    let Some(text) = plain(value)? else {
        return Some(None);
    };
    let Some(field) = FIELDS.iter().find(|field| field.section == section && field.name == name) else {
        // The attributes of a kind that share their name with a condition, or are new to this client.
        return (section == "fault").then(|| Some(format!("--set {}", quoted(&format!("{name}={text}")))));
    };
    if SWITCHES.contains(&name) {
        return Some((text == "true").then(|| field.flag.to_owned()));
    }
    if field.default == Some(text.as_str()) {
        return Some(None);
    }
    // What begins with a dash would be read as the next flag.
    let between = if text.starts_with('-') { '=' } else { ' ' };
    Some(Some(format!("{}{between}{}", field.flag, quoted(&text))))
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
            let words: Option<Vec<String>> = items.iter().map(listed).collect();
            words.map(|words| Some(words.join(",")))
        }
        Value::Object(_) => None,
    }
}

/// One of a list: a word, or an error with its weight.
fn listed(item: &Value) -> Option<String> {
    match item {
        Value::String(text) => Some(text.clone()),
        Value::Object(fields) if fields.len() == 2 => {
            Some(format!("{}={}", fields.get("errno")?.as_str()?, fields.get("weight")?))
        }
        _ => None,
    }
}

/// What a rule does, in one line: `error EIO on write,fsync of /pg_wal/**, once`.
pub fn sentence(rule: &Value) -> String {
    let text = |section: &str, name: &str| word(rule, section, name);
    let terms = rule.get("fault").and_then(Value::as_str);
    let kind = terms.map(str::to_owned).or_else(|| text("fault", "kind"));
    let mut words = vec![kind.unwrap_or_else(|| "?".to_owned())];
    words.extend(text("fault", "errno"));
    words.extend(text("fault", "delay"));
    words.extend(text("fault", "jitter").map(|jitter| format!("±{jitter}")));
    words.extend(attributes(rule));
    let usual = rule.get("acts_on").and_then(|ops| plain(ops).flatten()).filter(|ops| ops != "*");
    words.push(format!("on {}", text("match", "ops").or(usual).unwrap_or_else(|| "every operation".to_owned())));
    words.extend(text("match", "path").map(|path| format!("of {path}")));
    words.extend(text("match", "offset").map(|range| format!("in {range}")));
    words.extend(text("match", "pid").map(|pid| format!("by pid {pid}")));
    words.extend(text("match", "uid").map(|uid| format!("by uid {uid}")));
    for name in ["path_regex", "tree", "comm", "gid", "length", "direct", "type"] {
        words.extend(text("match", name).map(|value| format!("with {name} {value}")));
    }
    let when: Vec<String> = conditions(&text).into_iter().map(|condition| format!(", {condition}")).collect();
    words.join(" ") + &when.concat()
}

/// What else is said of the kind: `max_bytes=100`.
fn attributes(rule: &Value) -> Vec<String> {
    let told = ["kind", "errno", "delay", "jitter"];
    let fields = rule.get("fault").and_then(Value::as_object).into_iter().flatten();
    let others = fields.filter(|(name, _)| !told.contains(&name.as_str()));
    others
        .map(|(name, value)| format!("{name}={}", plain(value).flatten().unwrap_or_else(|| value.to_string())))
        .collect()
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
        set("per", "mount").map(|what| format!("counted per {what}")),
        set("after", "").map(|span| format!("not before {span}")),
        set("after_bytes", "").map(|size| format!("not before {size} bytes")),
        set("after_rule", "").map(|name| format!("not before rule {name} has fired")),
        set("up", "").zip(set("down", "")).map(|(up, down)| format!("well for {up}, then down for {down}")),
        set("for", "").map(|span| format!("for {span}")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn word(rule: &Value, section: &str, name: &str) -> Option<String> {
    plain(rule.get(section)?.get(name)?).flatten()
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
    fn attributes_of_every_kind_have_their_words() {
        let errors = json!([{"errno": "EIO", "weight": 3}, {"errno": "ENOSPC", "weight": 1}]);
        let rule = json!({"name": "a", "fault": {"kind": "error", "errors": errors, "force": true}});
        assert_eq!(command(&rule).unwrap(), "rule add a --kind error --errors EIO=3,ENOSPC=1 --force");
        let rule = json!({"name": "a", "fault": {"kind": "attr", "size": "+1"}});
        assert_eq!(command(&rule).unwrap(), "rule add a --kind attr --set size=+1");
        let rule = json!({"name": "a", "fault": "20%return(EIO)"});
        assert_eq!(command(&rule).unwrap(), "rule add a --terms '20%return(EIO)'");
        assert_eq!(sentence(&rule), "20%return(EIO) on every operation");
        let rule = json!({"name": "a", "fault": {"kind": "short", "max_bytes": 100}, "match": {"comm": "etcd"}});
        assert_eq!(sentence(&rule), "short max_bytes=100 on every operation with comm etcd");
    }

    #[test]
    fn a_rule_that_no_flags_express_has_no_command() {
        let keep = json!({"parts": 3, "persist": [1, 3]});
        assert_eq!(command(&json!({"name": "a", "fault": {"kind": "torn", "keep": keep}})), None);
    }
}
