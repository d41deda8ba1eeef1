//! Which events a client wants.
//!
//! Used by the control thread only. Events that a filter does not know how to judge (a change of state has no `op`)
//! pass only when that condition is absent.

use globset::GlobMatcher;

use super::record::{Body, Record};
use crate::fault::Op;
use crate::fault::kind::KINDS;

/// The events that are in the ring.
pub const NAMES: &[&str] = &["injection", "rule", "mode", "space", "device", "coredump", "request", "bye"];

/// All conditions that are given must hold.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Glob over the rule's name.
    pub rule: Option<GlobMatcher>,
    /// The fault's kind, or the event's name.
    pub kind: Option<String>,
    pub op: Option<String>,
    /// Of rename and link, either path.
    pub path: Option<GlobMatcher>,
    pub pid: Option<u32>,
}

impl Filter {
    /// The words that `kind` can be met by.
    pub fn kinds() -> impl Iterator<Item = &'static str> + Clone {
        NAMES.iter().copied().chain(KINDS.iter().filter(|kind| kind.built).map(|kind| kind.word))
    }

    /// The words that `op` can be met by.
    pub fn ops() -> impl Iterator<Item = &'static str> + Clone {
        Op::ALL.iter().map(|op| op.word())
    }

    /// Does the client want it? `gap` and `hello` are not records and are always sent.
    pub fn wants(&self, record: &Record) -> bool {
        match &record.body {
            Body::Injection(injection) => {
                use std::os::unix::ffi::OsStrExt;
                let mut paths = [&injection.path, &injection.to].into_iter().flatten();
                let mut is_any =
                    |glob: &GlobMatcher| paths.any(|path| glob.is_match(std::ffi::OsStr::from_bytes(path)));
                self.rule.as_ref().is_none_or(|rule| rule.is_match(&*injection.rule))
                    && self.kind.as_ref().is_none_or(|kind| kind == injection.kind || kind == "injection")
                    && self.op.as_ref().is_none_or(|op| op == injection.op)
                    && self.path.as_ref().is_none_or(&mut is_any)
                    && self.pid.is_none_or(|pid| pid == injection.pid)
            }
            Body::Change(change) => {
                let rule = change.detail.get("rule").and_then(|rule| rule.as_str());
                self.rule.as_ref().is_none_or(|glob| rule.is_some_and(|rule| glob.is_match(rule)))
                    && self.kind.as_ref().is_none_or(|kind| kind == change.event)
                    && self.op.is_none()
                    && self.path.is_none()
                    && self.pid.is_none()
            }
        }
    }
}
