//! Fuzz target: JSON, as a client sends it, through the checks and the compiler to decisions.
//!
//! Runs on the fuzzer's thread. All that it does is in the library beside it, which the tests use too.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| nemesisfs_fuzz::rule(bytes));
