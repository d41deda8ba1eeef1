//! What a normal write costs: three system calls of the daemon, and no allocation.
//!
//! The allocations are counted in this very process, which serves a mount for that. The allocator below is that of all
//! tests, so it does next to nothing while nobody counts; it must never allocate, nor wait.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};

use fuser::{Session, SessionACL};
use nemesisfs::event::Ring;
use nemesisfs::fs::Core;
use nemesisfs::fs::adapter::Adapter;
use nemesisfs::sys::mounts;
use nix::mount::MsFlags;

use crate::support::{Mounted, Trace, eventually, is_mounted};

const WRITES: usize = 1000;

/// The readers of a daemon.
fn readers(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap());
    let is_reader = |task: &std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("fuser-"))
    };
    tasks.filter(is_reader).map(|task| task.file_name().to_str().unwrap().parse().unwrap()).collect()
}

/// The calls of the readers while something is done, with how often each was made.
fn calls(mounted: &Mounted, act: impl FnOnce()) -> BTreeMap<String, usize> {
    let trace = Trace::of(mounted, &readers(mounted.pid), &[]);
    act();
    let mut counts = BTreeMap::new();
    for line in trace.end() {
        // `1234 pwrite64(12, …`; a call that another one comes into is told in two lines.
        let call = line.split_whitespace().nth(1).unwrap_or_default();
        if let Some((name, _)) = call.split_once('(') {
            *counts.entry(name.to_string()).or_default() += 1;
        }
    }
    counts
}

fn three_calls_each(what: &str, counts: &BTreeMap<String, usize>) {
    assert_eq!(counts["pwrite64"], WRITES, "{what}: {counts:?}");
    // Under strace this takes seconds, and once a second the kernel asks for the attributes; and who waits in a read when
    // strace comes and goes makes another one.
    let all: usize = counts.values().sum();
    assert!((3 * WRITES..3 * WRITES + 60).contains(&all), "{what}: {counts:?}");
}

fn opened(path: &Path, flags: i32) -> File {
    OpenOptions::new().write(true).custom_flags(flags).open(path).unwrap()
}

/// A process of its own: when another test starts one, our files are closed in it, which the kernel tells.
const WRITER: &str = r#"
import mmap, os, sys, time
aside, how, user = sys.argv[3], sys.argv[4], int(sys.argv[5])
os.setgroups([]), os.setgid(user), os.setuid(user)
fd = os.open('f', os.O_WRONLY | {'buffered': 0, 'direct': os.O_DIRECT, 'append': os.O_APPEND}[how])
page = mmap.mmap(-1, 4096)
def write():
    for n in range(1000):
        if how == 'append': os.write(fd, b'x' * 512)
        else: os.pwritev(fd, [page], n % 64 * 4096)
def say(word): open(f'{aside}/{word}', 'w').close()
def wait(word):
    while not os.path.exists(f'{aside}/{word}'): time.sleep(0.01)
write(), say('ready'), wait('go'), write(), say('done'), wait('end')
"#;

#[test]
fn a_write_costs_three_system_calls_of_every_sort_and_user() {
    let mounted = Mounted::new();
    std::fs::write(mounted.path("f"), vec![0; 64 * 4096]).unwrap();
    std::fs::set_permissions(mounted.path("f"), Permissions::from_mode(0o666)).unwrap();
    for (how, user) in ["buffered", "direct", "append"].iter().flat_map(|how| [(how, "0"), (how, "65534")]) {
        let aside = mounted.aside(&format!("{how}{user}"));
        let arguments = [aside.as_path(), Path::new(how), Path::new(user)];
        let counts = std::thread::scope(|scope| {
            let client = scope.spawn(|| mounted.python(WRITER, &arguments));
            let said = |word: &str| eventually(word, || aside.join(word).exists() || client.is_finished());
            let say = |word: &str| drop(File::create(aside.join(word)).unwrap());
            said("ready");
            let counts = calls(&mounted, || {
                say("go");
                said("done");
            });
            say("end");
            counts
        });
        three_calls_each(&format!("{how}, user {user}"), &counts);
    }
    mounted.end();
}

