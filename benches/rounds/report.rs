//! All samples of all rounds, and the tables that are made of them.
//!
//! Used by the main thread; no locks. Must never assert a time: which ratio is good enough is for the reader to say.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use crate::operation::Operation;

/// Samples of one operation on one target, in nanoseconds; none where the target does not take it.
#[derive(Default)]
pub struct Samples(BTreeMap<(usize, usize), Vec<u64>>);

/// One number for many samples.
#[derive(Clone, Copy)]
enum Statistic {
    Median,
    Mean,
    P99,
}

/// A target, and the targets whose sum it is compared with.
const RATIOS: &[(&str, &[&str])] = &[
    ("idle", &["bare"]),
    ("idle", &["floor", "bare"]),
    ("idle", &["loopback"]),
    ("idle", &["bindfs"]),
    ("idle", &["passthrough_ll"]),
    ("passthrough", &["min. passthrough"]),
];

const NAMES: usize = 24;

impl Samples {
    pub fn add(&mut self, operation: usize, target: usize, times: Vec<Duration>) {
        let samples = self.0.entry((operation, target)).or_default();
        samples.extend(times.into_iter().map(|time| time.as_nanos() as u64));
    }

    /// In microseconds.
    fn get(&self, operation: usize, target: usize, statistic: Statistic) -> Option<f64> {
        let sorted = self.0.get(&(operation, target)).filter(|samples| !samples.is_empty())?;
        let at = |percent: usize| sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)] as f64;
        let ns = match statistic {
            Statistic::Median => at(50),
            Statistic::P99 => at(99),
            Statistic::Mean => sorted.iter().sum::<u64>() as f64 / sorted.len() as f64,
        };
        Some(ns / 1e3)
    }

    /// The tables of these operations (with their numbers) and targets.
    pub fn report(mut self, operations: &[(usize, &Operation)], targets: &[String]) -> String {
        self.0.values_mut().for_each(|samples| samples.sort_unstable());
        let mut text = String::new();
        let statistics =
            [("median", Statistic::Median), ("mean", Statistic::Mean), ("99th percentile", Statistic::P99)];
        for (title, statistic) in statistics {
            let value = |o, t: usize| self.get(o, t, statistic);
            table(&mut text, &format!("{title}, µs"), operations, targets, value);
        }
        let known = |name: &&str| targets.iter().any(|target| target == name);
        let ratios: Vec<_> = RATIOS.iter().filter(|(of, to)| known(of) && to.iter().all(known)).collect();
        let titles: Vec<_> = ratios.iter().map(|(of, to)| format!("{of} : {}", to.join(" + "))).collect();
        for (title, statistic) in &statistics[..2] {
            let one = |o, name: &str| self.get(o, targets.iter().position(|target| target == name)?, *statistic);
            let ratio = |o, r: usize| {
                let (of, to) = ratios[r];
                Some(one(o, of)? / to.iter().map(|name| one(o, name)).sum::<Option<f64>>()?)
            };
            table(&mut text, &format!("ratios of the {title}s"), operations, &titles, ratio);
        }
        text
    }
}

fn table(
    text: &mut String,
    title: &str,
    operations: &[(usize, &Operation)],
    columns: &[String],
    cell: impl Fn(usize, usize) -> Option<f64>,
) {
    if columns.is_empty() {
        return;
    }
    let width = |column: &String| column.chars().count().max(6) + 2;
    let heads: String = columns.iter().map(|column| format!("{column:>width$}", width = width(column))).collect();
    let _ = writeln!(text, "\n{title}\n{:NAMES$}{heads}", "");
    for (o, operation) in operations {
        let cells = columns.iter().enumerate().map(|(c, column)| {
            let value = cell(*o, c).map_or_else(|| "-".into(), |value| format!("{value:.2}"));
            format!("{value:>width$}", width = width(column))
        });
        let _ = writeln!(text, "{:NAMES$}{}", operation.name, cells.collect::<String>());
    }
}
