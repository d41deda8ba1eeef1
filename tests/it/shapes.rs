//! What a program sees of each kind of fault, call by call: on each way to a file, and what the disk has after.
//!
//! The claims are those of the kinds' table; each is asked of a handle opened before arming and of one opened after.
//! Mappings are made by Python programs, which a signal may kill.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::calls::{
    Handle, Opened, PAGE, Way, armed, changed, counted, differences, errno, evict, number, once, only, patched,
    pattern, prepared, same, seen, stored, ways,
};
use crate::support::{Mounted, eventually, within};

const SIZE: usize = 4 * PAGE;

/// Where a write of a handle lands that asks for the second page.
fn landing(way: Way) -> usize {
    if way == Way::Append { SIZE } else { PAGE }
}

#[test]
fn a_short_write_stores_the_count_that_it_tells_and_the_next_one_is_whole() {
    for (way, opened) in ways() {
        for (fault, count) in
            [(json!({"kind": "short", "max_bytes": 512}), 512), (json!({"kind": "short", "fraction": 0.5}), PAGE)]
        {
            let mounted = Mounted::new();
            let before = prepared(&mounted, "f", SIZE);
            let handle = armed(&mounted, "f", (way, opened), once("write", fault));
            let data = pattern(2 * PAGE, 1);
            assert_eq!(handle.write(&data, PAGE as u64).ok(), Some(count), "{way:?} {opened:?}");
            let after = patched(&before, landing(way), &data[..count]);
            assert_eq!((stored(&mounted, "f"), seen(&mounted, "f")), (after.clone(), after), "{way:?} {opened:?}");
            assert_eq!(only(&mounted, "r")["done"], count, "{way:?} {opened:?}");
            assert_eq!(handle.write(&data, 0).ok(), Some(data.len()), "the next one");
            drop(handle);
            mounted.end();
        }
    }
}

/// A device takes no part of a sector.
#[test]
fn a_direct_write_is_short_by_whole_sectors() {
    let mounted = Mounted::new();
    let before = prepared(&mounted, "f", SIZE);
    let direct = (Way::Direct, Opened::BeforeArming);
    for (most, count) in [(100, 512), (700, 512), (1500, 1024)] {
        let handle = armed(&mounted, "f", direct, once("write", json!({"kind": "short", "max_bytes": most})));
        let data = pattern(2 * PAGE, 1);
        assert_eq!(handle.write(&data, 0).ok(), Some(count), "{most}");
        assert_eq!(stored(&mounted, "f"), patched(&before, 0, &data[..count]), "{most}");
        assert_eq!(handle.write(&before[..2 * PAGE], 0).ok(), Some(2 * PAGE));
        mounted.cli(&["rule", "rm", "r"]);
    }
    mounted.end();
}

#[test]
fn a_short_read_gives_right_bytes_and_leaves_the_size_alone() {
    for (way, opened) in
        [(Way::Direct, Opened::BeforeArming), (Way::Direct, Opened::AfterArming), (Way::Cached, Opened::AfterArming)]
    {
        for (fault, count) in
            [(json!({"kind": "short", "max_bytes": 512}), 512), (json!({"kind": "short", "fraction": "25%"}), 2048)]
        {
            let mounted = Mounted::new();
            let before = prepared(&mounted, "f", SIZE);
            let other = Handle::open(Way::Append, &mounted, "f");
            let handle = armed(&mounted, "f", (way, opened), once("read", fault));
            assert_eq!(handle.read(2 * PAGE, PAGE as u64).unwrap(), before[PAGE..PAGE + count], "{way:?} {opened:?}");
            assert_eq!(only(&mounted, "r")["done"], count);
            assert_eq!(other.file.metadata().unwrap().len(), SIZE as u64, "for another handle");
            let end = nix::unistd::lseek(&other.file, 0, nix::unistd::Whence::SeekEnd);
            assert_eq!(end, Ok(SIZE as i64));
            assert_eq!(other.file.write_at(b"at the end", 0).ok(), Some(10));
            assert_eq!(stored(&mounted, "f"), [&before[..], b"at the end"].concat(), "nothing was overwritten");
            assert_eq!(handle.read(2 * PAGE, PAGE as u64).unwrap(), before[PAGE..3 * PAGE], "the next one is whole");
            drop((handle, other));
            mounted.end();
        }
    }
}

#[test]
fn a_cached_read_is_short_at_a_page_and_the_file_stays_as_long() {
    let mounted = Mounted::new();
    let size = 40 * PAGE;
    let before = prepared(&mounted, "f", size);
    let other = Handle::open(Way::Append, &mounted, "f");
    let rule = json!({"match": {"ops": ["read"]}, "fault": {"kind": "short", "max_bytes": "6000"}});
    let handle = armed(&mounted, "f", (Way::Cached, Opened::BeforeArming), rule);
    for (offset, length, count) in
        [(0, 20_000, PAGE), (100, 20_000, PAGE - 100), (0, 100, 100), (20 * PAGE, PAGE, PAGE)]
    {
        let read = handle.read(length, offset as u64).unwrap();
        assert!(read == before[offset..offset + count], "{offset} {length}: {}", read.len());
        assert_eq!(other.file.metadata().unwrap().len(), size as u64);
    }
    // A program that goes on gets all of it, and what is appended goes behind it.
    let mut whole = Vec::new();
    while whole.len() < size {
        let read = handle.read(50_000, whole.len() as u64).unwrap();
        assert!(!read.is_empty(), "at {}", whole.len());
        whole.extend(read);
    }
    assert!(whole == before);
    other.write(b"tail", 0).unwrap();
    assert_eq!(stored(&mounted, "f")[size..], *b"tail");
    let rule = mounted.http("GET", "/v1/rules/r", None).body;
    assert_eq!(rule["injections"], mounted.injections("r").len(), "{rule}");
    drop((handle, other));
    mounted.end();
}

