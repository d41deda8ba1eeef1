//! The record of what happened: injections and changes of state, in one bounded ring.
//!
//! Readers publish from the hot path, the control thread reads for its clients. Publishing waits for nobody: see
//! [`ring`]. This part knows nothing of who listens or in which format.

pub mod filter;
pub mod record;
pub mod ring;

pub use filter::Filter;
pub use record::{Body, Change, Injection, Record};
pub use ring::{Cursor, Read, Ring};
