//! The kinds of fault: one table of their words and attributes, and the compiled forms.
//!
//! Pure data: any thread, no locks. The table drives the checks and the suggestions; a new kind begins with a line
//! here.

use std::ops::Range;

use super::corrupt::Corrupt;
use super::errno;
use super::op::{Op, OpSet};

/// What the contract says of one kind.
#[derive(Debug)]
pub struct Kind {
    pub word: &'static str,
    /// Attributes it takes.
    pub attributes: &'static [&'static str],
    /// Operations it can act on.
    pub able: OpSet,
    /// Operations it acts on when a rule names none.
    pub usual: OpSet,
    /// Is it built?
    pub built: bool,
}

const IO: OpSet = OpSet::of(&[Op::Read, Op::Write]);
const WRITE: OpSet = OpSet::of(&[Op::Write]);
const READ: OpSet = OpSet::of(&[Op::Read]);
/// What a slow disk is slow at.
const DISK: OpSet = OpSet::of(&[Op::Read, Op::Write, Op::CopyFileRange, Op::Fallocate, Op::Fsync, Op::Fsyncdir]);
/// What answers with attributes that the kernel takes over.
const STAT: OpSet =
    OpSet::of(&[Op::Lookup, Op::Getattr, Op::Setattr, Op::Create, Op::Mknod, Op::Mkdir, Op::Symlink, Op::Link]);

pub const KINDS: &[Kind] = &[
    kind("error", &["errno", "errors", "any", "timing", "force"], OpSet::all(), OpSet::all()),
    kind("short", &["max_bytes", "fraction"], IO, IO),
    kind("drop", &[], OpSet::all().droppable(), WRITE),
    kind("torn", &["keep", "then", "errno", "force"], WRITE, WRITE),
    kind("corrupt", &["mode", "bits", "length", "nth", "value", "when"], IO, WRITE),
    kind("misdirect", &["offset_delta", "to"], IO, IO),
    kind("bad_sectors", &["ranges", "errno", "heal_on_write", "force"], READ, READ),
    kind("latency", &["delay", "jitter", "distribution"], OpSet::all(), OpSet::all()),
    kind("throttle", &["bytes_per_second", "ops_per_second", "burst"], OpSet::all(), DISK),
    kind("stall", &["delay", "then", "errno", "force"], OpSet::all(), OpSet::all()),
    kind(
        "attr",
        &["size", "blocks", "perm", "uid", "gid", "nlink", "atime", "mtime", "ctime"],
        STAT,
        OpSet::of(&[Op::Lookup, Op::Getattr]),
    ),
    kind("kill", &["signal", "target"], OpSet::all(), OpSet::all()),
    Kind { built: false, ..kind("power_cut", &["keep", "kill"], OpSet::all(), OpSet::all()) },
];

const fn kind(word: &'static str, attributes: &'static [&'static str], able: OpSet, usual: OpSet) -> Kind {
    Kind { word, attributes, able, usual, built: true }
}

impl Kind {
    pub fn find(word: &str) -> Option<&'static Kind> {
        KINDS.iter().find(|kind| kind.word == word)
    }
}

/// What happens to a request that a rule fires on.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// It fails.
    Error { errors: Errors, timing: Timing },
    /// Less of it is done than was asked for, and the caller is told so.
    Short(Portion),
    /// It is acknowledged, and taken back when evicted.
    Drop,
    /// Part of it is stored. Then the caller is told that all was, until evicted, or an error.
    Torn { keep: Kept, then: Then },
    /// Bytes are changed: in flight (read), or at rest (write).
    Corrupt(Corrupt),
    /// It goes to another place of the file, or comes from there.
    Misdirect(Elsewhere),
    /// Some places of the medium cannot be read.
    BadSectors(BadSectors),
    /// It takes longer.
    Latency(Latency),
    /// It waits for its turn on a slow disk.
    Throttle(Throttle),
    /// It hangs until released, for so long, or until the rule's life ends.
    Stall { limit_ns: Option<u64>, then: Then },
    /// Attributes are told wrong.
    Attr(Box<Attributes>),
    /// Its caller, or all who have something open on the mount, get a signal.
    Kill { signal: i32, target: Target },
    /// The capacity of the mount is zero. Only the mode `enospc` has it: the refusals are made by `space`.
    Full,
}

