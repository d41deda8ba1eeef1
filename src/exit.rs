//! The exit codes of the contract, by which scripts tell what came of a command.
//!
//! Constants alone. Must never: change.

/// Also the code of removing what is not there.
pub const DONE: u8 = 0;
pub const FAILED: u8 = 1;
pub const USAGE: u8 = 2;
pub const NO_INSTANCE: u8 = 3;
pub const NO_SUCH_THING: u8 = 4;
pub const NOT_SUPPORTED: u8 = 5;
pub const TIMED_OUT: u8 = 124;
