//! The syntax of a rule: what clients send, as they send it.
//!
//! Pure data: any thread, no locks. What the words mean is for [`super::compile()`] to say.

use std::collections::BTreeMap;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// One rule: where (`match`), when (`trigger`), what (`fault`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// Unique in the mount; `mode` and `space` are reserved.
    #[serde(default)]
    pub name: String,
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Has a run failed in which it has not fired?
    #[serde(default)]
    pub required: bool,
    /// Do coredumps go to the root filesystem for as long as it is armed? Nothing to the engine: who arms it sees to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub redirect_coredumps: bool,
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
    /// Operations and groups; empty means every operation that the kind can act on.
    #[serde(default)]
    pub ops: Vec<String>,
    /// Glob over the path below the mountpoint, with a leading slash; `*` stops at a slash, `**` does not.
    #[serde(default)]
    pub path: Option<String>,
    /// Regular expression that must be found in the path.
    #[serde(default)]
    pub path_regex: Option<String>,
    /// The process, whichever of its threads calls.
    #[serde(default)]
    pub pid: Option<u32>,
    /// The process or any that descends from it, as far as its parents live.
    #[serde(default)]
    pub tree: Option<u32>,
    /// Glob over the name of the program or of the thread that calls: at most 15 bytes, as the kernel keeps them.
    #[serde(default)]
    pub comm: Option<String>,
    #[serde(default)]
    pub uid: Option<u32>,
    #[serde(default)]
    pub gid: Option<u32>,
    /// Half-open byte range, `0..1MiB`; a request matches that touches it.
    #[serde(default)]
    pub offset: Option<String>,
    /// Half-open range of the request's length in bytes.
    #[serde(default)]
    pub length: Option<String>,
    /// Past the page cache (`O_DIRECT`), or not. Only reads, writes and opens are either.
    #[serde(default)]
    pub direct: Option<bool>,
    /// Type of the file: see [`super::op::FileType`].
    #[serde(default)]
    pub r#type: Option<String>,
}

/// When: of the requests that match, which fire. First the conditions on time and on others (`after…`, `up`, `down`),
/// which let requests pass uncounted; then `skip`, `every`, `probability`, `times`, by the count of what is left.
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
    /// What is counted by itself: `mount`, `file`, `process`.
    #[serde(default = "per_mount")]
    pub per: String,
    /// Not before so long after arming.
    #[serde(default)]
    pub after: Option<String>,
    /// Not before matching requests of so many bytes.
    #[serde(default)]
    pub after_bytes: Option<Value>,
    /// Not before the rule of this name has fired.
    #[serde(default)]
    pub after_rule: Option<String>,
    /// Life of the rule, from the moment it is armed.
    #[serde(default)]
    pub r#for: Option<String>,
    /// Of a disk that comes and goes, beginning at the moment of arming: how long it is well.
    #[serde(default)]
    pub up: Option<String>,
    /// How long it then fails, before it is well again.
    #[serde(default)]
    pub down: Option<String>,
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

/// What: a kind with its attributes (which, is in [`super::kind::KINDS`]), or terms as fail-rs and gofail write them
/// ([`super::term`]).
#[derive(Clone, Debug, PartialEq)]
pub enum FaultSpec {
    Kind { kind: String, attributes: Map<String, Value> },
    Terms(String),
}

impl FaultSpec {
    pub fn of_kind(kind: &str) -> FaultSpec {
        FaultSpec::Kind { kind: kind.into(), attributes: Map::new() }
    }

    /// With one more attribute.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> FaultSpec {
        if let FaultSpec::Kind { attributes, .. } = &mut self {
            attributes.insert(name.into(), value.into());
        }
        self
    }
}

impl Serialize for FaultSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            FaultSpec::Terms(text) => serializer.serialize_str(text),
            FaultSpec::Kind { kind, attributes } => {
                let kind = std::iter::once(("kind", Value::from(kind.as_str())));
                let attributes = attributes.iter().map(|(name, value)| (name.as_str(), value.clone()));
                serializer.collect_map(kind.chain(attributes))
            }
        }
    }
}

impl<'de> Deserialize<'de> for FaultSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => Ok(FaultSpec::Terms(text)),
            Value::Object(mut attributes) => {
                let Some(kind) = attributes.shift_remove("kind") else { return Err(D::Error::missing_field("kind")) };
                let Value::String(kind) = kind else { return Err(D::Error::custom("the kind is not a word")) };
                attributes.retain(|_, value| !value.is_null());
                Ok(FaultSpec::Kind { kind, attributes })
            }
            _ => Err(D::Error::custom("neither a kind with its attributes nor terms")),
        }
    }
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

fn per_mount() -> String {
    "mount".into()
}