impl Fault {
    /// One error, before anything is done.
    pub const fn error(errno: i32) -> Fault {
        Fault::Error { errors: Errors::One(errno), timing: Timing::Before }
    }

    /// The kind's word, as in rules and events.
    pub fn word(&self) -> &'static str {
        match self {
            Fault::Error { .. } => "error",
            Fault::Short(_) => "short",
            Fault::Drop => "drop",
            Fault::Torn { .. } => "torn",
            Fault::Corrupt(_) => "corrupt",
            Fault::Misdirect(_) => "misdirect",
            Fault::BadSectors(_) => "bad_sectors",
            Fault::Latency(_) => "latency",
            Fault::Throttle(_) => "throttle",
            Fault::Stall { .. } => "stall",
            Fault::Attr(_) => "attr",
            Fault::Kill { .. } => "kill",
            Fault::Full => "space",
        }
    }

    /// Would such a request be done otherwise? Of a cached read the kernel asks for more than the program, so that only the
    /// request itself can tell.
    pub fn alters(&self, op: Op, (offset, length): (u64, u64), direct: bool) -> bool {
        match self {
            Fault::Short(portion) => (op == Op::Read && !direct) || portion.of(length).is_some(),
            Fault::Torn { keep, .. } => !keep.is_all(offset, length),
            Fault::Misdirect(elsewhere) => elsewhere.of(offset).is_some(),
            Fault::Corrupt(corrupt) => corrupt.reaches(length),
            _ => true,
        }
    }

    /// Is what the kernel keeps of names and attributes wrong after it? Of what was done and then failed the kernel has not
    /// taken over what it did.
    pub fn makes_cached_wrong(&self) -> bool {
        matches!(self, Fault::Attr(_) | Fault::Error { timing: Timing::After, .. })
    }

    /// Is it about bytes on their way, so that a copy inside the filesystem would pass it by?
    pub fn wants_plain_io(&self) -> bool {
        use Fault::{BadSectors, Corrupt, Misdirect, Short, Torn};
        matches!(self, Short(_) | Torn { .. } | Corrupt(_) | Misdirect(_) | BadSectors(_))
    }
}

/// When an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timing {
    /// Nothing is done.
    Before,
    /// It is done, and the caller is told that it was not.
    After,
}

/// Which error.
#[derive(Clone, Debug, PartialEq)]
pub enum Errors {
    One(i32),
    /// Each with its share, all shares together 1.
    Weighted(Vec<(i32, f64)>),
    /// Any that the operation's manual page allows.
    Any,
}

impl Errors {
    /// The error for one firing, by a draw in [0, 1).
    pub fn pick(&self, op: Op, draw: f64) -> i32 {
        match self {
            Errors::One(errno) => *errno,
            Errors::Weighted(all) => {
                let mut left = draw;
                let hit = all.iter().find(|(_, share)| {
                    left -= share;
                    left < 0.0
                });
                hit.or(all.last()).map_or(libc::EIO, |(errno, _)| *errno)
            }
            Errors::Any => {
                let count = errno::any(op).count();
                errno::any(op).nth((draw * count as f64) as usize).unwrap_or(libc::EIO)
            }
        }
    }

    /// Can the operation give all of them?
    pub fn are_possible(&self, op: Op) -> bool {
        match self {
            Errors::One(errno) => errno::is_possible(op, *errno),
            Errors::Weighted(all) => all.iter().all(|(errno, _)| errno::is_possible(op, *errno)),
            Errors::Any => true,
        }
    }
}

/// How much of a request is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Portion {
    AtMost(u64),
    Fraction(f64),
}

impl Portion {
    /// Of so many bytes; none when it would be all of them, and never nothing: no program is told "0 bytes" of a write,
    /// and of a read that means the end of the file.
    pub fn of(self, length: u64) -> Option<u64> {
        let part = match self {
            Portion::AtMost(most) => most,
            Portion::Fraction(fraction) => (length as f64 * fraction) as u64,
        };
        Some(part.max(1)).filter(|part| *part < length)
    }
}

