//! Capacity: what succeeds on a full disk, what does not, and what the numbers say.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::Mounted;

fn full(mounted: &Mounted) {
    mounted.cli(&["space", "virtual", "--free", "0"]);
}

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Option<i32> {
    result.unwrap_err().raw_os_error()
}

fn refusals(mounted: &Mounted) -> Vec<Value> {
    mounted.injections("space")
}

/// As on a full ext4: names can be made, blocks that are there can be written, nothing that needs a block works.
#[test]
fn at_zero_free_only_what_needs_no_block_succeeds() {
    for mounted in [Mounted::new(), Mounted::in_memory()] {
        let path = |name: &str| mounted.path(name);
        std::fs::write(path("old"), [1; 8192]).unwrap();
        let holed = File::create(path("holed")).unwrap();
        holed.set_len(1 << 20).unwrap();
        let log = File::create(path("log")).unwrap();
        nix::fcntl::fallocate(&log, nix::fcntl::FallocateFlags::empty(), 0, 1 << 20).unwrap();
        full(&mounted);

        let old = OpenOptions::new().write(true).open(path("old")).unwrap();
        old.write_all_at(&[2; 8192], 0).unwrap();
        log.write_all_at(&[2; 4096], 500_000).unwrap();
        File::create(path("new")).unwrap();
        std::fs::hard_link(path("old"), path("link")).unwrap();
        std::os::unix::fs::symlink("old", path("symlink")).unwrap();
        std::fs::rename(path("link"), path("renamed")).unwrap();
        old.set_len(1 << 20).unwrap();

        assert_eq!(errno(holed.write_at(&[1; 4096], 4096)), Some(libc::ENOSPC), "into a hole");
        assert_eq!(errno(File::create(path("new")).unwrap().write_at(b"x", 0)), Some(libc::ENOSPC), "past the end");
        assert_eq!(errno(std::fs::create_dir(path("dir"))), Some(libc::ENOSPC));
        let more = nix::fcntl::fallocate(&log, nix::fcntl::FallocateFlags::empty(), 0, 2 << 20);
        assert_eq!(more, Err(nix::errno::Errno::ENOSPC));
        let events = refusals(&mounted);
        assert!(events.len() >= 4 && events.iter().all(|event| event["errno"] == "ENOSPC"), "{events:?}");

        mounted.cli(&["space", "clear"]);
        holed.write_all_at(&[1; 4096], 4096).unwrap();
        std::fs::create_dir(path("dir")).unwrap();
        drop((old, holed, log));
        mounted.end();
    }
}

#[test]
fn a_write_that_half_fits_is_short_and_the_next_is_refused() {
    for mounted in [Mounted::new(), Mounted::in_memory()] {
        let file = File::create(mounted.path("f")).unwrap();
        mounted.cli(&["space", "virtual", "--free", "8KiB"]);
        assert_eq!(file.write_at(&[1; 20_000], 0).unwrap(), 8192);
        assert_eq!(errno(file.write_at(&[1; 20_000], 8192)), Some(libc::ENOSPC));
        assert_eq!(std::fs::read(mounted.path("f")).unwrap(), [1; 8192]);
        let events = refusals(&mounted);
        assert_eq!(events[0]["done"], 8192, "{events:?}");
        assert_eq!(events.last().unwrap()["errno"], "ENOSPC");
        drop(file);
        mounted.end();
    }
}

#[test]
fn freeing_counts_at_once_and_of_an_open_file_at_its_last_close() {
    let mounted = Mounted::in_memory();
    let path = |name: &str| mounted.path(name);
    std::fs::write(path("a"), [1; 65_536]).unwrap();
    std::fs::write(path("b"), [1; 65_536]).unwrap();
    std::fs::write(path("c"), [1; 65_536]).unwrap();
    // A close may reach the daemon later than it returns, and of an open file nothing is free yet.
    crate::support::eventually("all is closed", || mounted.health("open_files") == 0);
    full(&mounted);
    let free = || mounted.http("GET", "/v1/space", None).body["virtual"]["free"].as_u64().unwrap();
    assert_eq!(free(), 0);
    std::fs::remove_file(path("a")).unwrap();
    assert_eq!(free(), 65_536);
    let open = File::open(path("b")).unwrap();
    std::fs::remove_file(path("b")).unwrap();
    assert_eq!(free(), 65_536, "it is still open");
    drop(open);
    crate::support::eventually("the last close counts", || free() == 131_072);
    OpenOptions::new().write(true).open(path("c")).unwrap().set_len(4096).unwrap();
    assert_eq!(free(), 131_072 + 61_440);
    std::fs::write(path("d"), [1; 131_072 + 61_440]).unwrap();
    assert_eq!(free(), 0);
    mounted.end();
}

#[test]
fn statfs_agrees() {
    let mounted = Mounted::new();
    let available = || {
        let said = Command::new("df").args(["--output=avail", "-B1"]).arg(&mounted.mountpoint).output().unwrap();
        String::from_utf8_lossy(&said.stdout).lines().nth(1).unwrap().trim().parse::<u64>().unwrap()
    };
    assert!(available() > 0);
    mounted.cli(&["space", "virtual", "--free", "10MiB"]);
    assert_eq!(available(), 10 << 20);
    full(&mounted);
    assert_eq!(available(), 0);
    mounted.reset();
    assert!(available() > 0);
    mounted.end();
}

