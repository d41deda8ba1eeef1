//! Errors as clients get them: problem documents of RFC 9457, with a closed set of codes.
//!
//! Used by the handlers on the control thread.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::fault;

/// One refusal.
#[derive(Debug)]
pub struct Problem {
    status: u16,
    code: &'static str,
    detail: String,
    hint: Option<String>,
    errors: Vec<Value>,
    /// What else belongs to it, by name.
    more: Vec<(&'static str, Value)>,
}

impl Problem {
    pub fn new(status: u16, code: &'static str, detail: impl Into<String>) -> Problem {
        Problem { status, code, detail: detail.into(), hint: None, errors: Vec::new(), more: Vec::new() }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Problem {
        self.hint = Some(hint.into());
        self
    }

    pub fn with(mut self, name: &'static str, value: Value) -> Problem {
        self.more.push((name, value));
        self
    }

    pub fn bad_request(detail: impl Into<String>) -> Problem {
        Problem::new(400, "bad_request", detail)
    }

    /// What is wrong with a parameter, which has no place in a document.
    pub fn of_parameter(problem: fault::Problem) -> Problem {
        let refused = Problem::bad_request(problem.detail);
        problem.hint.into_iter().fold(refused, Problem::hint)
    }

    /// What is wrong with a body that is no rule.
    pub fn of_body(problem: fault::Problem) -> Problem {
        Problem { code: "bad_request", ..problem.into() }
    }

    pub fn no_rule(name: &str) -> Problem {
        Problem::new(404, "not_found", format!("there is no rule {name:?}")).hint("nemesisfs rule list")
    }

    fn title(&self) -> &'static str {
        match self.code {
            "rule_invalid" => "Invalid rule",
            "not_yet" => "Not built yet",
            "not_found" => "No such thing",
            "bad_request" => "Invalid request",
            "body_too_large" => "Body too large",
            "busy" => "Busy",
            "conflict" => "Conflict",
            "not_supported" => "Not supported on this host",
            "unknown_route" => "No such route",
            "method_not_allowed" => "Method not allowed",
            _ => "Internal error",
        }
    }
}

/// Everything that is wrong with rules. What is only not built yet has a code of its own, unless something else is
/// wrong too.
impl From<Vec<fault::Problem>> for Problem {
    fn from(problems: Vec<fault::Problem>) -> Problem {
        let code = if problems.iter().all(|problem| problem.not_yet) { "not_yet" } else { "rule_invalid" };
        let first = problems.iter().find(|problem| !problem.not_yet).or(problems.first());
        let errors =
            problems.iter().map(|problem| json!({"pointer": problem.pointer, "detail": problem.at_its_place()}));
        Problem {
            status: 422,
            code,
            detail: first.map(|problem| problem.detail.clone()).unwrap_or_default(),
            hint: first.and_then(|problem| problem.hint.clone()),
            errors: errors.collect(),
            more: Vec::new(),
        }
    }
}

impl From<fault::Problem> for Problem {
    fn from(problem: fault::Problem) -> Problem {
        vec![problem].into()
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.detail)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut body = json!({
            "type": "about:blank", "title": self.title(), "status": self.status, "code": self.code,
            "detail": self.detail,
        });
        if let Some(hint) = &self.hint {
            body["hint"] = hint.as_str().into();
        }
        if !self.errors.is_empty() {
            body["errors"] = self.errors.into();
        }
        for (name, value) in self.more {
            body[name] = value;
        }
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let kind = HeaderValue::from_static("application/problem+json");
        (status, [(header::CONTENT_TYPE, kind)], body.to_string()).into_response()
    }
}
