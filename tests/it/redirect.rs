//! Coredumps on a host without systemd: `kernel.core_pattern` names a file or a name, the core directory is bind-mounted
//! from a disk that is full, and real programs crash.
//!
//! `kernel.core_pattern` is one for the whole machine: one test at a time, and a program of its own sets it back, however
//! the tests end.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::crashes::{Victim, check, core_of, crash, crash_many, names};
use crate::support::{Mounted, eventually, executable, is_mounted, sh};

const PATTERN: &str = "/proc/sys/kernel/core_pattern";

static ALONE: Mutex<()> = Mutex::new(());

/// The machine's `core_pattern`, for the length of a test.
struct Pattern {
    before: String,
    /// Sets it back when its input ends, which it does when this process does.
    restorer: Child,
    _alone: MutexGuard<'static, ()>,
}

impl Pattern {
    fn set(value: &str) -> Pattern {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = pattern();
        let mut restorer = Command::new("setsid");
        restorer.args(["sh", "-c", "trap '' INT TERM HUP; read _; printf '%s' \"$1\" >\"$2\"", "sh", &before, PATTERN]);
        let restorer = restorer.stdin(Stdio::piped()).spawn().expect("sh");
        fs::write(PATTERN, value).expect("root");
        Pattern { before, restorer, _alone: alone }
    }
}

impl Drop for Pattern {
    fn drop(&mut self) {
        drop(self.restorer.stdin.take());
        let _ = self.restorer.wait();
        assert!(pattern() == self.before || std::thread::panicking());
    }
}

fn pattern() -> String {
    fs::read_to_string(PATTERN).expect("core_pattern").trim_end().to_string()
}

/// What lies below the core directory.
enum On {
    /// A small disk.
    Disk,
    /// The mount of the instance.
    Mount,
    /// The backing directory of the instance, on a small disk of its own.
    Backing,
}

/// A core directory that is bind-mounted from elsewhere. Its mounts go before all else.
struct Mounts {
    cores: PathBuf,
    data: PathBuf,
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for path in [&self.cores, &self.data] {
            while is_mounted(path) && nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH).is_ok() {}
        }
    }
}

/// A core directory on what can be full, an instance, and a pattern that leads there.
struct Host {
    mounts: Mounts,
    mounted: Mounted,
    _pattern: Pattern,
}

impl Host {
    fn new(on: On) -> Host {
        let mounted = match on {
            On::Backing => Mounted::on_own_disk(128 << 20, &["mkfs.ext4", "-q"]),
            On::Disk | On::Mount => Mounted::new(),
        };
        let cores = mounted.aside("cores");
        let data = match on {
            On::Disk => mounted.aside("data"),
            On::Mount => mounted.mountpoint.clone(),
            On::Backing => mounted.backing.clone(),
        };
        let disk = match on {
            On::Disk => format!(
                "truncate -s 128M {image}; mkfs.ext4 -q {image}; mount -o loop {image} {data}",
                image = mounted.aside("image").join("ext4").display(),
                data = data.display()
            ),
            On::Mount | On::Backing => String::new(),
        };
        let bind = format!("mkdir -m 1777 {0}/cores; mount --bind {0}/cores {1}", data.display(), cores.display());
        let made = sh(&format!("{disk}\n{bind}"));
        let pattern = Pattern::set(&format!("{}/core.%p", cores.display()));
        let data = if matches!(on, On::Disk) { data } else { mounted.aside("data") };
        let host = Host { mounts: Mounts { cores, data }, mounted, _pattern: pattern };
        assert_eq!(made.code, 0, "{made:?}");
        host
    }

    fn cli(&self, words: &[&str]) -> String {
        self.mounted.cli(&[&["coredump"], words].concat())
    }

    fn fill(&self) {
        let data = self.mounts.data.display();
        sh(&format!("fallocate -l 1G {data}/fill; dd if=/dev/zero of={data}/fill2 bs=4k"));
    }

    fn make_room(&self) {
        for name in ["fill", "fill2"] {
            let _ = fs::remove_file(self.mounts.data.join(name));
        }
    }

    /// Where cores go meanwhile: the one directory that we have made.
    fn fallback(&self) -> PathBuf {
        let dirs = fs::read_dir(self.mounted.state_dir().join("cores")).expect("cores").flatten();
        dirs.map(|dir| dir.path()).next().expect("a directory")
    }

