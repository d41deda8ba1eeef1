//! What can be taken back.
//!
//! Changes go through to the backing directory at once; what is kept is how to undo them. So far one face of that is
//! built: dropped writes, which are acknowledged, seen by every reader through the page cache, and gone when evicted.

pub mod ranges;
pub mod undo;

pub use ranges::Ranges;
pub use undo::{Evicted, Undo};
