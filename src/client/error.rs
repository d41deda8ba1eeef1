//! What can go wrong between a command and a daemon, as one problem document (RFC 9457) with the exit code that
//! belongs to it, whether the daemon sent it or this side found it out.
//!
//! Thread: the caller's. Locks: none. Must never: print anything, or touch the mount.

use std::fmt;

use serde_json::{Value, json};

use crate::exit;

/// A failure, with everything that a user or a program is told about it.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientError {
    /// The exit code of the command.
    pub exit: u8,
    /// The HTTP status, when a daemon answered at all.
    pub status: Option<u16>,
    /// The problem document: `code`, `detail`, and often `hint`.
    pub problem: Value,
}

impl ClientError {
    fn local(exit: u8, code: &str, detail: impl Into<String>) -> Self {
        let problem = json!({"type": "about:blank", "code": code, "detail": detail.into()});
        ClientError { exit, status: None, problem }
    }

    /// The command was asked for something that this side cannot do or finds wrong.
    pub fn failed(detail: impl Into<String>) -> Self {
        Self::local(exit::FAILED, "failed", detail)
    }

    /// The command line does not make sense.
    pub fn usage(detail: impl Into<String>) -> Self {
        Self::local(exit::USAGE, "usage", detail)
    }

    /// No instance answers.
    pub fn no_instance(detail: impl Into<String>) -> Self {
        Self::local(exit::NO_INSTANCE, "no_instance", detail)
    }

    /// The time that the user gave ran out.
    pub fn timed_out(detail: impl Into<String>) -> Self {
        Self::local(exit::TIMED_OUT, "timed_out", detail)
    }

    /// A refusal by the daemon. A body that is no problem document (a proxy's page, say) becomes its detail.
    pub fn refused(status: u16, body: Value) -> Self {
        let problem = match body {
            Value::Object(_) if body.get("detail").is_some() || body.get("title").is_some() => body,
            Value::Null => {
                json!({"status": status, "detail": format!("HTTP status {status} without a word")})
            }
            Value::String(text) => json!({"status": status, "detail": text.trim()}),
            other => json!({"status": status, "detail": other.to_string()}),
        };
        let exit = match problem.get("code").and_then(Value::as_str) {
            Some("not_found") => exit::NO_SUCH_THING,
            Some("not_supported") => exit::NOT_SUPPORTED,
            _ => exit::FAILED,
        };
        ClientError { exit, status: Some(status), problem }
    }

    /// This host cannot do it.
    pub fn unsupported(detail: impl Into<String>) -> Self {
        Self::local(exit::NOT_SUPPORTED, "not_supported", detail)
    }

    /// Adds the next useful step.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        if let Value::Object(fields) = &mut self.problem {
            fields.insert("hint".into(), Value::String(hint.into()));
        }
        self
    }

    /// The `code` of the problem document, or nothing.
    pub fn code(&self) -> &str {
        self.problem.get("code").and_then(Value::as_str).unwrap_or_default()
    }

    /// What went wrong, in a sentence.
    pub fn detail(&self) -> &str {
        let word = |key| self.problem.get(key).and_then(Value::as_str);
        word("detail").or_else(|| word("title")).unwrap_or("refused")
    }

    /// The lines for a person: what went wrong, who stands in the way, what to do.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("error: {}", self.detail())];
        let holders = self.problem.get("holders").and_then(Value::as_array);
        lines.extend(holders.into_iter().flatten().map(holder_line));
        if let Some(hint) = self.problem.get("hint").and_then(Value::as_str) {
            lines.push(format!("hint: {hint}"));
        }
        lines
    }
}

fn holder_line(holder: &Value) -> String {
    let word = |key| holder.get(key).and_then(Value::as_str).unwrap_or("?");
    let pid = holder.get("pid").and_then(Value::as_i64).unwrap_or_default();
    format!("  held by pid {pid} ({}): {}", word("comm"), word("what"))
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.detail())
    }
}

impl std::error::Error for ClientError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_of_a_problem_decides_the_exit_code() {
        let exit_of = |code: &str| ClientError::refused(400, json!({"code": code, "detail": "x"})).exit;
        assert_eq!(exit_of("not_found"), exit::NO_SUCH_THING);
        assert_eq!(exit_of("not_supported"), exit::NOT_SUPPORTED);
        assert_eq!(exit_of("unknown_route"), exit::FAILED);
        assert_eq!(exit_of("rule_invalid"), exit::FAILED);
        assert_eq!(exit_of("not_yet"), exit::FAILED);
    }

    #[test]
    fn a_problem_is_told_as_error_then_holders_then_hint() {
        let problem = json!({"code": "busy", "detail": "the mount is busy", "hint": "try --lazy",
            "holders": [{"pid": 7, "comm": "sh", "what": "/data"}]});
        let lines = ClientError::refused(409, problem).lines();
        assert_eq!(lines, ["error: the mount is busy", "  held by pid 7 (sh): /data", "hint: try --lazy"]);
    }

    #[test]
    fn an_answer_that_is_no_problem_document_is_still_an_error_with_words() {
        assert_eq!(ClientError::refused(502, json!("Bad Gateway\n")).lines(), ["error: Bad Gateway"]);
        assert_eq!(ClientError::refused(500, Value::Null).exit, exit::FAILED);
    }
}
