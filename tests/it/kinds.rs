//! What real programs say of each kind of fault.
//!
//! A disk that fails in its own way is told by a program in that program's own words: a checksum, a line of a log, an
//! exit code. Each test names its claim, asserts those words and the event of the injection. For `error` and `drop` the
//! claims stand in [`crate::databases`], and so does `latency`, in the figures of a checkpoint of PostgreSQL.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use rusqlite::{Connection, ffi};
use serde_json::{Value, json};

use crate::databases::etcd::Etcd;
use crate::databases::postgres::Cluster;
use crate::databases::redis::Redis;
use crate::databases::server::logged;
use crate::databases::sqlite;
use crate::support::{Mounted, Said, eventually};

/// Of the blocks of PostgreSQL.
const BLOCK: u64 = 8192;

/// The only injection of a rule.
fn only_injection(mounted: &Mounted, rule: &str) -> Value {
    let mut events = mounted.injections(rule);
    assert_eq!(events.len(), 1, "{rule}: {events:?}");
    events.remove(0)
}

fn said(command: &mut Command) -> Said {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; is its package installed?"));
    output.into()
}

fn succeeded(command: &mut Command) -> String {
    let said = said(command);
    assert_eq!(said.code, 0, "{command:?}: {said:?}");
    said.out
}

/// <https://www.postgresql.org/docs/15/checksums.html>: checksums are there to find corruption by the storage;
/// <https://www.postgresql.org/docs/15/app-pgchecksums.html>.
#[test]
fn pg_checksums_finds_the_block_in_which_a_bit_was_flipped_and_none_once_it_is_repaired() {
    let mounted = Mounted::new();
    let cluster = Cluster::on(&mounted);
    let server = cluster.start();
    let table = cluster.table();
    mounted.rule(
        "flip",
        json!({
            "match": {"ops": ["write"], "path": table}, "trigger": {"skip": 5, "times": 1},
            "fault": {"kind": "corrupt", "mode": "bitflip", "bits": 1, "when": "write"},
        }),
    );
    cluster.query("CHECKPOINT").expect("a write that was corrupted is acknowledged");
    server.stop(Signal::SIGINT);
    let event = only_injection(&mounted, "flip");
    assert_eq!((&event["kind"], &event["path"]), (&json!("corrupt"), &json!(table)), "{event}");

    mounted.cli(&["evict"]);
    let block = event["offset"].as_u64().expect("an offset") / BLOCK;
    assert_eq!(cluster.bad_blocks(), [(table, block)], "the page that we made bad: {event}");
    mounted.cli(&["repair"]);
    cluster.assert_checksums_are_right();
    let server = cluster.start();
    assert_eq!(cluster.number("SELECT count(*) FROM t"), 1000);
    server.stop(Signal::SIGINT);
    mounted.end();
}

/// The checksum of a page covers its number, for pages that are in the wrong place: `pg_checksum_page` in
/// src/include/storage/checksum_impl.h of PostgreSQL 15.
#[test]
fn pg_checksums_finds_the_block_onto_which_another_was_written() {
    let mounted = Mounted::new();
    let cluster = Cluster::on(&mounted);
    let server = cluster.start();
    let table = cluster.table();
    // A checkpoint writes blocks in their order: what lands on the one before is not overwritten any more.
    mounted.rule(
        "astray",
        json!({
            "match": {"ops": ["write"], "path": table}, "trigger": {"skip": 5, "times": 1},
            "fault": {"kind": "misdirect", "offset_delta": "-8KiB"},
        }),
    );
    cluster.query("CHECKPOINT").expect("a write that went astray is acknowledged");
    server.stop(Signal::SIGINT);
    let event = only_injection(&mounted, "astray");

    mounted.cli(&["evict"]);
    let block = event["offset"].as_u64().expect("an offset") / BLOCK;
    assert!(block > 0, "{event}");
    assert_eq!(cluster.bad_blocks(), [(table, block - 1)], "{event}");
    mounted.end();
}