#[test]
fn size_and_used_count_the_tree() {
    let mounted = Mounted::in_memory();
    std::fs::write(mounted.path("a"), vec![1; 4 << 20]).unwrap();
    mounted.cli(&["space", "virtual", "--size", "10MiB"]);
    let account = || mounted.http("GET", "/v1/space", None).body["virtual"].clone();
    assert_eq!((account()["used"].as_u64(), account()["free"].as_u64()), (Some(4 << 20), Some(6 << 20)));
    mounted.cli(&["space", "virtual", "--used", "50%"]);
    assert_eq!((account()["size"].as_u64(), account()["free"].as_u64()), (Some(8 << 20), Some(4 << 20)));
    mounted.end();
}

/// FUSE asks nobody when a page is dirtied: the refusal comes when it is written back.
#[test]
fn a_store_into_a_hole_of_a_mapping_is_refused_at_msync() {
    let mounted = Mounted::new();
    let holed = File::create(mounted.path("f")).unwrap();
    holed.set_len(1 << 20).unwrap();
    full(&mounted);
    let script = "import mmap,sys\nf=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),0); m[5000]=1\n\
        try: m.flush(); print('ok')\nexcept OSError as e: print(e.errno)";
    let said = Command::new("python3").args(["-c", script]).arg(mounted.path("f")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), libc::ENOSPC.to_string());
    assert!(refusals(&mounted).iter().any(|event| event["pid"] == 0), "it is the kernel that writes back");
    drop(holed);
    mounted.end();
}

#[test]
fn the_mode_enospc_is_full_and_leaves_the_account_alone() {
    let mounted = Mounted::new();
    mounted.cli(&["space", "virtual", "--free", "1MiB"]);
    mounted.cli(&["mode", "enospc"]);
    assert_eq!(errno(File::create(mounted.path("a")).unwrap().write_at(b"x", 0)), Some(libc::ENOSPC));
    let events = mounted.injections("mode");
    assert_eq!((events.len(), events[0]["kind"].as_str()), (1, Some("space")), "{events:?}");
    let rule = mounted.http("GET", "/v1/rules/mode", None).body;
    assert_eq!(rule["injections"], 1);
    mounted.cli(&["mode", "allow_writes"]);
    std::fs::write(mounted.path("b"), [1; 8192]).unwrap();
    mounted.end();
}

#[test]
fn a_mode_ends_after_its_time() {
    let mounted = Mounted::new();
    mounted.cli(&["mode", "enospc", "--for", "3s"]);
    assert_eq!(errno(File::create(mounted.path("a")).unwrap().write_at(b"x", 0)), Some(libc::ENOSPC));
    crate::support::eventually("the mode ends", || {
        mounted.http("GET", "/v1/mode", None).body["mode"] == json!("allow_writes")
    });
    std::fs::write(mounted.path("a"), b"x").unwrap();
    mounted.end();
}

#[test]
fn a_rule_on_grow_fires_only_for_writes_that_need_space() {
    let mounted = Mounted::new();
    let file = File::create(mounted.path("f")).unwrap();
    file.write_all_at(&[1; 8192], 0).unwrap();
    mounted.error_rule("grow", "grow", "/**", "ENOSPC", None);
    file.write_all_at(&[2; 8192], 0).unwrap();
    assert_eq!(errno(file.write_at(&[2; 10], 8192)), Some(libc::ENOSPC));
    assert_eq!(mounted.http("GET", "/v1/rules/grow", None).body["matches"], 1);
    drop(file);
    mounted.end();
}

#[test]
fn what_has_blocks_of_its_own_is_taken_before_it_is_freed() {
    let mounted = Mounted::new();
    mounted.cli(&["space", "virtual", "--free", "1MiB"]);
    let free = || mounted.http("GET", "/v1/space", None).body["virtual"]["free"].as_u64().unwrap();
    for _ in 0..20 {
        std::os::unix::fs::symlink("x".repeat(500), mounted.path("l")).unwrap();
        std::fs::remove_file(mounted.path("l")).unwrap();
    }
    assert_eq!(free(), 1 << 20);
    let script = "import os,sys; p=sys.argv[1]; open(p,'w').close(); os.setxattr(p,'user.a',b'x'*3000); os.unlink(p)";
    assert!(Command::new("python3").args(["-c", script]).arg(mounted.path("f")).status().unwrap().success());
    crate::support::eventually("the last close", || free() == 1 << 20);
    mounted.end();
}

#[test]
fn the_rule_space_can_be_seen_and_waited_for() {
    let mounted = Mounted::new();
    full(&mounted);
    assert_eq!(errno(File::create(mounted.path("a")).unwrap().write_at(b"x", 0)), Some(libc::ENOSPC));
    let said = mounted.cli(&["rule", "wait", "space", "--for", "5s"]);
    assert!(said.contains("ENOSPC"), "{said}");
    assert!(mounted.cli(&["rule", "list"]).contains("space"));
    mounted.end();
}

fn space_of(mounted: &Mounted) -> Value {
    mounted.http("GET", "/v1/space", None).body
}

fn statvfs(mounted: &Mounted) -> nix::sys::statvfs::Statvfs {
    nix::sys::statvfs::statvfs(&mounted.mountpoint).unwrap()
}

