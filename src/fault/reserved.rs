//! The reserved rules: `mode`, one word for the whole mount, and `space`, which counts what the capacity refuses.
//!
//! Pure, as all of `fault/`. They are listed, counted and told as any other, and made here alone: clients cannot take their
//! names.

use std::sync::Arc;
use std::time::SystemTime;

use super::Fault;
use super::op::OpSet;
use super::plan::{Counters, Cycle, Place, Rule, Term, Trigger};
use super::spec::{FaultSpec, MatchSpec, RuleSpec, TriggerSpec};

/// What a disk without room refuses.
const NEEDS_SPACE: &[&str] = &["grow", "mkdir"];

/// The rule `space`, with nothing counted yet.
pub fn space(now_ns: u64) -> Rule {
    reserved("space", NEEDS_SPACE, Fault::Full, &Life::default(), now_ns)
}

/// One word for the whole mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    #[default]
    AllowWrites,
    DropWrites,
    ErrorWrites,
    ErrorReads,
    ErrorAll,
    Enospc,
}

impl Mode {
    pub const ALL: &'static [(&'static str, Mode)] = &[
        ("allow_writes", Mode::AllowWrites),
        ("drop_writes", Mode::DropWrites),
        ("error_writes", Mode::ErrorWrites),
        ("error_reads", Mode::ErrorReads),
        ("error_all", Mode::ErrorAll),
        ("enospc", Mode::Enospc),
    ];

    pub fn parse(word: &str) -> Option<Mode> {
        Self::ALL.iter().find(|(name, _)| *name == word).map(|(_, mode)| *mode)
    }

    pub fn word(self) -> &'static str {
        Self::ALL.iter().find(|(_, mode)| *mode == self).map_or("", |(name, _)| name)
    }

    /// What a device in that state makes of a filesystem's requests. Names and attributes live in the page cache of
    /// the device, so only `error_all` touches names.
    fn acts(self) -> Option<(&'static [&'static str], Fault)> {
        let eio = Fault::error(libc::EIO);
        Some(match self {
            Mode::AllowWrites => return None,
            Mode::DropWrites => {
                (&["write", "copy_file_range", "fallocate", "truncate", "fsync", "fsyncdir"], Fault::Drop)
            }
            Mode::ErrorWrites => (&["write", "copy_file_range", "fallocate", "truncate", "fsync", "fsyncdir"], eio),
            Mode::ErrorReads => (&["read", "copy_file_range", "readdir", "readlink"], eio),
            Mode::ErrorAll => {
                (&["data", "fallocate", "truncate", "fsync", "fsyncdir", "names", "readdir", "readlink"], eio)
            }
            Mode::Enospc => (NEEDS_SPACE, Fault::Full),
        })
    }

    /// The rule `mode`, from a moment of the monotonic clock on; none of a disk that is well.
    pub fn rule(self, life: &Life, now_ns: u64) -> Option<Rule> {
        self.acts().map(|(ops, fault)| reserved("mode", ops, fault, life, now_ns))
    }
}

/// How long a mode lasts, and how it comes and goes: each as it was written, and in nanoseconds.
#[derive(Clone, Debug, Default)]
pub struct Life {
    /// See [`RuleSpec`].
    pub redirect_coredumps: bool,
    pub lasts: Option<(String, u64)>,
    pub up: Option<(String, u64)>,
    pub down: Option<(String, u64)>,
}

fn reserved(name: &str, ops: &[&str], fault: Fault, life: &Life, now_ns: u64) -> Rule {
    let set = ops.iter().filter_map(|word| OpSet::parse(word)).fold(OpSet::default(), OpSet::with);
    let kind = FaultSpec::of_kind(fault.word());
    let text = |part: &Option<(String, u64)>| part.as_ref().map(|(text, _)| text.clone());
    let spec = RuleSpec {
        name: name.into(),
        enabled: true,
        required: false,
        redirect_coredumps: life.redirect_coredumps,
        r#match: MatchSpec { ops: ops.iter().map(ToString::to_string).collect(), ..MatchSpec::default() },
        trigger: TriggerSpec {
            r#for: text(&life.lasts),
            up: text(&life.up),
            down: text(&life.down),
            ..TriggerSpec::default()
        },
        fault: match fault {
            Fault::Error { .. } => kind.with("errno", "EIO"),
            Fault::Full => kind.with("errno", "ENOSPC"),
            _ => kind,
        },
        labels: Default::default(),
    };
    let cycle = life.up.as_ref().zip(life.down.as_ref());
    let cycle = cycle.map(|((_, up_ns), (_, down_ns))| Cycle { up_ns: *up_ns, down_ns: *down_ns });
    Rule {
        name: name.into(),
        spec,
        place: Place { ops: set, ..Place::default() },
        trigger: Trigger { cycle, ..Trigger::always() },
        terms: [Term { chance: 1.0, limit: None, ops: set, fault: Some(fault) }].into(),
        labels: None,
        armed_ns: now_ns,
        deadline_ns: life.lasts.as_ref().map(|(_, ns)| now_ns.saturating_add(*ns)),
        counters: Arc::new(Counters::new(1)),
        created: SystemTime::now(),
    }
}