#[test]
fn a_mapping_is_never_short() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 40 * PAGE);
    mounted.rule("r", json!({"match": {"ops": ["read"]}, "fault": {"kind": "short", "max_bytes": 100}}));
    let script = "import mmap,sys,os\nf=os.open('f',os.O_RDWR)\nm=mmap.mmap(f,0)\nb=bytes(m)\n\
                  sys.exit(0 if b==open(sys.argv[1],'rb').read() and os.fstat(f).st_size==len(b) else 1)";
    let mut command = Command::new("python3");
    command.args(["-c", script]).arg(mounted.backing.join("f")).current_dir(&mounted.mountpoint);
    assert!(command.status().unwrap().success());
    mounted.end();
}

#[test]
fn a_lost_write_is_there_for_all_readers_until_it_is_evicted() {
    for (way, opened) in ways() {
        for grows in [false, true] {
            let mounted = Mounted::new();
            let before = prepared(&mounted, "f", SIZE);
            let rule = json!({"match": {"ops": ["write"]}, "fault": {"kind": "drop"}});
            let handle = armed(&mounted, "f", (way, opened), rule);
            let at = if way == Way::Append || grows { SIZE } else { PAGE };
            let data = pattern(2 * PAGE, 1);
            assert_eq!(handle.write(&data, at as u64).ok(), Some(data.len()));
            let size = before.len().max(at + data.len());
            let told = [handle.file.metadata().unwrap().len(), mounted.path("f").metadata().unwrap().len()];
            assert_eq!(told, [size as u64; 2], "{way:?} {opened:?}");
            // Past the cache the old bytes are there at once.
            let shown = if way == Way::Direct { vec![0; data.len()] } else { data.clone() };
            let shown = if way == Way::Direct && !grows { before[PAGE..3 * PAGE].to_vec() } else { shown };
            assert_eq!(handle.read(data.len(), at as u64).unwrap(), shown, "{way:?} {opened:?} {grows}: the writer");
            handle.file.sync_all().unwrap();
            if way != Way::Direct {
                same(
                    &seen(&mounted, "f"),
                    &patched(&before, at, &data),
                    &format!("{way:?} {opened:?} {grows}: another"),
                );
            }
            evict(&mounted);
            let mut after = before.clone();
            after.resize(size, 0);
            same(&seen(&mounted, "f"), &after, &format!("{way:?} {opened:?} {grows}: evicted"));
            assert_eq!(handle.read(data.len(), at as u64).unwrap(), after[at..at + data.len()]);
            assert_eq!(mounted.path("f").metadata().unwrap().len(), size as u64);
            mounted.reset();
            assert_eq!(handle.write(&data, at as u64).ok(), Some(data.len()));
            let at = if way == Way::Append { size } else { at };
            evict(&mounted);
            same(&seen(&mounted, "f"), &patched(&after, at, &data), "a write after it stays");
            drop(handle);
            mounted.end();
        }
    }
}

#[test]
fn a_lost_store_into_a_mapping_is_gone_when_it_is_evicted() {
    let mounted = Mounted::new();
    let before = prepared(&mounted, "f", SIZE);
    mounted.rule("r", json!({"match": {"ops": ["write"]}, "fault": {"kind": "drop"}}));
    let script = "import mmap,os\n\
        f=os.open('f',os.O_RDWR); m=mmap.mmap(f,0)\n\
        m[5000:5010]=b'x'*10; m.flush(); os.fsync(f)\n\
        assert m[5000:5010]==b'x'*10 and os.pread(f,10,5000)==b'x'*10 and open('f','rb').read()[5000:5010]==b'x'*10";
    mounted.python(script, &[]);
    assert!(number(&mounted, "r", "injections") >= 1);
    evict(&mounted);
    same(&seen(&mounted, "f"), &before, "");
    mounted.end();
}

#[test]
fn a_lost_truncation_is_seen_until_it_is_evicted() {
    for (size, opened) in [(PAGE, Opened::BeforeArming), (PAGE, Opened::AfterArming), (8 * PAGE, Opened::BeforeArming)]
    {
        let mounted = Mounted::new();
        let before = prepared(&mounted, "f", SIZE);
        let rule = json!({"match": {"ops": ["truncate"]}, "fault": {"kind": "drop"}});
        let handle = armed(&mounted, "f", (Way::Cached, opened), rule);
        handle.file.set_len(size as u64).unwrap();
        let mut cut = before.clone();
        cut.resize(size, 0);
        same(&seen(&mounted, "f"), &cut, "");
        assert_eq!(handle.file.metadata().unwrap().len(), size as u64);
        assert_eq!(only(&mounted, "r")["op"], "setattr");
        evict(&mounted);
        let after = before.clone();
        assert!(seen(&mounted, "f") == after, "to {size}: the old size is back");
        assert_eq!(handle.file.metadata().unwrap().len(), after.len() as u64, "for the old handle too");
        drop(handle);
        mounted.end();
    }
}

