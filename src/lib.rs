#![deny(unsafe_code)]
pub mod cli;
pub mod client;
pub mod control;
pub mod daemon;
pub mod durability;
pub mod event;
pub mod fault;
pub mod fs;
pub mod space;
pub mod sys;
