//! The options of a rule, and the document that they make: shared by all that arms rules.
//!
//! Thread: the caller's. Locks: none. Must never: keep a list of valid words, which would be a second truth.

use clap::Args;
use serde_json::{Value, json};

use super::args::{Span, pair, probability};

#[derive(Debug, Args)]
#[command(next_help_heading = "What happens")]
pub struct FaultArgs {
    /// error, short, drop, torn, corrupt, misdirect, bad_sectors, latency, throttle, stall, attr, kill
    #[arg(long, required_unless_present = "terms")]
    kind: Option<String>,
    /// Instead of a kind, terms as in fail-rs and gofail: 20%3*return(EIO)->sleep(10ms)
    #[arg(long, value_name = "TERMS", conflicts_with = "kind")]
    terms: Option<String>,
    /// error, stall, torn, bad_sectors: the error, by name; any: one that the manual page allows
    #[arg(long, value_name = "NAME")]
    errno: Option<String>,
    /// error: several, with their weights
    #[arg(long, value_name = "NAME=WEIGHT,...")]
    errors: Option<String>,
    /// error: any that the manual page of the operation allows
    #[arg(long)]
    any: bool,
    /// error: whether the operation is done all the same: before or after
    #[arg(long, value_name = "WHEN")]
    timing: Option<String>,
    /// error: also one that no storage gives
    #[arg(long)]
    force: bool,
    /// short: at most so much is done
    #[arg(long, value_name = "SIZE")]
    max_bytes: Option<String>,
    /// short: this part is done, 0 to 1
    #[arg(long, value_name = "PART")]
    fraction: Option<String>,
    /// torn: what is stored: 512, 50%, "3 sectors", 1,3/4
    #[arg(long, value_name = "PART")]
    keep: Option<String>,
    /// stall, torn: what follows: ok or error
    #[arg(long, value_name = "WORD")]
    then: Option<String>,
    /// corrupt: bitflip, zero, random, byte
    #[arg(long, value_name = "WORD")]
    mode: Option<String>,
    /// corrupt: how many bits
    #[arg(long, value_name = "N")]
    bits: Option<u64>,
    /// corrupt: the byte of the request where it begins, from 1
    #[arg(long, value_name = "N")]
    nth: Option<u64>,
    /// corrupt: what the byte becomes
    #[arg(long, value_name = "BYTE")]
    value: Option<String>,
    /// corrupt: in flight (read) or at rest (write)
    #[arg(long, value_name = "WORD")]
    when: Option<String>,
    /// misdirect: by how much it goes wrong
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    offset_delta: Option<String>,
    /// bad_sectors: what cannot be read
    #[arg(long, value_name = "A..B,...")]
    ranges: Option<String>,
    /// bad_sectors: a write makes a sector good again
    #[arg(long)]
    heal_on_write: bool,
    /// latency: how much longer it takes; stall: how long at most
    #[arg(long, value_name = "DURATION")]
    delay: Option<Span>,
    /// latency: by how much the delay varies
    #[arg(long, value_name = "DURATION")]
    jitter: Option<Span>,
    /// latency: how the delay varies: fixed, uniform, normal, exponential
    #[arg(long, value_name = "WORD")]
    distribution: Option<String>,
    /// throttle: how fast the disk is
    #[arg(long, value_name = "SIZE")]
    bytes_per_second: Option<String>,
    /// throttle: how many requests it does
    #[arg(long, value_name = "N")]
    ops_per_second: Option<String>,
    /// throttle: what may go at once after a rest, in bytes or requests
    #[arg(long, value_name = "N")]
    burst: Option<String>,
    /// kill: the signal, by name
    #[arg(long, value_name = "NAME")]
    signal: Option<String>,
    /// kill: the caller, or all who have something open on the mount: caller or mount
    #[arg(long, value_name = "WORD")]
    target: Option<String>,
    /// Any attribute of the kind by its name, and those that have no option of their own: to=0, size=+1, perm=0600. Repeatable
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = pair)]
    attributes: Vec<(String, String)>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Where")]
pub struct MatchArgs {
    /// Operations and groups of them: write, fsync, data, metadata, grow … Repeatable, or separated by commas
    #[arg(long = "op", value_name = "OP", value_delimiter = ',')]
    ops: Vec<String>,
    /// Path as seen under the mountpoint, with a leading slash
    #[arg(long, value_name = "GLOB")]
    path: Option<String>,
    /// The same as a regular expression
    #[arg(long, value_name = "REGEX")]
    path_regex: Option<String>,
    /// Process that calls
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// Process that calls, or any below it
    #[arg(long, value_name = "PID")]
    tree: Option<u32>,
    /// Name of the program that calls
    #[arg(long, value_name = "NAME")]
    comm: Option<String>,
    /// User that calls
    #[arg(long, value_name = "UID")]
    uid: Option<u32>,
    /// Group that calls
    #[arg(long, value_name = "GID")]
    gid: Option<u32>,
    /// Bytes that the request touches, half-open: 0..1MiB
    #[arg(long, value_name = "A..B")]
    offset: Option<String>,
    /// Length of the request, half-open
    #[arg(long, value_name = "A..B")]
    length: Option<String>,
    /// Direct requests only, or none of them
    #[arg(long, value_name = "true|false")]
    direct: Option<bool>,
    /// Type of the file
    #[arg(long = "type", value_name = "TYPE")]
    kind_of_file: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "When")]
