//! Capacity: how full the mount pretends to be.
//!
//! [`Capacity`] is the account: atomics only, asked by readers on each request that could take or give back space while
//! a capacity is set, and not at all otherwise. [`blocks`] finds out what a write would need. Neither knows of rules or
//! of HTTP.

pub mod blocks;
pub mod capacity;

pub use blocks::{Fit, fit};
pub use capacity::{Capacity, Reservation, Usage};
