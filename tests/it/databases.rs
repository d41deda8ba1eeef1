//! What real databases do when their storage fails: outcomes that their makers, papers or issues published.
//!
//! Each test names its claim, and above it stands where the claim comes from. A claim also holds when nothing has failed,
//! so each test asserts that the fault it armed was seen in the events. The servers are those of the distribution:
//! `postgresql-15`, `redis-server`, `etcd-server` and `etcd-client`; SQLite comes with rusqlite. Other modules of tests use them too.

pub mod etcd;
pub mod postgres;
pub mod redis;
pub mod server;
pub mod sqlite;