/// Counts what the readers of this process allocate.
struct Counting;

static COUNTS: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Is this thread a reader? Found out once, while somebody counts.
    static READER: Cell<Option<bool>> = const { Cell::new(None) };
}

fn is_reader() -> bool {
    READER.get().unwrap_or_else(|| {
        let mut name = [0u8; 16];
        // SAFETY: PR_GET_NAME writes at most 16 bytes, and there are as many.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        let found = name.starts_with(b"fuser-");
        READER.set(Some(found));
        found
    })
}

fn count() {
    if COUNTS.load(Relaxed) && is_reader() {
        ALLOCATIONS.fetch_add(1, Relaxed);
    }
}

// SAFETY: all that is asked is handed on, unchanged, to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller has promised what the system's allocator wants.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(old, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How many allocations the readers make while something is done.
fn allocations(act: impl FnOnce()) -> u64 {
    ALLOCATIONS.store(0, Release);
    COUNTS.store(true, Release);
    act();
    COUNTS.store(false, Release);
    ALLOCATIONS.load(Acquire)
}

/// A mount that this process serves.
struct Here {
    mountpoint: std::path::PathBuf,
    session: Option<std::thread::JoinHandle<std::io::Result<()>>>,
}

impl Here {
    fn new(backing: &Path, mountpoint: &Path) -> Here {
        let core = Core::new(File::open(backing).unwrap(), Arc::new(Ring::default()), 1).unwrap();
        let core = Arc::new(core);
        core.readers.expect(3);
        let connection = mounts::mount(mountpoint, "here", MsFlags::empty()).unwrap();
        let mut config = fuser::Config::default();
        config.n_threads = Some(3);
        let session = Session::from_fd(Adapter(core), connection, SessionACL::All, config).unwrap();
        let session = std::thread::spawn(move || session.run());
        Here { mountpoint: mountpoint.to_path_buf(), session: Some(session) }
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        mounts::unmount(&self.mountpoint, true).unwrap();
        if let Some(session) = self.session.take() {
            session.join().unwrap().unwrap();
        }
    }
}

#[test]
fn a_write_allocates_nothing() {
    let dir = tempfile::Builder::new().prefix("nemesisfs-test-").tempdir().unwrap();
    let (backing, mountpoint) = (dir.path().join("backing"), dir.path().join("mnt"));
    for path in [&backing, &mountpoint] {
        std::fs::create_dir(path).unwrap();
    }
    let here = Here::new(&backing, &mountpoint);
    let path = mountpoint.join("f");
    std::fs::write(&path, [0; 4096]).unwrap();
    assert_ne!(allocations(|| drop(File::create(mountpoint.join("another")).unwrap())), 0, "they are counted");
    let (file, mut log) = (opened(&path, 0), opened(&path, libc::O_APPEND));
    let warm = || file.write_all_at(&[1; 4096], 0).unwrap();
    // From several threads at once, so that each reader has had its first write before it is counted.
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| (0..100).for_each(|_| warm()));
        }
    });
    let buffered = allocations(|| (0..WRITES as u64).for_each(|n| file.write_all_at(&[1; 4096], n * 100).unwrap()));
    let appended = allocations(|| (0..WRITES).for_each(|_| log.write_all(&[2; 512]).unwrap()));
    // Aligned, as direct I/O wants it.
    let pages = vec![1u8; 8192];
    let page = &pages[pages.as_ptr().align_offset(4096)..][..4096];
    let direct = opened(&path, libc::O_DIRECT);
    let rewrite = || (0..WRITES as u64).for_each(|n| direct.write_all_at(page, n % 64 * 4096).unwrap());
    rewrite();
    let directly = allocations(rewrite);
    assert_eq!((buffered, appended), (0, 0));
    // Each reader has an aligned buffer from its first direct write on, which may be one of these.
    assert!(directly <= 3, "{directly}");
    assert_eq!(std::fs::metadata(backing.join("f")).unwrap().len(), std::fs::metadata(&path).unwrap().len());
    drop((file, log, direct, here));
    assert!(!is_mounted(&mountpoint));
}