/// etcd's log is preallocated, PostgreSQL's first segments are; what has to grow is not.
#[test]
fn what_is_preallocated_stays_writable_and_a_log_that_must_grow_does_not() {
    for mounted in [Mounted::new(), Mounted::in_memory()] {
        let (wal, log) = (File::create(mounted.path("wal")).unwrap(), File::create(mounted.path("log")).unwrap());
        nix::fcntl::fallocate(&wal, nix::fcntl::FallocateFlags::empty(), 0, 1 << 20).unwrap();
        log.write_all_at(&[1; 4096], 0).unwrap();
        full(&mounted);
        for page in 0..256 {
            wal.write_all_at(&[2; 4096], page * 4096).unwrap();
        }
        wal.sync_all().unwrap();
        assert_eq!(errno(log.write_at(&[2; 4096], 4096)), Some(libc::ENOSPC));
        assert_eq!(refusals(&mounted).len(), 1);
        drop((wal, log));
        mounted.end();
    }
}

#[test]
fn inodes_run_out_and_come_back_when_files_are_removed() {
    let mounted = Mounted::new();
    let path = |name: &str| mounted.path(name);
    std::fs::write(path("old"), b"x").unwrap();
    mounted.cli(&["space", "virtual", "--inodes", "4"]);
    let files_free = || statvfs(&mounted).files_free();
    assert_eq!(files_free(), 4);
    let open = File::create(path("file")).unwrap();
    std::fs::create_dir(path("dir")).unwrap();
    std::os::unix::fs::symlink("x", path("symlink")).unwrap();
    mounted.python("import os; os.mkfifo('fifo')", &[]);
    assert_eq!(files_free(), 0);
    assert_eq!(errno(File::create(path("a"))), Some(libc::ENOSPC));
    assert_eq!(errno(std::fs::create_dir(path("a"))), Some(libc::ENOSPC));
    assert_eq!(errno(std::os::unix::fs::symlink("x", path("a"))), Some(libc::ENOSPC));
    let refused = mounted.python("import os\ntry: os.mkfifo('a')\nexcept OSError as e: print(e.errno)", &[]);
    assert_eq!(refused.trim(), libc::ENOSPC.to_string());
    let events = refusals(&mounted);
    let ops: Vec<_> = events.iter().map(|event| event["op"].as_str().unwrap()).collect();
    assert_eq!(ops, ["create", "mkdir", "symlink", "mknod"]);

    // Neither needs one, and bytes were not limited.
    std::fs::hard_link(path("old"), path("link")).unwrap();
    std::fs::rename(path("link"), path("renamed")).unwrap();
    std::fs::write(path("old"), [1; 100_000]).unwrap();

    std::fs::remove_file(path("renamed")).unwrap();
    assert_eq!(files_free(), 0, "the file has another name");
    std::fs::remove_file(path("file")).unwrap();
    assert_eq!(files_free(), 0, "it is still open");
    drop(open);
    crate::support::eventually("the last close gives its inode back", || files_free() == 1);
    std::fs::remove_dir(path("dir")).unwrap();
    std::fs::rename(path("symlink"), path("fifo")).unwrap();
    assert_eq!(files_free(), 3, "what is replaced is gone");
    std::fs::create_dir(path("again")).unwrap();
    assert_eq!(errno(std::fs::create_dir(path("again"))), Some(libc::EEXIST));
    assert_eq!(files_free(), 2, "what was not made takes none");
    mounted.end();
}

#[test]
fn the_reserve_is_for_root_alone() {
    let mounted = Mounted::new();
    mounted.cli(&["space", "virtual", "--free", "1MiB", "--reserve", "256KiB"]);
    let statvfs = statvfs(&mounted);
    let (free, available) = (statvfs.blocks_free(), statvfs.blocks_available());
    assert_eq!((free, available), ((1 << 20) / 4096, (768 << 10) / 4096));
    let script = "import os,sys
f = os.open('u', os.O_CREAT | os.O_WRONLY, 0o666)
pid = os.fork()
if pid == 0:
    os.setgid(1000); os.setuid(1000)
    n = os.pwrite(f, b'x' * (1 << 20), 0)
    try: os.pwrite(f, b'x' * 4096, n); print('more')
    except OSError as e: print(n, e.errno)
    sys.stdout.flush(); os._exit(0)
os.waitpid(pid, 0)
print(os.pwrite(f, b'x' * (1 << 20), 768 << 10))";
    let said = mounted.python(script, &[]);
    assert_eq!(said, format!("{} {}\n{}\n", 768 << 10, libc::ENOSPC, 256 << 10));
    let mounted_used = |words: &[&str]| {
        mounted.cli(words);
        space_of(&mounted)["virtual"].clone()
    };
    let account = mounted_used(&["space", "virtual", "--size", "100MiB", "--reserve", "5%"]);
    assert_eq!(account["reserve"], 5 << 20);
    mounted.end();
}

fn quotas(mounted: &Mounted, quota: Value) {
    let answer = mounted.http("PUT", "/v1/space", Some(&json!({"quota": quota})));
    assert_eq!(answer.status, 200, "{answer:?}");
}

fn used(mounted: &Mounted) -> Vec<u64> {
    let quotas = space_of(mounted)["quota"].clone();
    quotas.as_array().unwrap().iter().map(|quota| quota["used"].as_u64().unwrap()).collect()
}