#[test]
fn a_lost_fallocate_is_taken_back_when_it_is_evicted() {
    use nix::fcntl::{FallocateFlags, fallocate};
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for (flags, offset) in
        [(FallocateFlags::empty(), SIZE), (punch, PAGE), (FallocateFlags::FALLOC_FL_ZERO_RANGE, PAGE)]
    {
        let mounted = Mounted::new();
        let before = prepared(&mounted, "f", SIZE);
        let rule = json!({"match": {"ops": ["fallocate"]}, "fault": {"kind": "drop"}});
        let handle = armed(&mounted, "f", (Way::Cached, Opened::BeforeArming), rule);
        fallocate(&handle.file, flags, offset as i64, PAGE as i64).unwrap();
        let shown = patched(&before, offset, &[0; PAGE]);
        same(&seen(&mounted, "f"), &shown, &format!("{flags:?}"));
        only(&mounted, "r");
        evict(&mounted);
        let mut after = before.clone();
        after.resize(shown.len(), 0);
        same(&seen(&mounted, "f"), &after, &format!("{flags:?}"));
        drop(handle);
        mounted.end();
    }
}

/// A copy inside the filesystem would pass rules on reads and writes by.
#[test]
fn a_copy_is_reads_and_writes_while_a_rule_is_about_bytes() {
    for fault in [
        json!({"kind": "torn", "keep": 512}),
        json!({"kind": "short", "max_bytes": 512}),
        json!({"kind": "corrupt", "mode": "zero"}),
        json!({"kind": "misdirect", "offset_delta": "+4KiB"}),
    ] {
        let mounted = Mounted::new();
        prepared(&mounted, "from", SIZE);
        prepared(&mounted, "to", SIZE);
        let (from, to) =
            (Handle::open(Way::Cached, &mounted, "from").file, Handle::open(Way::Cached, &mounted, "to").file);
        let (mut at, mut to_at) = (0, 0);
        mounted.rule("r", json!({"match": {"ops": ["write"], "path": "/to"}, "fault": fault.clone()}));
        let copied = nix::fcntl::copy_file_range(&from, Some(&mut at), &to, Some(&mut to_at), 2 * PAGE);
        assert!(copied.is_ok_and(|count| count > 0), "{fault}: {copied:?}");
        let event = &counted(&mounted, "r")[0];
        assert_eq!((&event["op"], &event["kind"]), (&json!("write"), &fault["kind"]), "{event}");
        drop((from, to));
        mounted.end();
    }
}

#[test]
fn a_torn_write_keeps_exactly_the_ranges_that_it_says() {
    let part = 2 * PAGE / 4;
    let cases: [(Value, Vec<(usize, usize)>); 6] = [
        (json!(1000), vec![(0, 1000)]),
        (json!("50%"), vec![(0, PAGE)]),
        (json!("3 sectors"), vec![(0, 1536)]),
        (json!("1,3/4"), vec![(0, part), (2 * part, 3 * part)]),
        (json!({"parts": 4, "persist": [2, 4]}), vec![(part, 2 * part), (3 * part, 4 * part)]),
        (json!(0), vec![]),
    ];
    let mounted = Mounted::new();
    for (way, opened) in ways() {
        for (keep, kept) in &cases {
            for then in ["ok", "error"] {
                let before = prepared(&mounted, "f", SIZE);
                let fault = json!({"kind": "torn", "keep": keep, "then": then});
                let handle = armed(&mounted, "f", (way, opened), once("write", fault));
                let data = pattern(2 * PAGE, 1);
                let result = handle.write(&data, PAGE as u64);
                let at = landing(way);
                let context = format!("{way:?} {opened:?} keep {keep} then {then}");
                match then {
                    "ok" => assert_eq!(result.ok(), Some(data.len()), "{context}"),
                    _ => assert_eq!(errno(result), libc::EIO, "{context}"),
                }
                if then == "ok" && way != Way::Direct {
                    same(&seen(&mounted, "f"), &patched(&before, at, &data), &format!("{context}: until evicted"));
                }
                evict(&mounted);
                let mut after = before.clone();
                if then == "ok" {
                    after.resize(SIZE.max(at + data.len()), 0);
                }
                for (from, to) in kept {
                    after = patched(&after, at + from, &data[*from..*to]);
                }
                same(&seen(&mounted, "f"), &after, &context);
                assert_eq!(number(&mounted, "r", "injections"), 1, "{context}");
                let event = counted(&mounted, "r").pop().expect("its event");
                let lost = (0..data.len()).filter(|i| !kept.iter().any(|(from, to)| (*from..*to).contains(i)));
                assert_eq!(changed(&event), lost.map(|i| at + i).collect::<Vec<_>>(), "{context}: {event}");
                drop(handle);
                mounted.cli(&["rule", "rm", "r"]);
                std::fs::remove_file(mounted.path("f")).unwrap();
            }
        }
    }
    mounted.end();
}

