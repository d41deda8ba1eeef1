//! Threads on which waiting is harmless: for what the last free reader has read, and for parked requests that go on.
//!
//! A thread is started when a job comes and none is idle, up to a limit; it ends when it has been idle for a while.
//! Normal reads and writes never come here. The hand-over takes the lock of a channel for a moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

/// Hung disks hang threads; beyond this many, jobs wait for one.
const MOST: usize = 256;
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// The pool of one mount.
pub struct Workers {
    sender: Sender<Job>,
    receiver: Receiver<Job>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    threads: AtomicUsize,
    /// Threads that wait for a job, less the jobs that wait for a thread.
    idle: AtomicUsize,
    /// Jobs that are not done.
    jobs: AtomicUsize,
}

impl Default for Workers {
    fn default() -> Self {
        let (sender, receiver) = unbounded();
        Workers { sender, receiver, counts: Arc::default() }
    }
}

impl Workers {
    /// Runs a job on some thread, soon. A job that panics takes nothing with it.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        self.counts.jobs.fetch_add(1, AcqRel);
        let counts = self.counts.clone();
        let job = move || {
            let _done = Done(counts);
            job();
        };
        // The job claims an idle thread, or one is started for it.
        let claimed = self.counts.idle.fetch_update(AcqRel, Acquire, |idle| idle.checked_sub(1)).is_ok();
        if self.sender.send(Box::new(job)).is_err() {
            unreachable!("we hold a receiver ourselves");
        }
        if !claimed && self.counts.threads.load(Acquire) < MOST {
            self.start();
        }
    }

    /// Waits until all jobs are done, with a limit; false when some are not.
    pub fn wait(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while self.counts.jobs.load(Acquire) > 0 {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    fn start(&self) {
        self.counts.threads.fetch_add(1, AcqRel);
        let (receiver, counts) = (self.receiver.clone(), self.counts.clone());
        let thread = std::thread::Builder::new().name("worker".into()).spawn(move || work(&receiver, &counts));
        if let Err(error) = thread {
            tracing::error!(%error, "no thread for a request that has to wait");
            if self.counts.threads.fetch_sub(1, AcqRel) == 1
                && let Ok(job) = self.receiver.try_recv()
            {
                // Nobody else will ever do it.
                job();
            }
        }
    }
}

/// A job is done, however it ended.
struct Done(Arc<Counts>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.jobs.fetch_sub(1, AcqRel);
    }
}

fn work(receiver: &Receiver<Job>, counts: &Counts) {
    let run = |job: Job| {
        // The panic hook has logged it; the dropped reply has answered EIO.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
    };
    loop {
        while let Ok(job) = receiver.try_recv() {
            run(job);
        }
        counts.idle.fetch_add(1, AcqRel);
        match receiver.recv_timeout(IDLE) {
            Ok(job) => run(job),
            Err(_) => {
                // Leaving takes the idle thread out of the count; if a job has claimed it meanwhile, it is coming.
                if counts.idle.fetch_update(AcqRel, Acquire, |idle| idle.checked_sub(1)).is_ok() {
                    counts.threads.fetch_sub(1, AcqRel);
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
}
