//! Properties of the engine: what holds for any rules and any requests.
//!
//! Tests only, on their threads, without a mount. `counting` asks the engine and a naive model of it the same; `documents`
//! sends it rules good and bad; `extremes` asks every kind about requests that no usual program makes.

mod counting;
mod documents;
mod extremes;

use std::sync::Arc;
use std::time::SystemTime;

use globset::GlobMatcher;
use proptest::test_runner::Config;
use serde_json::Value;

use super::compile::Defaults;
use super::decide::key_of;
use super::{Facts, FileType, Op, Plan, Problem, Rule, compile, document};

/// So many cases, or as many as `PROPTEST_CASES` says: `tools/fuzz` asks for more.
fn config(cases: u32) -> Config {
    let usual = Config { failure_persistence: None, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_some() { usual } else { Config { cases, ..usual } }
}

/// Seed of rules that bring none.
const SEED: u64 = 7;

/// A request, made up.
#[derive(Clone, Debug)]
struct Request {
    op: Op,
    path: &'static str,
    pid: u32,
    uid: u32,
    range: Option<(u64, u64)>,
    direct: Option<bool>,
    file_type: FileType,
    truncates: bool,
    grows: bool,
    now_ns: u64,
    /// Are the paths of a plan known, as an inode knows them?
    known: bool,
}

impl Facts for Request {
    fn op(&self) -> Op {
        self.op
    }
    fn uid(&self) -> u32 {
        self.uid
    }
    fn gid(&self) -> u32 {
        self.uid
    }
    fn pid(&self) -> u32 {
        self.pid
    }
    fn in_tree(&self, root: u32) -> bool {
        root <= self.pid
    }
    fn comm_matches(&self, name: &GlobMatcher) -> bool {
        name.is_match("postgres")
    }
    fn range(&self) -> Option<(u64, u64)> {
        self.range
    }
    fn bytes(&self) -> u64 {
        self.range.map_or(0, |(_, length)| length)
    }
    fn direct(&self) -> Option<bool> {
        self.direct
    }
    fn file_type(&self) -> Option<FileType> {
        Some(self.file_type)
    }
    fn truncates(&self) -> bool {
        self.truncates
    }
    fn grows(&self) -> bool {
        self.grows
    }
    fn path_bits(&self, plan: &Plan) -> Option<Arc<[u64]>> {
        self.known.then(|| plan.path_bits([self.path.as_bytes()].into_iter()).into())
    }
    fn path_matches(&self, rule: &Rule) -> bool {
        rule.path_matches([self.path.as_bytes()].into_iter())
    }
    fn path_key(&self) -> u64 {
        key_of(self.path.as_bytes())
    }
    fn now_ns(&self) -> u64 {
        self.now_ns
    }
}

/// The rule of a document, armed at the beginning of time.
fn compiled(document: Value) -> Result<Rule, Vec<Problem>> {
    let spec = document::rule(document).map_err(|problem| vec![problem])?;
    compile(spec, Defaults { seed: SEED, now_ns: 0, created: SystemTime::UNIX_EPOCH })
}