#[test]
fn a_damaged_write_looks_right_until_it_is_evicted_and_can_be_traced_and_mended() {
    let modes = [
        json!({"kind": "corrupt", "mode": "bitflip", "bits": 3, "when": "write"}),
        json!({"kind": "corrupt", "mode": "zero", "length": 100}),
        json!({"kind": "corrupt", "mode": "random", "length": 600, "nth": 100}),
        json!({"kind": "corrupt", "mode": "byte", "value": "0x00", "nth": 1}),
    ];
    for (way, opened) in ways() {
        for fault in &modes {
            let mounted = Mounted::new();
            let before = prepared(&mounted, "f", SIZE);
            let handle = armed(&mounted, "f", (way, opened), once("write", fault.clone()));
            let data = pattern(2 * PAGE, 1);
            assert_eq!(handle.write(&data, PAGE as u64).ok(), Some(data.len()));
            let at = landing(way);
            let right = patched(&before, at, &data);
            if way != Way::Direct {
                let got = handle.read(data.len(), at as u64).unwrap();
                same(&got, &data, &format!("{way:?} {opened:?} {fault}: in the cache"));
            }
            evict(&mounted);
            let event = only(&mounted, "r");
            let wrong = seen(&mounted, "f");
            assert!(differences(&wrong, &right) == changed(&event), "{way:?} {opened:?} {fault}: {event}");
            assert_eq!(stored(&mounted, "f"), wrong);
            let first = changed(&event)[0];
            let asked = mounted.http("GET", &format!("/v1/repair?path=/f&offset={first}"), None).body;
            let place = &asked["damaged"][0]["places"][0];
            assert_eq!((&place["rule"], &place["nth"]), (&json!("r"), &json!(1)), "{asked}");
            let good = (0..right.len()).find(|i| !changed(&event).contains(i)).unwrap();
            let asked = mounted.http("GET", &format!("/v1/repair?path=/f&offset={good}"), None).body;
            assert_eq!(asked["damaged"], json!([]), "not this one");
            assert_eq!(mounted.http("POST", "/v1/repair", Some(&json!({"path": "/f"}))).status, 200);
            assert_eq!((seen(&mounted, "f"), stored(&mounted, "f")), (right.clone(), right), "{way:?} {fault}: mended");
            drop(handle);
            mounted.end();
        }
    }
}

#[test]
fn what_is_written_anew_or_cut_off_is_no_longer_ours_to_mend() {
    let mounted = Mounted::new();
    let before = prepared(&mounted, "f", SIZE);
    let damage = || {
        mounted.rule("r", once("write", json!({"kind": "corrupt", "mode": "zero", "length": 4096, "nth": 1})));
        let handle = Handle::open(Way::Cached, &mounted, "f");
        assert_eq!(handle.write(&pattern(PAGE, 1), PAGE as u64).ok(), Some(PAGE));
        mounted.cli(&["rule", "rm", "r"]);
        handle
    };
    let damaged = || {
        let listed = mounted.http("GET", "/v1/repair", None).body["damaged"].clone();
        let places = listed[0]["places"].as_array().cloned().unwrap_or_default();
        let number = |place: &Value, key: &str| place[key].as_u64().unwrap();
        places.iter().map(|place| (number(place, "offset"), number(place, "length"))).collect::<Vec<_>>()
    };
    let handle = damage();
    assert_eq!(damaged(), [(4096, 4096)]);
    handle.write(&[9; 1000], 5000).unwrap();
    assert_eq!(damaged(), [(4096, 904), (6000, 2192)], "a part was written anew");
    handle.file.set_len(7000).unwrap();
    assert_eq!(damaged(), [(4096, 904), (6000, 1000)], "a part was cut off");
    mounted.cli(&["repair", "/f"]);
    evict(&mounted);
    let right = patched(&patched(&before, PAGE, &pattern(PAGE, 1)), 5000, &[9; 1000]);
    assert_eq!(seen(&mounted, "f"), right[..7000], "what was written since is not undone");
    drop(handle);
    let handle = damage();
    drop(handle);
    std::fs::write(mounted.path("f"), "new").unwrap();
    assert_eq!(damaged(), []);
    mounted.end();
}

#[test]
fn a_damaged_read_is_in_flight_only() {
    for (way, opened) in ways() {
        let mounted = Mounted::new();
        let before = prepared(&mounted, "f", SIZE);
        let fault = json!({"kind": "corrupt", "mode": "bitflip", "bits": 2, "when": "read"});
        let rule = json!({"match": {"ops": ["read"]}, "fault": fault});
        let handle = armed(&mounted, "f", (way, opened), rule);
        let got = handle.read(SIZE, 0).unwrap();
        let mut told: Vec<usize> = counted(&mounted, "r").iter().flat_map(changed).collect();
        told.sort_unstable();
        let differ = differences(&got, &before);
        assert!(!differ.is_empty(), "{way:?} {opened:?}");
        assert_eq!(differ, told, "{way:?} {opened:?}");
        assert_eq!(stored(&mounted, "f"), before);
        mounted.cli(&["rule", "rm", "r"]);
        assert_eq!(handle.read(SIZE, 0).unwrap(), before, "{way:?} {opened:?}: through the same handle");
        same(&seen(&mounted, "f"), &before, "");
        assert_eq!(mounted.http("GET", "/v1/repair", None).body["damaged"], json!([]));
        drop(handle);
        mounted.end();
    }
}

