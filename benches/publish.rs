//! What one publication costs the thread that makes it, with readers of several kinds.
//!
//! The publisher runs on criterion's thread and does what a reader of the mount does: it publishes, and wakes the
//! listener. All cursors are served by one other thread, as the control thread serves its clients. No mount, no daemon.
//! Must never assert a time.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::thread::JoinHandle;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use nemesisfs::event::record::Comm;
use nemesisfs::event::{Cursor, Injection, Read, Ring};

/// A thread that reads along with so many cursors.
struct Listener {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Listener {
    fn start(ring: &Arc<Ring>, cursors: usize) -> Listener {
        let stop = Arc::new(AtomicBool::new(false));
        let (its_ring, its_stop, places) = (ring.clone(), stop.clone(), vec![ring.cursor(); cursors]);
        let thread = std::thread::spawn(move || listen(&its_ring, places, &its_stop));
        let waiting = thread.thread().clone();
        ring.set_waker(move || waiting.unpark());
        Listener { stop, thread }
    }

    /// Ends it, and tells how many events it read.
    fn end(self) -> u64 {
        self.stop.store(true, Release);
        self.thread.thread().unpark();
        self.thread.join().expect("the listener does not panic")
    }
}

fn listen(ring: &Ring, mut places: Vec<Cursor>, stop: &AtomicBool) -> u64 {
    let mut seen = 0;
    loop {
        // After the stop it looks once more, so that what was published is read however little it was.
        let last = stop.load(Acquire);
        ring.listen();
        seen += places.iter_mut().map(|place| read_on(ring, place)).sum::<u64>();
        if last {
            return seen;
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// Reads what is there, but at most a turn's worth, so that one cursor does not starve the others.
fn read_on(ring: &Ring, place: &mut Cursor) -> u64 {
    for seen in 0..256 {
        match ring.read(*place) {
            Read::Event(record) => {
                black_box(record);
                place.0 += 1;
            }
            Read::Gap { next, .. } => *place = next,
            Read::Empty => return seen,
        }
    }
    256
}

fn injection(rule: &Arc<str>, path: &Arc<[u8]>) -> Injection {
    Injection {
        rule: rule.clone(),
        kind: "error",
        op: "write",
        path: Some(path.clone()),
        ino: 42,
        offset: Some(8192),
        length: Some(4096),
        pid: 4711,
        comm: Comm::new(b"postgres"),
        errno: Some(libc::EIO),
        ..Injection::default()
    }
}

fn publications(c: &mut Criterion) {
    let rule: Arc<str> = "wal-eio".into();
    let path: Arc<[u8]> = b"/pg_wal/000000010000000000000001".as_slice().into();
    let publish = |ring: &Ring| {
        ring.inject(black_box(injection(&rule, &path)));
        ring.wake();
    };
    for readers in [0, 1, 64] {
        let ring = Arc::new(Ring::default());
        let listener = (readers > 0).then(|| Listener::start(&ring, readers));
        c.bench_function(&format!("publish, {readers} readers"), |b| b.iter(|| publish(&ring)));
        let seen = listener.map_or(0, Listener::end);
        assert_eq!(seen > 0, readers > 0, "{readers} readers read {seen} events");
    }
    let ring = Arc::new(Ring::default());
    ring.set_waker(|| ());
    // A client that took its place and never reads: it is a number, and nobody looks at it.
    let stopped = ring.cursor();
    ring.listen();
    c.bench_function("publish, a reader that has stopped", |b| b.iter(|| publish(&ring)));
    black_box(stopped);
}

/// What every reply pays when nothing was published.
fn nothing_to_wake(c: &mut Criterion) {
    let ring = Ring::default();
    c.bench_function("wake, nothing published", |b| b.iter(|| black_box(&ring).wake()));
}

fn short() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
}

criterion_group! { name = benches; config = short(); targets = publications, nothing_to_wake }
criterion_main!(benches);