/// `isTornEntry` in wal/decoder.go and `Repair` in wal/repair.go of etcd 3.4: a record of which a sector has nothing but zeros
/// was torn, and is cut off. It had been acknowledged: no log survives a disk that tears what it said it had synced.
#[test]
fn etcd_cuts_a_torn_record_off_its_log_and_has_every_key_before_it() {
    let mounted = Mounted::new();
    let etcd = Etcd::on(&mounted);
    // The file of keys must not have it either: else etcd would have it from there, without its record.
    let rarely = ["--backend-batch-interval", "1h", "--backend-batch-limit", "100000"];
    let server = etcd.start_with(&rarely);
    assert_eq!(etcd.put(0..20, "value"), 20);
    // The kernel cuts a write at the first page boundary: of the record's two parts the longer one is torn.
    mounted.rule(
        "torn",
        json!({
            "match": {"ops": ["write"], "path": "/etcd/member/wal/*.wal", "length": "2000..1MiB"}, "trigger": {"times": 1},
            "fault": {"kind": "torn", "keep": "512", "then": "ok"},
        }),
    );
    assert_eq!(etcd.put(20..21, &"x".repeat(4000)), 1, "a torn write is acknowledged");
    let event = only_injection(&mounted, "torn");
    assert_eq!((&event["kind"], &event["comm"]), (&json!("torn"), &json!("etcd")), "{event}");
    // Killed: an end in good order would write the keys.
    drop(server);

    mounted.cli(&["evict"]);
    let server = etcd.start_with(&rarely);
    logged(&etcd.log, &["repaired WAL", "unexpected EOF"]);
    assert_eq!(etcd.keys(), 20, "all but the one whose record was torn");
    assert_eq!(etcd.put(21..30, "value"), 9, "it works on");
    server.stop(Signal::SIGTERM);
    mounted.end();
}

/// `seekAndRead` and `unixWrite` in src/os_unix.c of SQLite: what was done in part is continued.
#[test]
fn sqlite_reads_and_writes_the_rest_of_what_was_done_in_part() {
    let mounted = Mounted::new();
    for (name, op) in [("short-reads", "read"), ("short-writes", "write")] {
        let path = mounted.path(&format!("{name}.db"));
        assert!(sqlite::ten_commits(&sqlite::open(&path, "DELETE")).is_empty());
        let before = rows(&path);
        mounted.rule(
            name,
            json!({
                "match": {"ops": [op], "path": format!("/{name}.db*"), "length": "1000..1MiB"},
                "fault": {"kind": "short", "max_bytes": 700},
            }),
        );
        assert_eq!(rows(&path), before, "{name}");
        assert!(sqlite::ten_commits(&sqlite::open(&path, "DELETE")).is_empty(), "{name}");
        assert_eq!(sqlite::reopened(&path), 20, "{name}");
        let injections = mounted.injections(name);
        // A page of 4096 bytes was asked for by all of its five parts that were longer than 1000 bytes.
        assert!(injections.len() >= 5 && injections.iter().all(|event| event["op"] == op), "{name}: {injections:?}");
        mounted.reset();
        assert_eq!(sqlite::reopened(&mounted.backing.join(format!("{name}.db"))), 20, "{name}: in the backing file");
    }
    mounted.end();
}

/// All rows of a database that is opened anew.
fn rows(path: &Path) -> Vec<String> {
    let db = Connection::open(path).expect("a database");
    let mut statement = db.prepare("SELECT v FROM t ORDER BY id").expect("a statement");
    let rows = statement.query_map((), |row| row.get(0)).expect("rows");
    rows.map(|row| row.expect("a row")).collect()
}

