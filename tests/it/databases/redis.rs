//! Redis on storage that is full or slow.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;

use super::server::{Server, logged};
use crate::support::{Mounted, eventually};

/// A Redis whose directory is the mount.
pub struct Redis<'a> {
    mounted: &'a Mounted,
    socket: PathBuf,
    pub log: PathBuf,
}

impl<'a> Redis<'a> {
    pub fn on(mounted: &'a Mounted) -> Redis<'a> {
        let aside = mounted.aside("redis");
        Redis { mounted, socket: aside.join("redis.sock"), log: aside.join("redis.log") }
    }

    pub fn start(&self, options: &[&str]) -> Server {
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--daemonize", "no", "--unixsocket"]).arg(&self.socket);
        command.arg("--dir").arg(&self.mounted.mountpoint).args(["--save", ""]).args(options);
        Server::start(command, &self.log).ready(|| self.ask("PING").as_deref() == Some("+PONG"))
    }

    fn connect(&self) -> Option<BufReader<UnixStream>> {
        let stream = UnixStream::connect(&self.socket).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        Some(BufReader::new(stream))
    }

    /// The answer to one command on a connection of its own; none when the server goes away over it.
    pub fn ask(&self, command: &str) -> Option<String> {
        say(&mut self.connect()?, command)
    }

    /// Sets keys until one is refused: how many were acknowledged, and what was said then (nothing: it went away).
    pub fn set(&self, keys: std::ops::Range<u32>, length: usize) -> (u32, Option<String>) {
        let mut stream = self.connect().expect("a connection");
        let first = keys.start;
        for key in keys.clone() {
            let answer = say(&mut stream, &format!("SET key{key} {key}-{}", "x".repeat(length)));
            if answer.as_deref() != Some("+OK") {
                return (key - first, answer);
            }
        }
        (keys.end - first, Some("+OK".to_string()))
    }

    pub fn keys(&self) -> u32 {
        let answer = self.ask("DBSIZE").expect("an answer");
        answer.trim_start_matches(':').parse().unwrap_or_else(|_| panic!("{answer}"))
    }

    /// One field of INFO.
    fn info(&self, field: &str) -> String {
        let text = self.ask("INFO persistence").expect("an answer");
        let found = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':').map(str::trim));
        found.unwrap_or_else(|| panic!("no {field} in {text}")).to_string()
    }

    fn full_disk(&self) {
        self.mounted.cli(&["space", "virtual", "--free", "0"]);
    }

    fn room_again(&self) {
        let refused = self.mounted.injections("space");
        assert!(refused.iter().any(|event| event["errno"] == "ENOSPC"), "the disk was full for somebody: {refused:?}");
        self.mounted.cli(&["space", "clear"]);
    }
}

fn say(stream: &mut BufReader<UnixStream>, command: &str) -> Option<String> {
    writeln!(stream.get_mut(), "{command}\r").ok()?;
    let mut line = String::new();
    if stream.read_line(&mut line).ok()? == 0 {
        return None;
    }
    let line = line.trim_end().to_string();
    let Some(length) = line.strip_prefix('$').and_then(|length| length.parse::<usize>().ok()) else {
        return Some(line);
    };
    let mut bulk = vec![0; length + 2];
    stream.read_exact(&mut bulk).ok()?;
    bulk.truncate(length);
    Some(String::from_utf8_lossy(&bulk).into_owned())
}

/// `flushAppendOnlyFile` in <https://github.com/redis/redis/blob/7.0/src/aof.c>: with `always` a reply that was sent cannot be
/// taken back, so it exits; <https://github.com/redis/redis/issues/1522>.
#[test]
fn redis_that_always_syncs_exits_on_a_full_disk_and_has_every_acknowledged_key_after() {
    let mounted = Mounted::new();
    let redis = Redis::on(&mounted);
    let policy = ["--appendonly", "yes", "--appendfsync", "always"];
    let mut server = redis.start(&policy);
    let (before, _) = redis.set(0..100, 100);
    assert_eq!(before, 100);
    redis.full_disk();
    let (after, answer) = redis.set(100..300, 4000);
    assert_eq!(answer, None, "the connection ends with the server, after {after} more keys");
    assert_eq!(server.ended().code(), Some(1));
    logged(&redis.log, &["AOF write error", "fsync policy is 'always'", "Exiting"]);

    redis.room_again();
    let server = redis.start(&policy);
    assert!(redis.keys() >= before + after, "{} keys of {}", redis.keys(), before + after);
    server.stop(Signal::SIGTERM);
    mounted.end();
}

