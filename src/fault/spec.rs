//! The syntax of a rule: what clients send, as they send it.
//!
//! Pure data: any thread, no locks. Fields of the contract that this version does not build yet are declared here as
//! [`NotYet`], so that they are told apart from misspelt ones; [`super::compile()`] refuses them by name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A field that the contract declares and that is not built yet: only its absence, `null` or its neutral value pass.
pub type NotYet = Option<serde_json::Value>;

/// One rule: where (`match`), when (`trigger`), what (`fault`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// Unique in the mount; `mode` and `space` are reserved.
    #[serde(default)]
    pub name: String,
    #[serde(default = "yes")]
    pub enabled: bool,
    #[serde(default)]
    pub required: bool,
    #[serde(default)]
    pub r#match: MatchSpec,
    #[serde(default)]
    pub trigger: TriggerSpec,
    pub fault: FaultSpec,
    /// Words of the client's own, copied into each event of the rule.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// Where: all that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatchSpec {
    /// Operations and groups; empty means every operation.
    #[serde(default)]
    pub ops: Vec<String>,
    /// Glob over the path below the mountpoint, with a leading slash; `*` stops at a slash, `**` does not.
    #[serde(default)]
    pub path: Option<String>,
    #[serde(default)]
    pub path_regex: NotYet,
    /// The process, whichever of its threads calls.
    #[serde(default)]
    pub pid: Option<u32>,
    #[serde(default)]
    pub tree: NotYet,
    #[serde(default)]
    pub comm: NotYet,
    #[serde(default)]
    pub uid: Option<u32>,
    #[serde(default)]
    pub gid: NotYet,
    /// Half-open byte range, `0..1MiB`; a request matches that touches it.
    #[serde(default)]
    pub offset: Option<String>,
    #[serde(default)]
    pub length: NotYet,
    #[serde(default)]
    pub direct: NotYet,
    #[serde(default)]
    pub r#type: NotYet,
}

/// When: of the requests that match, which fire.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TriggerSpec {
    #[serde(default = "certain")]
    pub probability: f64,
    /// The first so many matches do not fire.
    #[serde(default)]
    pub skip: u64,
    /// Then each so many-th fires.
    #[serde(default = "one")]
    pub every: u64,
    /// At most so many firings.
    #[serde(default)]
    pub times: Option<u64>,
    #[serde(default = "per_mount")]
    pub per: NotYet,
    #[serde(default)]
    pub after: NotYet,
    #[serde(default)]
    pub after_bytes: NotYet,
    #[serde(default)]
    pub after_rule: NotYet,
    /// Life of the rule, from the moment it is armed.
    #[serde(default)]
    pub r#for: Option<String>,
    #[serde(default)]
    pub up: NotYet,
    #[serde(default)]
    pub down: NotYet,
    /// Of the generator behind `probability`; the mount's own when absent.
    #[serde(default)]
    pub seed: Option<u64>,
}

impl Default for TriggerSpec {
    fn default() -> Self {
        TriggerSpec {
            probability: certain(),
            skip: 0,
            every: one(),
            times: None,
            per: per_mount(),
            after: None,
            after_bytes: None,
            after_rule: None,
            r#for: None,
            up: None,
            down: None,
            seed: None,
        }
    }
}

/// What: the kind and its attributes, flat. Which attributes a kind takes is in [`super::kind::KINDS`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultSpec {
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jitter: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distribution: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub then: Option<String>,
    /// Everything else: attributes that are not built yet, and misspelt ones. The compiler tells them apart.
    #[serde(flatten)]
    pub rest: BTreeMap<String, serde_json::Value>,
}

fn yes() -> bool {
    true
}

fn certain() -> f64 {
    1.0
}

fn one() -> u64 {
    1
}

fn per_mount() -> NotYet {
    Some("mount".into())
}
