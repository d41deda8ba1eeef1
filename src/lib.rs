#![deny(unsafe_code)]
pub mod sys;
pub mod fault;
pub mod event;
pub mod space;
pub mod durability;
pub mod fs;
pub mod cli;
pub mod client;