/// What of a torn write is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Kept {
    /// The first so many bytes.
    Bytes(u64),
    /// The first so many sectors of the disk, by their places in the file.
    Sectors(u64),
    /// The first part, of 1.
    Fraction(f64),
    /// Of so many equal parts these, counted from 1.
    Parts { of: u64, persist: Vec<u64> },
}

/// What disks write as a whole.
pub const SECTOR: u64 = 512;

impl Kept {
    /// The stored ranges of a write to a place. What is left of it after them is not.
    pub fn ranges(&self, offset: u64, length: u64) -> Vec<Range<u64>> {
        let end = offset.saturating_add(length);
        let first = |to: u64| std::iter::once(offset..to.clamp(offset, end)).collect();
        let mut ranges: Vec<Range<u64>> = match self {
            Kept::Bytes(bytes) => first(offset.saturating_add(*bytes)),
            Kept::Sectors(count) => first((offset / SECTOR).saturating_add(*count).saturating_mul(SECTOR)),
            Kept::Fraction(fraction) => first(offset.saturating_add((length as f64 * fraction) as u64)),
            Kept::Parts { of, persist } => {
                let within = |part: u64| (u128::from(length) * u128::from(part) / u128::from(*of)) as u64;
                let border = |part: u64| offset.saturating_add(within(part));
                let mut parts: Vec<u64> = persist.iter().copied().filter(|part| (1..=*of).contains(part)).collect();
                parts.sort_unstable();
                parts.dedup();
                parts.into_iter().map(|part| border(part - 1)..border(part)).collect()
            }
        };
        ranges.retain(|range| !range.is_empty());
        ranges
    }

    /// Is nothing of such a write lost?
    pub fn is_all(&self, offset: u64, length: u64) -> bool {
        self.ranges(offset, length).iter().map(|range| range.end - range.start).sum::<u64>() >= length
    }
}

/// Another place of the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    By(i64),
    To(u64),
}

impl Elsewhere {
    /// Instead of this place; none when there is nothing before the file's beginning, or it is the same place.
    pub fn of(self, offset: u64) -> Option<u64> {
        let place = match self {
            Elsewhere::By(delta) => offset.checked_add_signed(delta),
            Elsewhere::To(place) => Some(place),
        };
        place.filter(|place| *place != offset && *place < i64::MAX as u64)
    }
}

/// Places of a file that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSectors {
    /// Whole sectors.
    pub ranges: Vec<Range<u64>>,
    pub errno: i32,
    /// Does a write give the sector a new place on the medium?
    pub heal_on_write: bool,
}

/// A slow disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Throttle {
    pub bytes_per_second: Option<f64>,
    pub ops_per_second: Option<f64>,
    /// What may go at once after a rest: bytes if bytes are limited, else operations.
    pub burst: f64,
}

impl Throttle {
    /// How long a request of so many bytes keeps the disk busy: by its bytes, and as an operation.
    pub fn costs_ns(&self, bytes: u64) -> [u64; 2] {
        let cost = |rate: Option<f64>, units: f64| rate.map_or(0, |rate| (units * 1e9 / rate) as u64);
        [cost(self.bytes_per_second, bytes as f64), cost(self.ops_per_second, 1.0)]
    }

    /// How much of that may be owed.
    pub fn bursts_ns(&self) -> [u64; 2] {
        match (self.bytes_per_second, self.ops_per_second) {
            (Some(rate), _) => [(self.burst * 1e9 / rate) as u64, 0],
            (None, Some(rate)) => [0, (self.burst * 1e9 / rate) as u64],
            (None, None) => [0, 0],
        }
    }
}

/// Who gets the signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Caller,
    /// Every process that has something open on the mount.
    Mount,
}

/// Wrong attributes: those that are given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub size: Option<Amount>,
    pub blocks: Option<Amount>,
    pub perm: Option<u16>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub nlink: Option<Amount>,
    /// Nanoseconds since the epoch.
    pub atime: Option<Amount>,
    pub mtime: Option<Amount>,
    pub ctime: Option<Amount>,
}

