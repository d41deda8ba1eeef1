//! What clients may send: anything. What is wrong is told with its place, what is suggested is right, and what is shown
//! of a rule is the rule.

use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

use super::extremes::{attribute, edge, rule};
use super::{compiled, config};
use crate::fault::compile::{name_glob, path_glob};
use crate::fault::kind::KINDS;
use crate::fault::op::{FileType, OpSet};
use crate::fault::{Problem, RuleSpec, document, term};

const FIELDS: &[&str] = &[
    "name",
    "enabled",
    "required",
    "redirect_coredumps",
    "match",
    "trigger",
    "fault",
    "labels",
    "ops",
    "path",
    "path_regex",
    "pid",
    "tree",
    "comm",
    "uid",
    "gid",
    "offset",
    "length",
    "direct",
    "type",
    "probability",
    "skip",
    "every",
    "times",
    "per",
    "after",
    "after_bytes",
    "after_rule",
    "for",
    "up",
    "down",
    "seed",
    "kind",
];

/// Every word that is known somewhere.
fn known() -> Vec<String> {
    let kinds = KINDS.iter().flat_map(|kind| kind.attributes.iter().copied().chain([kind.word]));
    let types = FileType::WORDS.iter().map(|(word, _)| *word);
    let others =
        ["mount", "file", "process", "SIGTERM", "EIO", "ENOSPC", "return", "sleep", "bitflip", "before", "caller"];
    let all = FIELDS.iter().copied().chain(kinds).chain(types).chain(OpSet::words()).chain(others);
    all.map(str::to_string).collect()
}

/// A word that is known somewhere, or was mistyped.
fn word() -> impl Strategy<Value = String> {
    let mistyped = (select(known()), any::<prop::sample::Index>(), "[a-z_`~/ ]?").prop_map(|(word, at, typed)| {
        let at = at.index(word.len());
        format!("{}{typed}{}", &word[..at], &word[at + 1..])
    });
    prop_oneof![3 => select(known()), 5 => mistyped, 1 => ".{0,20}", 1 => "[/{},*?!a\\[\\]\\\\-]{0,30}"]
}

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        edge().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word().prop_map(Value::from),
        "/[/{},*?!a\\[\\]\\\\-]{0,30}".prop_map(Value::from),
        select(vec!["0..1", "1..0", "4KiB..", "10ms", "-3", "1e999", "99999999999999999999"]).prop_map(Value::from),
        prop::collection::vec(word(), 0..3).prop_map(Value::from),
    ]
}

