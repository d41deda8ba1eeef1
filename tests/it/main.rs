//! The integration tests: one binary, the real daemon, real mounts, real databases.
//!
//! What belongs where: [`mount`] the beginning and the end of a mount; [`alive`] its life under load, kills and a disk
//! that hangs; [`files`] what a program sees with nothing armed; [`model`] that this is what the bare directory shows, by
//! random operations on both; [`limits`] what FUSE cannot pass; [`write_path`] what a write costs; [`passthrough`] files
//! that the kernel serves; [`rules`] rules through the socket and their counting; [`faults`] what a program sees of each
//! fault; [`shapes`] what it sees of each kind, call by call, by [`calls`]; [`engine`] which requests a rule meets and fires on;
//! [`kinds`] what real programs say of each kind; [`sweep`] the fault at every point; [`parking`] delayed and stalled requests; [`space`] capacity;
//! [`events`] the stream; [`machine`] the daemon without a mount; [`redirect`] coredumps that go elsewhere; [`input`] bad
//! input; [`undo`] that what commands print to undo them does; [`databases`] published outcomes with real databases; [`docs`] that the documents are true; [`houses`] rules about the code itself;
//! [`seeds`] what the fuzz targets begin with. For the guests of `tools/lab`, and ignored elsewhere: [`devices`] of the device
//! mapper; [`cores`] as systemd-coredump stores them. Each test ends with [`support::Mounted::end`].

mod alive;
mod calls;
mod cores;
mod crashes;
mod databases;
mod devices;
mod docs;
mod edges;
mod engine;
mod events;
mod faults;
mod files;
mod houses;
mod input;
mod kinds;
mod limits;
mod machine;
mod model;
mod mount;
mod parking;
mod passthrough;
mod redirect;
mod rules;
mod seeds;
mod shapes;
mod space;
mod support;
mod sweep;
mod undo;
mod write_path;