pub struct TriggerArgs {
    /// Of each match, 0 to 1
    #[arg(long, value_name = "P", value_parser = probability)]
    probability: Option<f64>,
    /// Let the first N matches pass
    #[arg(long, value_name = "N")]
    skip: Option<u64>,
    /// Then fire on the first, and on each N-th after it
    #[arg(long, value_name = "N")]
    every: Option<u64>,
    /// Fire at most N times
    #[arg(long, value_name = "N")]
    times: Option<u64>,
    /// Count for each mount, file or process
    #[arg(long, value_name = "WHAT")]
    per: Option<String>,
    /// Not before this long after arming
    #[arg(long, value_name = "DURATION")]
    after: Option<Span>,
    /// Not before so much was written
    #[arg(long, value_name = "SIZE")]
    after_bytes: Option<String>,
    /// Not before this rule has fired
    #[arg(long, value_name = "NAME")]
    after_rule: Option<String>,
    /// Lifetime of the rule
    #[arg(long = "for", value_name = "DURATION")]
    lifetime: Option<Span>,
    /// Of a disk that comes and goes: how long it is well, first
    #[arg(long, value_name = "DURATION")]
    up: Option<Span>,
    /// Of a disk that comes and goes: how long it then fails
    #[arg(long, value_name = "DURATION")]
    down: Option<Span>,
    /// Of the draws behind the probability
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

fn text(span: &Option<Span>) -> Option<&str> {
    span.as_ref().map(|span| span.text.as_str())
}

/// A document of the fields that were given.
pub fn given(fields: Vec<(&str, Value)>) -> Value {
    let set = fields.into_iter().filter(|(_, value)| !value.is_null());
    Value::Object(set.map(|(name, value)| (name.to_owned(), value)).collect())
}

impl FaultArgs {
    pub fn document(&self) -> Value {
        if let Some(terms) = &self.terms {
            return json!(terms);
        }
        let switch = |on: bool| if on { json!(true) } else { Value::Null };
        let mut document = given(vec![
            ("kind", json!(self.kind)),
            ("errno", json!(self.errno)),
            ("errors", json!(self.errors)),
            ("any", switch(self.any)),
            ("timing", json!(self.timing)),
            ("force", switch(self.force)),
            ("max_bytes", json!(self.max_bytes)),
            ("fraction", json!(self.fraction)),
            ("keep", json!(self.keep)),
            ("then", json!(self.then)),
            ("mode", json!(self.mode)),
            ("bits", json!(self.bits)),
            ("nth", json!(self.nth)),
            ("value", json!(self.value)),
            ("when", json!(self.when)),
            ("offset_delta", json!(self.offset_delta)),
            ("ranges", json!(self.ranges)),
            ("heal_on_write", switch(self.heal_on_write)),
            ("delay", json!(text(&self.delay))),
            ("jitter", json!(text(&self.jitter))),
            ("distribution", json!(self.distribution)),
            ("bytes_per_second", json!(self.bytes_per_second)),
            ("ops_per_second", json!(self.ops_per_second)),
            ("burst", json!(self.burst)),
            ("signal", json!(self.signal)),
            ("target", json!(self.target)),
        ]);
        for (name, value) in &self.attributes {
            document[name] = json!(value);
        }
        document
    }
}

impl MatchArgs {
    pub fn document(&self) -> Value {
        let ops = if self.ops.is_empty() { Value::Null } else { json!(self.ops) };
        given(vec![
            ("ops", ops),
            ("path", json!(self.path)),
            ("path_regex", json!(self.path_regex)),
            ("pid", json!(self.pid)),
            ("tree", json!(self.tree)),
            ("comm", json!(self.comm)),
            ("uid", json!(self.uid)),
            ("gid", json!(self.gid)),
            ("offset", json!(self.offset)),
            ("length", json!(self.length)),
            ("direct", json!(self.direct)),
            ("type", json!(self.kind_of_file)),
        ])
    }
}

impl TriggerArgs {
    pub fn document(&self) -> Value {
        given(vec![
            ("probability", json!(self.probability)),
            ("skip", json!(self.skip)),
            ("every", json!(self.every)),
            ("times", json!(self.times)),
            ("per", json!(self.per)),
            ("after", json!(text(&self.after))),
            ("after_bytes", json!(self.after_bytes)),
            ("after_rule", json!(self.after_rule)),
            ("for", json!(text(&self.lifetime))),
            ("up", json!(text(&self.up))),
            ("down", json!(text(&self.down))),
            ("seed", json!(self.seed)),
        ])
    }
}
