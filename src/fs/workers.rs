//! Threads on which waiting is harmless: for what the last free reader has read, and for parked requests that go on.
//!
//! A thread is started when a job comes and there are fewer threads than jobs that are not done, up to a limit; it ends
//! when it has been idle for a while. So each job has a thread, or comes next when one is free. Normal reads and writes
//! never come here. The lock is held to put a job in the queue or to take one out, and never while a job is done.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Hung disks hang threads; beyond this many, jobs wait for one.
const MOST: usize = 256;
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// The pool of one mount.
pub struct Workers {
    name: &'static str,
    most: usize,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    more: Condvar,
}

/// While something is in the queue, there are as many threads as jobs, or as many as there may be: a thread ends only
/// when nothing is.
#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    /// Jobs that are not done.
    jobs: usize,
}

impl Default for Workers {
    fn default() -> Self {
        Workers::new("worker", MOST)
    }
}

impl Workers {
    /// With threads of this name, at most so many.
    pub fn new(name: &'static str, most: usize) -> Workers {
        Workers { name, most, shared: Arc::default() }
    }

    /// Runs a job on some thread, soon. A job that panics takes nothing with it.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let job: Job = Box::new(job);
        let mut state = self.shared.state.lock();
        state.queue.push_back(job);
        state.jobs += 1;
        let starts = state.threads < state.jobs.min(self.most);
        state.threads += usize::from(starts);
        drop(state);
        match starts {
            true => self.start(),
            false => drop(self.shared.more.notify_one()),
        }
    }

    /// Are there more jobs than threads can be?
    pub fn is_full(&self) -> bool {
        self.shared.state.lock().jobs >= self.most
    }

    /// Waits until all jobs are done, with a limit; false when some are not.
    pub fn wait(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while self.shared.state.lock().jobs > 0 {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    fn start(&self) {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(self.name.into()).spawn(move || work(&shared));
        if let Err(error) = thread {
            tracing::error!(%error, "no thread for what has to wait");
            let mut state = self.shared.state.lock();
            state.threads -= 1;
            // Without any thread nobody else will ever do it.
            while state.threads == 0
                && let Some(job) = state.queue.pop_front()
            {
                drop(state);
                self.shared.run(job);
                state = self.shared.state.lock();
            }
        }
    }
}

impl Shared {
    fn run(&self, job: Job) {
        // The panic hook has logged it; the dropped reply has answered EIO.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
        self.state.lock().jobs -= 1;
    }

    /// The next job, or nothing when there was none for a while; then the caller does not count any more.
    fn next(&self) -> Option<Job> {
        let until = Instant::now() + IDLE;
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                return Some(job);
            }
            if self.more.wait_until(&mut state, until).timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return None;
            }
        }
    }
}

fn work(shared: &Shared) {
    while let Some(job) = shared.next() {
        shared.run(job);
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::unbounded;

    use super::*;

    #[test]
    fn a_job_that_hangs_keeps_no_other_waiting() {
        let workers = Workers::default();
        let (release, wait) = unbounded::<()>();
        let (done, seen) = unbounded();
        for _ in 0..20 {
            let wait = wait.clone();
            workers.run(move || {
                let _ = wait.recv();
            });
        }
        workers.run(|| panic!("a job that panics"));
        for n in 0..20 {
            let done = done.clone();
            workers.run(move || done.send(n).unwrap());
        }
        for _ in 0..20 {
            seen.recv_timeout(Duration::from_secs(10)).expect("a free thread");
        }
        assert!(!workers.wait(Duration::from_millis(20)), "twenty hang");
        drop(release);
        assert!(workers.wait(Duration::from_secs(10)));
    }

    #[test]
    fn there_are_no_more_threads_than_jobs_at_a_time_however_quick_they_are() {
        let workers = Workers::default();
        let (done, ended) = unbounded();
        let rounds = |workers: &Workers| {
            for _ in 0..20_000 {
                let done = done.clone();
                workers.run(move || done.send(()).unwrap());
                ended.recv_timeout(Duration::from_secs(10)).expect("no job is lost");
            }
        };
        std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(|| rounds(&workers)))));
        // A job that has told its end is not quite done yet, on a busy machine for a while.
        let threads = workers.shared.state.lock().threads;
        assert!(threads <= 32, "{threads} threads for two jobs at a time");
    }

    #[test]
    fn of_more_jobs_than_threads_each_has_its_turn() {
        let workers = Workers::new("few", 2);
        let (done, ended) = unbounded();
        (0..50).for_each(|_| {
            let done = done.clone();
            workers.run(move || done.send(()).unwrap());
        });
        (0..50).for_each(|_| ended.recv_timeout(Duration::from_secs(10)).unwrap());
        assert!(workers.shared.state.lock().threads <= 2);
        assert!(workers.wait(Duration::from_secs(10)) && !workers.is_full());
    }
}
