//! What goes on when the daemon dies, when somebody takes the mount away, and when the disk hangs.
//!
//! Clients that may hang or die are Python programs of their own; how they ended is theirs to tell.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::mount::MsFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{Mounted, Response, Said, eventually, executable, is_alive, is_mounted, request, within};

/// Within this a hung system has failed, and a busy one has not.
const SOON: Duration = Duration::from_secs(30);
/// For what must not come, and would come at once.
const HELD: Duration = Duration::from_millis(400);

fn program(run_dir: &Path, words: &[&str]) -> Said {
    let mut command = Command::new(executable());
    command.args(words).env("NEMESISFS_RUNDIR", run_dir).env_remove("NEMESISFS_HOST").output().unwrap().into()
}

/// Starts clients; ended with the test at the latest.
struct Clients(Child);

impl Clients {
    fn start(dir: &Path, script: &str, arguments: &[&Path]) -> Clients {
        let script = format!("import signal; signal.alarm(60)\n{script}");
        let mut command = Command::new("python3");
        command.args(["-c", &script]).args(arguments).current_dir(dir).stdout(Stdio::piped()).stderr(Stdio::piped());
        Clients(command.spawn().unwrap())
    }

    fn end(mut self, limit: Duration) -> String {
        let until = Instant::now() + limit;
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "after {limit:?} the clients still run");
            std::thread::sleep(Duration::from_millis(10));
        }
        let (mut out, mut err) = (String::new(), String::new());
        self.0.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert!(self.0.wait().unwrap().success(), "{out}\n{err}");
        out
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Eight programs, each at something of its own, until an error ends it. Writers tell elsewhere what was acknowledged.
const LOAD: &str = r#"
import fcntl, mmap, os, sys, time
aside = sys.argv[1]
def write(n):
    fd, told = os.open(f'w{n}', os.O_RDWR | os.O_CREAT), os.open(f'{aside}/w{n}', os.O_RDWR | os.O_CREAT)
    for i in range(1 << 30):
        os.pwrite(fd, b'%07d\n' % i, i % 100000 * 8)
        os.pwrite(told, b'%07d\n' % i, 0)
def append(n):
    fd = os.open(f'w{n}', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    told = os.open(f'{aside}/w{n}', os.O_RDWR | os.O_CREAT)
    for i in range(1 << 30): os.write(fd, b'%07d\n' % i), os.pwrite(told, b'%07d\n' % i, 0)
def read(n):
    fd = os.open('data', os.O_RDONLY)
    while True: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED), os.pread(fd, 1 << 20, 0)
def map(n):
    fd = os.open('mapped', os.O_RDWR)
    m = mmap.mmap(fd, 1 << 20)
    while True: m[n * 4096] = 1; m.flush()
def create(n):
    while True: os.mkdir(f'd{n}'), os.rename(f'd{n}', f'e{n}'), os.listdir(), os.rmdir(f'e{n}')
def lock(n):
    fd = os.open('lock', os.O_RDWR | os.O_CREAT)
    while True: fcntl.lockf(fd, fcntl.LOCK_EX), os.stat('data'), os.fsync(fd), fcntl.lockf(fd, fcntl.LOCK_UN)
def hang(n): os.fsync(os.open('hung', os.O_RDWR))
"#;