/// Any JSON.
fn anything() -> impl Strategy<Value = Value> {
    leaf().prop_recursive(4, 40, 6, |inner| {
        let fields = prop::collection::vec((word(), inner.clone()), 0..6);
        prop_oneof![
            prop::collection::vec(inner, 0..4).prop_map(Value::from),
            fields.prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// A rule of which something was changed, so that much of it may be wrong.
fn damaged() -> impl Strategy<Value = Value> {
    let value = prop_oneof![3 => leaf(), 1 => anything(), 1 => select(FIELDS).prop_flat_map(attribute)];
    let change = (select(vec!["", "/match", "/trigger", "/fault"]), word(), value);
    (rule(), prop::collection::vec(change, 0..4)).prop_map(|(mut rule, changes)| {
        for (place, name, value) in changes {
            if let Some(Value::Object(fields)) = rule.pointer_mut(place) {
                fields.insert(name, value);
            }
        }
        rule
    })
}

fn problems(document: &Value) -> Vec<Problem> {
    compiled(document.clone()).err().unwrap_or_default()
}

fn suggested(problem: &Problem) -> Option<&str> {
    problem.hint.as_deref()?.strip_prefix("did you mean \"")?.strip_suffix("\"?")
}

/// Is a field or an attribute wrong, and not its value?
fn is_of_a_name(problem: &Problem) -> bool {
    let of_the_kind = problem.detail.contains("the kind") && problem.detail.ends_with("has no such attribute");
    of_the_kind || problem.detail.contains("unknown field")
}

/// The document with what was suggested, and the place of it; none if the suggestion is no word of the document.
fn mended(document: &Value, problem: &Problem) -> Option<(Value, String)> {
    let word = suggested(problem).filter(|word| !word.contains('\\'))?;
    let mut document = document.clone();
    let pointer = &problem.pointer[1..];
    if !is_of_a_name(problem) {
        *document.pointer_mut(pointer)? = word.into();
        return Some((document, problem.pointer.clone()));
    }
    let (parent, name) = pointer.rsplit_once('/')?;
    let Some(Value::Object(fields)) = document.pointer_mut(parent) else { return None };
    let value = fields.shift_remove(&name.replace("~1", "/").replace("~0", "~"))?;
    fields.insert(word.into(), value);
    Some((document, format!("#{parent}/{word}")))
}

/// What every refusal must be.
fn is_told_well(document: &Value) -> Result<(), TestCaseError> {
    for problem in problems(document) {
        let whole = problem.pointer == "#" && !document.is_object();
        let inside = problem.pointer.starts_with("#/");
        let missing = problem.pointer == "#" && problem.detail.starts_with("missing field");
        prop_assert!(whole || inside || missing, "{:?}", problem);
        prop_assert!(!problem.detail.is_empty(), "{:?}", problem);
        prop_assert!(problem.hint.as_ref().is_none_or(|hint| !hint.contains(" , ")), "{:?}", problem);
        let Some((mended, place)) = mended(document, &problem) else { continue };
        let in_vain = |other: &Problem| match is_of_a_name(&problem) {
            true => is_of_a_name(other),
            false => suggested(other).is_some() || other.not_yet,
        };
        let again = problems(&mended).into_iter().find(|other| other.pointer == place && in_vain(other));
        prop_assert!(again.is_none(), "after {:?}: {:?}", problem, again);
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(600))]

    #[test]
    fn a_rule_that_is_wrong_is_refused_with_its_place_and_a_hint_that_helps(document in damaged()) {
        is_told_well(&document)?;
    }

    #[test]
    fn any_document_is_refused_or_is_a_rule(document in anything()) {
        is_told_well(&document)?;
        if let Err(problem) = document::rules(document) {
            prop_assert!(problem.pointer.starts_with('#') && !problem.detail.is_empty());
        }
    }

    #[test]
    fn a_rule_that_is_shown_can_be_sent_again(document in damaged(), labels in prop::collection::btree_map(".{1,5}", ".{0,5}", 0..3)) {
        let mut document = document;
        document["labels"] = json!(labels);
        let Ok(spec) = document::rule(document) else { return Ok(()) };
        let shown = serde_json::to_value(&spec).unwrap();
        let read: RuleSpec = document::from_value(shown).unwrap();
        prop_assert_eq!(&read, &spec);
        let meaning = |spec: &RuleSpec| {
            let rule = compiled(serde_json::to_value(spec).unwrap());
            rule.map(|rule| format!("{:?} {:?} {:?} {:?}", rule.place, rule.trigger, rule.terms, rule.deadline_ns))
        };
        prop_assert_eq!(meaning(&read), meaning(&spec));
    }

    #[test]
    fn any_text_is_terms_or_refused(pieces in prop::collection::vec(prop_oneof![
        2 => select(vec!["->", "%", "*", "(", ")", "=", ",", "20", "3", "0.5", " ", "\"", "-"]).prop_map(str::to_string),
        2 => word(),
    ], 0..12)) {
        let text = pieces.concat();
        if let Err(problem) = term::parse(&text) {
            prop_assert!(problem.pointer == "#/fault" && !problem.detail.is_empty());
        }
        is_told_well(&json!({"name": "r", "fault": text}))?;
    }
}

proptest! {
    #![proptest_config(config(30))]

    /// Also the largest that are taken can be built.
    #[test]
    fn any_text_is_a_glob_or_refused(piece in select(vec!["{", "{a,", "}", "?", "*", "**/", "[!a-z]", "[", "\\", "é", "{?,**/}"]),
            count in 0usize..5000, rest in ".{0,10}") {
        let text = format!("/{}{rest}", piece.repeat(count));
        for glob in [path_glob(&text), name_glob(&text)].into_iter().flatten() {
            let _ = glob.compile_matcher().is_match("/a");
        }
    }
}

/// Braces in braces are a regular expression in brackets, and those have an end.
#[test]
fn the_deepest_glob_that_is_taken_can_be_built() {
    let deep = |depth: usize| format!("/{}a{}", "{b,".repeat(depth), "}".repeat(depth));
    let deepest = (1..200).rev().find_map(|depth| path_glob(&deep(depth)).ok()).unwrap();
    assert!(deepest.compile_matcher().is_match("/a"));
    for longest in ["?", "[!a]", "**/", "é"].map(|piece| piece.repeat(4000 / piece.len())) {
        let _ = path_glob(&format!("/{longest}")).unwrap().compile_matcher().is_match("/a");
    }
}