/// A life that ends, and a rule that is switched off, are removals too.
#[test]
fn no_wrong_page_stays_when_a_rule_on_reads_is_out_of_force() {
    for how in ["disable", "reset", "for"] {
        let mounted = Mounted::new();
        let before = prepared(&mounted, "f", SIZE);
        let handle = Handle::open(Way::Cached, &mounted, "f");
        let lasts = if how == "for" { json!("2s") } else { Value::Null };
        let fault = json!({"kind": "corrupt", "mode": "zero", "when": "read"});
        mounted.rule("r", json!({"match": {"ops": ["read"]}, "trigger": {"for": lasts}, "fault": fault}));
        assert_eq!(handle.read(SIZE, 0).unwrap(), [0; SIZE], "{how}");
        match how {
            "disable" => drop(mounted.cli(&["rule", "disable", "r"])),
            "reset" => mounted.reset(),
            _ => eventually("good bytes", || handle.read(SIZE, 0).unwrap() == before),
        }
        assert_eq!(handle.read(SIZE, 0).unwrap(), before, "{how}");
        drop(handle);
        mounted.end();
    }
}

#[test]
fn a_write_goes_astray_and_both_places_can_be_mended() {
    for (way, opened) in [
        (Way::Cached, Opened::BeforeArming),
        (Way::Cached, Opened::AfterArming),
        (Way::Direct, Opened::BeforeArming),
        (Way::Direct, Opened::AfterArming),
    ] {
        for (fault, place) in [
            (json!({"kind": "misdirect", "offset_delta": "+8KiB"}), 3 * PAGE),
            (json!({"kind": "misdirect", "to": 0}), 0),
            (json!({"kind": "misdirect", "offset_delta": -512}), PAGE - 512),
        ] {
            let mounted = Mounted::new();
            let before = prepared(&mounted, "f", SIZE);
            let handle = armed(&mounted, "f", (way, opened), once("write", fault.clone()));
            let data = pattern(PAGE, 1);
            assert_eq!(handle.write(&data, PAGE as u64).ok(), Some(PAGE), "{way:?} {opened:?} {fault}");
            let event = only(&mounted, "r");
            evict(&mounted);
            same(&seen(&mounted, "f"), &patched(&before, place, &data), &format!("{way:?} {opened:?} {fault}"));
            assert!(changed(&event).contains(&PAGE) && changed(&event).contains(&place), "{event}");
            mounted.cli(&["repair"]);
            same(
                &seen(&mounted, "f"),
                &patched(&before, PAGE, &data),
                &format!("{way:?} {fault}: as it was asked for"),
            );
            drop(handle);
            mounted.end();
        }
    }
}

#[test]
fn a_write_that_goes_astray_beyond_the_end_is_lost_and_the_size_is_as_asked_for() {
    for (way, delta) in
        [(Way::Cached, "+1MiB"), (Way::Direct, "+1MiB"), (Way::Append, "-4KiB"), (Way::Direct, "+12800")]
    {
        let mounted = Mounted::new();
        let before = prepared(&mounted, "f", SIZE);
        let fault = json!({"kind": "misdirect", "offset_delta": delta});
        let handle = armed(&mounted, "f", (way, Opened::BeforeArming), once("write", fault));
        let data = pattern(PAGE, 1);
        assert_eq!(handle.write(&data, 0).ok(), Some(PAGE), "{way:?} {delta}");
        evict(&mounted);
        let after = match (way, delta) {
            (Way::Append, _) => patched(&patched(&before, SIZE, &[0; PAGE]), SIZE - PAGE, &data),
            (_, "+12800") => patched(&before, 12800, &data[..SIZE - 12800]),
            _ => before,
        };
        same(&seen(&mounted, "f"), &after, &format!("{way:?} {delta}"));
        drop(handle);
        mounted.end();
    }
}

#[test]
fn a_read_comes_from_elsewhere_and_nothing_stays_of_it() {
    for (way, opened) in ways() {
        let mounted = Mounted::new();
        let before = prepared(&mounted, "f", SIZE);
        let rule = json!({"match": {"ops": ["read"]}, "fault": {"kind": "misdirect", "to": 0}});
        let handle = armed(&mounted, "f", (way, opened), rule);
        assert_eq!(handle.read(PAGE, 2 * PAGE as u64).unwrap()[..512], before[..512], "{way:?} {opened:?}");
        mounted.cli(&["rule", "rm", "r"]);
        assert_eq!(handle.read(PAGE, 2 * PAGE as u64).unwrap(), before[2 * PAGE..3 * PAGE], "{way:?} {opened:?}");
        assert_eq!((seen(&mounted, "f"), stored(&mounted, "f")), (before.clone(), before));
        drop(handle);
        mounted.end();
    }
}