fn chown(path: &std::path::Path, uid: u32) {
    std::os::unix::fs::chown(path, Some(uid), None).unwrap();
}

#[test]
fn a_quota_of_an_owner_refuses_with_edquot_and_moves_with_chown() {
    let mounted = Mounted::new();
    let path = |name: &str| mounted.path(name);
    std::fs::write(path("theirs"), [1; 8192]).unwrap();
    chown(&path("theirs"), 1000);
    std::fs::write(path("ours"), [1; 65_536]).unwrap();
    mounted.cli(&["space", "quota", "--limit", "16KiB", "--uid", "1000"]);
    assert_eq!(used(&mounted), [8192]);
    let script = "import os
os.setgid(1000); os.setuid(1000)
f = os.open('theirs', os.O_WRONLY)
n = os.pwrite(f, b'x' * 20000, 8192)
try: os.pwrite(f, b'x', 8192 + n); print('more')
except OSError as e: print(n, e.errno)
try: os.mkdir('d'); print('made')
except OSError as e: print(e.errno)";
    assert_eq!(mounted.python(script, &[]), format!("8192 {}\n{}\n", libc::EDQUOT, libc::EDQUOT));
    let events = refusals(&mounted);
    assert_eq!((&events[0]["done"], &events[1]["errno"]), (&json!(8192), &json!("EDQUOT")), "{events:?}");
    assert_eq!(used(&mounted), [16_384]);

    // As on a local filesystem root is not bound by the quota of another.
    OpenOptions::new().write(true).open(path("theirs")).unwrap().write_all_at(&[1; 4096], 16_384).unwrap();
    assert_eq!(used(&mounted), [20_480]);
    chown(&path("theirs"), 0);
    assert_eq!(used(&mounted), [0]);
    chown(&path("ours"), 1000);
    assert_eq!(used(&mounted), [65_536]);
    std::fs::remove_file(path("ours")).unwrap();
    assert_eq!(used(&mounted), [0]);

    mounted.cli(&["space", "quota", "--limit", "8KiB", "--uid", "0"]);
    assert_eq!(space_of(&mounted)["quota"].as_array().unwrap().len(), 2, "the first stays");
    assert_eq!(errno(File::create(path("new")).unwrap().write_at(b"x", 0)), Some(libc::EDQUOT), "it says root's");
    mounted.cli(&["space", "clear", "quota"]);
    std::fs::write(path("new"), [1; 65_536]).unwrap();
    mounted.end();
}

#[test]
fn a_quota_of_a_subtree_binds_everybody_and_moves_with_rename() {
    let mounted = Mounted::new();
    let path = |name: &str| mounted.path(name);
    std::fs::create_dir_all(path("in/sub")).unwrap();
    std::fs::create_dir_all(path("out/dir")).unwrap();
    std::fs::write(path("in/a"), [1; 8192]).unwrap();
    std::fs::write(path("out/b"), [1; 16_384]).unwrap();
    std::fs::write(path("out/dir/c"), [1; 4096]).unwrap();
    mounted.cli(&["space", "quota", "--limit", "64KiB", "--path", "/in/**"]);
    let directory = std::fs::metadata(path("in/sub")).unwrap();
    let of_directory = std::os::unix::fs::MetadataExt::blocks(&directory) * 512;
    assert_eq!(used(&mounted), [8192 + of_directory]);
    std::fs::rename(path("out/b"), path("in/sub/b")).unwrap();
    assert_eq!(used(&mounted), [8192 + of_directory + 16_384], "a file that comes in");
    std::fs::rename(path("in/a"), path("out/a")).unwrap();
    assert_eq!(used(&mounted), [of_directory + 16_384], "a file that goes out");
    std::fs::rename(path("out/dir"), path("in/dir")).unwrap();
    assert_eq!(used(&mounted), [2 * of_directory + 16_384 + 4096], "a directory with all below it");
    let open = OpenOptions::new().write(true).open(path("in/dir/c")).unwrap();
    let left = 65_536 - used(&mounted)[0];
    assert_eq!(open.write_at(&[1; 100_000], 4096).unwrap() as u64, left, "a write that half fits is short");
    assert_eq!(errno(open.write_at(b"x", 4096 + left)), Some(libc::EDQUOT));
    std::fs::write(path("out/free"), [1; 100_000]).unwrap();
    std::fs::rename(path("in/dir"), path("out/dir")).unwrap();
    assert_eq!(used(&mounted), [of_directory + 16_384]);
    open.write_all_at(&[1; 100_000], 4096).unwrap();
    drop(open);
    mounted.end();
}

#[test]
fn a_quota_on_everything_is_what_statfs_shows() {
    let mounted = Mounted::in_memory();
    std::fs::write(mounted.path("a"), [1; 65_536]).unwrap();
    quotas(&mounted, json!({"limit": "1MiB", "path": "/**"}));
    let now = statvfs(&mounted);
    let block = now.fragment_size();
    assert_eq!((now.blocks() * block, now.blocks_available() * block), (1 << 20, (1 << 20) - used(&mounted)[0]));
    assert!(used(&mounted)[0] >= 65_536);
    mounted.cli(&["space", "virtual", "--free", "4KiB"]);
    assert_eq!(statvfs(&mounted).blocks_free() * block, 4096, "the smaller of both");
    let file = File::create(mounted.path("b")).unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    assert_eq!(errno(file.write_at(&[1; 4096], 4096)), Some(libc::ENOSPC), "it is the capacity that refuses");
    drop(file);
    mounted.reset();
    assert_eq!(space_of(&mounted)["quota"], json!([]));
    mounted.end();
}

