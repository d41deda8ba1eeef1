//! Every kind with every attribute, asked about requests at the ends of all ranges: nothing panics, nothing gets out of
//! the request.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value, json};

use super::{Request, compiled, config};
use crate::fault::corrupt::{Corrupt, Mode};
use crate::fault::kind::{Distribution, Elsewhere, Errors, KINDS, Kept, LONGEST_DELAY_NS, Latency, Portion, Throttle};
use crate::fault::plan::Cycle;
use crate::fault::{Fault, FileType, Firing, Op, Outcome, Plan, decide, why};

/// Numbers at which something ends.
pub(super) fn edge() -> impl Strategy<Value = u64> {
    let ends =
        vec![0, 1, 2, 511, 512, 513, 4096, u64::from(u32::MAX), i64::MAX as u64, 1 << 63, u64::MAX - 512, u64::MAX];
    prop_oneof![4 => select(ends), 1 => any::<u64>(), 1 => 0u64..100_000]
}

/// A value for an attribute, good more often than not.
pub(super) fn attribute(name: &str) -> BoxedStrategy<Value> {
    let number = || edge().prop_map(Value::from);
    let size = || {
        prop_oneof![number(), select(vec!["4KiB", "1B", "15EiB", "-1", "+4KiB", "-8EiB", "0"]).prop_map(Value::from)]
    };
    let words = |words: &[&'static str]| select(words.to_vec()).prop_map(Value::from).boxed();
    let duration = || words(&["0s", "1ns", "10ms", "3s", "1day", "500years", "-1s"]);
    match name {
        "errno" => words(&["EIO", "ENOSPC", "5", "511", "any", "ENOSYS", "512", "EOI"]),
        "errors" => prop_oneof![
            words(&["EIO=3,ENOSPC=1", "EIO=1e308,ENOSPC=1e308,EPERM", "EIO=0", ""]),
            Just(json!([{"errno": "EIO", "weight": 3}, {"errno": "EROFS"}, "EAGAIN"])),
            Just(json!([{"errno": "EIO", "weight": f64::MAX}, {"errno": "ESTALE", "weight": f64::MAX}])),
            Just(json!([{"errno": "EIO", "weight": f64::MIN_POSITIVE}])),
        ]
        .boxed(),
        "any" | "force" | "heal_on_write" => {
            prop_oneof![any::<bool>().prop_map(Value::from), words(&["true", "no"])].boxed()
        }
        "timing" => words(&["before", "after", "later"]),
        "fraction" => prop_oneof![(0.0..1.0).prop_map(Value::from), words(&["50%", "0.999999999", "0", "NaN"])].boxed(),
        "keep" => prop_oneof![
            number(),
            words(&["50%", "3 sectors", "18446744073709551615 sectors", "1,3/4", "1/18446744073709551615", "4KiB"]),
            (edge(), edge()).prop_map(|(of, part)| json!({"parts": of, "persist": [part, 1, of]})),
            edge().prop_map(|count| json!({"sectors": count})),
        ]
        .boxed(),
        "then" => words(&["ok", "error", "ok", "power_cut", "oops"]),
        "mode" => words(&["bitflip", "zero", "random", "byte", "bit"]),
        "when" => words(&["read", "write", "sync"]),
        "ranges" => prop_oneof![
            (edge(), edge()).prop_map(|(from, to)| json!([format!("{from}..{to}"), "8KiB..12KiB", "16EiB.."])),
            words(&["0..1,512..", "..", "1..1"]),
        ]
        .boxed(),
        "delay" | "jitter" => duration(),
        "distribution" => words(&["fixed", "uniform", "normal", "exponential", "poisson"]),
        "ops_per_second" => prop_oneof![number(), any::<f64>().prop_map(Value::from), words(&["1e-300", "0"])].boxed(),
        "signal" => words(&["SIGKILL", "SIGTERM", "9", "99", "SIGKIL"]),
        "target" => words(&["caller", "mount", "all"]),
        "perm" => words(&["0600", "7777", "0o644", "8", "-1"]),
        "atime" | "mtime" | "ctime" => prop_oneof![
            number(),
            any::<i64>().prop_map(Value::from),
            words(&["-1day", "+500years", "2020-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "-9223372036854775808"]),
        ]
        .boxed(),
        _ => size().boxed(),
    }
}

/// Any kind with some of its attributes.
pub(super) fn fault() -> impl Strategy<Value = Value> {
    (0..KINDS.len(), any::<u16>()).prop_flat_map(|(kind, chosen)| {
        let kind = &KINDS[kind];
        let chosen = kind.attributes.iter().enumerate().filter(move |(i, _)| chosen & 1 << i != 0);
        let attributes: Vec<_> =
            chosen.map(|(_, name)| attribute(name).prop_map(move |value| (name.to_string(), value))).collect();
        attributes.prop_map(move |attributes| {
            let kind = ("kind".to_string(), Value::from(kind.word));
            Value::Object(std::iter::once(kind).chain(attributes).collect())
        })
    })
}

/// A rule on everything, or on what its place leaves of it.
pub(super) fn rule() -> impl Strategy<Value = Value> {
    let ops = prop::collection::vec(
        select(vec!["*", "read", "write", "data", "grow", "truncate", "fsync", "metadata"]),
        0..3,
    );
    let range = || prop::option::weighted(0.2, (edge(), edge()).prop_map(|(from, to)| format!("{from}..{to}")));
    let duration = || prop::option::weighted(0.2, select(vec!["0s", "1ns", "5s", "584years"]));
    let count = || prop::option::weighted(0.3, edge());
    let per = select(vec!["mount", "file", "process"]);
    let place = (ops, range(), range(), prop::option::weighted(0.1, select(vec!["/**", "/a*"])));
    let when = ([count(), count(), count(), count()], [duration(), duration(), duration(), duration()], per, 0.0..=1.0);
    (place, when, fault(), any::<bool>()).prop_map(|((ops, offset, length, path), when, fault, required)| {
        let ([skip, every, times, after_bytes], [after, life, up, down], per, probability) = when;
        let mut trigger = Map::new();
        let mut given = |name: &str, value: Value| {
            if !value.is_null() {
                trigger.insert(name.into(), value);
            }
        };
        given("skip", json!(skip.map(|skip| skip % 5)));
        given("every", json!(every));
        given("times", json!(times));
        given("after_bytes", json!(after_bytes));
        given("after", json!(after));
        given("for", json!(life));
        given("up", json!(up));
        given("down", json!(down));
        given("per", json!(per));
        given("probability", json!(if probability < 0.7 { 1.0 } else { probability }));
        let place = json!({"ops": ops, "offset": offset, "length": length, "path": path});
        json!({"name": "r", "required": required, "match": place, "trigger": trigger, "fault": fault})
    })
}

fn request() -> impl Strategy<Value = Request> {
    let range = prop::option::weighted(0.9, (edge(), edge()));
    (select(Op::ALL), range, edge(), any::<[bool; 3]>(), any::<u32>()).prop_map(
        |(op, range, now_ns, [truncates, grows, known], id)| Request {
            op,
            path: if known { "/a" } else { "/dir/b" },
            pid: id,
            uid: id,
            range,
            direct: Some(grows),
            file_type: FileType::File,
            truncates,
            grows,
            now_ns,
            known,
        },
    )
}

/// What the filesystem does by a firing, as far as it is decided here.
fn carry_out(firing: &Firing, request: &Request) {
    let (offset, length) = request.range.unwrap_or_default();
    match firing.fault() {
        Fault::Short(portion) => stays_short(*portion, length),
        Fault::Torn { keep, .. } => stays_within(keep, offset, length),
        Fault::Corrupt(corrupt) => damages_what_it_tells(corrupt, 600, |k| firing.draw(k)),
        Fault::Misdirect(elsewhere) => goes_elsewhere(*elsewhere, offset),
        Fault::Error { errors, .. } => assert!((1..512).contains(&errors.pick(request.op, firing.draw(0)))),
        Fault::BadSectors(bad) => {
            let place = firing.place.expect("a bad sector was met");
            assert!(bad.ranges.iter().any(|range| range.contains(&place)));
            assert!(offset <= place && place < offset.saturating_add(length));
        }
        _ => {}
    }
}

fn stays_short(portion: Portion, length: u64) {
    assert!(portion.of(length).is_none_or(|part| 0 < part && part < length), "{portion:?} of {length}");
}

/// Kept ranges are in order, apart, none empty, and all of them in the write.
fn stays_within(keep: &Kept, offset: u64, length: u64) {
    let ranges = keep.ranges(offset, length);
    let end = offset.saturating_add(length);
    assert!(
        ranges.iter().all(|range| offset <= range.start && range.start < range.end && range.end <= end),
        "{ranges:?}"
    );
    assert!(ranges.is_sorted_by(|a, b| a.end <= b.start), "{ranges:?}");
}

fn damages_what_it_tells(corrupt: &Corrupt, length: usize, draw: impl FnMut(u64) -> f64) {
    let before: Vec<u8> = (0..length).map(|i| i as u8).collect();
    let mut after = before.clone();
    let damaged = corrupt.damage(&mut after, draw);
    for (at, (old, new)) in before.iter().zip(&after).enumerate() {
        assert_eq!(old != new, damaged.iter().any(|range| range.contains(&at)), "{corrupt:?}: byte {at} of {length}");
    }
}

fn goes_elsewhere(elsewhere: Elsewhere, offset: u64) {
    assert!(elsewhere.of(offset).is_none_or(|place| place != offset && place < i64::MAX as u64));
}

proptest! {
    #![proptest_config(config(1000))]

    /// Whatever compiles can be asked about anything, and told about at any time.
    #[test]
    fn no_rule_that_compiles_panics(rule in rule(), requests in prop::collection::vec(request(), 1..12)) {
        let Ok(rule) = compiled(rule) else { return Ok(()) };
        let plan = Plan::new(1, vec![Arc::new(rule)]);
        let mut firings = 0;
        for request in &requests {
            let decision = decide(&plan, request);
            prop_assert!(decision.delay_ns() <= LONGEST_DELAY_NS || decision.delays.iter().any(throttles));
            let outcome = match &decision.outcome {
                Outcome::Proceed => None,
                Outcome::Error(errno, firing) => {
                    prop_assert!((1..512).contains(errno));
                    Some(firing)
                }
                Outcome::Alter(firing) => Some(firing),
            };
            let all = decision.delays.iter().chain(&decision.kills).chain(&decision.stall).chain(outcome);
            firings += all.inspect(|firing| {
                firing.note_told();
                carry_out(firing, request);
            }).count() as u64;
            let rule = &plan.rules[0];
            let _ = (rule.state(request.now_ns), rule.is_in_time(request.now_ns));
            prop_assert!(rule.next_turn_ns(request.now_ns).is_none_or(|turn| turn > request.now_ns));
            let reason = why::unfired(rule, request.now_ns);
            prop_assert_eq!(reason.is_some(), rule.spec.required && firings == 0);
            prop_assert!(reason.is_none_or(|reason| !reason.is_empty()));
        }
        let counters = &plan.rules[0].counters;
        prop_assert_eq!(counters.injections.load(Relaxed), firings);
        prop_assert!(firings <= counters.matches.load(Relaxed));
    }

    #[test]
    fn parts_of_a_request_stay_in_it(numbers in any::<[u8; 3]>(), edges in [edge(), edge(), edge(), edge()], part in 0.0..1.0) {
        let [offset, length, a, b] = edges;
        for keep in [Kept::Bytes(a), Kept::Sectors(a), Kept::Fraction(part)] {
            stays_within(&keep, offset, length);
        }
        let persist = numbers.iter().map(|number| u64::from(*number)).chain([a, b]).collect();
        stays_within(&Kept::Parts { of: a.max(1), persist }, offset, length);
        stays_short(Portion::AtMost(a), length);
        stays_short(Portion::Fraction(part), length);
        goes_elsewhere(Elsewhere::By(a as i64), offset);
        goes_elsewhere(Elsewhere::To(a), offset);
    }

    /// Also when more bits are asked for than there are.
    #[test]
    fn damage_is_what_is_told(mode in 0..4, edges in [edge(), edge(), edge()], length in 0usize..300, draws in prop::collection::vec(0.0..1.0, 7)) {
        let [bits, limit, nth] = edges;
        let value = bits as u8;
        let modes = [Mode::Bitflip { bits: bits.max(1) }, Mode::Zero, Mode::Random, Mode::Byte { value }];
        for (limit, nth) in [(None, None), (Some(limit), None), (None, Some(nth.max(1))), (Some(limit), Some(nth.max(1)))] {
            let corrupt = Corrupt { mode: modes[mode as usize], length: limit, nth };
            damages_what_it_tells(&corrupt, length, |k| draws[k as usize % draws.len()]);
        }
    }

    #[test]
    fn delays_are_never_longer_than_a_day(edges in [edge(), edge()], u in 0.0..1.0, v in 0.0..1.0) {
        for (_, distribution) in Distribution::WORDS {
            let latency = Latency { delay_ns: edges[0], jitter_ns: edges[1], distribution: *distribution };
            prop_assert!(latency.sample(u, v) <= LONGEST_DELAY_NS);
        }
        prop_assert!(Distribution::WORDS.len() == 4);
    }

    /// Faster disks cost no more, and more bytes no less.
    #[test]
    fn a_slow_disk_costs_by_the_byte(bytes in [edge(), edge()], rate in 1e-300..1e300, burst in edge()) {
        let throttle = Throttle { bytes_per_second: Some(rate), ops_per_second: Some(rate), burst: burst as f64 };
        let faster = Throttle { bytes_per_second: Some(rate * 2.0), ..throttle.clone() };
        let [less, more] = [bytes[0].min(bytes[1]), bytes[0].max(bytes[1])];
        prop_assert!(throttle.costs_ns(less)[0] <= throttle.costs_ns(more)[0]);
        prop_assert!(faster.costs_ns(more)[0] <= throttle.costs_ns(more)[0]);
        let _ = throttle.bursts_ns();
    }

    /// A read meets a bad sector if it reads a byte of one: at the end of the file there is none to read.
    #[test]
    fn only_bytes_that_are_read_can_be_bad(from in 0u64..8, count in 1u64..4, offset in 0u64..6000, length in prop_oneof![Just(0u64), 1u64..3000], request in request()) {
        let bad = from * 512..(from + count) * 512;
        let fault = json!({"kind": "bad_sectors", "ranges": [format!("{}..{}", bad.start, bad.end)]});
        let plan = Plan::new(1, vec![Arc::new(compiled(json!({"name": "r", "fault": fault})).unwrap())]);
        let decision = decide(&plan, &Request { op: Op::Read, range: Some((offset, length)), ..request });
        let place = match decision.outcome {
            Outcome::Error(libc::EIO, firing) => firing.place,
            _ => None,
        };
        prop_assert_eq!(place, (offset..offset + length).find(|byte| bad.contains(byte)));
    }

    /// At any time it is up or down, and what comes next comes later.
    #[test]
    fn a_disk_that_comes_and_goes_does_so_at_any_time(up_ns in edge(), down_ns in edge(), since in edge()) {
        let cycle = Cycle { up_ns, down_ns: down_ns.max(1) };
        let length = u128::from(up_ns) + u128::from(cycle.down_ns);
        let is_down = cycle.is_down(since);
        // Of cycles of more than 584 years nobody sees the end.
        prop_assert!(length > u128::from(u64::MAX) || is_down == (u128::from(since) % length >= u128::from(up_ns)));
    }

    /// Each share of a draw gives one of the errors.
    #[test]
    fn of_weighted_errors_one_is_picked(weights in prop::collection::vec(edge(), 1..5), draw in 0.0..1.0, op in select(Op::ALL)) {
        let sum: f64 = weights.iter().map(|weight| *weight as f64).sum();
        let all: Vec<(i32, f64)> = weights.iter().zip(1..).map(|(weight, errno)| (errno, *weight as f64 / sum)).collect();
        let most = all.len() as i32;
        prop_assert!((1..=most).contains(&Errors::Weighted(all).pick(op, draw)));
        prop_assert!((1..512).contains(&Errors::Any.pick(op, draw)));
    }
}

/// Is it the queue of a slow disk, which has no end?
fn throttles(firing: &Firing) -> bool {
    matches!(firing.fault(), Fault::Throttle(_))
}
