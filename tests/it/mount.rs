//! The life of a mount: where it may be, how it begins and how it ends, from every state.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::{Mounted, Said, eventually, executable, executable_in, is_alive, is_mounted, within};

/// Runs the program on directories of a test's own.
fn program(run_dir: &Path, words: &[&str]) -> Said {
    let mut command = Command::new(executable());
    command.args(words).env("NEMESISFS_RUNDIR", run_dir).env_remove("NEMESISFS_HOST").output().unwrap().into()
}

fn signal(mounted: &Mounted, signal: Signal) {
    kill(Pid::from_raw(mounted.pid as i32), signal).unwrap();
}

#[test]
fn a_mount_shows_the_backing_directory_and_leaves_nothing() {
    let mounted = Mounted::new();
    std::fs::write(mounted.path("a"), "hello").unwrap();
    assert_eq!(std::fs::read_to_string(mounted.backing.join("a")).unwrap(), "hello");
    let (mountpoint, socket) = (mounted.mountpoint.clone(), mounted.socket.clone());
    let listed = mounted.cli(&["list"]);
    assert!(listed.contains("alive") && listed.contains(mountpoint.to_str().unwrap()), "{listed}");
    let pid = mounted.pid;
    mounted.end();
    assert!(!is_mounted(&mountpoint) && !socket.exists());
    eventually("the daemon's end", || !is_alive(pid));
}

#[test]
fn the_ready_line_is_stable() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for name in ["backing", "mnt"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    let said = program(dir.path(), &["mount", &path("backing"), &path("mnt"), "--instance", "n1"]);
    assert_eq!((said.code, said.err.as_str()), (0, ""));
    let words: Vec<&str> = said.out.trim_end().split(' ').map(|word| word.split('=').next().unwrap()).collect();
    assert_eq!(words, ["ready", "instance", "mount", "socket", "pid", "log"], "{said:?}");
    assert!(said.out.contains(&format!("socket={}", path("n1.sock"))), "{said:?}");
    assert_eq!(program(dir.path(), &["umount", &path("mnt")]).code, 0);
    assert_eq!(program(dir.path(), &["umount", &path("mnt")]).code, 0, "not mounted is success");
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "only the two directories and the log: {left:?}");
}

#[test]
fn in_place_the_directory_is_opened_before_it_is_covered() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("before"), "there").unwrap();
    let (run, data_text) = (dir.path().join("run"), data.display().to_string());
    assert_eq!(program(&run, &["mount", &data_text, &data_text]).code, 0);
    assert!(is_mounted(&data));
    assert_eq!(std::fs::read_to_string(data.join("before")).unwrap(), "there");
    std::fs::write(data.join("during"), "kept").unwrap();
    let again = program(&run, &["mount", &data_text, &data_text, "--instance", "again"]);
    assert_eq!(again.code, 1);
    assert!(again.err.contains("mounted by us"), "{again:?}");
    assert_eq!(program(&run, &["umount", &data_text]).code, 0);
    assert!(!is_mounted(&data));
    assert_eq!(std::fs::read_to_string(data.join("during")).unwrap(), "kept");
}

/// A data directory is often a filesystem of its own: ending our mount must leave that one alone.
#[test]
fn in_place_over_a_mounted_filesystem_only_our_own_mount_ends() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let none: Option<&str> = None;
    nix::mount::mount(Some("tmpfs"), &data, Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
    let device = std::fs::metadata(&data).unwrap().dev();
    let (run, text) = (dir.path().join("run"), data.display().to_string());
    for how in
        [&["umount", text.as_str()][..], &["umount", text.as_str(), "--lazy"], &["umount", text.as_str(), "--force"]]
    {
        assert_eq!(program(&run, &["mount", &text, &text]).code, 0);
        assert_ne!(std::fs::metadata(&data).unwrap().dev(), device);
        let said = program(&run, how);
        assert_eq!(said.code, 0, "{said:?}");
        assert_eq!(std::fs::metadata(&data).unwrap().dev(), device, "{how:?}");
    }
    nix::mount::umount(&data).unwrap();
}

#[test]
fn what_cannot_go_well_is_refused_with_its_reason() {
    let mounted = Mounted::new();
    let run = mounted.run_dir();
    let (backing, mountpoint) = (mounted.backing.display().to_string(), mounted.mountpoint.display().to_string());
    let other = mounted.aside("other").display().to_string();
    let inside = mounted.aside("other/inside").display().to_string();
    let free = mounted.aside("free").display().to_string();
    let busy = File::create(Path::new(&free).join("open")).unwrap();
    let nothing = format!("{other}/nothing");
    for (from, to, reason) in [
        (&other, &mountpoint, "mounted by us"),
        (&backing, &other, "served by instance"),
        (&other, &inside, "inside the backing directory"),
        (&other, &free, "busy"),
        (&nothing, &other, "No such file"),
        (&other, &nothing, "No such file"),
        (&other, &"/proc".to_string(), "busy"),
    ] {
        let start = Instant::now();
        let said = program(&run, &["mount", from, to, "--instance", "second"]);
        assert_eq!(said.code, 1, "{from} {to}: {said:?}");
        assert!(said.err.contains(reason) && said.err.contains("hint: "), "{from} {to}: {said:?}");
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
    let same_name = program(&run, &["mount", &other, &other, "--instance", "t"]);
    assert!(same_name.code == 1 && same_name.err.contains("running already"), "{same_name:?}");
    let socket = format!("{other}/s.sock");
    let below = program(&run, &["mount", &other, &other, "--instance", "second", "--socket", &socket]);
    assert!(below.code == 1 && below.err.contains("under the mountpoint"), "{below:?}");
    assert_eq!(program(&run, &["mount", &other, &other, "-o", "sude"]).code, 2);
    drop(busy);
    std::fs::write(mounted.path("a"), "the first is untouched").unwrap();
    mounted.end();
}

/// What is in the way of our socket is not ours to remove.
#[test]
fn a_socket_path_that_is_taken_is_left_alone() {
    let mounted = Mounted::new();
    let other = mounted.aside("other").display().to_string();
    let precious = mounted.run_dir().join("precious");
    std::fs::write(&precious, "precious").unwrap();
    for taken in [&precious, &mounted.socket] {
        let taken = taken.display().to_string();
        let words = ["mount", &other, &other, "--instance", "second", "--socket", &taken];
        let said = program(&mounted.run_dir(), &words);
        assert!(said.code == 1 && said.err.contains("socket"), "{said:?}");
    }
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "precious");
    assert_eq!(mounted.http("GET", "/v1/version", None).status, 200);
    mounted.end();
}