/// A value instead of the right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    Is(i128),
    MoreBy(i128),
}

impl Amount {
    pub fn of(self, right: i128) -> i128 {
        match self {
            Amount::Is(value) => value,
            Amount::MoreBy(more) => right.saturating_add(more),
        }
    }
}

/// What follows a stall, or a torn write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    Ok,
    Error(i32),
}

/// A delay and how it varies.
#[derive(Clone, Debug, PartialEq)]
pub struct Latency {
    /// The delay itself, or its mean.
    pub delay_ns: u64,
    /// Half the width (`uniform`) or the standard deviation (`normal`).
    pub jitter_ns: u64,
    pub distribution: Distribution,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    Fixed,
    Uniform,
    Normal,
    Exponential,
}

impl Distribution {
    pub const WORDS: &'static [(&'static str, Distribution)] = &[
        ("fixed", Distribution::Fixed),
        ("uniform", Distribution::Uniform),
        ("normal", Distribution::Normal),
        ("exponential", Distribution::Exponential),
    ];
}

/// No single delay is longer, whatever the distribution draws.
pub const LONGEST_DELAY_NS: u64 = 24 * 3600 * 1_000_000_000;

impl Latency {
    /// One delay in nanoseconds from two draws, each uniform in [0, 1).
    pub fn sample(&self, u: f64, v: f64) -> u64 {
        let (mean, width) = (self.delay_ns as f64, self.jitter_ns as f64);
        let ns = match self.distribution {
            Distribution::Fixed => mean,
            Distribution::Uniform => mean + width * (2.0 * u - 1.0),
            // Box and Muller (1958): two uniform draws give one normal.
            Distribution::Normal => mean + width * (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos(),
            Distribution::Exponential => -mean * (1.0 - u).ln(),
        };
        ns.clamp(0.0, LONGEST_DELAY_NS as f64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_distribution_has_the_mean_it_was_given() {
        for distribution in [Distribution::Uniform, Distribution::Normal, Distribution::Exponential] {
            let latency = Latency { delay_ns: 1_000_000, jitter_ns: 200_000, distribution };
            let draws = 200u32;
            let mut sum = 0.0;
            for i in 0..draws {
                for j in 0..draws {
                    let (u, v) = ((f64::from(i) + 0.5) / 200.0, (f64::from(j) + 0.5) / 200.0);
                    sum += latency.sample(u, v) as f64;
                }
            }
            let mean = sum / f64::from(draws * draws);
            assert!((mean - 1_000_000.0).abs() < 20_000.0, "{distribution:?}: {mean}");
        }
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init)]
    fn a_torn_write_keeps_what_it_says() {
        assert_eq!(Kept::Bytes(100).ranges(1000, 4096), [1000..1100]);
        assert_eq!(Kept::Sectors(1).ranges(1000, 4096), [1000..1024], "the sector of the disk, not of the write");
        assert_eq!(Kept::Fraction(0.5).ranges(0, 4096), [0..2048]);
        assert_eq!(Kept::Parts { of: 3, persist: vec![3, 1] }.ranges(0, 4096), [0..1365, 2730..4096]);
        assert_eq!(Kept::Bytes(0).ranges(0, 10), []);
    }

    #[test]
    fn a_portion_is_never_nothing_and_never_all() {
        assert_eq!(Portion::AtMost(10).of(10), None);
        assert_eq!(Portion::AtMost(10).of(11), Some(10));
        assert_eq!(Portion::Fraction(0.1).of(5), Some(1));
        assert_eq!(Portion::Fraction(0.5).of(1), None);
    }

    #[test]
    fn weighted_errors_come_by_their_shares() {
        let errors = Errors::Weighted(vec![(libc::EIO, 0.75), (libc::ENOSPC, 0.25)]);
        let count = (0..100).filter(|i| errors.pick(Op::Write, f64::from(*i) / 100.0) == libc::EIO).count();
        assert_eq!(count, 75);
        assert_eq!(errors.pick(Op::Write, 0.999_999_999), libc::ENOSPC);
    }
}
