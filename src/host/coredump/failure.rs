//! Why nothing was done: what is wrong, and what to do about it.
//!
//! Any thread; no locks. Must never: leave out which file, mount or process it is about.

use super::super::tool::ToolError;

/// What sort of failure it is: who asks decides by it what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What was asked for makes no sense.
    Invalid,
    /// It cannot be done on this machine, or not by this process.
    Unsupported,
    /// Something stands in the way now: a core that is being written, too little room.
    Conflict,
    NotFound,
    /// It was tried, and did not work.
    Failed,
}

#[derive(Clone, Debug, thiserror::Error)]
#[error("{detail}")]
pub struct Failure {
    pub kind: Kind,
    pub detail: String,
    pub hint: Option<String>,
}

impl Failure {
    pub(super) fn new(kind: Kind, detail: impl Into<String>) -> Failure {
        Failure { kind, detail: detail.into(), hint: None }
    }

    pub(super) fn failed(detail: impl Into<String>) -> Failure {
        Failure::new(Kind::Failed, detail)
    }

    pub(super) fn conflict(detail: impl Into<String>) -> Failure {
        Failure::new(Kind::Conflict, detail)
    }

    pub(super) fn invalid(detail: impl Into<String>) -> Failure {
        Failure::new(Kind::Invalid, detail)
    }

    pub(super) fn unsupported(detail: impl Into<String>) -> Failure {
        Failure::new(Kind::Unsupported, detail)
    }

    /// Several as one, of the sort of the first.
    pub(super) fn all(failures: Vec<Failure>) -> Failure {
        let kind = failures.first().map_or(Kind::Failed, |first| first.kind);
        let hint = failures.iter().find_map(|failure| failure.hint.clone());
        let details: Vec<String> = failures.into_iter().map(|failure| failure.detail).collect();
        Failure { kind, detail: details.join("; "), hint }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }
}

impl From<ToolError> for Failure {
    fn from(error: ToolError) -> Failure {
        match error {
            ToolError::Missing(_) => Failure::unsupported(error.to_string()),
            _ => Failure::failed(error.to_string()),
        }
    }
}

/// An error of the system about a path.
pub(super) fn about(path: &std::path::Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("{}: {error}", path.display()))
}
