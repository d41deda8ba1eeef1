//! SQLite: one row for each transaction, with its write-ahead log and with its rollback journal.
//!
//! Runs on the main thread; no locks but SQLite's own. `synchronous` is SQLite's default for both, so that it syncs as an
//! application's would.

use std::io;
use std::time::Duration;

use rusqlite::Connection;

use crate::files::Files;
use crate::operation::timed;

pub fn insert_wal(files: &mut Files) -> io::Result<Duration> {
    insert(files, "wal")
}

pub fn insert_journal(files: &mut Files) -> io::Result<Duration> {
    insert(files, "delete")
}

fn insert(files: &mut Files, journal: &'static str) -> io::Result<Duration> {
    if !files.databases.contains_key(journal) {
        let connection = open(files, journal).map_err(io::Error::other)?;
        files.databases.insert(journal, connection);
    }
    let connection = &files.databases[journal];
    let row = || connection.prepare_cached("INSERT INTO t (content) VALUES (?)")?.execute([[0x5a_u8; 100]]);
    timed(|| row().map(drop).map_err(io::Error::other))
}

fn open(files: &Files, journal: &str) -> rusqlite::Result<Connection> {
    let connection = Connection::open(files.dir.join(format!("{journal}.sqlite")))?;
    connection.pragma_update_and_check(None, "journal_mode", journal, |_| Ok(()))?;
    connection.execute_batch("CREATE TABLE t (id INTEGER PRIMARY KEY, content BLOB)")?;
    Ok(connection)
}
