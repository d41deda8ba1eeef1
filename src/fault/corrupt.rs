//! How bytes are damaged.
//!
//! Pure: called by a reader with the data of a request and draws of its firing.

use std::ops::Range;

/// A damage, compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corrupt {
    pub mode: Mode,
    /// How many bytes; all of the request where it is not said, for modes that take a length.
    pub length: Option<u64>,
    /// The byte of the request where it begins, from 1, as dm-flakey counts; drawn where it is not said.
    pub nth: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// So many bits, each another one.
    Bitflip {
        bits: u64,
    },
    Zero,
    Random,
    /// One byte becomes this.
    Byte {
        value: u8,
    },
}

impl Corrupt {
    /// Damages the data of a request; gives the damaged ranges in it, of which each byte is another than before. Data that
    /// cannot be damaged so (zeros that are to become zeros, a byte beyond its end) stays as it is.
    ///
    /// `draw` gives numbers uniform in [0, 1), the k-th always the same for one firing.
    pub fn damage(&self, data: &mut [u8], mut draw: impl FnMut(u64) -> f64) -> Vec<Range<usize>> {
        let Some(place) = self.place(data.len(), &mut draw) else { return Vec::new() };
        let mut changed = Vec::new();
        match self.mode {
            Mode::Bitflip { bits } => {
                for bit in distinct(bits, place.len() as u64 * 8, |k| draw(k + 1)) {
                    let at = place.start + (bit / 8) as usize;
                    data[at] ^= 1 << (bit % 8);
                    changed.push(at);
                }
            }
            Mode::Zero => set(data, place, &mut changed, |_, _| 0),
            Mode::Byte { value } => set(data, place, &mut changed, |_, _| value),
            Mode::Random => set(data, place, &mut changed, |k, old| {
                // Never the byte that it was.
                old.wrapping_add(1 + below(draw(k + 1), 255) as u8)
            }),
        }
        changed.sort_unstable();
        ranges(&changed)
    }

    /// Has a request of so many bytes the place that is to be damaged?
    pub fn reaches(&self, length: u64) -> bool {
        length >= self.nth.unwrap_or(1)
    }

    /// The part of the request that the damage may lie in.
    fn place(&self, length: usize, draw: &mut impl FnMut(u64) -> f64) -> Option<Range<usize>> {
        if length == 0 {
            return None;
        }
        let wanted = match (self.mode, self.length) {
            (Mode::Byte { .. }, _) => 1,
            (Mode::Bitflip { .. }, None) if self.nth.is_some() => 1,
            (_, Some(wanted)) => wanted.min(length as u64) as usize,
            (_, None) => length,
        };
        let start = match self.nth {
            Some(nth) => usize::try_from(nth - 1).ok()?,
            None => below(draw(0), (length - wanted + 1) as u64) as usize,
        };
        let place = start..start.saturating_add(wanted).min(length);
        (!place.is_empty()).then_some(place)
    }
}

fn below(draw: f64, limit: u64) -> u64 {
    ((draw * limit as f64) as u64).min(limit.saturating_sub(1))
}

/// So many different numbers below a limit, or all of them. By Floyd's algorithm, which costs one draw for each however
/// many there are.
fn distinct(count: u64, limit: u64, mut draw: impl FnMut(u64) -> f64) -> Vec<u64> {
    let mut taken = vec![0u64; (limit as usize).div_ceil(64)];
    let mut found = Vec::new();
    for (k, last) in (limit.saturating_sub(count)..limit).enumerate() {
        let drawn = below(draw(k as u64), last + 1);
        let is_taken = taken[(drawn / 64) as usize] & 1 << (drawn % 64) != 0;
        let number = if is_taken { last } else { drawn };
        taken[(number / 64) as usize] |= 1 << (number % 64);
        found.push(number);
    }
    found
}

fn set(data: &mut [u8], place: Range<usize>, changed: &mut Vec<usize>, mut value: impl FnMut(u64, u8) -> u8) {
    for (k, at) in place.enumerate() {
        let new = value(k as u64, data[at]);
        if data[at] != new {
            data[at] = new;
            changed.push(at);
        }
    }
}

/// Sorted places as ranges.
fn ranges(places: &[usize]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for at in places {
        match ranges.last_mut() {
            Some(last) if *at <= last.end => last.end = last.end.max(at + 1),
            _ => ranges.push(*at..at + 1),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(seed: u64) -> impl FnMut(u64) -> f64 {
        move |k| {
            let mixed =
                (k + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(seed.wrapping_mul(0xD134_2543_DE82_EF95));
            (mixed >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    #[test]
    fn exactly_what_is_reported_is_another_than_before() {
        let modes = [Mode::Bitflip { bits: 3 }, Mode::Zero, Mode::Random, Mode::Byte { value: 0xAA }];
        for mode in modes {
            for (length, nth) in [(None, None), (Some(10), None), (Some(10), Some(5)), (None, Some(96))] {
                for seed in 0..50 {
                    let before: Vec<u8> = (0..100u8).map(|i| i.wrapping_mul(3)).collect();
                    let mut after = before.clone();
                    let damaged = Corrupt { mode, length, nth }.damage(&mut after, draws(seed));
                    for at in 0..100 {
                        let told = damaged.iter().any(|range| range.contains(&at));
                        assert_eq!(before[at] != after[at], told, "{mode:?} {length:?} {nth:?} {seed}: byte {at}");
                    }
                    if let Mode::Bitflip { bits } = mode {
                        let flipped: u32 = before.iter().zip(&after).map(|(a, b)| (a ^ b).count_ones()).sum();
                        assert_eq!(u64::from(flipped), bits);
                    }
                }
            }
        }
    }

    #[test]
    fn as_many_bits_as_there_are_take_no_longer_than_it_takes_to_draw_them() {
        let began = std::time::Instant::now();
        let mut data = vec![0u8; 1 << 17];
        let corrupt = Corrupt { mode: Mode::Bitflip { bits: u64::MAX }, length: None, nth: None };
        assert_eq!(corrupt.damage(&mut data, draws(1)).first(), Some(&(0..1 << 17)));
        assert!(data.iter().all(|byte| *byte == 0xff));
        assert!(began.elapsed().as_secs() < 10);
    }

    #[test]
    fn what_is_beyond_the_data_cannot_be_damaged() {
        let corrupt = Corrupt { mode: Mode::Byte { value: 1 }, length: None, nth: Some(101) };
        assert!(corrupt.damage(&mut [0; 100], draws(1)).is_empty());
        let corrupt = Corrupt { mode: Mode::Zero, length: None, nth: None };
        assert!(corrupt.damage(&mut [], draws(1)).is_empty());
        assert!(corrupt.damage(&mut [0; 8], draws(1)).is_empty(), "zeros already");
    }
}