#[test]
fn a_name_that_is_not_utf8_is_refused_for_our_mountpoint_and_harmless_as_another() {
    use std::os::unix::ffi::OsStrExt;
    let mounted = Mounted::new();
    let odd = mounted.aside("other").join(std::ffi::OsStr::from_bytes(b"we ird\xff\n\\dir"));
    std::fs::create_dir(&odd).unwrap();
    let mut command = Command::new(executable());
    let refused: Said =
        command.arg("mount").args([&odd, &odd]).env("NEMESISFS_RUNDIR", mounted.run_dir()).output().unwrap().into();
    assert!(refused.code == 1 && refused.err.contains("UTF-8"), "{refused:?}");
    let none: Option<&str> = None;
    nix::mount::mount(Some("tmpfs"), &odd, Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
    let listed = mounted.try_cli(&["list"]);
    nix::mount::umount(&odd).unwrap();
    assert_eq!(listed.code, 0, "{listed:?}");
    mounted.end();
}

#[test]
fn a_symlink_is_no_way_around_the_one_instance_a_directory() {
    let mounted = Mounted::new();
    let link = mounted.aside("other").join("link");
    std::os::unix::fs::symlink(&mounted.backing, &link).unwrap();
    let (link, free) = (link.display().to_string(), mounted.aside("free").display().to_string());
    let second = program(&mounted.run_dir(), &["mount", &link, &free, "--instance", "second"]);
    assert!(second.code == 1 && second.err.contains("served by"), "{second:?}");
    mounted.end();
}

#[test]
fn a_symlink_to_a_mountpoint_serves_as_well_as_the_mountpoint_alive_or_dead() {
    let mounted = Mounted::new();
    let (run, links, backing) = (mounted.run_dir(), mounted.aside("links"), mounted.backing.display().to_string());
    std::os::unix::fs::symlink("../mnt", links.join("link")).unwrap();
    std::os::unix::fs::symlink("link", links.join("twice")).unwrap();
    mounted.kill();
    for name in ["link", "twice", "link/", "twice/."] {
        let link = links.join(name).display().to_string();
        let said = program(&run, &["mount", &backing, &link, "--instance", "t"]);
        assert_eq!(said.code, 0, "a dead mount is replaced through {name}: {said:?}");
        let again = program(&run, &["mount", &backing, &link]);
        assert!(again.code == 1 && again.err.contains("mounted by us"), "{again:?}");
        let said = program(&run, &["umount", &link]);
        assert!(said.code == 0 && !said.out.contains("not mounted"), "{name}: {said:?}");
        assert!(!is_mounted(&mounted.mountpoint), "{name}");
        assert!(program(&run, &["umount", &link]).out.contains("not mounted"), "{name}");
        let mut next = Command::new(executable());
        next.args(["mount", &backing, &link, "--instance", "t"]).env("NEMESISFS_RUNDIR", &run);
        let said: Said = next.output().unwrap().into();
        let pid = said.out.split_whitespace().find_map(|word| word.strip_prefix("pid=")).unwrap();
        kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
        eventually("its end", || !is_alive(pid.parse().unwrap()));
    }
    let link = links.join("twice").display().to_string();
    let said = program(&run, &["umount", &link]);
    assert!(said.code == 0 && !is_mounted(&mounted.mountpoint), "a dead mount is ended through a link: {said:?}");
}

#[test]
fn times_are_what_they_would_be_without_us() {
    let mounted = Mounted::new();
    let script = "import os,sys\n\
        p=sys.argv[1]+'/f'; open(p,'w').close()\n\
        for ns in (0,1,-1,-500_000_000,-1_000_000_001,2**40*10**6,-2**31*10**9):\n\
        \x20os.utime(p,ns=(ns,ns)); print(os.stat(p).st_mtime_ns)\n\
        os.utime(p,times=(-2**63,-2**63)); print(os.stat(p).st_mtime)";
    let times = |dir: &Path| {
        let said: Said = Command::new("python3").args(["-c", script]).arg(dir).output().unwrap().into();
        assert_eq!(said.code, 0, "{said:?}");
        said.out
    };
    assert_eq!(times(&mounted.mountpoint), times(&mounted.aside("bare")));
    mounted.end();
}

#[test]
fn a_busy_mount_is_not_ended_and_its_holders_are_named() {
    let mounted = Mounted::new();
    let open = File::create(mounted.path("f")).unwrap();
    let said = mounted.try_cli(&["umount", "--instance", "t"]);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains(&std::process::id().to_string()), "{said:?}");
    std::fs::write(mounted.path("g"), "it goes on").unwrap();
    // And it parks again, after the failed attempt had let everything go.
    mounted.rule("hang", json!({"match": {"path": "/g", "ops": ["write"]}, "fault": {"kind": "stall"}}));
    let path = mounted.path("g");
    let held = std::thread::spawn(move || std::fs::write(path, "x"));
    eventually("a parked write", || mounted.http("GET", "/v1/health", None).body["parked"] == 1);
    mounted.reset();
    held.join().unwrap().unwrap();
    drop(open);
    mounted.end();
}