    /// How many mounts lie on the core directory.
    fn mounts(&self) -> usize {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
        table.lines().filter(|line| line.split(' ').nth(4) == self.mounts.cores.to_str()).count()
    }

    fn crash(&self) -> u32 {
        crash(&self.mounted.aside("work"), Signal::SIGSEGV, 1)
    }

    /// A core that was written where cores are at home.
    fn next_goes_home(&self) {
        let pid = self.crash();
        let core = core_of(&self.mounts.data.join("cores"), pid).expect("its core");
        assert_eq!(check(&core, pid), Ok(()));
        assert_eq!(self.mounts(), 1);
    }

    fn events(&self, action: &str) -> Vec<Value> {
        let mut events = self.mounted.events();
        events.retain(|event| event["event"] == "coredump" && event["action"] == action);
        events
    }

    fn client(&self, words: &[&str]) -> Client {
        let mut client = Command::new(executable());
        client.args(["coredump"]).args(words).process_group(0).env("NEMESISFS_RUNDIR", self.mounted.run_dir());
        Client(client.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program runs"))
    }

    /// After what a daemon ends by itself: the directory goes a moment after the mount.
    fn end_soon(self) {
        eventually("nothing of ours is left", || !self.mounted.state_dir().join("cores").exists());
        self.end();
    }

    fn end(self) {
        let left = self.mounted.state_dir().join("cores");
        assert!(!left.exists(), "nothing of ours is left: {:?}", names(&left));
        let Host { mounts, mounted, _pattern } = self;
        drop(mounts);
        mounted.end();
    }
}

/// A client, with what it has started.
struct Client(Child);

impl Client {
    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = (killpg(self.pid(), Signal::SIGKILL), self.0.wait());
    }
}

#[test]
fn without_redirection_a_crash_on_a_full_disk_leaves_no_whole_core() {
    let host = Host::new(On::Disk);
    host.fill();
    let pid = host.crash();
    let core = core_of(&host.mounts.cores, pid);
    assert!(core.is_none_or(|core| check(&core, pid).is_err()));
    host.end();
}

#[test]
fn every_core_of_twenty_crashes_on_a_full_disk_is_whole_and_comes_home() {
    let host = Host::new(On::Disk);
    host.cli(&["redirect"]);
    host.fill();
    let pids = crash_many(&host.mounted.aside("work"), 20, 5);
    for pid in &pids {
        let core = core_of(&host.fallback(), *pid).expect("its core");
        assert_eq!(check(&core, *pid), Ok(()));
    }
    let list: Value = serde_json::from_str(&host.cli(&["list", "--json"])).expect("JSON");
    let places = list["cores"].as_array().expect("a list").iter().map(|core| core["place"].clone());
    assert_eq!(places.collect::<Vec<_>>(), vec![json!("away"); 20]);
    host.make_room();
    assert_eq!(host.cli(&["restore"]).matches("brought home: ").count(), 20);
    for pid in &pids {
        let core = core_of(&host.mounts.data.join("cores"), *pid).expect("its core, at home");
        assert_eq!(check(&core, *pid), Ok(()));
    }
    host.next_goes_home();
    host.end();
}

#[test]
fn every_core_of_twenty_crashes_on_a_disk_that_seems_full_is_whole_and_comes_home() {
    let host = Host::new(On::Mount);
    host.cli(&["redirect", "--fills", &host.mounted.mountpoint.display().to_string()]);
    host.mounted.cli(&["space", "virtual", "--free", "0"]);
    let pids = crash_many(&host.mounted.aside("work"), 20, 5);
    for pid in &pids {
        let core = core_of(&host.fallback(), *pid).expect("its core");
        assert_eq!(check(&core, *pid), Ok(()));
    }
    host.mounted.cli(&["space", "clear"]);
    host.cli(&["restore"]);
    for pid in &pids {
        let core = core_of(&host.mounted.backing.join("cores"), *pid).expect("its core, at home");
        assert_eq!(check(&core, *pid), Ok(()));
    }
    host.end();
}

#[test]
fn cores_that_do_not_fit_at_home_stay_listed_and_come_home_when_there_is_room() {
    let host = Host::new(On::Disk);
    host.cli(&["redirect"]);
    host.fill();
    let pid = host.crash();
    let away = core_of(&host.fallback(), pid).expect("its core");
    let said = host.cli(&["restore"]);
    assert!(said.contains(&format!("stays: {}", away.display())), "{said}");
    assert!(host.cli(&["list"]).contains(&format!("{}", away.display())));
    assert!(host.cli(&["status"]).contains("cores lie in "));
    host.make_room();
    eventually("it is at home", || core_of(&host.mounts.cores, pid).is_some());
    eventually("it is brought home", || !away.exists());
    eventually("nothing is left", || !host.mounted.state_dir().join("cores").exists());
    host.end_soon();
}

