//! The kinds of fault: one table of their words and attributes, and the compiled forms.
//!
//! Pure data: any thread, no locks. The table drives the checks and the suggestions; a new kind begins with a line
//! here.

/// What the contract says of one kind.
pub struct Kind {
    pub word: &'static str,
    /// Attributes it takes here.
    pub attributes: &'static [&'static str],
    /// Attributes it is to take later.
    pub later: &'static [&'static str],
    /// Is it built?
    pub built: bool,
}

pub const KINDS: &[Kind] = &[
    built("error", &["errno"], &["errors", "any", "timing"]),
    built("drop", &[], &[]),
    built("latency", &["delay", "jitter", "distribution"], &[]),
    built("stall", &["then", "errno"], &[]),
    later("short", &["max_bytes", "fraction"]),
    later("torn", &["keep", "then"]),
    later("corrupt", &["mode", "bits", "length", "nth", "value", "when"]),
    later("misdirect", &["offset_delta", "to"]),
    later("bad_sectors", &["ranges", "errno", "heal_on_write"]),
    later("throttle", &["bytes_per_second", "ops_per_second", "burst"]),
    later("attr", &["size", "perm", "uid", "gid", "mtime"]),
    later("kill", &["signal", "target"]),
    later("power_cut", &["keep", "kill"]),
];

const fn built(word: &'static str, attributes: &'static [&'static str], later: &'static [&'static str]) -> Kind {
    Kind { word, attributes, later, built: true }
}

const fn later(word: &'static str, attributes: &'static [&'static str]) -> Kind {
    Kind { word, attributes: &[], later: attributes, built: false }
}

impl Kind {
    pub fn find(word: &str) -> Option<&'static Kind> {
        KINDS.iter().find(|kind| kind.word == word)
    }
}

/// What happens to a request that a rule fires on.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// It fails; nothing is done.
    Error { errno: i32 },
    /// It is acknowledged, and taken back when evicted.
    Drop,
    /// It takes longer.
    Latency(Latency),
    /// It hangs until released or until the rule's life ends.
    Stall { then: Then },
    /// The capacity of the mount is zero. Only the mode `enospc` has it: the refusals are made by `space`.
    Full,
}

impl Fault {
    /// The kind's word, as in rules and events.
    pub fn word(&self) -> &'static str {
        match self {
            Fault::Error { .. } => "error",
            Fault::Drop => "drop",
            Fault::Latency(_) => "latency",
            Fault::Stall { .. } => "stall",
            Fault::Full => "space",
        }
    }
}

/// What follows a stall.
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
    pub const WORDS: &'static [&'static str] = &["fixed", "uniform", "normal", "exponential"];

    pub fn parse(word: &str) -> Option<Distribution> {
        Some(match word {
            "fixed" => Distribution::Fixed,
            "uniform" => Distribution::Uniform,
            "normal" => Distribution::Normal,
            "exponential" => Distribution::Exponential,
            _ => return None,
        })
    }
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
}