#[test]
fn a_lazy_umount_ends_the_daemon_after_the_last_close() {
    let mounted = Mounted::new();
    let mut open = File::create(mounted.path("f")).unwrap();
    let mountpoint = mounted.mountpoint.clone();
    let pid = mounted.pid;
    let backing = mounted.backing.join("f");
    let lazy = std::thread::scope(|scope| {
        let lazy = scope.spawn(|| mounted.try_cli(&["umount", "--instance", "t", "--lazy"]));
        eventually("it is detached", || !is_mounted(&mountpoint));
        open.write_all(b"still served").unwrap();
        assert!(is_alive(pid));
        assert_eq!(std::fs::read(&backing).unwrap(), b"still served");
        drop(open);
        lazy.join().unwrap()
    });
    assert_eq!(lazy.code, 0, "{lazy:?}");
    eventually("the daemon's end", || !is_alive(pid));
}

#[test]
fn a_lazy_umount_returns_at_once_and_says_who_still_holds_it() {
    let mounted = Mounted::new();
    let mut open = File::create(mounted.path("f")).unwrap();
    let (run, place, own) = (mounted.run_dir(), mounted.mountpoint.display().to_string(), std::process::id());
    // The second time there is nothing left to be done.
    for words in [&["umount", "--instance", "t", "--lazy"][..], &["umount", &place], &["umount", &place, "--lazy"]] {
        let (run, owned) = (run.clone(), words.iter().map(ToString::to_string).collect::<Vec<_>>());
        let ended = within(Duration::from_secs(10), move || {
            program(&run, &owned.iter().map(String::as_str).collect::<Vec<_>>())
        });
        let said = ended.unwrap_or_else(|| panic!("{words:?} returns"));
        let names = said.out.contains("detached") && said.out.contains(&format!("pid {own} "));
        assert!(said.code == 0 && names, "{words:?}: {said:?}");
        assert!(!is_mounted(&mounted.mountpoint) && is_alive(mounted.pid), "{words:?}");
    }
    open.write_all(b"still served").unwrap();
    assert_eq!(std::fs::read(mounted.backing.join("f")).unwrap(), b"still served");
    for words in [&["list"][..], &["-H", mounted.socket.to_str().unwrap(), "list"]] {
        let listed = program(&run, words).out;
        assert!(listed.contains(" detached "), "{listed}");
    }
    drop(open);
    eventually("the daemon's end", || !is_alive(mounted.pid));
}

#[test]
fn where_one_is_detached_another_may_be_mounted_but_not_over_its_directory() {
    for how in ["force", "signal", "close"] {
        let mounted = Mounted::new();
        let open = File::create(mounted.path("f")).unwrap();
        assert_eq!(mounted.try_cli(&["umount", "--instance", "t", "--lazy"]).code, 0);
        let (run, own) = (mounted.run_dir(), format!("pid {} ", std::process::id()));
        let (place, other) = (mounted.mountpoint.display().to_string(), mounted.aside("other").display().to_string());
        let backing = mounted.backing.display().to_string();
        for words in [["mount", &backing, &place, "--instance", "new"], ["mount", &other, &place, "--instance", "t"]] {
            let said = program(&run, &words);
            let told = said.err.contains("detached") && said.err.contains(&own) && said.err.contains("hint: ");
            assert!(said.code == 1 && told, "{words:?}: {said:?}");
        }
        assert_eq!(program(&run, &["mount", &other, &place, "--instance", "new"]).code, 0);
        std::fs::write(mounted.path("g"), "of the new one").unwrap();
        match how {
            "force" => assert_eq!(program(&run, &["umount", "--instance", "t", "--force"]).code, 0),
            "signal" => signal(&mounted, Signal::SIGTERM),
            _ => assert_eq!(program(&run, &["umount", "--instance", "t"]).code, 0),
        }
        if how != "force" {
            std::thread::sleep(Duration::from_millis(500));
            drop(open);
        }
        eventually("the old daemon's end", || !is_alive(mounted.pid));
        let listed = program(&run, &["list"]).out;
        assert!(listed.contains(" alive ") && !listed.contains(" detached "), "{how}: {listed}");
        assert_eq!(std::fs::read(mounted.path("g")).unwrap(), b"of the new one", "{how}");
        assert_eq!(program(&run, &["umount", &place]).code, 0);
        assert!(!is_mounted(&mounted.mountpoint));
    }
}