fn bad(ranges: &[&str], heal: bool) -> Value {
    let fault = json!({"kind": "bad_sectors", "ranges": ranges, "heal_on_write": heal});
    json!({"match": {"path": "/f"}, "fault": fault})
}

#[test]
fn a_bad_sector_stops_a_read_there_and_stays_bad() {
    for (way, opened) in ways() {
        let mounted = Mounted::new();
        let before = prepared(&mounted, "f", 64 * PAGE);
        let handle = armed(&mounted, "f", (way, opened), bad(&["80KiB..84KiB"], false));
        let bad_page = 20 * PAGE;
        for _ in 0..2 {
            match way {
                // One request, one error.
                Way::Direct => assert_eq!(errno(handle.read(64 * PAGE, 0)), libc::EIO),
                _ => assert_eq!(handle.read(64 * PAGE, 0).unwrap(), before[..bad_page], "{way:?} {opened:?}"),
            }
            assert_eq!(errno(handle.read(PAGE, bad_page as u64)), libc::EIO, "{way:?} {opened:?}");
            let behind = handle.read(PAGE, (bad_page + PAGE) as u64);
            assert_eq!(behind.unwrap(), before[bad_page + PAGE..bad_page + 2 * PAGE], "{way:?} {opened:?}");
        }
        handle.write(&pattern(PAGE, 1), bad_page as u64).unwrap();
        if way == Way::Direct {
            assert_eq!(errno(handle.read(PAGE, bad_page as u64)), libc::EIO, "a write mends nothing by itself");
        }
        mounted.reset();
        assert_eq!(handle.read(PAGE, 0).unwrap(), before[..PAGE]);
        drop(handle);
        mounted.end();
    }
}

#[test]
fn one_error_of_a_bad_sector_is_counted_once() {
    for (way, opened) in ways() {
        let mounted = Mounted::new();
        prepared(&mounted, "f", 64 * PAGE);
        let handle = armed(&mounted, "f", (way, opened), bad(&["80KiB..81KiB"], false));
        for times in 1..=3 {
            assert_eq!(errno(handle.read(PAGE, 20 * PAGE as u64)), libc::EIO);
            assert_eq!(counted(&mounted, "r").len(), times, "{way:?} {opened:?}: {:?}", mounted.injections("r"));
            assert_eq!(number(&mounted, "r", "injections"), times as u64);
        }
        drop(handle);
        mounted.end();
    }
}

#[test]
fn a_load_from_a_bad_sector_is_a_bus_error() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", 64 * PAGE);
    mounted.rule("r", bad(&["80KiB..84KiB"], false));
    let load = |at: usize| {
        let script = "import mmap,sys; f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ); m[int(sys.argv[2])]";
        Command::new("python3")
            .args(["-c", script])
            .arg(mounted.path("f"))
            .arg(at.to_string())
            .status()
            .unwrap()
            .signal()
    };
    assert_eq!(load(20 * PAGE + 1), Some(libc::SIGBUS));
    assert_eq!(load(100), None);
    assert_eq!(load(20 * PAGE + 1), Some(libc::SIGBUS), "it stays bad");
    mounted.end();
}

#[test]
fn a_write_of_a_whole_sector_makes_it_good_if_the_medium_has_spare_ones() {
    let mounted = Mounted::new();
    let before = prepared(&mounted, "f", SIZE);
    for way in [Way::Cached, Way::Direct] {
        let handle = armed(&mounted, "f", (way, Opened::BeforeArming), bad(&["4KiB..12KiB"], true));
        assert_eq!(errno(handle.read(PAGE, PAGE as u64)), libc::EIO, "{way:?}");
        assert_eq!(handle.write(&before[PAGE..2 * PAGE], PAGE as u64).ok(), Some(PAGE));
        evict(&mounted);
        assert_eq!(handle.read(PAGE, PAGE as u64).unwrap(), before[PAGE..2 * PAGE], "{way:?}: healed");
        assert_eq!(errno(handle.read(PAGE, 2 * PAGE as u64)), libc::EIO, "{way:?}: the next one is bad still");
        drop(handle);
        mounted.reset();
    }
    mounted.rule("r", bad(&["4KiB..8KiB"], true));
    let handle = Handle::open(Way::Cached, &mounted, "f");
    assert_eq!(handle.write(&before[PAGE + 100..PAGE + 600], PAGE as u64 + 100).ok(), Some(500));
    evict(&mounted);
    assert_eq!(errno(handle.read(PAGE, PAGE as u64)), libc::EIO, "no whole sector was written");
    drop(handle);
    mounted.end();
}