#[test]
fn a_core_in_flight_is_waited_for_at_both_switches() {
    let host = Host::new(On::Mount);
    // Each write of a core takes a while.
    let slow = json!({"match": {"ops": ["write"], "path": "/cores/**"}, "fault": {"kind": "latency", "delay": "2ms"}});
    host.mounted.rule("slow", slow);
    let victim = Victim::new(&host.mounted.aside("work"), 8);
    victim.kill(Signal::SIGQUIT);
    eventually("its core is being written", || host.cli(&["status"]).contains("being written: the core of perl"));
    host.cli(&["redirect"]);
    let pid = victim.crashed(Signal::SIGQUIT);
    assert_eq!(host.events("waiting").len(), 1);
    let core = core_of(&host.mounted.backing.join("cores"), pid).expect("where it began");
    assert_eq!(check(&core, pid), Ok(()));
    // One that is not done in time: nothing is switched.
    host.cli(&["restore"]);
    let victim = Victim::new(&host.mounted.aside("work"), 8);
    victim.kill(Signal::SIGABRT);
    eventually("its core is being written", || host.cli(&["status"]).contains("being written: the core of perl"));
    let said = host.mounted.try_cli(&["coredump", "redirect", "--patience", "100ms"]);
    assert!(said.code == 1 && said.err.contains("is being written"), "{said:?}");
    assert_eq!(host.mounts(), 1);
    host.mounted.reset();
    victim.crashed(Signal::SIGABRT);
    host.end();
}

#[test]
fn a_relative_pattern_is_changed_for_the_time_and_its_cores_stay_listed() {
    let host = Host::new(On::Disk);
    fs::write(PATTERN, "core").expect("root");
    host.cli(&["redirect"]);
    assert!(pattern().ends_with("/cores/working-directories/core.%P.%t"), "{}", pattern());
    let pid = host.crash();
    let core = core_of(&host.fallback(), pid).expect("its core");
    assert_eq!(check(&core, pid), Ok(()));
    host.cli(&["restore"]);
    assert_eq!(pattern(), "core");
    assert!(host.cli(&["list"]).contains(&core.display().to_string()));
    fs::remove_file(core).expect("the core");
    // Who takes it away has nothing to tell us.
    host.cli(&["redirect"]);
    host.cli(&["restore"]);
    host.end();
}

#[test]
fn a_program_that_takes_cores_is_not_replaced() {
    let host = Host::new(On::Disk);
    fs::write(PATTERN, "|/usr/share/apport/apport -p%p").expect("root");
    let said = host.mounted.try_cli(&["coredump", "redirect"]);
    assert!(said.code == 5 && said.err.contains("/usr/share/apport/apport"), "{said:?}");
    let said = host.mounted.http("GET", "/v1/coredump", None);
    assert_eq!((said.status, &said.body["found"]["taker"]), (200, &json!("program")));
    assert!(said.body["would"]["refused"].as_str().is_some_and(|why| why.contains("apport")), "{said:?}");
    host.end();
}

#[test]
fn a_command_has_the_lease_for_its_time_whichever_way_it_ends() {
    let host = Host::new(On::Disk);
    let run = |script: &str| host.mounted.try_cli(&["coredump", "redirect", "--", "sh", "-c", script]);
    let inside = format!("grep -c ' {} ' /proc/self/mountinfo; exit 7", host.mounts.cores.display());
    let said = run(&inside);
    assert_eq!((said.code, said.out.as_str()), (7, "2\n"), "{said:?}");
    assert_eq!(host.mounts(), 1);
    assert_eq!(run("kill -KILL $$").code, 137);
    assert_eq!(host.mounted.try_cli(&["coredump", "redirect", "--", "/nowhere/at-all"]).code, 127);
    assert_eq!(host.mounts(), 1);
    let mark = host.mounted.aside("work").join("trapped");
    let script = format!("trap 'exit 3' TERM; : > {}; while :; do sleep 0.1; done", mark.display());
    let mut client = host.client(&["redirect", "--", "sh", "-c", &script]);
    eventually("the command runs", || mark.exists());
    assert_eq!(host.mounts(), 2);
    kill(client.pid(), Signal::SIGTERM).expect("a signal");
    assert_eq!(client.0.wait().expect("its end").code(), Some(3));
    assert_eq!(host.mounts(), 1);
    host.end();
}