#[test]
fn of_quotas_and_capacities_that_are_wrong_it_is_said_what() {
    let mounted = Mounted::new();
    let refused = |body: Value, pointer: &str| {
        let answer = mounted.http("PUT", "/v1/space", Some(&body));
        assert_eq!((answer.status, &answer.body["errors"][0]["pointer"]), (422, &json!(pointer)), "{answer:?}");
    };
    refused(json!({}), "#/virtual");
    refused(json!({"virtual": {"inodes": 5, "reserve": "5%"}}), "#/virtual/reserve");
    refused(json!({"virtual": {"free": "0", "reserve": "lots"}}), "#/virtual/reserve");
    refused(json!({"quota": [{"limit": "1MiB"}, {"limit": "many"}]}), "#/quota/1/limit");
    refused(json!({"ballast": {}}), "#/ballast");
    refused(json!({"ballast": {"used": "101%"}}), "#/ballast/used");
    assert_eq!(space_of(&mounted)["virtual"], Value::Null);
    mounted.end();
}

#[test]
fn what_is_set_for_a_time_ends_after_it() {
    let mounted = Mounted::new();
    mounted.cli(&["space", "virtual", "--free", "0", "--for", "3s"]);
    assert_eq!(errno(File::create(mounted.path("a")).unwrap().write_at(b"x", 0)), Some(libc::ENOSPC));
    crate::support::eventually("it ends", || space_of(&mounted)["virtual"].is_null());
    std::fs::write(mounted.path("a"), b"x").unwrap();
    // What is set anew does not end with the first.
    mounted.cli(&["space", "virtual", "--free", "0", "--for", "300ms"]);
    mounted.cli(&["space", "virtual", "--free", "0"]);
    std::thread::sleep(std::time::Duration::from_millis(600));
    assert!(!space_of(&mounted)["virtual"].is_null());
    mounted.end();
}

#[test]
fn late_a_write_is_accepted_and_fsync_tells_once_for_each_open_file() {
    for mounted in [Mounted::new(), Mounted::in_memory()] {
        let file = File::create(mounted.path("f")).unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        let other = File::open(mounted.path("f")).unwrap();
        mounted.cli(&["space", "virtual", "--free", "8KiB", "--late"]);
        // In memory for certain: the kernel sends by itself what it has first to load from the program's file.
        let data = vec![2; 20_000];
        assert_eq!(file.write_at(&data, 4096).unwrap(), 20_000, "all of it is accepted");
        assert_eq!(space_of(&mounted)["virtual"]["free"], 0, "what fits is there, what does not takes nothing");
        assert_eq!(errno(file.sync_all()), Some(libc::ENOSPC));
        file.sync_all().unwrap();
        assert_eq!(errno(other.sync_data()), Some(libc::ENOSPC), "another open file is told too");
        other.sync_data().unwrap();
        File::open(mounted.path("f")).unwrap().sync_all().unwrap();
        let events = refusals(&mounted);
        assert_eq!((events.len(), &events[0]["done"], &events[1]["op"]), (3, &json!(8192), &json!("fsync")));

        // Readers see it until it is evicted; then what did not fit is lost.
        assert_eq!(std::fs::read(mounted.path("f")).unwrap()[4096..], data);
        mounted.cli(&["evict"]);
        let after = std::fs::read(mounted.path("f")).unwrap();
        assert_eq!(after[..12_288], [[1; 4096].as_slice(), &[2; 8192]].concat());
        assert_eq!(after[12_288..], [0; 24_096 - 12_288]);
        assert_eq!(space_of(&mounted)["virtual"]["free"], 0);
        drop((file, other));
        std::fs::remove_file(mounted.path("f")).unwrap();
        crate::support::eventually("its blocks are free", || space_of(&mounted)["virtual"]["free"] == 12_288);
        mounted.end();
    }
}

#[test]
fn late_a_write_through_o_sync_tells_by_itself_and_direct_io_at_once() {
    let mounted = Mounted::new();
    mounted.cli(&["space", "virtual", "--free", "0", "--late"]);
    let script = "import os, mmap
def told(flags):
    f = os.open('f', os.O_CREAT | os.O_WRONLY | flags)
    page = mmap.mmap(-1, 4096)
    try: print(os.writev(f, [page]))
    except OSError as e: print(e.errno)
    os.close(f)
told(os.O_SYNC); told(os.O_DSYNC); told(os.O_DIRECT); told(0)";
    let enospc = libc::ENOSPC;
    assert_eq!(mounted.python(script, &[]), format!("{enospc}\n{enospc}\n{enospc}\n4096\n"));
    mounted.end();
}