#[test]
fn a_write_that_fails_or_is_lost_makes_no_bad_sector_good() {
    let mounted = Mounted::new();
    let before = prepared(&mounted, "f", SIZE);
    let handle = armed(&mounted, "f", (Way::Direct, Opened::BeforeArming), bad(&["4KiB..8KiB"], true));
    for fault in [json!({"kind": "error", "errno": "EIO"}), json!({"kind": "drop"})] {
        mounted.rule("fails", json!({"match": {"ops": ["write"]}, "fault": fault}));
        let _ = handle.write(&before[PAGE..2 * PAGE], PAGE as u64);
        assert_eq!(errno(handle.read(PAGE, PAGE as u64)), libc::EIO, "{fault}");
        mounted.cli(&["rule", "rm", "fails"]);
    }
    assert_eq!(handle.write(&before[PAGE..2 * PAGE], PAGE as u64).ok(), Some(PAGE));
    assert_eq!(handle.read(PAGE, PAGE as u64).unwrap(), before[PAGE..2 * PAGE]);
    drop(handle);
    mounted.end();
}

#[test]
fn bad_sectors_beyond_the_end_harm_nobody_until_the_file_grows_there() {
    let mounted = Mounted::new();
    let before = prepared(&mounted, "f", SIZE);
    let handle = armed(&mounted, "f", (Way::Cached, Opened::BeforeArming), bad(&["16KiB..1GiB"], false));
    assert_eq!(handle.read(1 << 20, 0).unwrap(), before);
    assert!(handle.read(100, SIZE as u64).unwrap().is_empty());
    same(&seen(&mounted, "f"), &before, "");
    assert_eq!(number(&mounted, "r", "injections"), 0);
    handle.write(&[1; PAGE], SIZE as u64).unwrap();
    evict(&mounted);
    assert_eq!(errno(handle.read(PAGE, SIZE as u64)), libc::EIO);
    drop(handle);
    mounted.end();
}

#[test]
fn attributes_are_wrong_as_told_and_right_again_without_the_rule() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", SIZE);
    let path = mounted.path("f");
    let file = File::open(&path).unwrap();
    type Shown = fn(&std::fs::Metadata) -> i128;
    let cases: [(Value, Shown, i128); 7] = [
        (json!({"size": "+1"}), |meta| meta.len().into(), SIZE as i128 + 1),
        (json!({"size": 0}), |meta| meta.len().into(), 0),
        (json!({"perm": "0400"}), |meta| (meta.mode() & 0o7777).into(), 0o400),
        (json!({"uid": 4711}), |meta| meta.uid().into(), 4711),
        (json!({"gid": 4712}), |meta| meta.gid().into(), 4712),
        (json!({"nlink": 7}), |meta| meta.nlink().into(), 7),
        (json!({"mtime": "2001-09-09T01:46:40Z"}), |meta| meta.mtime().into(), 1_000_000_000),
    ];
    for (attributes, shown, wrong) in cases {
        let told = || [path.metadata().unwrap(), file.metadata().unwrap()].map(|meta| shown(&meta));
        let right = told();
        let mut fault = attributes.clone();
        fault["kind"] = "attr".into();
        mounted.rule("r", json!({"match": {"path": "/f"}, "fault": fault}));
        assert_eq!(told(), [wrong; 2], "{attributes}");
        assert!(number(&mounted, "r", "injections") > 0);
        mounted.cli(&["rule", "rm", "r"]);
        assert_eq!(told(), right, "{attributes}: without it");
        assert_eq!(std::fs::read(&path).unwrap().len(), SIZE, "{attributes}");
    }
    drop(file);
    mounted.end();
}

/// Runs a Python program that meets a write that kills; gives its end.
fn python(mounted: &Mounted, script: &str) -> std::process::Output {
    Command::new("python3").args(["-c", script]).current_dir(&mounted.mountpoint).output().unwrap()
}

#[test]
fn the_caller_dies_at_that_write_and_nobody_else() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", SIZE);
    let rule = json!({
        "match": {"ops": ["write"], "path": "/log"}, "trigger": {"skip": 2, "times": 1},
        "fault": {"kind": "kill", "signal": "SIGKILL"},
    });
    mounted.rule("r", rule);
    let said = python(
        &mounted,
        "import os\nf=os.open('log',os.O_CREAT|os.O_WRONLY)\nfor i in range(9): os.write(f,b'0123456789')",
    );
    assert_eq!(said.status.signal(), Some(libc::SIGKILL));
    let size = stored(&mounted, "log").len();
    assert!((20..=30).contains(&size), "it died at its third write: {size}");
    let event = only(&mounted, "r");
    assert_eq!((&event["op"], &event["offset"]), (&json!("write"), &json!(20)), "{event}");
    mounted.end();
}

#[test]
fn a_caller_that_handles_the_signal_goes_on() {
    let mounted = Mounted::new();
    let rule = json!({
        "match": {"ops": ["write"]}, "trigger": {"times": 1}, "fault": {"kind": "kill", "signal": "SIGTERM"},
    });
    mounted.rule("r", rule);
    let script = "import os,signal\ngot=[]\nsignal.signal(signal.SIGTERM,lambda *a: got.append(1))\n\
        f=os.open('f',os.O_CREAT|os.O_WRONLY)\nprint(os.write(f,b'x'*100),os.write(f,b'x'*100),len(got))";
    let said = python(&mounted, script);
    assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), "100 100 1", "{said:?}");
    only(&mounted, "r");
    mounted.end();
}

