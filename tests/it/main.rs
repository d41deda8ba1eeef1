//! The integration tests: one binary, the real daemon, real mounts, real databases.
//!
//! What belongs where: [`mount`] the life of a mount; [`alive`] that life under load, and when the disk hangs; [`files`]
//! what a program sees with nothing armed; [`passthrough`] files that the kernel serves; [`write_path`] what a write costs;
//! [`rules`] rules through the socket and their counting; [`faults`] what a program sees of each fault; [`parking`] delayed
//! and stalled requests; [`space`] capacity; [`events`] the stream; [`input`] bad input; [`databases`] published outcomes
//! with real databases; [`houses`] rules about the code itself. Each test ends with [`support::Mounted::end`].

mod alive;
mod databases;
mod docs;
mod events;
mod faults;
mod files;
mod houses;
mod input;
mod mount;
mod parking;
mod passthrough;
mod rules;
mod space;
mod support;
mod write_path;