#[test]
fn coredump_to_root_exception_handling() {
    let host = Host::new(On::Disk);
    let work = host.mounted.aside("work");
    // An error in the middle, with the core directory in use: the core of it is whole, and at home.
    let script = format!(
        "cd {}; sleep 20 >/dev/null 2>&1 & cd {}; ulimit -c unlimited; perl -e '$|=1; print $$; kill SEGV => $$'; exec perl -e 'die'",
        host.mounts.cores.display(),
        work.display()
    );
    let said = host.mounted.try_cli(&["coredump", "redirect", "--", "bash", "-c", &script]);
    assert_eq!(said.code, 255, "{said:?}");
    let pid = said.out.trim().parse().expect("a pid");
    let core = core_of(&host.mounts.data.join("cores"), pid).expect("its core");
    assert_eq!(check(&core, pid), Ok(()));
    assert!(host.events("busy").len() == 1 && leases(&host).is_empty());
    host.next_goes_home();
    // One that cannot be redirected runs nothing.
    let said = host.mounted.try_cli(&["coredump", "redirect", "--fills", "/", "--", "touch", "ran"]);
    assert!(said.code == 1 && !work.join("ran").exists(), "{said:?}");
    assert_eq!(host.mounts(), 1);
    host.end();
}

#[test]
fn the_lease_of_a_command_outlives_the_daemon_that_gave_it_and_is_given_back_to_another() {
    let mut host = Host::new(On::Disk);
    let mut client = host.client(&["redirect", "--ttl", "1m", "--", "sleep", "5"]);
    eventually("it is redirected", || host.mounts() == 2);
    eventually("a daemon that watches", || watcher(&host).is_some());
    let began = Instant::now();
    host.mounted.kill();
    assert_eq!(client.0.wait().expect("its end").code(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(8) && host.mounts() == 1, "{:?}", began.elapsed());
    host.mounted.mount_again();
    host.next_goes_home();
    host.end();
}

#[test]
fn a_lone_keeper_that_is_killed_under_a_command_leaves_no_lease() {
    let mut host = Host::new(On::Disk);
    host.mounted.kill();
    let mut client = host.client(&["redirect", "--ttl", "5s", "--", "sleep", "12"]);
    eventually("it is redirected", || host.mounts() == 2);
    eventually("a daemon that watches", || watcher(&host).is_some());
    kill(watcher(&host).expect("a daemon"), Signal::SIGKILL).expect("a signal");
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(host.mounts(), 2, "another one has renewed it");
    assert_eq!(client.0.wait().expect("its end").code(), Some(0));
    assert_eq!(host.mounts(), 1);
    host.mounted.mount_again();
    assert!(leases(&host).is_empty());
    host.end_soon();
}

#[test]
fn a_redirection_that_others_undo_is_told_and_done_again() {
    let host = Host::new(On::Disk);
    host.cli(&["redirect"]);
    nix::mount::umount(&host.mounts.cores).expect("ours");
    eventually("it is redirected again", || host.mounts() == 2 && host.events("redirected").len() == 2);
    assert_eq!(host.events("lost").len(), 1);
    let pid = host.crash();
    assert_eq!(check(&core_of(&host.fallback(), pid).expect("its core"), pid), Ok(()));
    host.cli(&["restore"]);
    host.next_goes_home();
    host.end_soon();
}

#[test]
fn cores_leave_a_part_of_the_disk_free_when_they_come_home() {
    let host = Host::new(On::Disk);
    host.cli(&["redirect"]);
    let pid = host.crash();
    // A tenth of 128 MiB is free: enough for the core, and less than the 15 percent that are to stay free.
    let data = host.mounts.data.display();
    sh(&format!("fallocate -l $(($(df --output=avail -B1 {data} | tail -n 1) - 13000000)) {data}/fill"));
    let said = host.cli(&["restore"]);
    assert!(said.contains("are to stay free") && said.contains("stays: "), "{said}");
    let list = host.cli(&["list"]);
    assert!(list.contains("cores lie in ") && list.contains("are to stay free"), "{list}");
    host.make_room();
    eventually("it is at home", || core_of(&host.mounts.cores, pid).is_some());
    eventually("nothing is left", || !host.mounted.state_dir().join("cores").exists());
    host.end();
}

#[test]
fn the_lease_of_a_command_is_renewed_and_ends_soon_after_a_killed_client() {
    let host = Host::new(On::Disk);
    let client = host.client(&["redirect", "--ttl", "4s", "--", "sleep", "100"]);
    eventually("it is redirected", || host.mounts() == 2);
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(host.mounts(), 2, "it is renewed");
    kill(client.pid(), Signal::SIGKILL).expect("a signal");
    let killed = Instant::now();
    eventually("it is restored", || host.mounts() == 1);
    // Without an end of its own it would last for ever.
    assert!(killed.elapsed() < Duration::from_secs(8), "{:?}", killed.elapsed());
    eventually("it is told", || host.events("expired").len() == 1);
    host.next_goes_home();
    host.end_soon();
}

#[test]
fn what_a_killed_daemon_has_redirected_another_one_restores_at_its_time() {
    let mut host = Host::new(On::Disk);
    host.cli(&["redirect", "--for", "6s"]);
    eventually("a daemon that watches", || watcher(&host).is_some());
    let pid = host.crash();
    host.mounted.kill();
    assert_eq!(host.mounts(), 2);
    eventually("it is restored", || host.mounts() == 1);
    eventually("its core is at home", || core_of(&host.mounts.data.join("cores"), pid).is_some());
    host.mounted.mount_again();
    host.next_goes_home();
    host.end_soon();
}

/// The daemon without a mount.
fn watcher(host: &Host) -> Option<Pid> {
    let state: Value = serde_json::from_slice(&fs::read(host.mounted.run_dir().join("host.json")).ok()?).ok()?;
    Some(Pid::from_raw(state["pid"].as_i64()? as i32))
}

#[test]
fn when_all_daemons_are_killed_another_one_is_started_that_restores() {
    let mut host = Host::new(On::Disk);
    host.cli(&["redirect", "--for", "6s"]);
    eventually("a daemon that watches", || watcher(&host).is_some());
    let pid = host.crash();
    host.mounted.kill();
    kill(watcher(&host).expect("a daemon that watches"), Signal::SIGKILL).expect("a signal");
    eventually("it is restored", || host.mounts() == 1);
    eventually("its core is at home", || core_of(&host.mounts.data.join("cores"), pid).is_some());
    host.mounted.mount_again();
    host.next_goes_home();
    host.end_soon();
}

#[test]
fn when_nobody_is_left_the_next_daemon_restores() {
    let mut host = Host::new(On::Disk);
    host.cli(&["redirect", "--for", "6s"]);
    let began = Instant::now();
    eventually("a daemon that watches", || watcher(&host).is_some());
    let pid = host.crash();
    host.mounted.kill();
    let watcher = watcher(&host).expect("a daemon that watches");
    let status = fs::read_to_string(format!("/proc/{watcher}/status")).expect("its status");
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("a parent").trim();
    for pid in [parent.parse().expect("a pid"), watcher.as_raw()] {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("a signal");
    }
    std::thread::sleep(Duration::from_millis(6500).saturating_sub(began.elapsed()));
    assert_eq!(host.mounts(), 2);
    host.mounted.mount_again();
    eventually("it is restored", || host.mounts() == 1);
    eventually("its core is at home", || core_of(&host.mounts.data.join("cores"), pid).is_some());
    host.next_goes_home();
    eventually("nothing is left", || !host.mounted.state_dir().join("cores").exists());
    host.end();
}

#[test]
fn leases_over_http_have_names_ends_and_places() {
    let host = Host::new(On::Disk);
    let lease = "/v1/coredump/leases/test-1";
    let http = |method: &str, path: &str, body: Value| host.mounted.http(method, path, Some(&body));
    assert_eq!(http("PUT", &format!("{lease}?renew=true"), json!({})).status, 404);
    let taken = http("PUT", lease, json!({"for": "1m", "owner": "me", "need": 0}));
    assert_eq!((taken.status, &taken.body["redirected"]), (201, &json!(true)), "{taken:?}");
    assert!(taken.body["commands"][0].as_str().is_some_and(|line| line.starts_with("mount --bind ")));
    let renewed = http("PUT", &format!("{lease}?renew=true"), json!({"for": "2m"}));
    let listed = host.mounted.http("GET", "/v1/coredump/leases", None).body;
    assert_eq!((&listed["leases"][0]["owner"], &listed["leases"][0]["need"]), (&json!("me"), &json!(0)));
    assert_eq!((renewed.status, &renewed.body["renewed"]), (200, &json!(true)));
    let shown = host.mounted.http("GET", lease, None);
    assert!(shown.body["remaining_ms"].as_u64().is_some_and(|ms| ms > 60_000), "{shown:?}");
    let status = host.mounted.http("GET", "/v1/coredump", None).body;
    assert_eq!((&status["redirected"], &status["found"]["mounted_by"]), (&json!(true), &json!("bind")));
    for (path, body, what) in [
        ("/v1/coredump/leases/a%20b", json!({}), "no name"),
        ("/v1/coredump/leases/a", json!({"for": "soon"}), "not a duration"),
        ("/v1/coredump/leases/a", json!({"to": "relative"}), "not an absolute path"),
        ("/v1/coredump/leases/a", json!({"need": "much"}), "not a size"),
        ("/v1/coredump/leases/a", json!({"on_low": "wran"}), "unknown word"),
        ("/v1/coredump/leases/a", json!({"fro": "1m"}), "fro"),
    ] {
        let said = http("PUT", path, body);
        assert!((400..500).contains(&said.status), "{said:?}");
        assert!(said.body["detail"].as_str().is_some_and(|detail| detail.contains(what)), "{said:?}");
    }
    let released = host.mounted.http("DELETE", lease, None);
    assert_eq!((released.status, &released.body["restored"]), (200, &json!(true)));
    assert_eq!(host.mounted.http("DELETE", lease, None).status, 204);
    assert_eq!(host.mounted.http("DELETE", "/v1/coredump/leases/a%20b", None).status, 204);
    assert_eq!(host.mounted.http("DELETE", "/v1/coredump/leases", None).status, 204);
    assert_eq!(host.mounted.http("GET", "/v1/coredump/leases", None).body["leases"], json!([]));
    assert!(host.cli(&["restore"]).contains("there was no such lease"));
    assert_eq!(host.mounted.http("GET", lease, None).status, 404);
    host.end();
}

#[test]
fn an_agent_does_what_the_daemon_may_not_and_without_one_the_caller_is_told() {
    let host = Host::new(On::Disk);
    let by_agent = ["coredump", "redirect", "--by", "agent", "--timeout"];
    let said = host.mounted.try_cli(&[&by_agent[..], &["300ms"]].concat());
    assert!(said.code == 1 && said.err.contains("no agent has acknowledged within 300ms"), "{said:?}");
    assert_eq!(host.mounts(), 1);
    assert_eq!(host.events("wanted")[0]["commands"][0], "nemesisfs coredump redirect --lease agent.cli --for '10m'");
    let state = host.mounted.aside("agent");
    let mut agent = Command::new(executable());
    agent.args(["coredump", "agent", "-H", &format!("unix://{}", host.mounted.socket.display())]);
    agent.env("NEMESISFS_STATEDIR", &state).process_group(0).stdout(Stdio::null());
    let agent = Client(agent.spawn().expect("the program runs"));
    host.mounted.cli(&[&by_agent[..], &["20s"]].concat());
    assert_eq!(host.mounts(), 2);
    let pid = host.crash();
    assert!(core_of(&host.mounts.cores, pid).is_some());
    // A renewal whose acknowledgement is late undoes nothing.
    let said = host.mounted.try_cli(&[&by_agent[..], &["1ms"]].concat());
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!((said.code, host.mounts()), (1, 2), "{said:?}");
    host.cli(&["restore"]);
    assert_eq!(host.mounts(), 1);
    assert!(core_of(&host.mounts.data.join("cores"), pid).is_some(), "the agent has brought it home");
    assert_eq!(host.events("acknowledged").len(), 2);
    drop(agent);
    host.end();
}

// Out-of-space and coredumps as one.

fn leases(host: &Host) -> Vec<String> {
    let body = host.mounted.http("GET", "/v1/coredump", None).body;
    let leases = body["leases"].as_array().expect("leases").clone();
    let mut names: Vec<String> =
        leases.iter().map(|lease| lease["name"].as_str().expect("a name").to_string()).collect();
    names.sort();
    names
}

/// The actions of the events about coredumps and space, in order.
fn story(host: &Host) -> Vec<String> {
    let events = host.mounted.events();
    let about = events.iter().filter(|event| event["event"] == "coredump" || event["event"] == "space");
    let word = |event: &Value| format!("{} {}", event["event"], event["action"]).replace('"', "");
    about.map(word).filter(|word| !word.ends_with(" step") && !word.ends_with(" low")).collect()
}

#[test]
fn a_full_disk_that_asks_for_it_has_coredumps_elsewhere_before_and_home_after() {
    let host = Host::new(On::Mount);
    host.mounted.cli(&["space", "virtual", "--free", "0", "--redirect-coredumps"]);
    assert_eq!(leases(&host), ["mount-t"]);
    let pids = crash_many(&host.mounted.aside("work"), 6, 3);
    let fallback = host.fallback();
    for pid in &pids {
        assert_eq!(check(&core_of(&fallback, *pid).expect("a core"), *pid), Ok(()));
    }
    host.mounted.cli(&["space", "clear"]);
    assert!(leases(&host).is_empty());
    let home = host.mounted.mountpoint.join("cores");
    eventually("the cores at home", || pids.iter().all(|pid| core_of(&home, *pid).is_some()));
    let story = story(&host);
    let at = |word: &str| story.iter().position(|other| other == word).unwrap_or_else(|| panic!("{word}: {story:?}"));
    assert!(at("coredump redirected") < at("space set"), "{story:?}");
    assert!(at("space cleared") < at("coredump restored"), "{story:?}");
    host.end_soon();
}

#[test]
fn a_rule_and_a_mode_hold_coredumps_elsewhere_for_as_long_as_they_are_armed() {
    let host = Host::new(On::Mount);
    let words = "rule add full --kind error --errno ENOSPC --op grow --redirect-coredumps --times 1";
    host.mounted.cli(&words.split(' ').collect::<Vec<_>>());
    assert_eq!(leases(&host), ["mount-t"]);
    // It fires, is exhausted, and wants nothing more.
    assert!(fs::write(host.mounted.mountpoint.join("file"), [0; 5000]).is_err());
    eventually("the lease's end", || leases(&host).is_empty());
    host.mounted.cli(&["rule", "disable", "full"]);
    host.mounted.cli(&["mode", "enospc", "--for", "6s", "--redirect-coredumps"]);
    assert_eq!(leases(&host), ["mount-t"]);
    eventually("the lease's end", || leases(&host).is_empty());
    // What is made and does not act wants nothing.
    let words = "rule add later --kind error --errno ENOSPC --op grow --redirect-coredumps --disabled";
    host.mounted.cli(&words.split(' ').collect::<Vec<_>>());
    assert!(leases(&host).is_empty());
    host.mounted.cli(&["rule", "enable", "later"]);
    assert_eq!(leases(&host), ["mount-t"]);
    host.mounted.cli(&["reset"]);
    assert!(leases(&host).is_empty());
    host.end_soon();
}

#[test]
fn what_several_want_is_held_until_the_last_of_them_ends_and_reset_all_ends_every_lease() {
    let host = Host::new(On::Mount);
    host.mounted.cli(&["mode", "enospc", "--redirect-coredumps"]);
    host.mounted.cli(&["space", "virtual", "--free", "0", "--redirect-coredumps"]);
    host.cli(&["redirect", "--lease", "mine", "--fills", &host.mounted.mountpoint.display().to_string()]);
    host.mounted.cli(&["mode", "allow_writes"]);
    assert_eq!(leases(&host), ["mine", "mount-t"]);
    host.mounted.cli(&["space", "clear"]);
    assert_eq!(leases(&host), ["mine"]);
    host.mounted.cli(&["reset"]);
    assert_eq!(leases(&host), ["mine"]);
    host.mounted.cli(&["reset", "--all"]);
    assert!(leases(&host).is_empty());
    assert!(!fallback_is_mounted(&host));
    host.end();
}

fn fallback_is_mounted(host: &Host) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let ours = host.mounted.state_dir().join("cores").display().to_string();
    table.lines().any(|line| line.contains(&ours))
}