/// What was lost does not stay lost once there is space: the same range written again is kept.
#[test]
fn late_what_is_written_again_when_there_is_space_is_kept() {
    let mounted = Mounted::in_memory();
    std::fs::write(mounted.path("old"), [1; 8192]).unwrap();
    let file = File::create(mounted.path("f")).unwrap();
    mounted.cli(&["space", "virtual", "--free", "0", "--late"]);
    file.write_all_at(&[1; 12_288], 0).unwrap();
    assert_eq!(errno(file.sync_all()), Some(libc::ENOSPC));
    std::fs::remove_file(mounted.path("old")).unwrap();
    assert_eq!(space_of(&mounted)["virtual"]["free"], 8192);
    file.write_all_at(&[2; 8192], 0).unwrap();
    file.sync_all().unwrap();
    assert_eq!(space_of(&mounted)["virtual"]["free"], 0);
    file.set_len(8192).unwrap();
    assert_eq!(space_of(&mounted)["virtual"]["free"], 0, "what was cut off took nothing");
    mounted.cli(&["evict"]);
    assert_eq!(std::fs::read(mounted.path("f")).unwrap(), [2; 8192]);
    assert_eq!(space_of(&mounted)["virtual"]["free"], 0);
    drop(file);
    mounted.end();
}

const EXT4: &[&str] = &["mkfs.ext4", "-q"];

fn ballast_files(mounted: &Mounted) -> Vec<String> {
    let names = std::fs::read_dir(&mounted.backing).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter_map(|name| name.into_string().ok()).filter(|name| name.starts_with("occupy_")).collect()
}

fn df(mounted: &Mounted) -> (u64, u64) {
    let now = nix::sys::statvfs::statvfs(&mounted.backing).unwrap();
    let used = now.blocks() - now.blocks_free();
    (now.blocks_available() * now.fragment_size(), 100 * used / (used + now.blocks_available()))
}

#[test]
fn ballast_really_fills_the_disk_and_goes_with_clear_reset_and_umount() {
    let mounted = Mounted::on_own_disk(64 << 20, EXT4);
    let said = mounted.cli(&["space", "ballast", "--used", "90%"]);
    assert!(said.contains("ballast full: occupy_90percent.") && said.contains("space clear ballast"), "{said}");
    assert!((89..=90).contains(&df(&mounted).1), "{:?}", df(&mounted));
    assert_eq!(ballast_files(&mounted).len(), 1);
    assert!(mounted.path(&ballast_files(&mounted)[0]).exists(), "it is a file like others");
    let actions = |mounted: &Mounted| {
        let events = mounted.events();
        let of_space = events.iter().filter(|event| event["event"] == "space");
        of_space.map(|event| event["action"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(actions(&mounted), ["filling", "set"]);
    assert!(mounted.cli(&["space", "status"]).contains("ballast full: occupy_90percent."));

    mounted.cli(&["space", "ballast", "--until-free", "20MiB"]);
    let free = df(&mounted).0;
    let wanted = (20 << 20) - 65_536..=(20 << 20) + 4096;
    assert!(wanted.contains(&free), "another takes its place: {free}");
    assert_eq!(ballast_files(&mounted).len(), 1);
    mounted.cli(&["space", "clear", "ballast"]);
    assert!(ballast_files(&mounted).is_empty() && df(&mounted).1 < 5);

    mounted.cli(&["space", "ballast", "--until-free", "0"]);
    let file = File::create(mounted.path("f"));
    let written = file.and_then(|file| file.write_at(&[1; 65_536], 0));
    assert!(written.is_err_and(|error| error.raw_os_error() == Some(libc::ENOSPC)), "nothing is left, for root either");
    mounted.reset();
    assert!(ballast_files(&mounted).is_empty());

    mounted.cli(&["space", "ballast", "--used", "50%"]);
    let backing = mounted.backing.clone();
    let umount = mounted.try_cli(&["umount", "--instance", "t"]);
    assert_eq!(umount.code, 0, "{umount:?}");
    let left: Vec<_> = std::fs::read_dir(&backing).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("occupy")), "{left:?}");
}

#[test]
fn ballast_of_a_killed_daemon_goes_with_the_next_start_and_a_users_file_of_that_name_stays() {
    let mut mounted = Mounted::on_own_disk(64 << 20, EXT4);
    std::fs::write(mounted.path("occupy_90percent.1"), "a user's own").unwrap();
    mounted.cli(&["space", "ballast", "--used", "80%"]);
    assert_eq!(ballast_files(&mounted).len(), 2);
    mounted.kill();
    assert_eq!(ballast_files(&mounted).len(), 2);
    mounted.mount_again();
    assert_eq!(ballast_files(&mounted), ["occupy_90percent.1"]);
    let events = mounted.events();
    assert!(events.iter().any(|event| event["left_by"] == "a killed daemon"), "{events:?}");
    mounted.end();
}

#[test]
fn ballast_that_does_not_reach_its_target_is_an_error_and_is_removed() {
    let mounted = Mounted::on_own_disk(64 << 20, EXT4);
    let said = mounted.try_cli(&["space", "ballast", "--used", "90%", "--deadline", "0s"]);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("the deadline has passed"), "{said:?}");
    assert!(ballast_files(&mounted).is_empty());
    assert_eq!(space_of(&mounted)["ballast"], Value::Null);
    mounted.end();
    // The old ext2 has nothing to allocate with.
    let mounted = Mounted::on_own_disk(64 << 20, &["mkfs.ext2", "-q"]);
    let said = mounted.try_cli(&["space", "ballast", "--used", "90%"]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(ballast_files(&mounted).is_empty());
    mounted.end();
}

#[test]
fn ballast_is_refused_where_it_would_fill_the_root_or_what_we_need() {
    let mounted = Mounted::new();
    let said = mounted.try_cli(&["space", "ballast", "--used", "99%"]);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.err.contains("is also that of /") && said.err.contains("--force"), "{said:?}");
    let answer = mounted.http("PUT", "/v1/space", Some(&json!({"ballast": {"used": "99%"}})));
    assert_eq!((answer.status, &answer.body["code"]), (409, &json!("conflict")));
    // Far from full, it is no danger to the machine that runs the tests.
    let (free, _) = df(&mounted);
    let almost_free = (free - (8 << 20)).to_string();
    mounted.cli(&["space", "ballast", "--until-free", &almost_free, "--force"]);
    assert_eq!(ballast_files(&mounted).len(), 1);
    mounted.cli(&["space", "clear"]);
    assert!(ballast_files(&mounted).is_empty());
    mounted.end();
}

