//! Core dumps as systemd-coredump stores them. Hosts need not have systemd: these tests are for the systemd guest of the
//! lab (`tools/lab test --systemd`), one after the other.
//!
//! The core directory is bind-mounted from a small data filesystem, as `scylla_coredump_setup --dump-to-raiddir` does it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use crate::crashes::{Victim, await_core, check, core_of, crash, crash_many, names};
use crate::support::{Mounted, Said, eventually, executable, sh};

const CORES: &str = "/var/lib/systemd/coredump";
const DATA: &str = "/var/lib/scylla";
const UNIT: &str = "var-lib-systemd-coredump.mount";
const FALLBACK: &str = "cores/var-lib-systemd-coredump";

/// How the core directory is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Unit,
    Fstab,
    Bind,
    Nothing,
}

/// The guest with a data filesystem that can be filled, and an instance of ours.
struct Guest {
    mounted: Mounted,
    by: By,
}

impl Guest {
    fn new(by: By) -> Guest {
        Guest::on(Mounted::new(), by)
    }

    fn on(mounted: Mounted, by: By) -> Guest {
        let guest = Guest { mounted, by };
        let image = guest.mounted.aside("data").join("image");
        must(&format!(
            "truncate -s 96M {0}; mkfs.ext4 -q {0}; mkdir -p {DATA}; mount -o loop {0} {DATA}; mkdir {DATA}/coredump",
            image.display()
        ));
        configure("yes");
        guest.mount_cores(DATA);
        guest
    }

    fn mount_cores(&self, data: &str) {
        let bind = format!("{data}/coredump {CORES} none bind 0 0");
        let unit = format!(
            "[Unit]\\nConflicts=umount.target\\nDefaultDependencies=no\\n[Mount]\\nWhat={data}/coredump\\nWhere={CORES}\\n\
             Type=none\\nOptions=bind\\n[Install]\\nWantedBy=multi-user.target\\n"
        );
        match self.by {
            By::Unit => must(&format!(
                "printf '{unit}' > /etc/systemd/system/{UNIT}; systemctl daemon-reload; systemctl start {UNIT}"
            )),
            By::Fstab => must(&format!("echo '{bind}' >> /etc/fstab; systemctl daemon-reload; mount {CORES}")),
            By::Bind => must(&format!("mount --bind {data}/coredump {CORES}")),
            By::Nothing => return,
        };
        assert_eq!(shown(), Some(PathBuf::from("/coredump")));
    }

    /// Not one byte is left, for root either.
    fn fill(&self) {
        let most = format!("$(($(df --output=avail -B1 {DATA} | tail -n 1) - 1048576))");
        sh(&format!("fallocate -l {most} {DATA}/fill; dd if=/dev/zero of={DATA}/fill2 bs=4k"));
        assert_eq!(must(&format!("df --output=avail -B1 {DATA} | tail -n 1")).out.trim(), "0");
    }

    fn make_room(&self) {
        must(&format!("rm -f {DATA}/fill {DATA}/fill2"));
    }

    fn fallback(&self) -> PathBuf {
        self.mounted.state_dir().join(FALLBACK)
    }

    fn cli(&self, words: &[&str]) -> String {
        self.mounted.cli(&[&["coredump"], words].concat())
    }

    /// Starts a client that redirects while it runs, in a group of its own.
    fn client(&self, ttl: &str, command: &[&str]) -> Client {
        let words = ["coredump", "redirect", "--ttl", ttl, "--"];
        let mut client = Command::new(executable());
        client.args(words).args(command).process_group(0);
        client.env("NEMESISFS_RUNDIR", self.mounted.run_dir());
        Client(client.stderr(std::process::Stdio::null()).spawn().expect("the program runs"))
    }

    fn events(&self, action: &str) -> Vec<Value> {
        let mut events = self.mounted.events();
        events.retain(|event| event["event"] == "coredump" && event["action"] == action);
        events
    }

    fn end(self) {
        assert!(!self.fallback().exists(), "nothing of ours is left: {:?}", names(&self.fallback()));
        self.clear();
        self.mounted.end();
    }