/// `flushAppendOnlyFile` in src/aof.c and `writeCommandsDeniedByDiskError` in src/server.c of Redis 7.0;
/// <https://github.com/redis/redis/issues/12012>.
#[test]
fn redis_that_syncs_each_second_refuses_writes_on_a_full_disk_and_goes_on_by_itself_when_there_is_room() {
    let mounted = Mounted::new();
    let redis = Redis::on(&mounted);
    let mut server = redis.start(&["--appendonly", "yes", "--appendfsync", "everysec"]);
    assert_eq!(redis.set(0..100, 100).0, 100);
    redis.full_disk();
    // The log is written once in a loop of events, so some more are acknowledged in memory; many more while it waits for the
    // fsync of the second before. It ends at the first that is refused.
    let (_, answer) = redis.set(100..200_000, 400);
    let answer = answer.expect("an answer: the server stays");
    assert!(answer.contains("MISCONF Errors writing to the AOF file: No space left on device"), "{answer}");
    assert!(redis.ask("GET key5").is_some_and(|value| value.starts_with("5-")), "reads are served");
    assert!(server.runs());

    redis.room_again();
    eventually("writes are accepted", || redis.ask("SET again 1").as_deref() == Some("+OK"));
    logged(&redis.log, &["AOF write error looks solved"]);
    let keys = redis.keys();
    server.stop(Signal::SIGTERM);
    let server = redis.start(&["--appendonly", "yes"]);
    assert_eq!(redis.keys(), keys, "all that it had, after a restart");
    server.stop(Signal::SIGTERM);
    mounted.end();
}

/// `stop-writes-on-bgsave-error` in redis.conf of Redis 7.0; <https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/>.
#[test]
fn redis_whose_snapshot_does_not_fit_refuses_writes_keeps_the_old_one_and_goes_on_after_the_next() {
    let mounted = Mounted::new();
    let redis = Redis::on(&mounted);
    let save = ["--appendonly", "no", "--save", "3600 1"];
    let server = redis.start(&save);
    assert_eq!(redis.set(0..300, 1000).0, 300);
    assert_eq!(redis.ask("SAVE").as_deref(), Some("+OK"));
    let dump = mounted.path("dump.rdb");
    let old = fs::read(&dump).expect("a snapshot");

    redis.full_disk();
    assert_eq!(redis.set(300..600, 1000).0, 300, "memory is not full");
    redis.ask("BGSAVE");
    eventually("the snapshot fails", || redis.info("rdb_last_bgsave_status") == "err");
    logged(&redis.log, &["Background saving error"]);
    let answer = redis.ask("SET more 1").expect("an answer");
    assert!(answer.contains("MISCONF Redis is configured to save RDB snapshots"), "{answer}");
    assert!(fs::read(&dump).expect("a snapshot") == old, "the old snapshot is as it was");

    redis.room_again();
    redis.ask("BGSAVE");
    eventually("writes are accepted", || redis.ask("SET more 1").as_deref() == Some("+OK"));
    let keys = redis.keys();
    assert_eq!(redis.ask("SAVE").as_deref(), Some("+OK"));
    server.stop(Signal::SIGTERM);
    let server = redis.start(&save);
    assert_eq!(redis.keys(), keys);
    server.stop(Signal::SIGTERM);
    mounted.end();
}

/// `flushAppendOnlyFile` in src/aof.c of Redis 7.0: a write waits up to two seconds for the fsync that is under way, then
/// goes on, and this is counted; <https://redis.io/docs/latest/operate/oss_and_stack/management/optimization/latency/>.
#[test]
fn redis_on_a_disk_that_syncs_slowly_counts_the_delays_and_answers_all_the_same() {
    let mounted = Mounted::new();
    let redis = Redis::on(&mounted);
    let server = redis.start(&["--appendonly", "yes", "--appendfsync", "everysec"]);
    assert_eq!(redis.set(0..10, 10).0, 10);
    mounted
        .rule("slow", json!({"match": {"ops": ["fsync"], "path": "/**"}, "fault": {"kind": "latency", "delay": "4s"}}));
    let until = Instant::now() + Duration::from_secs(12);
    while redis.info("aof_delayed_fsync") == "0" {
        assert!(Instant::now() < until, "no fsync was counted as delayed");
        assert_eq!(redis.ask("SET key 1").as_deref(), Some("+OK"), "no client sees an error");
        std::thread::sleep(Duration::from_millis(50));
    }
    logged(&redis.log, &["Asynchronous AOF fsync is taking too long"]);
    let slow = mounted.injections("slow");
    assert!(slow.iter().any(|event| event["delay_ns"] == 4_000_000_000_u64), "{slow:?}");
    mounted.reset();
    drop(server);
    mounted.end();
}