#[test]
fn ballast_for_a_time_goes_after_it() {
    let mounted = Mounted::on_own_disk(64 << 20, EXT4);
    mounted.cli(&["space", "ballast", "--used", "50%", "--for", "3s"]);
    assert_eq!(ballast_files(&mounted).len(), 1);
    crate::support::eventually("it goes", || ballast_files(&mounted).is_empty());
    mounted.end();
}

/// Filling is made slow from outside, so that there is a middle of it.
#[test]
fn ballast_that_is_cleared_or_whose_client_is_gone_in_the_middle_is_removed() {
    let mounted = Mounted::on_own_disk(64 << 20, EXT4);
    let slow = ["-f", "-e", "trace=fallocate", "-e", "inject=fallocate:delay_enter=400000"];
    let trace = crate::support::Trace::of(&mounted, &[mounted.pid], &slow);
    let filling = || {
        let client = Command::new(crate::support::executable())
            .args(["space", "ballast", "--used", "95%"])
            .env("NEMESISFS_RUNDIR", mounted.run_dir())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        crate::support::eventually("it fills", || space_of(&mounted)["ballast"]["state"] == "filling");
        client
    };
    let gone = || {
        crate::support::eventually("it is removed", || ballast_files(&mounted).is_empty());
        assert!(df(&mounted).1 < 5);
    };
    let client = filling();
    mounted.cli(&["space", "clear"]);
    gone();
    let said: crate::support::Said = client.wait_with_output().unwrap().into();
    assert!(said.code == 1 && said.err.contains("cleared"), "{said:?}");

    let mut client = filling();
    client.kill().unwrap();
    client.wait().unwrap();
    gone();

    let mut client = filling();
    mounted.kill();
    client.wait().unwrap();
    assert_eq!(ballast_files(&mounted).len(), 1);
    drop(trace);
    let mut mounted = mounted;
    mounted.mount_again();
    assert!(ballast_files(&mounted).is_empty());
    mounted.end();
}

/// Below is a mount of ours whose files take no attributes; nor has FUSE files without a name.
#[test]
fn ballast_on_files_that_take_no_marks_is_known_by_the_run_directory() {
    let below = Mounted::on_own_disk(64 << 20, EXT4);
    below.error_rule("no-marks", "setxattr", "/**", "EOPNOTSUPP", None);
    let mountpoint = below.aside("upper").display().to_string();
    let program = |words: &[&str]| -> crate::support::Said {
        let mut command = Command::new(crate::support::executable());
        command.args(words).env("NEMESISFS_RUNDIR", below.run_dir()).output().unwrap().into()
    };
    let mount = |instance: &str| {
        let said = program(&["mount", below.mountpoint.to_str().unwrap(), &mountpoint, "--instance", instance]);
        assert_eq!(said.code, 0, "{said:?}");
        let pid = said.out.split_whitespace().find_map(|word| word.strip_prefix("pid=")).unwrap();
        pid.parse::<i32>().unwrap()
    };
    // However the test ends.
    struct Detach<'a>(&'a str);
    impl Drop for Detach<'_> {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    let _upper = Detach(&mountpoint);
    let pid = mount("upper");
    let said = program(&["-H", "upper", "space", "ballast", "--used", "80%"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(below.injections("no-marks").len(), 1);
    assert!((79..=80).contains(&df(&below).1), "{:?}", df(&below));
    let state = below.run_dir().join("upper.ballast");
    assert!(state.exists());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    crate::support::eventually("its end", || !crate::support::is_alive(pid as u32));
    assert_eq!(ballast_files(&below).len(), 1);
    // Whatever the next one is called.
    mount("another");
    assert!(ballast_files(&below).is_empty() && !state.exists());
    let said = program(&["umount", &mountpoint]);
    assert_eq!(said.code, 0, "{said:?}");
    below.end();
}

/// What differences have added up to is what a count of the tree finds, after a storm of everything that changes it.
#[test]
fn accounts_agree_with_a_count_after_a_storm() {
    let mounted = Mounted::in_memory();
    let root = mounted.mountpoint.clone();
    ["in", "out"].iter().for_each(|name| std::fs::create_dir(root.join(name)).unwrap());
    let limits = json!([
        {"limit": "1MiB"},
        {"limit": "1GiB", "uid": 1000},
        {"limit": "1GiB", "path": "/in/**"},
        {"limit": "512KiB", "uid": 0, "path": "/out/**"},
    ]);
    quotas(&mounted, limits.clone());
    mounted.cli(&["space", "virtual", "--size", "1GiB", "--inodes", "1000"]);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let root = &root;
            scope.spawn(move || storm(root, thread));
        }
    });
    // A close that is told to us after it has returned.
    crate::support::eventually("all is closed", || mounted.health("open_files") == 0);
    let counted = used(&mounted);
    let free = space_of(&mounted)["virtual"]["free"].clone();
    let inodes = space_of(&mounted)["virtual"]["inodes"]["free"].as_u64().unwrap();
    quotas(&mounted, limits);
    assert_eq!(counted, used(&mounted), "quotas: differences (left) and a count (right)");
    mounted.cli(&["space", "virtual", "--size", "1GiB"]);
    assert_eq!(free, space_of(&mounted)["virtual"]["free"], "bytes: differences (left) and a count (right)");
    let names = |name: &str| std::fs::read_dir(root.join(name)).unwrap().count() as u64;
    assert_eq!(inodes, 1000 - names("in") - names("out"));
    assert!(refusals(&mounted).iter().any(|event| event["errno"] == "EDQUOT"), "the limits were reached");
    mounted.end();
}

