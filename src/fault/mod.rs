//! Rules in, decision out.
//!
//! Pure: no I/O, no clock of its own, no lock held for more than a look at a table. Called by the readers on every
//! request that an armed rule could concern, by the control thread to check and compile what clients send. A rule is
//! sent as a [`RuleSpec`], compiled to a [`Rule`] by [`compile()`], gathered into an immutable [`Plan`], and asked by
//! [`decide()`] with the [`Facts`] of one request.

pub mod compile;
pub mod corrupt;
pub mod decide;
pub mod document;
pub mod errno;
pub mod index;
pub mod kind;
pub mod op;
pub mod plan;
#[cfg(test)]
mod properties;
pub mod reserved;
pub mod spec;
mod strict;
pub mod term;
pub mod why;

pub use compile::{Problem, compile};
pub use decide::{Decision, Facts, Firing, Outcome, decide, decide_again, stored};
pub use kind::{Fault, Latency, Then, Timing};
pub use op::{FileType, Op, OpSet};
pub use plan::{Counters, Plan, Rule, State};
pub use reserved::{Life, Mode};
pub use spec::RuleSpec;