#[test]
fn ballast_fills_a_disk_only_after_coredumps_have_left_it() {
    let host = Host::new(On::Backing);
    host.mounted.cli(&["space", "ballast", "--until-free", "0", "--redirect-coredumps"]);
    assert_eq!(leases(&host), ["mount-t"]);
    let pid = crash(&host.mounted.aside("work"), Signal::SIGABRT, 8);
    assert_eq!(check(&core_of(&host.fallback(), pid).expect("a core"), pid), Ok(()));
    let story = story(&host);
    let at = |word: &str| story.iter().position(|other| other == word).unwrap_or_else(|| panic!("{word}: {story:?}"));
    assert!(at("coredump redirected") < at("space filling"), "{story:?}");
    host.mounted.cli(&["space", "clear", "ballast"]);
    eventually("the core at home", || core_of(&host.mounted.backing.join("cores"), pid).is_some());
    host.end_soon();
}

#[test]
fn without_an_answer_of_the_agent_nothing_is_filled() {
    let host = Host::new(On::Mount);
    // A pipe to a program that is not systemd's cannot be redirected.
    fs::write(PATTERN, "|/bin/false %p").expect("root");
    let said = host.mounted.try_cli(&["space", "virtual", "--free", "0", "--redirect-coredumps"]);
    fs::write(PATTERN, format!("{}/core.%p", host.mounts.cores.display())).expect("root");
    assert_ne!(said.code, 0, "{said:?}");
    let space = host.mounted.http("GET", "/v1/space", None).body;
    assert!(space["virtual"].is_null(), "{space}");
    assert!(leases(&host).is_empty());
    host.end();
}