#[test]
fn killed_under_load_each_call_ends_and_what_was_acknowledged_is_there() {
    let mounted = Mounted::new();
    let aside = mounted.aside("told");
    for name in ["data", "mapped", "hung"] {
        std::fs::write(mounted.path(name), vec![1; 1 << 20]).unwrap();
    }
    mounted.rule("hang", json!({"match": {"ops": ["fsync"], "path": "/hung"}, "fault": {"kind": "stall"}}));
    let script = r#"
children = {}
for n, act in enumerate([write, append, read, map, create, lock, lock, hang]):
    pid = os.fork()
    if pid == 0:
        try: act(n)
        except OSError as error: os._exit(error.errno)
        os._exit(0)
    children[pid] = act.__name__
print('started', flush=True)
for _ in children:
    pid, status = os.wait()
    print(children[pid], os.waitstatus_to_exitcode(status), flush=True)
"#;
    let clients = Clients::start(&mounted.mountpoint, &format!("{LOAD}{script}"), &[&aside]);
    let told =
        |n: u32| -> Option<usize> { std::fs::read_to_string(aside.join(format!("w{n}"))).ok()?.get(..7)?.parse().ok() };
    eventually("the fsync hangs", || mounted.health("parked") == 1);
    eventually("both write", || (0..2).all(|n| told(n).is_some_and(|count| count > 10)));
    std::thread::sleep(Duration::from_millis(500));
    kill(Pid::from_raw(mounted.pid as i32), Signal::SIGKILL).unwrap();
    let said = clients.end(SOON);
    for line in said.lines().skip(1) {
        let status = line.split(' ').next_back().unwrap().parse::<i32>().unwrap();
        // A store into a mapping is told by a signal.
        let ways = [libc::ECONNABORTED, libc::ENOTCONN, -libc::SIGBUS, libc::EIO];
        assert!(ways.contains(&status), "{said}");
    }
    assert_eq!(said.lines().count(), 9, "{said}");
    let there = |n: u32| std::fs::read_to_string(mounted.backing.join(format!("w{n}"))).unwrap();
    let (written, appended) = (told(0).expect("a count"), told(1).expect("a count"));
    assert!(written > 10 && appended > 10, "{written} {appended}");
    assert_eq!(there(0).lines().nth(written % 100_000), Some(format!("{written:07}").as_str()));
    let records = there(1);
    assert!(records.lines().take(appended + 1).enumerate().all(|(i, record)| record == format!("{i:07}")));
    assert!(records.lines().count() > appended);
    the_dead_mount_is_replaced(&mounted);
}

