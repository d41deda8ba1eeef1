//! The filesystem: FUSE requests over the backing directory. The hot path.
//!
//! Readers (fuser's threads) run [`adapter`] and [`serve`]; [`workers`] run what waits; the clock ([`clock`]) lets
//! delayed requests go. Knows nothing of HTTP; of JSON only what the clock tells the stream, and of the
//! syntax of rules only what [`arming`] writes for those that nobody has sent: a mode's, and the capacity's. Lock
//! order: none; each lock here is held alone, for a few instructions, and never across a system call, but for the undo
//! log of a file (see [`crate::durability`]).

mod account;
pub mod adapter;
pub mod arming;
mod buffer;
pub mod call;
pub mod clock;
mod evict;
mod facts;
pub mod files;
pub mod hold;
pub mod inode;
pub mod kernel_cache;
mod limits;
pub mod mount;
mod ops;
pub mod park;
pub mod passthrough;
mod privileges;
pub mod process;
pub mod readers;
pub mod serve;
pub mod tree;
pub mod usage;
pub mod watch;
pub mod workers;

pub use arming::Changed;
pub use serve::{Core, Ended};