#[test]
fn late_accounts_agree_with_a_count_after_a_storm_and_an_eviction() {
    let mounted = Mounted::in_memory();
    let root = mounted.mountpoint.clone();
    ["in", "out"].iter().for_each(|name| std::fs::create_dir(root.join(name)).unwrap());
    mounted.cli(&["space", "virtual", "--size", "512KiB", "--late"]);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let root = &root;
            scope.spawn(move || storm(root, thread));
        }
    });
    crate::support::eventually("all is closed", || mounted.health("open_files") == 0);
    mounted.cli(&["evict"]);
    let free = space_of(&mounted)["virtual"]["free"].clone();
    mounted.cli(&["space", "virtual", "--size", "512KiB"]);
    assert_eq!(free, space_of(&mounted)["virtual"]["free"], "differences (left) and a count (right)");
    assert!(!refusals(&mounted).is_empty(), "the limit was reached");
    mounted.end();
}

fn storm(root: &std::path::Path, seed: u64) {
    let mut state = seed + 1;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % below
    };
    for _ in 0..1500 {
        let path = |number: u64| root.join(["in", "out"][number as usize % 2]).join(format!("f{}", number / 2));
        let (one, other) = (path(random(16)), path(random(16)));
        // Any of it may fail: somebody else was faster, or there is no space.
        match random(8) {
            0..3 => drop(OpenOptions::new().create(true).truncate(false).write(true).open(one).map(|file| {
                let _ = file.write_at(&vec![1; 1 + random(100_000) as usize], random(100_000));
            })),
            3 => drop(OpenOptions::new().write(true).open(one).map(|file| file.set_len(random(100_000)))),
            4 => drop(std::fs::remove_file(one)),
            5 => drop(std::fs::rename(one, other)),
            6 => drop(std::os::unix::fs::chown(one, Some(1000 * random(2) as u32), None)),
            _ => drop(std::fs::create_dir(&one).and_then(|()| std::fs::remove_dir(one))),
        }
    }
}

#[test]
fn where_nothing_was_limited_refusals_are_counted_from_0() {
    let mounted = Mounted::new();
    let refused = || std::fs::write(mounted.path("f"), [0; 4096]).unwrap_err().raw_os_error();
    let shown = || mounted.http("GET", "/v1/rules/space", None);
    let waited = || mounted.http("GET", "/v1/rules/space/wait?for=100ms", None);
    assert_eq!((shown().status, waited().status), (404, 404), "nothing is limited");
    mounted.cli(&["space", "virtual", "--free", "0"]);
    assert_eq!((refused(), &shown().body["injections"]), (Some(libc::ENOSPC), &json!(1)));
    mounted.cli(&["space", "quota", "--limit", "1GiB", "--path", "/q/**"]);
    assert_eq!(shown().body["injections"], json!(1), "the capacity is the same");
    mounted.reset();
    assert_eq!((shown().status, waited().status), (404, 404));
    mounted.cli(&["space", "virtual", "--free", "0", "--for", "3s"]);
    assert_eq!((&shown().body["injections"], &waited().body["fired"]), (&json!(0), &json!(false)));
    assert_eq!(refused(), Some(libc::ENOSPC));
    crate::support::eventually("its time is over", || shown().status == 404);
    assert_eq!(waited().body["fired"], json!(true), "what has fired has fired");
    mounted.end();
}

#[test]
fn the_time_of_one_ballast_does_not_end_the_next() {
    let mounted = Mounted::on_own_disk(64 << 20, EXT4);
    mounted.cli(&["space", "ballast", "--used", "50%", "--for", "1s"]);
    mounted.cli(&["space", "ballast", "--used", "70%"]);
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(space_of(&mounted)["ballast"]["state"], "full");
    assert_eq!(ballast_files(&mounted).len(), 1);
    mounted.cli(&["space", "ballast", "--used", "50%", "--for", "1s"]);
    mounted.cli(&["space", "clear", "ballast"]);
    std::thread::sleep(std::time::Duration::from_secs(2));
    let expired = mounted.events().into_iter().filter(|event| event["action"] == "expired");
    assert_eq!(expired.count(), 0, "none has lived so long");
    mounted.end();
}
