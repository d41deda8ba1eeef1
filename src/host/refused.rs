//! Why nothing was done to the machine: what is wrong, and what to do about it.
//!
//! Any thread; no locks. Must never: leave out which file, mount, device or process it is about.

use std::fmt;

use serde_json::Value;

use super::tool::ToolError;
use crate::fault::compile::Problem;

/// What kind of no it is: who asks decides by it what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request makes no sense, here.
    Invalid,
    NotFound,
    /// Somebody uses it.
    Busy,
    /// It does not go with how things are now, or a tool said no.
    Conflict,
    /// This host cannot, or not this process.
    NotSupported,
    /// It was tried, and did not work.
    Failed,
}

#[derive(Clone, Debug)]
pub struct Refused {
    pub kind: Kind,
    pub detail: String,
    pub hint: Option<String>,
    /// The field of the request that it is about.
    pub pointer: Option<String>,
    /// What else belongs to it, by name.
    pub more: Vec<(&'static str, Value)>,
}

impl Refused {
    pub(super) fn new(kind: Kind, detail: impl Into<String>) -> Refused {
        Refused { kind, detail: detail.into(), hint: None, pointer: None, more: Vec::new() }
    }

    pub(super) fn failed(detail: impl Into<String>) -> Refused {
        Refused::new(Kind::Failed, detail)
    }

    pub(super) fn conflict(detail: impl Into<String>) -> Refused {
        Refused::new(Kind::Conflict, detail)
    }

    pub(super) fn invalid(detail: impl Into<String>) -> Refused {
        Refused::new(Kind::Invalid, detail)
    }

    pub(super) fn not_supported(detail: impl Into<String>) -> Refused {
        Refused::new(Kind::NotSupported, detail)
    }

    /// Several as one, of the kind of the first.
    pub(super) fn all(refused: Vec<Refused>) -> Refused {
        let kind = refused.first().map_or(Kind::Failed, |first| first.kind);
        let hint = refused.iter().find_map(|refused| refused.hint.clone());
        let details: Vec<String> = refused.into_iter().map(|refused| refused.detail).collect();
        Refused { hint, ..Refused::new(kind, details.join("; ")) }
    }

    pub(super) fn hint(self, hint: impl Into<String>) -> Refused {
        Refused { hint: Some(hint.into()), ..self }
    }

    pub(super) fn with(mut self, name: &'static str, value: Value) -> Refused {
        self.more.push((name, value));
        self
    }

    /// Its word in the API.
    pub fn code(&self) -> &'static str {
        match self.kind {
            Kind::Invalid => "bad_request",
            Kind::NotFound => "not_found",
            Kind::Busy => "busy",
            Kind::Conflict => "conflict",
            Kind::NotSupported => "not_supported",
            Kind::Failed => "internal",
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Refused {
        let refused = Refused::invalid(problem.detail);
        Refused { hint: problem.hint, pointer: Some(problem.pointer), ..refused }
    }
}

impl From<ToolError> for Refused {
    fn from(error: ToolError) -> Refused {
        match error {
            ToolError::Missing(_) => Refused::not_supported(error.to_string()),
            error => Refused::conflict(error.to_string()),
        }
    }
}