/// What is there after a daemon was killed: nothing that could pass for an empty database, and the next mount works.
fn the_dead_mount_is_replaced(mounted: &Mounted) {
    for path in [mounted.mountpoint.clone(), mounted.path("data"), mounted.path("new")] {
        // The kernel believes for a second what it was told last of a directory.
        let gone = || std::fs::metadata(&path).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN));
        eventually(&format!("ENOTCONN of {}", path.display()), gone);
    }
    assert_eq!(std::fs::read_dir(&mounted.mountpoint).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    assert_eq!(File::create(mounted.path("new")).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    let (backing, mountpoint) = (mounted.backing.display().to_string(), mounted.mountpoint.display().to_string());
    let said = program(&mounted.run_dir(), &["mount", &backing, &mountpoint, "--instance", "t"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(std::fs::read(mounted.path("data")).unwrap(), vec![1; 1 << 20]);
    for _ in 0..2 {
        assert_eq!(program(&mounted.run_dir(), &["umount", &mountpoint]).code, 0, "also the second time");
    }
    assert!(!is_mounted(&mounted.mountpoint));
    assert_eq!(std::fs::read_dir(&mounted.mountpoint).unwrap().count(), 0, "below it nothing was changed");
}

#[test]
fn the_systems_lazy_umount_under_load_ends_the_daemon_after_the_last_close() {
    let mounted = Mounted::new();
    let aside = mounted.aside("told");
    std::fs::write(mounted.path("mapped"), vec![1; 1 << 20]).unwrap();
    let script = r#"
import mmap, os, sys, time
aside = sys.argv[1]
def client(n):
    fd = os.open(f'f{n}', os.O_RDWR | os.O_CREAT | os.O_APPEND)
    m = mmap.mmap(os.open('mapped', os.O_RDWR), 1 << 20)
    i = 0
    while not os.path.exists(aside + '/stop'):
        os.write(fd, b'%07d\n' % i)
        assert os.pread(fd, 8, i * 8) == b'%07d\n' % i
        m[n * 4096] = i % 256
        if i % 50 == 0: os.fsync(fd), m.flush()
        i += 1
    open(f'{aside}/{n}', 'w').write(str(i))
children = []
for n in range(4):
    pid = os.fork()
    if pid == 0:
        client(n)
        os._exit(0)
    children.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
"#;
    // Started there, they leave with their working directory.
    let clients = Clients::start(&mounted.mountpoint, script, &[&aside]);
    eventually("four clients", || mounted.health("open_files") == 8);
    let status = Command::new("umount").arg("-l").arg(&mounted.mountpoint).status().unwrap();
    assert!(status.success());
    assert!(!is_mounted(&mounted.mountpoint));
    let size = || std::fs::metadata(mounted.backing.join("f0")).unwrap().len();
    let before = size();
    eventually("they go on", || size() > before + 100);
    assert!(is_alive(mounted.pid));
    std::fs::write(aside.join("stop"), "").unwrap();
    clients.end(SOON);
    for n in 0..4 {
        let count: u64 = std::fs::read_to_string(aside.join(n.to_string())).unwrap().parse().unwrap();
        assert_eq!(std::fs::metadata(mounted.backing.join(format!("f{n}"))).unwrap().len(), count * 8);
    }
    eventually("the daemon's end", || !is_alive(mounted.pid));
    assert!(!mounted.socket.exists());
    assert!(!mounted.log_text().contains("panic"), "{}", mounted.log_text());
    let again = program(&mounted.run_dir(), &["umount", mounted.mountpoint.to_str().unwrap()]);
    assert_eq!(again.code, 0, "what is not mounted any more is success: {again:?}");
}

/// A second way to a directory, which goes with the test.
struct Bound(PathBuf);

impl Bound {
    fn new(from: &Path, to: PathBuf) -> Bound {
        let none: Option<&str> = None;
        nix::mount::mount(Some(from), &to, none, MsFlags::MS_BIND, none).unwrap();
        Bound(to)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.0);
    }
}

#[test]
fn a_second_start_is_refused_by_whatever_way_it_comes_and_the_first_is_untouched() {
    let mounted = Mounted::new();
    let device = std::fs::metadata(&mounted.mountpoint).unwrap().dev();
    let mut open = File::create(mounted.path("open")).unwrap();
    let bound = Bound::new(&mounted.backing, mounted.aside("bound"));
    let bound_mount = Bound::new(&mounted.mountpoint, mounted.aside("bound-mount"));
    let link = mounted.aside("links").join("link");
    std::os::unix::fs::symlink(&mounted.backing, &link).unwrap();
    let link_mount = mounted.aside("links").join("link-mount");
    std::os::unix::fs::symlink(&mounted.mountpoint, &link_mount).unwrap();
    let (free, other) = (mounted.aside("free"), mounted.aside("other"));
    let (backing, mountpoint) = (mounted.backing.clone(), mounted.mountpoint.clone());
    for run in [mounted.run_dir(), mounted.aside("another-run")] {
        for (from, to) in [
            (&backing, &mountpoint),
            (&backing, &free),
            (&backing, &backing),
            (&bound.0, &free),
            (&bound.0, &bound.0),
            (&link, &free),
            (&other, &mountpoint),
            (&other, &link_mount),
            (&mountpoint, &mountpoint),
        ] {
            for instance in ["t", "second"] {
                let words = ["mount", from.to_str().unwrap(), to.to_str().unwrap(), "--instance", instance];
                let began = Instant::now();
                let said = program(&run, &words);
                let what = format!("{words:?} in {}: {said:?}", run.display());
                if said.code == 0 {
                    program(&run, &["umount", to.to_str().unwrap()]);
                }
                assert!(said.code == 1 && said.err.contains("error: ") && said.err.contains("hint: "), "{what}");
                // One that hangs would do so for ever.
                assert!(began.elapsed() < Duration::from_secs(3), "{:?} for {what}", began.elapsed());
                assert!(said.out.is_empty(), "{what}");
                assert_eq!(std::fs::metadata(&mountpoint).unwrap().dev(), device, "{what}");
                assert!(!is_mounted(&free) && !is_mounted(&backing), "{what}");
            }
        }
    }
    open.write_all(b"untouched").unwrap();
    assert_eq!(std::fs::read(mounted.backing.join("open")).unwrap(), b"untouched");
    assert_eq!(mounted.http("GET", "/v1/version", None).status, 200);
    drop((open, bound, bound_mount));
    mounted.end();
}

/// Nobody has anything open there, and the other run directory does not know the first.
#[test]
fn a_second_start_in_place_over_a_mount_of_ours_is_refused() {
    let mounted = Mounted::new();
    let (run, there) = (mounted.aside("another-run"), mounted.mountpoint.display().to_string());
    let said = program(&run, &["mount", &there, &there]);
    if said.code == 0 {
        program(&run, &["umount", &there]);
    }
    assert!(said.code == 1 && said.err.contains("is mounted by us: instance t"), "{said:?}");
    mounted.end();
}

/// A mount over another one, which is its disk and can be made to hang.
struct OnSlowDisk {
    disk: Option<Mounted>,
    mountpoint: PathBuf,
}

impl OnSlowDisk {
    fn new() -> OnSlowDisk {
        OnSlowDisk::with(&[])
    }

    /// With more options of `mount` for the one above.
    fn with(options: &[&str]) -> OnSlowDisk {
        let disk = Mounted::new();
        let mountpoint = disk.aside("upper");
        let words = ["mount", "--instance", "upper", disk.mountpoint.to_str().unwrap(), mountpoint.to_str().unwrap()];
        let said = program(&disk.run_dir(), &[&words, options].concat());
        assert_eq!(said.code, 0, "{said:?}");
        OnSlowDisk { disk: Some(disk), mountpoint }
    }

    fn disk(&self) -> &Mounted {
        self.disk.as_ref().unwrap()
    }

    fn path(&self, name: String) -> PathBuf {
        self.mountpoint.join(name)
    }

    fn socket(&self) -> PathBuf {
        self.disk().run_dir().join("upper.sock")
    }

    /// One request to the mount above, which must not hang.
    fn say(&self, method: &'static str, path: &'static str, body: Value) -> Response {
        let socket = self.socket();
        let body = (method != "GET").then_some(body);
        goes_on(path, move || request(&socket, method, path, body.as_ref()))
    }

    fn end(mut self) {
        let disk = self.disk.take().unwrap();
        disk.cli(&["umount", "--instance", "upper"]);
        let log = std::fs::read_to_string(disk.run_dir().join("upper.log")).unwrap();
        assert!(!log.contains("panic"), "{log}");
        disk.end();
    }
}

impl Drop for OnSlowDisk {
    fn drop(&mut self) {
        if let Some(disk) = &self.disk {
            // Whatever hangs there hangs in the lower one, which lets go first.
            disk.reset();
            disk.try_cli(&["umount", "--instance", "upper", "--force"]);
        }
    }
}

#[test]
fn readers_are_not_exhausted_by_a_disk_that_hangs() {
    for each in [8, 16] {
        let slow = OnSlowDisk::new();
        let (below, disk) = (slow.disk().backing.clone(), slow.disk());
        std::fs::create_dir(below.join("free")).unwrap();
        std::fs::write(below.join("free/f"), vec![7; 1 << 20]).unwrap();
        for sort in ["fsync", "read", "write", "lookup", "open"] {
            for n in 0..each {
                // Each in a directory of its own: the kernel keeps a directory's lock for a lookup.
                std::fs::create_dir_all(below.join(format!("slow/{sort}{n}"))).unwrap();
                std::fs::write(below.join(format!("slow/{sort}{n}/f")), vec![3; 1 << 16]).unwrap();
            }
        }
        let at = |sort: &str, n: usize| slow.path(format!("slow/{sort}{n}/f"));
        let opened = |sort: &str| -> Vec<File> {
            (0..each).map(|n| OpenOptions::new().read(true).write(true).open(at(sort, n)).unwrap()).collect()
        };
        let (syncs, reads, writes) = (opened("fsync"), opened("read"), opened("write"));
        for n in 0..each {
            std::fs::metadata(at("open", n)).unwrap();
            std::fs::metadata(at("lookup", n).parent().unwrap()).unwrap();
        }
        for (op, path) in [
            ("fsync", "/slow/fsync*/f"),
            ("read", "/slow/read*/f"),
            ("write", "/slow/write*/f"),
            ("lookup", "/slow/lookup*/f"),
            ("open", "/slow/open*/f"),
        ] {
            disk.rule(op, json!({"match": {"ops": [op], "path": path}, "fault": {"kind": "stall"}}));
        }
        let mut hung: Vec<JoinHandle<std::io::Result<()>>> = Vec::new();
        hung.extend(syncs.into_iter().map(|file| std::thread::spawn(move || file.sync_all())));
        hung.extend(reads.into_iter().map(|file| std::thread::spawn(move || file.read_exact_at(&mut [0; 4096], 0))));
        hung.extend(writes.into_iter().map(|file| std::thread::spawn(move || file.write_all_at(&[9; 4096], 0))));
        for n in 0..each {
            let (lookup, open) = (at("lookup", n), at("open", n));
            hung.push(std::thread::spawn(move || std::fs::metadata(lookup).map(drop)));
            hung.push(std::thread::spawn(move || File::open(open).map(drop)));
        }
        let parked = || disk.health("parked").as_u64().unwrap() as usize;
        eventually(&format!("all hang, of {each}"), || parked() >= 5 * each);
        everything_else_goes_on(&slow);
        assert!(parked() >= 5 * each && hung.iter().all(|one| !one.is_finished()), "they hang still");
        disk.reset();
        for one in hung {
            let ended = within(SOON, move || one.join().unwrap());
            ended.expect("released, it ends").expect("and well");
        }
        assert_eq!(std::fs::read(below.join("slow/write0/f")).unwrap()[..4096], [9; 4096]);
        slow.end();
    }
}

/// The client of a request that hangs, until it is dropped.
fn asking(socket: &Path, method: &str, path: &str, body: &Value) -> UnixStream {
    let (mut client, body) = (UnixStream::connect(socket).unwrap(), body.to_string());
    let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}", body.len());
    client.write_all(format!("{head}\r\nContent-Type: application/json\r\n\r\n{body}").as_bytes()).unwrap();
    client
}

#[test]
fn a_reset_resets_also_what_is_still_being_counted() {
    let slow = OnSlowDisk::new();
    let (disk, socket) = (slow.disk(), slow.socket());
    std::fs::write(disk.backing.join("f"), vec![7; 1 << 16]).unwrap();
    let full = json!({"virtual": {"used": "100%"}});
    let hang = json!({"match": {"ops": ["readdir"]}, "fault": {"kind": "stall"}});
    let parked = |count: u64| eventually("it counts", || disk.health("parked").as_u64() == Some(count));
    disk.rule("hang", hang.clone());
    let counting = {
        let (socket, full) = (socket.clone(), full.clone());
        std::thread::spawn(move || request(&socket, "PUT", "/v1/space", Some(&full)))
    };
    parked(1);
    assert_eq!(slow.say("GET", "/v1/space", json!({})).body["virtual"], Value::Null);
    assert_eq!(slow.say("POST", "/v1/reset", json!({})).status, 200);
    disk.reset();
    let answer = within(SOON, || counting.join().unwrap()).expect("the count ends");
    assert_eq!((answer.status, &answer.body["code"]), (409, &json!("conflict")), "{answer:?}");
    let made = slow.path("made".into());
    std::fs::write(&made, [5; 100_000]).expect("nothing is full");
    // Of a client that has gone away nothing comes either.
    disk.rule("hang", hang);
    let client = asking(&socket, "PUT", "/v1/space", &full);
    parked(1);
    drop(client);
    std::thread::sleep(HELD);
    disk.reset();
    parked(0);
    std::thread::sleep(HELD);
    std::fs::write(&made, [5; 200_000]).expect("nothing is full");
    assert_eq!(slow.say("GET", "/v1/space", json!({})).body["virtual"], Value::Null);
    slow.end();
}

#[test]
fn looks_at_a_disk_that_hangs_leave_helpers_for_the_others() {
    let slow = OnSlowDisk::new();
    let (disk, socket) = (slow.disk(), slow.socket());
    disk.rule("hang", json!({"match": {"ops": ["statfs"]}, "fault": {"kind": "stall"}}));
    let clients: Vec<UnixStream> = (0..600).map(|_| asking(&socket, "GET", "/v1/space", &Value::Null)).collect();
    eventually("they hang", || disk.health("parked").as_u64() >= Some(16));
    std::thread::sleep(HELD);
    let rule = json!({"match": {"ops": ["read"]}, "fault": {"kind": "error", "errno": "EIO"}});
    assert_eq!(slow.say("PUT", "/v1/rules/r", rule).body["pending"], json!([]));
    assert_eq!(slow.say("POST", "/v1/reset", json!({})).status, 200);
    let shown = slow.say("GET", "/v1/space", json!({}));
    assert_eq!((shown.status, &shown.body["statfs"]), (200, &Value::Null));
    drop(clients);
    slow.end();
}

/// What is under way in the disk is waited for, then files that are passed through are looked at, then the kernel has to
/// forget what a parked request holds: all of it in two seconds.
#[test]
fn a_change_is_answered_in_time_whatever_hangs() {
    let slow = OnSlowDisk::with(&["--passthrough", "/none"]);
    let disk = slow.disk();
    for name in ["big", "held"] {
        std::fs::write(disk.backing.join(name), vec![7; 1 << 16]).unwrap();
    }
    let on = |path: &str, fault: Value| json!({"match": {"ops": ["read"], "path": path}, "fault": fault});
    disk.rule("hang", on("/big", json!({"kind": "stall"})));
    slow.say("PUT", "/v1/rules/hang", on("/held", json!({"kind": "stall"})));
    let hung = ["big", "held"].map(|name| {
        let path = slow.path(name.into());
        std::thread::spawn(move || std::fs::read(path))
    });
    eventually("one hangs in the disk", || disk.health("parked").as_u64() >= Some(1));
    let parked = || slow.say("GET", "/v1/health", json!({})).body["parked"].as_u64();
    eventually("one is parked", || parked() >= Some(1));
    let changed = |errno: &str| {
        let start = Instant::now();
        let answer = slow.say("PUT", "/v1/rules/e", on("/held", json!({"kind": "error", "errno": errno})));
        assert_eq!(answer.body["pending"].as_array().map(Vec::len), Some(1), "{answer:?}");
        start.elapsed()
    };
    // The machine may stand still in one of them.
    let took = ["EIO", "ENOMEM", "EINTR"].map(changed).into_iter().min().unwrap();
    slow.say("POST", "/v1/reset", json!({}));
    disk.reset();
    for one in hung {
        let _ = within(SOON, move || one.join().unwrap()).expect("it goes on");
    }
    assert!(took < Duration::from_millis(3500), "{took:?}");
    slow.end();
}

/// While a change waits for what is under way, the new rule may hold something already.
#[test]
fn a_rule_that_takes_the_place_of_another_keeps_what_it_holds_itself() {
    let slow = OnSlowDisk::with(&["--passthrough", "/none"]);
    let disk = slow.disk();
    std::fs::write(disk.backing.join("big"), vec![7; 1 << 16]).unwrap();
    let file = File::create(slow.path("f".into())).unwrap();
    let stall = |seed: u64| json!({"match": {"ops": ["write"]}, "trigger": {"seed": seed}, "fault": {"kind": "stall"}});
    slow.say("PUT", "/v1/rules/s", stall(1));
    disk.rule("hang", json!({"match": {"ops": ["read"], "path": "/big"}, "fault": {"kind": "stall"}}));
    let big = slow.path("big".into());
    let read = std::thread::spawn(move || std::fs::read(big));
    eventually("a read is under way", || disk.health("parked").as_u64() >= Some(1));
    let socket = slow.socket();
    let second = stall(2);
    let putting = std::thread::spawn(move || request(&socket, "PUT", "/v1/rules/s", Some(&second)));
    let new = || slow.say("GET", "/v1/rules/s", json!({})).body["trigger"]["seed"] == 2;
    eventually("the new rule is in force", new);
    let write = std::thread::spawn(move || file.write_all_at(b"x", 0));
    let parked = || slow.say("GET", "/v1/health", json!({})).body["parked"].as_u64();
    eventually("it holds a write", || parked() == Some(1));
    within(SOON, || putting.join().unwrap()).expect("the change is answered");
    std::thread::sleep(HELD);
    let held = (parked(), write.is_finished());
    slow.say("POST", "/v1/reset", json!({}));
    assert_eq!(held, (Some(1), false));
    disk.reset();
    within(SOON, move || (read.join().unwrap().unwrap(), write.join().unwrap().unwrap())).expect("all go on");
    slow.end();
}

/// Does something, which must not hang.
fn goes_on<T: Send + 'static>(what: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    within(SOON, act).unwrap_or_else(|| panic!("{what} goes on"))
}

fn everything_else_goes_on(slow: &OnSlowDisk) {
    for round in 0..5 {
        let (dir, made) = (slow.path("free".into()), slow.path(format!("free/made{round}")));
        let f = dir.join("f");
        let opened = goes_on("open", move || File::open(f).unwrap());
        goes_on("read", move || opened.read_exact_at(&mut vec![0; 1 << 20], 0).unwrap());
        let path = made.clone();
        let file = goes_on("create", move || File::create(path).unwrap());
        let file = goes_on("write", move || file.write_all_at(&[5; 4096], 0).map(|()| file).unwrap());
        goes_on("fsync", move || file.sync_all().unwrap());
        assert_eq!(goes_on("stat", move || std::fs::metadata(made).unwrap().len()), 4096);
        assert_eq!(goes_on("readdir", move || std::fs::read_dir(dir).unwrap().count()), round + 2);
        let run = slow.disk().run_dir();
        let said = goes_on("the socket", move || program(&run, &["rule", "list", "-H", "upper"]));
        assert_eq!(said.code, 0, "{said:?}");
    }
}