#[test]
fn the_lease_of_a_mount_goes_with_it_and_that_of_a_killed_one_with_the_next() {
    let mut host = Host::new(On::Backing);
    let ballast = ["space", "ballast", "--until-free", "64MiB", "--redirect-coredumps"];
    host.mounted.cli(&ballast);
    assert!(fallback_is_mounted(&host));
    let mountpoint = host.mounted.mountpoint.display().to_string();
    host.mounted.cli(&["umount", &mountpoint]);
    assert!(!fallback_is_mounted(&host));
    host.mounted.mount_again();
    host.mounted.cli(&ballast);
    host.mounted.kill();
    assert!(fallback_is_mounted(&host), "the disk is as full as it was");
    // The next one of its name removes the ballast, and wants it no longer.
    host.mounted.mount_again();
    eventually("it is given back", || leases(&host).is_empty() && !fallback_is_mounted(&host));
    host.end_soon();
}

#[test]
fn rules_that_a_mount_begins_with_have_coredumps_elsewhere_before_it_is_ready() {
    let host = Host::new(On::Mount);
    host.mounted.kill();
    let rules = host.mounted.aside("rules").join("rules.json");
    let rule = json!({"name": "full", "match": {"ops": ["grow"]}, "fault": {"kind": "error", "errno": "ENOSPC"},
        "redirect_coredumps": true});
    fs::write(&rules, json!({"rules": [rule]}).to_string()).expect("a file");
    let (mnt, backing) = (&host.mounted.mountpoint, &host.mounted.backing);
    let mut words = vec!["mount", "--instance", "t", "--rules"];
    let paths = [&rules, backing, mnt].map(|path| path.display().to_string());
    words.extend(paths.iter().map(String::as_str));
    let said = host.mounted.try_cli(&words);
    assert_eq!(said.code, 0, "{said:?}");
    // The bind mount of before leads to the dead mount, whose filesystem is another one: nothing is to be done for it.
    assert_eq!(leases(&host), ["mount-t"]);
    fs::write(PATTERN, "|/bin/false").expect("root");
    host.mounted.cli(&["umount", &paths[2]]);
    let said = host.mounted.try_cli(&words);
    assert!(said.code == 1 && said.err.contains("hands cores to /bin/false"), "{said:?}");
    assert!(!is_mounted(mnt), "what is refused leaves no mount");
}

#[test]
fn a_full_filesystem_of_the_state_does_not_keep_coredumps_from_coming_home() {
    let host = Host::new(On::Disk);
    let (state, elsewhere) = (host.mounted.state_dir(), host.mounted.aside("elsewhere"));
    let mounts = Mounts { cores: state.clone(), data: state.clone() };
    let made = sh(&format!("mkdir -p {0}; mount -t tmpfs -o size=256k tmpfs {0}", state.display()));
    assert_eq!(made.code, 0, "{made:?}");
    host.cli(&["redirect", "--to", &elsewhere.display().to_string()]);
    assert_eq!(host.mounts(), 2);
    sh(&format!("dd if=/dev/zero of={}/fill bs=1k", state.display()));
    assert!(fs::write(state.join("more"), [0; 4096]).is_err(), "it is full");
    host.cli(&["restore"]);
    assert_eq!(host.mounts(), 1);
    drop(mounts);
    host.end();
}