/// `unixRead` in src/os_unix.c of SQLite: `EIO` is taken for a corrupt filesystem, and told as a corrupt database;
/// <https://sqlite.org/rescode.html#ioerr_corruptfs>. Other errors are <https://sqlite.org/rescode.html#ioerr_read>:
/// `ENODATA` is what the kernel makes of a medium error (`blk_errors` in block/blk-core.c).
#[test]
fn sqlite_cannot_read_a_page_on_bad_sectors_and_reads_the_others() {
    let mounted = Mounted::new();
    let path = mounted.path("bad.db");
    let db = sqlite::open(&path, "DELETE");
    for _ in 0..10 {
        assert!(sqlite::ten_commits(&db).is_empty());
    }
    drop(db);
    for (errno, wanted) in [("EIO", ffi::SQLITE_CORRUPT), ("ENODATA", ffi::SQLITE_IOERR_READ)] {
        bad_sectors(&mounted, "/bad.db", "40KiB..44KiB", errno);
        let db = Connection::open(&path).expect("a database");
        let scan = || db.query_row("SELECT sum(length(v)) FROM t", (), |row| row.get::<_, i64>(0));
        for time in ["at first", "again: the sectors stay bad"] {
            let error = scan().expect_err("a page cannot be read");
            assert_eq!(sqlite::code(&error), wanted, "{errno}, {time}: {error}");
        }
        let last = db.query_row("SELECT length(v) FROM t WHERE id = 100", (), |row| row.get::<_, i64>(0));
        assert_eq!(last.ok(), Some(500), "{errno}: a row on another page");
        assert_bad_sectors_were_met(&mounted, errno);
        mounted.reset();
        assert_eq!(scan().ok(), Some(50_000), "{errno}");
    }
    mounted.end();
}

/// `mdread` in src/backend/storage/smgr/md.c of PostgreSQL 15.
#[test]
fn postgres_names_the_block_on_bad_sectors_and_serves_the_others() {
    let mounted = Mounted::new();
    let cluster = Cluster::on(&mounted);
    let server = cluster.start();
    let table = cluster.table();
    // Its own cache has the table.
    server.stop(Signal::SIGINT);
    let server = cluster.start();
    bad_sectors(&mounted, &table, "8KiB..12KiB", "EIO");
    let file = table.strip_prefix("/pg/").expect("a file of the cluster");
    for _ in 0..2 {
        let error = cluster.query("SELECT sum(i) FROM t").expect_err("a block cannot be read");
        let wanted = format!("ERROR:  could not read block 1 in file \"{file}\": Input/output error");
        assert!(error.contains(&wanted), "{error}");
    }
    assert_eq!(cluster.number("SELECT i FROM t WHERE ctid = '(0,1)'"), 1, "a row in another block");
    assert_bad_sectors_were_met(&mounted, "EIO");

    mounted.reset();
    assert_eq!(cluster.number("SELECT count(*) FROM t"), 1000);
    server.stop(Signal::SIGINT);
    mounted.end();
}

/// <https://github.com/facebook/rocksdb/wiki/Background-Error-Handling>: an error of a read is told to its reader and to
/// nobody else.
#[test]
fn rocksdb_reports_the_key_on_bad_sectors_and_reads_the_others() {
    let mounted = Mounted::new();
    let database = mounted.path("rocks");
    let ldb = |words: &[&str]| said(Command::new("ldb").arg(format!("--db={}", database.display())).args(words));
    // Opening a table reads the last half a megabyte of it.
    let value = "v".repeat(100_000);
    let mut put = vec!["--create_if_missing", "--compression_type=no", "batchput"];
    for key in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"] {
        put.extend([key, &value]);
    }
    assert_eq!(ldb(&put).code, 0);
    assert_eq!(ldb(&["--compression_type=no", "compact"]).code, 0);
    bad_sectors(&mounted, "/rocks/*.sst", "8KiB..12KiB", "EIO");
    for _ in 0..2 {
        let failed = ldb(&["get", "a"]);
        assert_ne!(failed.code, 0);
        let text = format!("{}{}", failed.out, failed.err);
        assert!(text.contains("IO error: While pread") && text.contains("Input/output error"), "{text}");
    }
    let read = ldb(&["get", "l"]);
    assert!(read.code == 0 && read.out.trim_end() == value, "a key in another block: {} {}", read.code, read.err);
    assert_bad_sectors_were_met(&mounted, "EIO");

    mounted.reset();
    assert_eq!(ldb(&["get", "a"]).out.trim_end(), value);
    mounted.end();
}

fn bad_sectors(mounted: &Mounted, path: &str, range: &str, errno: &str) {
    let fault = json!({"kind": "bad_sectors", "ranges": [range], "errno": errno});
    mounted.rule("bad", json!({"match": {"ops": ["read"], "path": path}, "fault": fault}));
}

fn assert_bad_sectors_were_met(mounted: &Mounted, errno: &str) {
    let injections = mounted.injections("bad");
    assert!(injections.iter().any(|event| event["kind"] == "bad_sectors" && event["errno"] == errno), "{injections:?}");
}