#[test]
fn umount_by_path_ends_the_one_that_is_mounted_there_and_not_a_detached_one() {
    let mounted = Mounted::new();
    let mut open = File::create(mounted.path("f")).unwrap();
    assert_eq!(mounted.try_cli(&["umount", "--instance", "t", "--lazy"]).code, 0);
    let (run, place) = (mounted.run_dir(), mounted.mountpoint.display().to_string());
    let other = mounted.aside("other").display().to_string();
    assert_eq!(program(&run, &["mount", &other, &place, "--instance", "z"]).code, 0);
    let said = program(&run, &["umount", &place]);
    assert!(said.code == 0 && !said.out.contains("detached"), "{said:?}");
    assert!(!is_mounted(&mounted.mountpoint) && is_alive(mounted.pid));
    open.write_all(b"still served").unwrap();
    drop(open);
    eventually("the daemon's end", || !is_alive(mounted.pid));
}

#[test]
fn signals_end_it_cleanly_also_with_parked_requests_and_open_files() {
    for which in [Signal::SIGTERM, Signal::SIGINT] {
        let mounted = Mounted::new();
        let open = File::create(mounted.path("f")).unwrap();
        mounted.rule("hang", json!({"match": {"ops": ["fsync"]}, "fault": {"kind": "stall"}}));
        let held = std::thread::spawn(move || open.sync_all());
        eventually("a parked fsync", || mounted.http("GET", "/v1/health", None).body["parked"] == 1);
        signal(&mounted, which);
        held.join().unwrap().unwrap();
        eventually("the daemon's end", || !is_alive(mounted.pid));
        assert!(!is_mounted(&mounted.mountpoint) && !mounted.socket.exists());
        assert!(mounted.log_text().contains("the mount has ended"), "{}", mounted.log_text());
    }
}

#[test]
fn after_a_signal_a_mount_in_use_is_cut_within_ten_seconds() {
    let mounted = Mounted::new();
    let open = File::create(mounted.path("f")).unwrap();
    let told = Instant::now();
    signal(&mounted, Signal::SIGTERM);
    eventually("it is detached", || !is_mounted(&mounted.mountpoint));
    eventually("the daemon's end", || !is_alive(mounted.pid));
    // Ten seconds, and some for a machine that is busy.
    assert!(told.elapsed() < Duration::from_secs(25), "{:?}", told.elapsed());
    drop(open);
}

