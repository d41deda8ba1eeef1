//! What can be taken back.
//!
//! Changes go through to the backing directory at once; what is kept is how to undo them. So far two faces
//! of that are built: dropped writes, which are acknowledged, seen by every reader through the page cache, and gone when
//! evicted; and damaged places, whose originals are kept.

pub mod originals;
pub mod undo;

pub use crate::ranges::Ranges;
pub use originals::{Mark, Original};
pub use undo::{Evicted, Undo};
