//! Capacity: how full the mount is, or pretends to be.
//!
//! [`Capacity`] is the account: atomics only, asked by readers on each request that could take or give back space while
//! a capacity is set, and not at all otherwise; [`Usage`] is what it knows of one file, [`Quotas`] what owners and subtrees
//! may use. [`blocks`] finds out what a write would need, [`WritebackError`] tells what was accepted and not kept.
//! [`ballast`] really fills the disk, by a helper. None knows of rules or of HTTP.

pub mod ballast;
pub mod blocks;
pub mod capacity;
pub mod quota;
pub mod usage;
pub mod writeback;

pub use ballast::Ballast;
pub use blocks::{Fit, fit};
pub use capacity::{Capacity, Claimant, Limit, Limits, Reservation};
pub use quota::{Members, Quota, Quotas};
pub use usage::Usage;
pub use writeback::{Told, WritebackError};