/// Killed, the daemon leaves a dead mount, so that the directory below cannot pass for an empty database.
#[test]
fn a_killed_daemon_loses_nothing_and_the_next_mount_cleans_up() {
    let mounted = Mounted::new();
    std::fs::write(mounted.path("a"), "acknowledged").unwrap();
    signal(&mounted, Signal::SIGKILL);
    eventually("its end", || !is_alive(mounted.pid));
    // A request that was on its way fails with the connection; from then on there is none.
    eventually("a dead mount", || {
        std::fs::metadata(mounted.path("a")).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN))
    });
    assert_eq!(std::fs::read(mounted.backing.join("a")).unwrap(), b"acknowledged");
    let listed = program(&mounted.run_dir(), &["list"]).out;
    assert!(listed.contains("dead") || listed.contains("stale"), "{listed}");
    let (backing, mountpoint) = (mounted.backing.display().to_string(), mounted.mountpoint.display().to_string());
    let said = program(&mounted.run_dir(), &["mount", &backing, &mountpoint, "--instance", "t"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(std::fs::read(mounted.path("a")).unwrap(), b"acknowledged");
    let ended = program(&mounted.run_dir(), &["umount", &mountpoint]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(!is_mounted(&mounted.mountpoint));
}

#[test]
fn a_dead_mount_is_unmounted() {
    let mounted = Mounted::new();
    signal(&mounted, Signal::SIGKILL);
    eventually("its end", || !is_alive(mounted.pid));
    let mountpoint = mounted.mountpoint.display().to_string();
    for _ in 0..2 {
        assert_eq!(program(&mounted.run_dir(), &["umount", &mountpoint]).code, 0);
        assert!(!is_mounted(&mounted.mountpoint));
    }
}

/// Found by a test of this suite, whose mount another one took for its own.
#[test]
fn a_name_ends_no_mount_of_another_run_directory() {
    let mounted = Mounted::new();
    let (elsewhere, mountpoint) = (mounted.aside("another-run"), mounted.mountpoint.display().to_string());
    for words in [&["umount", "--instance", "t"][..], &["umount", "--instance", "t", "--force"]] {
        let said = program(&elsewhere, words);
        let hint = said.out.contains("not mounted") && said.out.contains(&format!("`nemesisfs umount {mountpoint}`"));
        assert!(said.code == 0 && hint, "{said:?}");
        mounted.check();
    }
    let listed = program(&elsewhere, &["list"]).out;
    let line = listed.lines().find(|line| line.contains(&mountpoint));
    assert!(line.is_some_and(|line| line.contains(" elsewhere ")), "{listed}");
    mounted.end();
}

#[test]
fn a_dead_instance_ends_no_mount_that_another_run_directory_has_made_at_its_place() {
    let mut mounted = Mounted::new();
    mounted.kill();
    let elsewhere = mounted.aside("another-run");
    let state = std::fs::read_to_string(mounted.run_dir().join("t.json")).unwrap();
    let state = state.replace(mounted.run_dir().to_str().unwrap(), elsewhere.to_str().unwrap());
    mounted.mount_again();
    for how in ["--force", "--lazy"] {
        std::fs::write(elsewhere.join("t.json"), &state).unwrap();
        let said = program(&elsewhere, &["umount", "--instance", "t", how]);
        assert!(said.code == 0 && said.out.contains("belongs to another run directory"), "{said:?}");
        mounted.check();
    }
    mounted.end();
}

#[test]
fn a_dead_mount_is_replaced_although_the_kernel_still_has_its_attributes() {
    let mut mounted = Mounted::new();
    assert!(std::fs::metadata(&mounted.mountpoint).is_ok());
    mounted.kill();
    mounted.mount_again();
    mounted.end();
}

#[test]
fn a_dead_mount_is_one_line_of_the_list() {
    let mounted = Mounted::new();
    mounted.kill();
    let listed: serde_json::Value = serde_json::from_str(&mounted.cli(&["list", "--json"])).unwrap();
    let rows = listed["instances"].as_array().unwrap();
    let here: Vec<_> = rows.iter().filter(|row| row["mountpoint"] == json!(mounted.mountpoint)).collect();
    let [row] = here[..] else { panic!("{here:?}") };
    assert_eq!((&row["state"], &row["pid"]), (&json!("dead"), &json!(mounted.pid)), "{row}");
    assert!(row.get("seed").is_some_and(serde_json::Value::is_null), "all rows have the same members: {row}");
    assert_eq!(program(&mounted.run_dir(), &["umount", mounted.mountpoint.to_str().unwrap()]).code, 0);
}

#[test]
fn a_dead_instance_whose_mount_another_has_replaced_is_not_listed() {
    let mounted = Mounted::new();
    mounted.kill();
    let (run, elsewhere) = (mounted.run_dir(), mounted.aside("another-run"));
    let (backing, place) = (mounted.backing.display().to_string(), mounted.mountpoint.display().to_string());
    let state = std::fs::read(run.join("t.json")).unwrap();
    for dir in [&elsewhere, &run] {
        assert_eq!(program(dir, &["mount", &backing, &place, "--instance", "next"]).code, 0);
        let listed = program(&run, &["list"]).out;
        assert!(!listed.contains(" dead "), "{listed}");
        assert_eq!(program(dir, &["umount", &place]).code, 0);
    }
    assert!(!run.join("t.json").exists(), "who has cleaned up behind it forgets it");
    // With nobody in its place, it is told that it died there.
    std::fs::write(run.join("t.json"), state).unwrap();
    let listed = program(&run, &["list"]).out;
    assert!(listed.contains(" dead "), "{listed}");
    assert_eq!(program(&run, &["umount", &place]).code, 0);
}

#[test]
fn a_mount_whose_state_is_lost_is_ended_and_not_said_to_be_dead() {
    let mounted = Mounted::new();
    std::fs::remove_file(mounted.run_dir().join("t.json")).unwrap();
    let said = program(&mounted.run_dir(), &["umount", mounted.mountpoint.to_str().unwrap()]);
    let truly = !said.out.contains("no living instance") && said.out.contains("instance t");
    assert!(said.code == 0 && truly, "{said:?}");
    assert!(!is_mounted(&mounted.mountpoint));
    eventually("the daemon's end", || !is_alive(mounted.pid));
}

#[test]
fn a_daemon_whose_socket_is_gone_is_ended_as_by_the_systems_umount() {
    let mounted = Mounted::new();
    let open = File::create(mounted.path("f")).unwrap();
    std::fs::remove_file(&mounted.socket).unwrap();
    let said = mounted.try_cli(&["umount", "--instance", "t"]);
    let named = said.err.contains("busy") && said.err.contains(&std::process::id().to_string());
    assert!(said.code == 1 && named, "{said:?}");
    drop(open);
    let said = mounted.try_cli(&["umount", "--instance", "t"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(!is_mounted(&mounted.mountpoint) && !is_alive(mounted.pid));
}

#[test]
fn what_somebody_else_has_mounted_over_ours_is_not_taken_away() {
    let mounted = Mounted::new();
    let none: Option<&str> = None;
    let over =
        || nix::mount::mount(Some("above"), &mounted.mountpoint, Some("tmpfs"), nix::mount::MsFlags::empty(), none);
    over().unwrap();
    std::fs::write(mounted.path("precious"), "precious").unwrap();
    for how in [&[][..], &["--lazy"]] {
        let said = mounted.try_cli(&[&["umount", "--instance", "t"], how].concat());
        let told = said.err.contains("above (tmpfs) is mounted over") && said.err.contains("hint: ");
        assert!(said.code == 1 && told, "{how:?}: {said:?}");
        assert_eq!(std::fs::read(mounted.path("precious")).unwrap(), b"precious", "{how:?}");
        assert!(is_alive(mounted.pid), "{how:?}");
    }
    nix::mount::umount(&mounted.mountpoint).unwrap();
    mounted.end();
}

#[test]
fn a_mount_inside_ours_is_named_as_what_keeps_it_busy() {
    let mounted = Mounted::new();
    let inside = mounted.path("inside");
    std::fs::create_dir(&inside).unwrap();
    let none: Option<&str> = None;
    nix::mount::mount(Some("tmpfs"), &inside, Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
    let said = mounted.try_cli(&["umount", "--instance", "t"]);
    assert!(said.code == 1 && said.err.contains(inside.to_str().unwrap()), "{said:?}");
    nix::mount::umount(&inside).unwrap();
    mounted.end();
}

#[test]
fn a_run_directory_that_cannot_be_written_is_named_with_what_chooses_another() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let (run, place) = (dir.path().join("file/run"), dir.path().display().to_string());
    for words in [&["mount", &place, &place, "--instance", "n"][..], &["host"]] {
        let said = program(&run, words);
        let told = said.err.contains(run.to_str().unwrap()) && said.err.contains("NEMESISFS_RUNDIR");
        assert!(said.code == 1 && told, "{words:?}: {said:?}");
    }
}

#[test]
fn a_stopped_daemon_is_forced() {
    let mounted = Mounted::new();
    signal(&mounted, Signal::SIGSTOP);
    let mountpoint = mounted.mountpoint.clone();
    let (run, text) = (mounted.run_dir(), mountpoint.display().to_string());
    let said = within(Duration::from_secs(60), move || {
        program(&run, &["umount", &text, "--force", "--connect-timeout", "1s"])
    });
    let said = said.expect("it comes back");
    assert!(!is_mounted(&mountpoint), "{said:?}");
    signal(&mounted, Signal::SIGKILL);
}

/// A user who may mount, but has none of root's other powers: no handles, no identities but their own.
#[test]
fn another_user_than_root_can_mount_for_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for name in ["backing", "mnt", "run", "."] {
        std::fs::create_dir_all(path(name)).unwrap();
        std::os::unix::fs::chown(path(name), Some(65534), Some(65534)).unwrap();
    }
    let own = executable_in(dir.path());
    let script = format!(
        "{own} mount {backing} {mnt} && echo hi > {mnt}/a && mkdir {mnt}/d && mv {mnt}/a {mnt}/d/b && cat {mnt}/d/b && \
         {own} rule add x --kind error --errno EIO --op write --times 1 && ! echo no > {mnt}/d/b && ls -l {mnt}/d && \
         {own} umount {mnt}",
        backing = path("backing"),
        mnt = path("mnt"),
    );
    let said: Said = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .args(["--inh-caps=+sys_admin,+dac_override", "--ambient-caps=+sys_admin,+dac_override", "sh", "-ec", &script])
        .env("NEMESISFS_RUNDIR", path("run"))
        .output()
        .unwrap()
        .into();
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.out.contains("hi\n") && said.out.contains("nobody"), "{said:?}");
    assert!(std::fs::read_to_string(path("run/mnt.log")).unwrap().contains("without root"));
}

/// Users of databases have their data directory as home, and below that would be the directory of what is done to the
/// machine, which they cannot do.
#[test]
fn another_user_than_root_can_mount_their_home_and_nothing_of_ours_is_made_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for name in ["home", "mnt", "run", "."] {
        std::fs::create_dir_all(path(name)).unwrap();
        std::os::unix::fs::chown(path(name), Some(65534), Some(65534)).unwrap();
    }
    let own = executable_in(dir.path());
    let as_user = |script: &str| -> Said {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.args(["--inh-caps=+sys_admin,+dac_override", "--ambient-caps=+sys_admin,+dac_override"]);
        for name in ["NEMESISFS_RUNDIR", "NEMESISFS_STATEDIR", "XDG_STATE_HOME", "NEMESISFS_HOST"] {
            command.env_remove(name);
        }
        command.env("HOME", path("home")).env("XDG_RUNTIME_DIR", path("run"));
        command.args(["sh", "-c", script]).output().unwrap().into()
    };
    for place in ["mnt", "home"].map(path) {
        let said = as_user(&format!("{own} mount {} {place}", path("home")));
        assert_eq!(said.code, 0, "{place}: {said:?}");
        let used =
            as_user(&format!("{own} mode enospc; {own} coredump status; {own} device status x; {own} reset --all"));
        let there = std::fs::read_dir(path("home")).map(Iterator::count);
        let said = as_user(&format!("{own} umount {place}"));
        assert_eq!(said.code, 0, "{place}: {said:?}");
        let made = std::fs::read_dir(path("home")).unwrap().count();
        assert_eq!(made, 0, "{place}, with {there:?} while it was mounted: {used:?}");
    }
}

#[test]
fn a_handler_that_panics_answers_eio_and_serving_goes_on() {
    let mounted = Mounted::new();
    for _ in 0..10 {
        let error = std::fs::metadata(mounted.path(".nemesisfs-panic")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    std::fs::write(mounted.path("a"), "it goes on").unwrap();
    let log = mounted.log_text();
    assert_eq!(log.matches("panic: ").count(), 10, "{log}");
    assert_eq!(mounted.try_cli(&["umount", "--instance", "t"]).code, 0);
}

#[test]
fn new_files_belong_to_their_makers() {
    let mounted = Mounted::new();
    // uid and gid of nobody, umask 027, in a directory with a sticky and an sgid bit.
    let script =
        "umask 027; mkdir sg; chmod 2770 sg; mkdir sg/d; echo x > sg/f; mkfifo p; ln -s f l; echo x > f; chmod 4755 f";
    for dir in [mounted.mountpoint.clone(), mounted.aside("bare")] {
        std::os::unix::fs::chown(&dir, Some(65534), Some(12)).unwrap();
        let status = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--groups=12,100", "sh", "-ec", script])
            .current_dir(&dir)
            .status();
        assert!(status.unwrap().success());
    }
    let tree = |dir: &Path| {
        ["sg", "sg/d", "sg/f", "p", "l", "f"].map(|name| {
            let meta = std::fs::symlink_metadata(dir.join(name)).unwrap();
            (name, meta.uid(), meta.gid(), format!("{:o}", meta.mode()))
        })
    };
    assert_eq!(tree(&mounted.mountpoint), tree(&mounted.aside("bare")));
    mounted.end();
}

/// A stall of everything would keep its last holder from closing.
#[test]
fn a_mount_that_was_detached_holds_nobody_and_fails_who_is_to_fail() {
    let mounted = Mounted::new();
    let held = File::create(mounted.path("held")).unwrap();
    let said = mounted.try_cli(&["umount", "--instance", "t", "--lazy"]);
    assert!(said.code == 0 && !is_mounted(&mounted.mountpoint), "{said:?}");
    mounted.error_rule("bad", "write", "/held", "EIO", None);
    mounted.rule("hang", json!({"fault": {"kind": "stall"}}));
    assert!((&held).write_all(b"x").is_err());
    held.sync_all().unwrap();
    drop(held);
    eventually("its end", || !is_alive(mounted.pid));
}

#[test]
fn force_cuts_the_connection_of_a_mount_that_is_covered_and_leaves_the_cover() {
    for answers in [true, false] {
        let mounted = Mounted::new();
        let place = mounted.mountpoint.display().to_string();
        assert!(Command::new("mount").args(["-t", "tmpfs", "cover", &place]).status().unwrap().success());
        if !answers {
            std::fs::rename(&mounted.socket, mounted.aside("hidden").join("socket")).unwrap();
        }
        let said = mounted.try_cli(&["umount", "--instance", "t", "--force", "--connect-timeout", "1s"]);
        let covers = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let covers = covers.lines().filter(|line| line.contains(&place) && line.contains(" - tmpfs cover ")).count();
        nix::mount::umount2(&mounted.mountpoint, nix::mount::MntFlags::empty()).unwrap();
        eventually("its end", || !is_alive(mounted.pid));
        assert_eq!(covers, 1, "{said:?}");
        assert!(answers == said.err.contains("our connection is cut"), "{said:?}");
        mounted.cli(&["umount", &place]);
        assert!(!is_mounted(&mounted.mountpoint), "{answers}");
    }
}

/// A mount of ours that can be seen elsewhere, too.
struct Bound(PathBuf);

impl Bound {
    fn new(from: &Path, to: PathBuf) -> Bound {
        let none: Option<&str> = None;
        nix::mount::mount(Some(from), &to, none, nix::mount::MsFlags::MS_BIND, none).unwrap();
        Bound(to)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn what_is_bound_elsewhere_is_named_as_what_keeps_the_instance_and_ends_it_when_it_is_unmounted() {
    for how in ["", "--lazy", "no socket"] {
        let mounted = Mounted::new();
        let bound = Bound::new(&mounted.mountpoint, mounted.aside("bound"));
        let (run, place) = (mounted.run_dir(), mounted.mountpoint.display().to_string());
        let other = bound.0.display().to_string();
        if how == "no socket" {
            std::fs::remove_file(&mounted.socket).unwrap();
        }
        let began = Instant::now();
        let mut words = vec!["umount", &place];
        words.extend(Some(how).filter(|how| how.starts_with('-')));
        let said = program(&run, &words);
        assert!(began.elapsed() < Duration::from_secs(10), "{how}: it is said at once: {said:?}");
        let named = said.err.contains(&format!("instance t is still mounted at {other}"));
        assert!(
            said.code == 1 && named && said.err.contains(&format!("`nemesisfs umount {other}`")),
            "{how}: {said:?}"
        );
        assert!(!is_mounted(&mounted.mountpoint) && is_alive(mounted.pid), "{how}");
        // Once more, as who cleans up does, takes away nothing that somebody else has bound.
        for again in [words, vec!["umount", "--instance", "t"]] {
            let said = program(&run, &again);
            let told = said.err.contains(&format!("is not mounted, but instance t is still mounted at {other}"));
            assert!(said.code == 1 && told, "{again:?}: {said:?}");
            assert!(is_mounted(&bound.0) && is_alive(mounted.pid), "{again:?}: {said:?}");
        }
        std::fs::write(bound.0.join("f"), "it goes on").unwrap();
        let said = program(&run, &["umount", &other]);
        assert_eq!(said.code, 0, "{how}: {said:?}");
        assert!(!is_mounted(&bound.0), "{how}");
        eventually("the daemon's end", || !is_alive(mounted.pid));
    }
}

#[test]
fn a_place_where_it_is_bound_is_unmounted_alone_and_all_of_them_by_force() {
    let mounted = Mounted::new();
    let (one, two) = (mounted.aside("one"), mounted.aside("two"));
    let bound = [Bound::new(&mounted.mountpoint, one), Bound::new(&mounted.mountpoint, two)];
    let places = [&bound[0].0, &bound[1].0, &mounted.mountpoint];
    let said = mounted.try_cli(&["umount", places[0].to_str().unwrap()]);
    assert!(said.code == 0 && said.out.contains("one of the places of instance t"), "{said:?}");
    assert_eq!(places.map(|place| is_mounted(place)), [false, true, true]);
    mounted.check();
    let said = mounted.try_cli(&["umount", places[1].to_str().unwrap(), "--force"]);
    let told = said.out.contains("instance t ended: ")
        && places[1..].iter().all(|place| said.out.contains(place.to_str().unwrap()));
    assert!(said.code == 0 && told, "{said:?}");
    assert_eq!(places.map(|place| is_mounted(place)), [false; 3], "{said:?}");
    eventually("the daemon's end", || !is_alive(mounted.pid));
}

#[test]
fn a_mount_that_was_moved_is_ended_where_it_is() {
    let mounted = Mounted::new();
    // A mount below a shared one cannot be moved.
    let private = Bound::new(&mounted.aside("private"), mounted.aside("private"));
    let none: Option<&str> = None;
    nix::mount::mount(none, &private.0, none, nix::mount::MsFlags::MS_PRIVATE, none).unwrap();
    let [from, to] = ["from", "to"].map(|name| private.0.join(name));
    for dir in [&from, &to] {
        std::fs::create_dir(dir).unwrap();
    }
    let (run, other) = (mounted.run_dir(), mounted.aside("other").display().to_string());
    let said = program(&run, &["mount", &other, from.to_str().unwrap(), "--instance", "moved"]);
    assert_eq!(said.code, 0, "{said:?}");
    nix::mount::mount(Some(&from), &to, none, nix::mount::MsFlags::MS_MOVE, none).unwrap();
    let said = program(&run, &["umount", to.to_str().unwrap()]);
    assert!(said.code == 0 && !said.out.contains("another run directory"), "{said:?}");
    assert!(!is_mounted(&to), "{said:?}");
    assert!(!program(&run, &["list"]).out.contains("moved"));
    // It lies in the directory that ends with the test.
    drop(private);
    mounted.end();
}

/// A database would see it, a rule could hit it, and we would wait for ourselves.
#[test]
fn nothing_of_the_daemon_may_lie_among_the_files_of_the_mount() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for name in ["backing", "mnt", "run", "state"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    std::os::unix::fs::symlink("backing", path("link")).unwrap();
    for mountpoint in ["mnt", "backing", "link"] {
        let under = Some("mnt/x").filter(|_| mountpoint == "mnt");
        for below in ["backing/x", "link/x", "mnt/../backing/x"].into_iter().chain(under) {
            for what in ["--log", "--socket", "NEMESISFS_RUNDIR", "NEMESISFS_STATEDIR"] {
                let mut command = Command::new(executable());
                command.args(["mount", &path("backing"), &path(mountpoint), "--instance", "n"]);
                command.env("NEMESISFS_RUNDIR", path("run")).env("NEMESISFS_STATEDIR", path("state"));
                match what.starts_with('-') {
                    true => command.args([what, &path(below)]),
                    false => command.env(what, path(below)),
                };
                let said: Said = command.output().unwrap().into();
                if said.code == 0 {
                    program(Path::new(&path("run")), &["umount", &path(mountpoint)]);
                    program(Path::new(&path(below)), &["umount", &path(mountpoint)]);
                }
                let told =
                    said.err.contains("among the files of the mount") && said.err.contains(&format!("hint: {what} "));
                assert!(said.code == 1 && told, "{mountpoint} {below} {what}: {said:?}");
            }
        }
    }
    for name in ["backing", "mnt"] {
        assert_eq!(std::fs::read_dir(path(name)).unwrap().count(), 0);
    }
}

/// The command lines of others are used here, too.
#[test]
fn what_other_fuse_filesystems_are_told_by_o_is_taken_where_it_holds_and_else_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for name in ["backing", "mnt", "mnt/not-empty"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    let run = dir.path().join("run");
    let mount = |options: &str| program(&run, &["mount", &path("backing"), &path("mnt"), "-o", options]);
    for (option, hint) in [
        ("allow_root", "all users"),
        ("auto_unmount", "nemesisfs umount"),
        ("user", "nosuid,nodev,noexec"),
        ("fsname=data", "--instance"),
        ("modules=subdir", "the first of the two"),
        ("sude", "one of: rw ro"),
    ] {
        let said = mount(&format!("noatime,{option}"));
        let told = said.err.contains(&format!("mount option \"{option}\"")) && said.err.contains(hint);
        assert!(said.code == 2 && told, "{said:?}");
        assert!(!is_mounted(Path::new(&path("mnt"))), "{said:?}");
    }
    for harmless in ["", "rw,,nofail,", "relatime,async,_netdev,noauto,nouser,x-systemd.automount"] {
        let said = mount(harmless);
        assert_eq!(said.code, 0, "{harmless}: {said:?}");
        assert_eq!(program(&run, &["umount", &path("mnt")]).code, 0, "{harmless}");
    }
    let said = mount("allow_other,default_permissions,nonempty,defaults,noatime");
    assert_eq!(said.code, 0, "{said:?}");
    let options = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let options = options.lines().find(|line| line.contains(&path("mnt"))).unwrap();
    let umount = program(&run, &["umount", &path("mnt")]);
    let hold = ["noatime", "allow_other", "default_permissions"].iter().all(|word| options.contains(word));
    assert!(hold && umount.code == 0, "{options}: {umount:?}");
}