/// <https://fio.readthedocs.io/en/latest/fio_doc.html#json-output>.
#[test]
fn fio_measures_the_throughput_to_which_writes_are_throttled() {
    let mounted = Mounted::new();
    throttle(&mounted, "write", json!({"bytes_per_second": "4MiB", "burst": "64KiB"}));
    let arms: [(&str, &[&str]); 3] = [
        ("direct", &["--direct=1"]),
        ("buffered", &["--fsync=8"]),
        ("two files, which share it", &["--direct=1", "--numjobs=2", "--group_reporting"]),
    ];
    for (name, options) in arms {
        let options = [&["--bs=64k", "--size=64m", "--fallocate=none"], options].concat();
        assert_near(4_194_304.0, name, || fio(&mounted, "write", &options)["bw_bytes"].clone());
    }
    assert!(!mounted.injections("slow").is_empty());
    mounted.end();
}

/// The same page: `iops`.
#[test]
fn fio_measures_the_operations_each_second_to_which_reads_are_throttled() {
    let mounted = Mounted::new();
    // fio would write it first.
    fs::write(mounted.backing.join("job.0.0"), vec![7; 1 << 20]).expect("a file");
    throttle(&mounted, "read", json!({"ops_per_second": 200, "burst": 10}));
    let options = ["--direct=1", "--rw=randread", "--bs=4k", "--size=1m"];
    assert_near(200.0, "random reads", || fio(&mounted, "read", &options)["iops"].clone());
    assert!(!mounted.injections("slow").is_empty());
    mounted.end();
}

fn throttle(mounted: &Mounted, op: &str, attributes: Value) {
    let mut fault = json!({"kind": "throttle"});
    fault.as_object_mut().expect("an object").extend(attributes.as_object().expect("an object").clone());
    mounted.rule("slow", json!({"match": {"ops": [op], "path": "/job.*"}, "fault": fault}));
}

/// Two and a half seconds of fio on the mount: what it tells of one direction.
fn fio(mounted: &Mounted, direction: &str, options: &[&str]) -> Value {
    let mut command = Command::new("fio");
    command.args(["--name=job", "--ioengine=psync", "--time_based", "--runtime=2500ms", "--output-format=json"]);
    command.arg(format!("--directory={}", mounted.mountpoint.display())).arg(format!("--rw={direction}")).args(options);
    let text = succeeded(&mut command);
    let json = text.find('{').and_then(|start| serde_json::from_str::<Value>(&text[start..]).ok());
    json.unwrap_or_else(|| panic!("{text}"))["jobs"][0][direction].clone()
}

/// It is never faster than that. It may be slower when the machine stands still: best of three.
fn assert_near(wanted: f64, what: &str, mut measure: impl FnMut() -> Value) {
    let reached = (0..3).any(|_| {
        let measured = measure();
        let measured = measured.as_f64().unwrap_or_else(|| panic!("{what}: {measured}"));
        println!("{what}: {measured}, {wanted} wanted");
        assert!(measured / wanted <= 1.2, "{what}: {measured}, {wanted} wanted");
        measured / wanted >= 0.8
    });
    assert!(reached, "{what}: three times slower than {wanted}");
}

/// <https://git-scm.com/docs/index-format>: a file whose size is not that of the index has changed, whatever is in it.
#[test]
fn git_takes_a_file_of_a_wrong_size_for_a_changed_one() {
    let mounted = Mounted::new();
    let git = |words: &[&str]| {
        let mut command = Command::new("git");
        command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null").arg("-C");
        succeeded(command.arg(&mounted.mountpoint).args(words))
    };
    git(&["init", "--quiet"]);
    fs::write(mounted.path("file"), "contents").expect("a file");
    git(&["add", "file"]);
    assert_eq!(git(&["status", "--porcelain"]), "A  file\n");
    wrong_attributes(&mounted, "/file", json!({"kind": "attr", "size": "+1"}));
    assert_eq!(git(&["status", "--porcelain"]), "AM file\n");
    assert!(!mounted.injections("wrong").is_empty());

    mounted.reset();
    assert_eq!(git(&["status", "--porcelain"]), "A  file\n");
    mounted.end();
}

