//! A disk that misbehaves on command, and says exactly what it did.
//!
//! A FUSE filesystem to be mounted over the data directory of an unmodified database. With nothing armed it is
//! invisible; armed, it fails as storage fails. A socket takes rules and tells of every injection.
//!
//! # Layout
//!
//! - [`sys`] — Linux interfaces, one a file; the only place with `unsafe`.
//! - [`ranges`] — sets of byte ranges, which several parts keep.
//! - [`fault`] — rules in, decision out. Pure.
//! - [`event`] — the record of what happened, and the ring that holds it.
//! - [`durability`] — what can be taken back.
//! - [`space`] — capacity.
//! - [`fs`] — the filesystem, the hot path.
//! - [`host`] — what is done to the machine: devices that fail, where coredumps go.
//! - [`control`] — the socket.
//! - [`instances`], [`exit`] — the run directory, by which commands and daemons find each other, and the exit codes of both.
//! - [`daemon`] — from options to a mount that serves, and to its end.
//! - [`client`], [`cli`] — the command line, which talks to the socket and to nothing else.
//!
//! Each part uses only those above it in this list (the command line starts the daemon and reads its state files; it
//! shares no state with it). A test holds that.
//!
//! # Threads
//!
//! | thread | how many | does | may wait for |
//! |---|---|---|---|
//! | reader (`fuser-N`) | processors + 1 | reads a request, decides, does it, replies | the backing filesystem |
//! | `worker` | as needed, at most 256 | what the last free reader has read, parked requests that go on | the backing filesystem |
//! | `clock` | 1 | lets delayed requests go, ends the lives of rules and wakes those that come later, lets killed callers die | nothing |
//! | `control` | 1 | HTTP and the event stream | its clients |
//! | `watch` | 1 | once a second: what others changed below us, memory to give back | the backing filesystem, readers |
//! | `machine` | 1 | ends what was done to the machine when its time has come, hears what other daemons do to it | tools of the system |
//! | `helper`, `kernel-cache` | as needed, at most 512 and 256 | what could block: cleaning the kernel's caches, evicting, counting | readers |
//! | main, `signals` | 2 | the beginning and the end | all |
//!
//! # Locks
//!
//! All are held for a few instructions, nearly always alone, and never across a system call. One exception: a file's undo log stays
//! locked while old bytes are saved and overwritten, because nobody may write them in between. The control thread takes
//! no lock that is ever held across a system call, but for one of its own, which only its tasks wait for: the one under
//! which coredumps are moved. What is done to the machine is serialised across processes by
//! locks on files ([`host::state`]), which helpers hold for as long as the tools take, and nobody else waits for.
//!
//! # The life of one write
//!
//! [`fs::adapter`] names it as a [`fs::call::Call`] and hands it to [`fs::Core::serve`]. No rule armed for writes: one
//! atomic load, and on to `perform`, to `pwrite`, to the reply. Else [`fault::decide()`] asks the rules: an error is
//! told at once; a delay or stall parks the request ([`fs::park`]), and the clock or a client lets it go on, on a
//! worker; a drop is written with its undo log. When the rules change meanwhile, [`fault::decide_again()`] asks those
//! that are new. Each firing is in the ring ([`event::Ring`]) before the reply, and the control thread is woken after it.
#![deny(unsafe_code)]

pub mod cli;
pub mod client;
pub mod control;
pub mod daemon;
pub mod durability;
pub mod event;
pub mod exit;
pub mod fault;
pub mod fs;
pub mod host;
pub mod instances;
pub mod ranges;
pub mod space;
pub mod sys;
