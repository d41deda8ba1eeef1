//! The mount is the bare directory: random operations by several identities on both, and nothing different between
//! them.
//!
//! Each operation is a few system calls ([`operations`]) that a worker process ([`worker`]) of one identity makes on
//! the bare directory and another on the mount; results, data and errors are compared at once, the whole trees
//! ([`tree`]) now and then. One call at a time, so that the comparison is exact. `NEMESISFS_MODEL_SEED` runs one seed
//! instead of those given here, `NEMESISFS_MODEL_OPERATIONS` more operations, `NEMESISFS_MODEL_BETWEEN` compares the trees
//! more often, and `NEMESISFS_MODEL_TRACE` tells all calls instead of the last ones.

mod operations;
mod random;
mod sides;
mod tree;
mod wire;
mod worker;

use crate::support::Mounted;
use operations::{IDENTITIES, Model};
use sides::Sides;

/// Operations between two comparisons of the whole trees.
const BETWEEN: u64 = 100;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

/// Not a test: what runs in a worker, and at once returns in the test.
#[test]
fn a_worker_of_the_model() {
    if let Ok(root) = std::env::var(worker::ROOT) {
        worker::serve(&root);
    }
}

#[test]
fn the_mount_is_the_bare_directory_on_disk() {
    run("the_mount_is_the_bare_directory_on_disk", &[1, 2, 5], 3_000, Mounted::new, Backing::Disk);
}

#[test]
fn the_mount_is_the_bare_directory_in_memory() {
    run("the_mount_is_the_bare_directory_in_memory", &[3, 4, 6], 3_000, Mounted::in_memory, Backing::Memory);
}

/// What the backing filesystem lets us compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backing {
    /// ext4: how many blocks a file takes depends on when they were chosen.
    Disk,
    /// With preallocation: of preallocated blocks, those in the page cache count as data, which depends on readahead.
    Preallocating,
    /// tmpfs.
    Memory,
}

impl Backing {
    /// On the disk every second seed preallocates.
    fn of_seed(self, seed: u64) -> Backing {
        match self == Backing::Disk && seed.is_multiple_of(2) {
            true => Backing::Preallocating,
            false => self,
        }
    }

    /// From where on lines of the tree are not compared.
    fn ignored(self) -> &'static str {
        match self {
            Backing::Disk => " blocks=",
            Backing::Preallocating => " map=",
            Backing::Memory => "\n",
        }
    }
}

fn run(test: &str, seeds: &[u64], operations: u64, mount: fn() -> Mounted, backing: Backing) {
    let operations = variable("NEMESISFS_MODEL_OPERATIONS").unwrap_or(operations);
    let given = variable("NEMESISFS_MODEL_SEED");
    for seed in given.as_slice().iter().chain(seeds).take(if given.is_some() { 1 } else { seeds.len() }) {
        let mounted = mount();
        let bare = mounted.aside("bare");
        let backing = backing.of_seed(*seed);
        let title = format!(
            "NEMESISFS_MODEL_SEED={seed} NEMESISFS_MODEL_OPERATIONS={operations} cargo test --test it model::{test}"
        );
        let sides = Sides::start([&bare, &mounted.mountpoint, &mounted.backing], IDENTITIES, title, backing.ignored());
        let mut model = Model::new(sides, *seed, backing);
        model.prepare();
        for operation in 1..=operations {
            model.step();
            if operation % variable("NEMESISFS_MODEL_BETWEEN").unwrap_or(BETWEEN) == 0 {
                model.compare();
            }
        }
        model.compare();
        drop(model);
        mounted.end();
    }
}