/// rsync(1), `--itemize-changes`: `t` stands for a time that differs.
#[test]
fn rsync_would_copy_a_file_of_which_the_time_is_wrong() {
    let mounted = Mounted::new();
    fs::create_dir(mounted.path("tree")).expect("a directory");
    for name in ["one", "two"] {
        fs::write(mounted.path(&format!("tree/{name}")), name).expect("a file");
    }
    let (from, to) = (format!("{}/", mounted.path("tree").display()), mounted.aside("copy"));
    let rsync = |options: &str| succeeded(Command::new("rsync").arg(options).arg(&from).arg(&to));
    rsync("-a");
    assert_eq!(rsync("-ain"), "");
    wrong_attributes(&mounted, "/tree/two", json!({"kind": "attr", "mtime": "-1day"}));
    assert_eq!(rsync("-ain"), ">f..t...... two\n");
    assert!(!mounted.injections("wrong").is_empty());

    mounted.reset();
    assert_eq!(rsync("-ain"), "");
    mounted.end();
}

fn wrong_attributes(mounted: &Mounted, path: &str, fault: Value) {
    mounted.rule("wrong", json!({"match": {"ops": ["lookup", "getattr"], "path": path}, "fault": fault}));
}

/// `flushAppendOnlyFile` in src/aof.c of Redis 7.0: with `always` no command is acknowledged before it is in the log.
#[test]
fn redis_that_is_killed_at_a_write_of_its_log_has_every_acknowledged_key_after() {
    let mounted = Mounted::new();
    let redis = Redis::on(&mounted);
    let policy = ["--appendonly", "yes", "--appendfsync", "always"];
    let mut server = redis.start(&policy);
    assert_eq!(redis.set(0..20, 100).0, 20);
    mounted.rule(
        "death",
        json!({
            "match": {"ops": ["write"], "path": "/appendonlydir/*.incr.aof"}, "trigger": {"skip": 10, "times": 1},
            "fault": {"kind": "kill", "signal": "SIGKILL", "target": "caller"},
        }),
    );
    let (acknowledged, answer) = redis.set(20..100, 100);
    assert_eq!((acknowledged, answer), (10, None), "it died at the eleventh write");
    assert_eq!(server.ended().signal(), Some(libc::SIGKILL));
    let event = only_injection(&mounted, "death");
    assert_eq!((&event["kind"], &event["comm"]), (&json!("kill"), &json!("redis-server")), "{event}");

    let server = redis.start(&policy);
    // The write itself may have been done.
    assert!((30..=31).contains(&redis.keys()), "{} keys", redis.keys());
    server.stop(Signal::SIGTERM);
    mounted.end();
}

/// `flushAppendOnlyFile` in src/aof.c of Redis 7.0: a write waits two seconds for an fsync that is under way, and then goes on.
/// Here the kernel lets no write to the file pass before the fsync has ended.
#[test]
fn redis_complains_of_an_fsync_that_hangs_and_goes_on_when_it_is_released() {
    const KEYS: u32 = 300;
    let mounted = Mounted::new();
    let redis = Redis::on(&mounted);
    let policy = ["--appendonly", "yes", "--appendfsync", "everysec"];
    let server = redis.start(&policy);
    mounted.rule(
        "hang",
        json!({
            "match": {"ops": ["fsync"], "path": "/appendonlydir/*.incr.aof"}, "trigger": {"times": 1},
            "fault": {"kind": "stall"},
        }),
    );
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            (0..KEYS).all(|key| {
                std::thread::sleep(Duration::from_millis(12));
                redis.ask(&format!("SET key{key} 1")).as_deref() == Some("+OK")
            })
        });
        let complaint = "Asynchronous AOF fsync is taking too long";
        eventually("it complains", || fs::read_to_string(&redis.log).is_ok_and(|text| text.contains(complaint)));
        mounted.cli(&["rule", "release", "hang"]);
        assert!(client.join().expect("the client"), "every key was acknowledged");
    });
    assert_eq!(only_injection(&mounted, "hang")["kind"], "stall");
    server.stop(Signal::SIGTERM);
    let server = redis.start(&policy);
    assert_eq!(redis.keys(), KEYS);
    server.stop(Signal::SIGTERM);
    mounted.end();
}