    /// The guest as it was.
    fn clear(&self) {
        sh(&format!(
            "set +e; while umount {CORES}; do :; done; rm -f /etc/systemd/system/{UNIT} /etc/systemd/coredump.conf
             : > /etc/fstab; umount {DATA}; rm -f {CORES}/*"
        ));
        if matches!(self.by, By::Unit | By::Fstab) {
            sh("systemctl daemon-reload");
        }
    }
}

/// A client, with what it has started.
struct Client(std::process::Child);

impl Drop for Client {
    fn drop(&mut self) {
        let _ = (killpg(Pid::from_raw(self.0.id() as i32), Signal::SIGKILL), self.0.wait());
    }
}

/// What a test that failed has left.
struct Cleared<'g>(&'g Guest);

impl Drop for Cleared<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", sh("grep coredump /proc/self/mountinfo; journalctl -n 40 --no-pager").out);
            self.0.clear();
        }
    }
}

fn must(script: &str) -> Said {
    let said = sh(script);
    assert_eq!(said.code, 0, "{script}\n{said:?}");
    said
}

/// Which directory of its filesystem is seen at the core directory, if it is a mountpoint.
fn shown() -> Option<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut lines = table.lines().rev().map(|line| line.split(' ').collect::<Vec<_>>());
    lines.find(|words| words[4] == CORES).map(|words| words[3].into())
}

fn mounts() -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().filter(|line| line.split(' ').nth(4) == Some(CORES)).count()
}

fn list() -> Vec<Value> {
    let said = sh("coredumpctl --no-pager --json=short list");
    serde_json::from_str(&said.out).unwrap_or_default()
}

/// What coredumpctl says of the core of a process: `present`, `missing`, `none`.
fn known(pid: u32) -> Option<String> {
    let entry = list().into_iter().find(|entry| entry["pid"] == pid)?;
    entry["corefile"].as_str().map(ToOwned::to_owned)
}

fn all_known(pids: &[u32]) {
    let present: Vec<Value> = list().into_iter().filter(|entry| entry["corefile"] == "present").collect();
    assert!(pids.iter().all(|pid| present.iter().any(|entry| entry["pid"] == *pid)), "{present:?}");
}

fn await_known(pid: u32) -> String {
    let mut word = None;
    eventually("coredumpctl knows the core", || {
        word = known(pid);
        word.is_some()
    });
    word.unwrap_or_default()
}

/// Without traces of programs, which under emulation take longer than all else.
fn configure(compress: &str) {
    let text = format!("[Coredump]\nStorage=external\nProcessSizeMax=0\nCompress={compress}\n");
    fs::write("/etc/systemd/coredump.conf", text).expect("its configuration");
}

/// Most are stored as they are, a few compressed.
fn crashes(count: usize, compressed: usize) -> Vec<u32> {
    configure("no");
    let mut pids = crash_many(Path::new("/"), count - compressed, 9);
    eventually("all are stored", || pids.iter().all(|pid| core_of(Path::new(CORES), *pid).is_some()));
    configure("yes");
    pids.extend(crash_many(Path::new("/"), compressed, compressed));
    pids
}

fn twenty_crashes() -> Vec<u32> {
    crashes(20, 3)
}

/// Where time is short, twenty are enough on one of the two disks.
fn twenty_crashes_or_some() -> Vec<u32> {
    if std::env::var_os("NEMESISFS_LAB_SHORT").is_some() { crashes(6, 1) } else { twenty_crashes() }
}

/// Every core is there and whole. Compressed ones by what coredumpctl gives out, which of this version gives out no
/// others.
fn all_whole(dir: &Path, pids: &[u32]) {
    let out = std::env::temp_dir().join("dumped");
    for pid in pids {
        let core = await_core(dir, *pid);
        if core.extension().is_some_and(|extension| extension == "zst") {
            let dump = format!("coredumpctl -q -o {} dump {pid}", out.display());
            eventually("coredumpctl dumps it", || sh(&dump).code == 0);
            assert_eq!(check(&out, *pid), Ok(()));
        } else {
            assert_eq!(check(&core, *pid), Ok(()));
        }
    }
}

fn crash_one() -> u32 {
    crash(Path::new("/"), Signal::SIGSEGV, 1)
}

fn in_data() -> PathBuf {
    Path::new(DATA).join("coredump")
}

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn without_redirection_a_crash_on_a_full_disk_leaves_no_core() {
    let guest = Guest::new(By::Bind);
    let cleared = Cleared(&guest);
    guest.fill();
    let pid = crash(Path::new("/"), Signal::SIGABRT, 4);
    assert_eq!(await_known(pid), "none");
    assert_eq!(core_of(Path::new(CORES), pid), None);
    let list: Value = serde_json::from_str(&guest.cli(&["list", "--json"])).unwrap();
    let listed = list["cores"].as_array().unwrap().iter().find(|core| core["pid"] == pid).unwrap();
    assert_eq!((&listed["place"], &listed["coredumpctl"]["corefile"]), (&"nowhere".into(), &"none".into()));
    drop(cleared);
    guest.end();
}

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn every_core_of_twenty_crashes_on_a_full_disk_is_whole_and_comes_home() {
    let guest = Guest::new(By::Unit);
    let cleared = Cleared(&guest);
    assert!(guest.cli(&["status"]).contains(&format!("mounted by {UNIT}")));
    guest.cli(&["redirect", "--fills", DATA]);
    guest.fill();
    let pids = twenty_crashes();
    all_whole(&guest.fallback(), &pids);
    guest.make_room();
    let said = guest.cli(&["restore"]);
    assert_eq!(said.matches("brought home: ").count(), 20, "{said}");
    assert_eq!((shown(), mounts()), (Some("/coredump".into()), 1));
    assert!(pids.iter().all(|pid| core_of(&in_data(), *pid).is_some()));
    all_known(&pids);
    all_whole(Path::new(CORES), &pids[15..]);
    await_core(&in_data(), crash_one());
    assert_eq!(must(&format!("systemctl is-active {UNIT}")).out.trim(), "active");
    drop(cleared);
    guest.end();
}

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn every_core_of_twenty_crashes_on_a_disk_that_seems_full_is_whole_and_comes_home() {
    let guest = Guest::new(By::Nothing);
    let cleared = Cleared(&guest);
    let mnt = guest.mounted.mountpoint.display().to_string();
    must(&format!("mkdir {mnt}/coredump; mount --bind {mnt}/coredump {CORES}"));
    let home = guest.mounted.backing.join("coredump");
    guest.cli(&["redirect", "--fills", &mnt]);
    guest.mounted.cli(&["space", "virtual", "--free", "0"]);
    let pids = twenty_crashes_or_some();
    all_whole(&guest.fallback(), &pids);
    guest.mounted.cli(&["space", "clear"]);
    guest.cli(&["restore"]);
    assert!(pids.iter().all(|pid| core_of(&home, *pid).is_some()));
    assert_eq!(mounts(), 1);
    all_known(&pids);
    await_core(&home, crash_one());
    drop(cleared);
    guest.end();
}

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn a_line_of_fstab_is_found_and_left_as_it_is() {
    let guest = Guest::new(By::Fstab);
    let cleared = Cleared(&guest);
    assert!(guest.cli(&["status"]).contains("mounted by fstab"));
    guest.cli(&["redirect"]);
    guest.fill();
    let pid = crash_one();
    all_whole(&guest.fallback(), &[pid]);
    guest.make_room();
    // Twice entered, twice given back.
    guest.cli(&["redirect"]);
    guest.cli(&["restore"]);
    guest.cli(&["restore"]);
    assert_eq!((shown(), mounts()), (Some("/coredump".into()), 1));
    assert_eq!(must(&format!("systemctl is-active {UNIT}")).out.trim(), "active");
    await_core(&in_data(), crash_one());
    drop(cleared);
    guest.end();
}

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn a_unit_that_is_not_mounted_hides_no_core_when_the_next_crash_starts_it() {
    let guest = Guest::new(By::Unit);
    let cleared = Cleared(&guest);
    must(&format!("systemctl stop {UNIT}"));
    assert_eq!(mounts(), 0);
    guest.cli(&["redirect"]);
    let pid = crash_one();
    await_core(&guest.fallback(), pid);
    let said = guest.cli(&["restore"]);
    assert!(said.contains("stays: ") && names(Path::new(CORES)).is_empty(), "{said}");
    let next = crash_one();
    await_core(&in_data(), next);
    await_core(&in_data(), pid);
    assert_eq!(mounts(), 1);
    eventually("nothing of ours is left", || !guest.fallback().exists());
    drop(cleared);
    guest.end();
}

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn a_unit_that_is_started_again_does_not_end_the_redirection() {
    let guest = Guest::new(By::Unit);
    let cleared = Cleared(&guest);
    guest.cli(&["redirect"]);
    must(&format!("systemctl restart {UNIT}"));
    eventually("it is redirected again", || guest.events("redirected").len() == 2);
    assert_eq!(guest.events("lost").len(), 1);
    await_core(&guest.fallback(), crash_one());
    guest.cli(&["restore"]);
    assert_eq!((shown(), mounts()), (Some("/coredump".into()), 1));
    drop(cleared);
    guest.end();
}

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn without_a_mount_nothing_is_done_and_none_is_made() {
    let guest = Guest::new(By::Nothing);
    let cleared = Cleared(&guest);
    // The fallback of a test is on the disk of the lab; usually both are on that of the root.
    let to = "/var/lib/nemesisfs-fallback";
    let said = guest.cli(&["redirect", "--to", to]);
    assert!(said.contains("stay where they go"), "{said}");
    let pid = crash_one();
    await_core(Path::new(CORES), pid);
    guest.cli(&["restore"]);
    assert!(mounts() == 0 && !Path::new(to).exists());
    drop(cleared);
    guest.end();
}

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn a_slow_core_in_flight_is_waited_for_at_both_switches() {
    let guest = Guest::new(By::Bind);
    let cleared = Cleared(&guest);
    let slow = || {
        let victim = Victim::new(Path::new("/"), 24);
        victim.kill(Signal::SIGABRT);
        eventually("its core is being written", || guest.cli(&["status"]).contains("being written"));
        victim
    };
    let before = slow();
    guest.cli(&["redirect"]);
    let pid = before.crashed(Signal::SIGABRT);
    assert!(core_of(&guest.fallback(), pid).is_none() && guest.events("waiting").len() == 1);
    let meanwhile = slow();
    guest.cli(&["restore"]);
    assert_eq!(guest.events("waiting").len(), 2);
    all_whole(Path::new(CORES), &[pid, meanwhile.crashed(Signal::SIGABRT)]);
    assert_eq!(mounts(), 1);
    drop(cleared);
    guest.end();
}

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn what_a_killed_client_and_a_killed_daemon_leave_is_restored() {
    let mut guest = Guest::new(By::Bind);
    let client = guest.client("2s", &["sleep", "100"]);
    eventually("the client has redirected", || mounts() == 2);
    kill(Pid::from_raw(client.0.id() as i32), Signal::SIGKILL).expect("a signal");
    eventually("its lease has ended", || mounts() == 1);
    guest.cli(&["redirect", "--for", "10s"]);
    guest.fill();
    let pid = crash_one();
    await_core(&guest.fallback(), pid);
    guest.mounted.kill();
    guest.make_room();
    guest.mounted.mount_again();
    eventually("the next daemon has restored", || mounts() == 1);
    let cleared = Cleared(&guest);
    all_whole(&in_data(), &[pid]);
    await_core(&in_data(), crash_one());
    drop(cleared);
    guest.end();
}

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn a_busy_mount_and_an_error_in_the_middle_end_with_the_mount_of_before() {
    let guest = Guest::new(By::Bind);
    let cleared = Cleared(&guest);
    // The command that runs meanwhile fails, and stays in the core directory.
    let script = format!("cd {CORES}; sleep 100 & exit 9");
    let mut client = guest.client("30s", &["sh", "-c", &script]);
    assert_eq!(client.0.wait().expect("its end").code(), Some(9));
    assert_eq!((mounts(), guest.events("busy").len()), (1, 1));
    await_core(&in_data(), crash_one());
    drop(cleared);
    guest.end();
}

#[test]
#[ignore = "needs systemd as PID 1: tools/lab test --systemd"]
fn for_a_daemon_in_a_container_the_agent_on_the_node_acts() {
    let guest = Guest::on(Mounted::started_by(&["unshare", "--mount", "--propagation", "slave"]), By::Bind);
    let cleared = Cleared(&guest);
    let redirect = ["coredump", "redirect", "--timeout"];
    let said = guest.mounted.try_cli(&[&redirect[..], &["1s"]].concat());
    assert!(said.code == 1 && said.err.contains("no agent has acknowledged"), "{said:?}");
    assert_eq!(mounts(), 1);
    let mut agent = Command::new(executable());
    agent.args(["coredump", "agent", "-H"]).arg(&guest.mounted.socket).process_group(0);
    agent.env("NEMESISFS_STATEDIR", guest.mounted.aside("agent")).stdout(std::process::Stdio::null());
    let agent = Client(agent.spawn().expect("the program runs"));
    guest.mounted.cli(&[&redirect[..], &["20s"]].concat());
    guest.fill();
    let pid = crash_one();
    all_whole(&guest.mounted.aside("agent").join(FALLBACK), &[pid]);
    guest.make_room();
    guest.cli(&["restore"]);
    assert_eq!(mounts(), 1);
    all_whole(&in_data(), &[pid]);
    drop((agent, cleared));
    guest.end();
}
