//! Terms, as fail-rs and gofail write them: `20%3*return(EIO)->sleep(10ms)`.
//!
//! Pure: called by the compiler. The grammar is theirs (fail-rs 0.5, `fail::cfg`; gofail 0.2): terms joined by `->`, each
//! `[P%][N*]task[(argument)]`; of the terms of a firing the first acts whose chance holds and whose count is not used up.
//! Tasks are theirs where they make sense outside the program (`off return sleep delay pause panic`), and every kind of
//! ours, with attributes as arguments: `short(max_bytes=100)`.

use serde_json::Value;

use super::compile::Problem;
use super::kind::KINDS;
use super::spec::FaultSpec;

/// One term.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    /// Chance that it acts, 0 to 1.
    pub chance: f64,
    /// At most so many times.
    pub limit: Option<u64>,
    /// What it does; nothing, for `off`.
    pub fault: Option<FaultSpec>,
}

/// Tasks that are no kinds.
const TASKS: &[&str] = &["off", "return", "sleep", "delay", "pause", "panic"];

/// Reads terms.
///
/// # Errors
/// What is wrong with the first that is.
pub fn parse(text: &str) -> Result<Vec<Term>, Problem> {
    split(text)?.into_iter().map(term).collect()
}

fn wrong(term: &str, what: impl std::fmt::Display) -> Problem {
    Problem::new("#/fault", format!("fault: {what} in the term {term:?}"))
        .hint("write \"20%3*return(EIO)->sleep(10ms)\"")
}

/// At the arrows that are in no brackets.
fn split(text: &str) -> Result<Vec<&str>, Problem> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0u32, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.checked_sub(1).ok_or_else(|| wrong(text, "a bracket that was not opened"))?,
            '-' if depth == 0 && text[at..].starts_with("->") => {
                parts.push(text[start..at].trim());
                start = at + 2;
            }
            _ => {}
        }
    }
    if depth > 0 {
        return Err(wrong(text, "a bracket that is not closed"));
    }
    parts.push(text[start..].trim());
    Ok(parts)
}

fn term(text: &str) -> Result<Term, Problem> {
    let mut rest = text;
    let mut chance = 1.0;
    let mut limit = None;
    let head = rest.split('(').next().unwrap_or_default();
    if let Some((percent, _)) = head.split_once('%') {
        let number = percent.trim().parse::<f64>().ok().filter(|number| (0.0..=100.0).contains(number));
        chance = number.ok_or_else(|| wrong(text, format!("{percent:?} is no percentage")))? / 100.0;
        rest = &rest[percent.len() + 1..];
    }
    let head = rest.split('(').next().unwrap_or_default();
    if let Some((count, _)) = head.split_once('*') {
        let number = count.trim().parse::<u64>().map_err(|_| wrong(text, format!("{count:?} is no count")))?;
        limit = Some(number);
        rest = &rest[count.len() + 1..];
    }
    Ok(Term { chance, limit, fault: task(text, rest.trim())? })
}

fn task(term: &str, text: &str) -> Result<Option<FaultSpec>, Problem> {
    let (name, argument) = match text.split_once('(') {
        None => (text, None),
        Some((name, rest)) => {
            let Some(inside) = rest.strip_suffix(')') else {
                return Err(wrong(term, "something behind the bracket"));
            };
            (name.trim(), Some(inside.trim().trim_matches('"')).filter(|argument| !argument.is_empty()))
        }
    };
    let only = |fault: FaultSpec| match argument {
        None => Ok(Some(fault)),
        Some(argument) => Err(wrong(term, format!("{name:?} takes no argument, and {argument:?} is one"))),
    };
    match name {
        "off" => only(FaultSpec::of_kind("error")).map(|_| None),
        "pause" => only(FaultSpec::of_kind("stall")),
        "panic" => only(FaultSpec::of_kind("kill").with("signal", "SIGABRT")),
        "return" => Ok(Some(FaultSpec::of_kind("error").with("errno", argument.unwrap_or("EIO")))),
        // A bare number is milliseconds, as there.
        "sleep" | "delay" => match argument {
            None => Err(wrong(term, format!("{name:?} does not say for how long"))),
            Some(number) if number.bytes().all(|byte| byte.is_ascii_digit()) => {
                Ok(Some(FaultSpec::of_kind("latency").with("delay", format!("{number}ms"))))
            }
            Some(duration) => Ok(Some(FaultSpec::of_kind("latency").with("delay", duration))),
        },
        "print" | "yield" | "break" => Err(Problem::new(
            "#/fault",
            format!("fault: {name:?} is of the inside of a program; a filesystem has no such thing"),
        )
        .hint("each injection is an event already: see the stream")),
        kind if KINDS.iter().any(|known| known.word == kind) => attributes(term, kind, argument).map(Some),
        unknown => {
            let known = TASKS.iter().copied().chain(KINDS.iter().filter(|kind| kind.built).map(|kind| kind.word));
            Err(Problem::new("#/fault", format!("fault: unknown task {unknown:?}")).nearest(unknown, known))
        }
    }
}

/// `name=value, name=value`.
fn attributes(term: &str, kind: &str, argument: Option<&str>) -> Result<FaultSpec, Problem> {
    let mut fault = FaultSpec::of_kind(kind);
    for pair in argument.into_iter().flat_map(|text| text.split(',')) {
        let Some((name, value)) = pair.split_once('=') else {
            return Err(wrong(term, format!("{pair:?} is not name=value")));
        };
        let value = value.trim();
        fault = fault.with(name.trim(), value.parse::<u64>().map_or_else(|_| Value::from(value), Value::from));
    }
    Ok(fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &str) -> Vec<(f64, Option<u64>, Option<FaultSpec>)> {
        parse(text).unwrap().into_iter().map(|term| (term.chance, term.limit, term.fault)).collect()
    }

    #[test]
    fn terms_of_both_libraries_are_read() {
        let eio = || FaultSpec::of_kind("error").with("errno", "EIO");
        let sleep = || FaultSpec::of_kind("latency").with("delay", "10ms");
        assert_eq!(kinds("20%3*return(EIO)->sleep(10ms)"), [(0.2, Some(3), Some(eio())), (1.0, None, Some(sleep()))]);
        assert_eq!(kinds(r#"return("EIO")"#), [(1.0, None, Some(eio()))]);
        assert_eq!(kinds("return"), [(1.0, None, Some(eio()))]);
        assert_eq!(kinds(" 0.5% 2 * sleep(10) "), [(0.005, Some(2), Some(sleep()))]);
        assert_eq!(kinds("3*off->pause"), [(1.0, Some(3), None), (1.0, None, Some(FaultSpec::of_kind("stall")))]);
        let short = FaultSpec::of_kind("short").with("max_bytes", 100);
        assert_eq!(kinds("short(max_bytes=100)"), [(1.0, None, Some(short))]);
    }

    #[test]
    fn what_is_no_term_is_refused_with_its_reason() {
        for text in
            ["", "20%", "x%return", "101%return", "-1%off", "y*return", "return(EIO", "return)", "sleep", "off(1)"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
        assert_eq!(parse("retrun(EIO)").unwrap_err().hint.as_deref(), Some("did you mean \"return\"?"));
        assert!(parse("print(x)").unwrap_err().detail.contains("inside of a program"));
    }
}