/// Only lower bounds: what else the machine does takes time too.
#[test]
fn two_threads_share_the_rate_of_a_slow_disk() {
    let mounted = Mounted::new();
    for (fault, each) in [
        (json!({"kind": "throttle", "bytes_per_second": "1MiB"}), 64 << 10),
        (json!({"kind": "throttle", "ops_per_second": 20}), 100),
    ] {
        mounted.rule("r", json!({"match": {"ops": ["write"]}, "fault": fault}));
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for name in ["a", "b"] {
                let file = File::create(mounted.path(name)).unwrap();
                scope.spawn(move || (0..4).for_each(|i| file.write_all_at(&vec![1; each], (i * each) as u64).unwrap()));
            }
        });
        // Eight at 16 or at 20 a second.
        let least = if each == 100 { Duration::from_millis(400) } else { Duration::from_millis(500) };
        assert!(begin.elapsed() >= least, "{fault}: {:?}", begin.elapsed());
        assert!(counted(&mounted, "r").iter().all(|event| event["delay_ns"].as_u64() > Some(0)));
    }
    mounted.end();
}

#[test]
fn a_burst_goes_at_once_and_a_delay_is_added_to_it() {
    let mounted = Mounted::new();
    let file = File::create(mounted.path("f")).unwrap();
    let throttle = json!({"kind": "throttle", "ops_per_second": 10, "burst": 5});
    mounted.rule("slow", json!({"match": {"ops": ["write"]}, "fault": throttle}));
    (0..5).for_each(|_| file.write_all_at(b"x", 0).unwrap());
    assert_eq!(number(&mounted, "slow", "injections"), 0, "the burst waits for nothing, and is no injection");
    mounted.rule("late", json!({"match": {"ops": ["write"]}, "fault": {"kind": "latency", "delay": "100ms"}}));
    let begin = Instant::now();
    file.write_all_at(b"x", 0).unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(100));
    drop(file);
    mounted.end();
}

#[test]
fn a_stall_of_some_time_ends_as_it_says() {
    let mounted = Mounted::new();
    for (op, then) in [("write", json!({"then": "error", "errno": "ETIMEDOUT"})), ("fsync", json!({"then": "ok"}))] {
        let file = File::create(mounted.path("f")).unwrap();
        let mut fault = json!({"kind": "stall", "delay": "200ms"});
        fault.as_object_mut().unwrap().extend(then.as_object().unwrap().clone());
        mounted.rule("r", once(op, fault));
        let begin = Instant::now();
        let result = if op == "write" { file.write_at(b"data", 0).map(drop) } else { file.sync_all() };
        assert!(begin.elapsed() >= Duration::from_millis(200));
        assert_eq!(errno(result), if op == "write" { libc::ETIMEDOUT } else { 0 });
        assert_eq!(number(&mounted, "r", "injections"), 1);
        file.write_all_at(b"data", 0).unwrap();
        file.sync_all().unwrap();
        mounted.cli(&["rule", "rm", "r"]);
    }
    mounted.end();
}

#[test]
fn a_stall_that_is_released_ends_in_its_error_and_one_that_is_removed_does_not() {
    for (how, wanted) in [("release", libc::EIO), ("rm", 0)] {
        let mounted = Mounted::new();
        let file = File::create(mounted.path("f")).unwrap();
        mounted.rule("r", once("write", json!({"kind": "stall", "then": "error"})));
        let writer = std::thread::spawn(move || errno(file.write_at(b"data", 0)));
        eventually("it hangs", || mounted.health("parked") == 1);
        mounted.cli(&["rule", how, "r"]);
        let told = within(Duration::from_secs(20), move || writer.join().unwrap());
        assert_eq!(told, Some(wanted), "{how}");
        assert_eq!(stored(&mounted, "f").is_empty(), wanted != 0, "{how}");
        mounted.end();
    }
}

#[test]
fn a_kill_of_the_mount_reaches_every_holder_and_not_the_daemon() {
    let mounted = Mounted::new();
    prepared(&mounted, "f", SIZE);
    let hold = |how: &str| {
        let script = format!("{how}\nprint('ready',flush=True)\nimport time\ntime.sleep(20)");
        let mut command = Command::new("python3");
        command.args(["-c", &script]).current_dir(&mounted.mountpoint).stdout(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        assert_eq!(line, "ready\n");
        child
    };
    let mut holders =
        [hold("f=open('f'); import os; os.chdir('/')"), hold("import os; f=os.open('.', os.O_RDONLY); os.chdir('/')")];
    let mut stranger = Command::new("sleep").arg("60").spawn().unwrap();
    let rule = json!({
        "match": {"ops": ["write"]}, "trigger": {"times": 1},
        "fault": {"kind": "kill", "signal": "SIGKILL", "target": "mount"},
    });
    mounted.rule("r", rule);
    let status = Command::new("sh")
        .args(["-c", "exec 3> new; echo x >&3; sleep 5"])
        .current_dir(&mounted.mountpoint)
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(libc::SIGKILL));
    for holder in &mut holders {
        assert_eq!(holder.wait().unwrap().signal(), Some(libc::SIGKILL));
    }
    assert!(stranger.try_wait().unwrap().is_none(), "who has nothing open here lives");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    mounted.check();
    only(&mounted, "r");
    mounted.end();
}
