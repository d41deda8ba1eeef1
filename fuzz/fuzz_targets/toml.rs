//! Fuzz target: A file of rules, as `mount --rules` and `rule apply` read it, to the rules that are in it.
//!
//! Runs on the fuzzer's thread. All that it does is in the library beside it, which the tests use too.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| nemesisfs_fuzz::toml(bytes));
