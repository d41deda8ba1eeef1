//! SQLite on storage that is full, fails or loses what it was given.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rusqlite::{Connection, Error, ffi};
use serde_json::json;

use crate::support::Mounted;

pub fn open(path: &Path, journal: &str) -> Connection {
    let db = Connection::open(path).expect("a database");
    db.pragma_update(None, "journal_mode", journal).expect("a journal mode");
    db.pragma_update(None, "synchronous", "FULL").expect("synchronous");
    // Checkpoints would write the database file in the middle of what is tested.
    db.pragma_update(None, "wal_autocheckpoint", 0).expect("no checkpoints");
    db.execute_batch("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v)").expect("a table");
    db
}

pub fn count(db: &Connection) -> i64 {
    db.query_row("SELECT count(*) FROM t", (), |row| row.get(0)).expect("a count")
}

pub fn assert_sound(db: &Connection) {
    let said: String = db.query_row("PRAGMA integrity_check", (), |row| row.get(0)).expect("a check");
    assert_eq!(said, "ok", "integrity_check");
}

/// Rows that a database has after it was opened anew, having found it sound.
pub fn reopened(path: &Path) -> i64 {
    let db = Connection::open(path).expect("a database");
    assert_sound(&db);
    count(&db)
}

/// The extended result code.
pub fn code(error: &Error) -> i32 {
    error.sqlite_error().unwrap_or_else(|| panic!("not of SQLite: {error}")).extended_code
}

/// One transaction that is much larger than the page cache.
fn large_transaction(db: &Connection) -> Result<(), Error> {
    db.execute_batch("BEGIN")?;
    for _ in 0..2000 {
        db.execute("INSERT INTO t(v) VALUES (randomblob(2000))", ())?;
    }
    db.execute_batch("COMMIT")
}

/// Ten transactions of one row: the error of each that failed.
pub fn ten_commits(db: &Connection) -> Vec<Error> {
    let insert = |_| db.execute("INSERT INTO t(v) VALUES (hex(randomblob(250)))", ()).err();
    (0..10).filter_map(insert).collect()
}

/// <https://sqlite.org/rescode.html#full>; <https://sqlite.org/lang_transaction.html>, "Response To Errors Within A
/// Transaction"; SQLite's own `test/diskfull.test` wants the database sound afterwards.
#[test]
fn sqlite_on_a_full_disk_refuses_the_transaction_keeps_the_rest_and_goes_on_when_there_is_room() {
    let mounted = Mounted::new();
    for journal in ["DELETE", "WAL"] {
        let db = open(&mounted.path(&format!("{journal}.db")), journal);
        db.pragma_update(None, "cache_size", 20).expect("a small cache");
        assert!(ten_commits(&db).is_empty());
        let before = mounted.injections("space").len();
        mounted.cli(&["space", "virtual", "--free", "0"]);

        let error = large_transaction(&db).expect_err("no room for it");
        assert_eq!(code(&error), ffi::SQLITE_FULL, "{journal}: {error}");
        assert!(error.to_string().contains("database or disk is full"), "{journal}: {error}");
        // Whether SQLite has rolled back by itself depends on where it was.
        if !db.is_autocommit() {
            db.execute_batch("ROLLBACK").expect("a rollback needs no room");
        }
        assert_eq!(count(&db), 10, "{journal}: what was committed, read while the disk is full");
        assert!(mounted.injections("space").len() > before, "{journal}: the refusal is an event");

        mounted.cli(&["space", "clear"]);
        large_transaction(&db).expect("the same transaction by the same connection");
        assert_eq!(count(&db), 2010, "{journal}");
        assert_sound(&db);
    }
    mounted.end();
}

/// <https://sqlite.org/rescode.html#ioerr_write> and `#full`; SQLite's own `test/ioerr.test`: sound after each error.
#[test]
fn sqlite_loses_exactly_the_commit_whose_write_failed() {
    let mounted = Mounted::new();
    // The first write to a write-ahead log is its header; the second is the first frame of a transaction.
    let arms = [
        ("journal", "DELETE", "-journal", 0, "EIO", ffi::SQLITE_IOERR_WRITE),
        ("database", "DELETE", "", 0, "EIO", ffi::SQLITE_IOERR_WRITE),
        ("log", "WAL", "-wal", 1, "EIO", ffi::SQLITE_IOERR_WRITE),
        ("full-journal", "DELETE", "-journal", 0, "ENOSPC", ffi::SQLITE_FULL),
        ("full-log", "WAL", "-wal", 1, "ENOSPC", ffi::SQLITE_FULL),
    ];
    for (name, journal, suffix, skip, errno, wanted) in arms {
        let path = mounted.path(&format!("{name}.db"));
        assert!(ten_commits(&open(&path, journal)).is_empty());
        mounted.rule(
            name,
            json!({
                "match": {"ops": ["write"], "path": format!("/{name}.db{suffix}")},
                "trigger": {"skip": skip, "times": 1}, "fault": {"kind": "error", "errno": errno},
            }),
        );
        let errors = ten_commits(&open(&path, journal));
        let codes: Vec<i32> = errors.iter().map(code).collect();
        assert_eq!(codes, [wanted], "{name}: one commit fails, and says why: {errors:?}");
        assert_eq!(reopened(&path), 19, "{name}: the other rows are there");
        let injections = mounted.injections(name);
        assert_eq!(injections.len(), 1, "{name}: {injections:?}");
        assert_eq!(injections[0]["errno"], errno, "{name}");
    }
    mounted.end();
}

/// Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020: SQLite aborts the transaction and tells
/// its caller. <https://sqlite.org/rescode.html#ioerr_fsync>. The paper's false failure: with a write-ahead log the row that
/// was refused may be there after all.
#[test]
fn sqlite_fails_the_commit_whose_fsync_failed_and_no_other() {
    let mounted = Mounted::new();
    let arms = [
        ("journal", "DELETE", "-journal", 19..=19),
        ("database", "DELETE", "", 19..=19),
        ("log", "WAL", "-wal", 19..=20),
    ];
    for (name, journal, suffix, rows) in arms {
        let path = mounted.path(&format!("{name}.db"));
        assert!(ten_commits(&open(&path, journal)).is_empty());
        mounted.error_rule(name, "fsync", &format!("/{name}.db{suffix}"), "EIO", Some(1));
        let codes: Vec<i32> = ten_commits(&open(&path, journal)).iter().map(code).collect();
        assert_eq!(codes, [ffi::SQLITE_IOERR_FSYNC], "{name}");
        let found = reopened(&path);
        assert!(rows.contains(&found), "{name}: {found} rows");
        assert_eq!(mounted.injections(name).len(), 1, "{name}");
    }
    mounted.end();
}

/// <https://sqlite.org/howtocorrupt.html>, "Disk drives that do not honor sync requests": what was committed is not there
/// after the power has failed. As nothing at all was written here, the database is the old one and sound.
#[test]
fn sqlite_commits_to_a_disk_that_drops_writes_are_gone_once_the_cache_is_evicted() {
    let mounted = Mounted::new();
    let path = mounted.path("lost.db");
    assert!(ten_commits(&open(&path, "DELETE")).is_empty());
    mounted.cli(&["mode", "drop_writes"]);
    assert!(ten_commits(&open(&path, "DELETE")).is_empty(), "a lost write is acknowledged");
    assert_eq!(reopened(&path), 20, "and everyone sees it, for now");
    mounted.cli(&["mode", "allow_writes"]);
    assert_eq!(reopened(&path), 20, "also when the disk works again");
    mounted.cli(&["evict"]);
    assert_eq!(reopened(&path), 10, "until the cache is gone");
    let dropped = mounted.injections("mode");
    assert!(dropped.iter().any(|event| event["op"] == "write" && event["path"] == "/lost.db"), "{dropped:?}");
    mounted.end();
}

/// A device that drops writes, as `drop_writes` of the kernel's dm-flakey:
/// <https://docs.kernel.org/admin-guide/device-mapper/dm-flakey.html>.
#[test]
fn dropped_bytes_are_seen_until_evicted_and_then_the_old_ones_are_back() {
    let mounted = Mounted::new();
    let path = mounted.path("file");
    fs::write(&path, "old contents").expect("a file");
    mounted.cli(&["mode", "drop_writes"]);
    let file = fs::File::options().write(true).open(&path).expect("the file");
    file.write_all_at(b"NEW", 0).expect("an overwrite");
    file.write_all_at(b"more", 12).expect("an append");
    file.sync_all().expect("an fsync that lies");
    drop(file);
    assert_eq!(fs::read_to_string(&path).expect("the file"), "NEW contentsmore");
    mounted.cli(&["evict", "/file"]);
    let after = fs::read(&path).expect("the file");
    let (old, grown) = after.split_at(12);
    assert_eq!(old, b"old contents");
    assert!(grown.iter().all(|byte| *byte == 0), "nothing of what was appended: {grown:?}");
    let ops: Vec<_> = mounted.injections("mode").iter().map(|event| event["op"].clone()).collect();
    assert_eq!(ops, ["write", "write", "fsync"]);
    mounted.end();
}
