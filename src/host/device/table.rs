//! Modes of a device, and the device mapper tables that make them: words and numbers in, one table line out.
//!
//! Pure: on any thread, no locks. Must never: ask the kernel, which has the last word about what it can do.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Refused, invalid};
use crate::fault::compile::{Problem, nanoseconds};

/// Seconds of a phase that never ends: with the other one at 0, the kernel stays in it.
const ALWAYS: u64 = 3600;
/// dm-flakey counts chances in these parts.
const PARTS: f64 = 1e9;
/// The longest delay, in milliseconds, which the kernel counts in 32 bits.
const LONGEST_MS: u64 = 3_600_000;

/// What can be wrong with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    AllowWrites,
    DropWrites,
    ErrorWrites,
    ErrorReads,
    ErrorAll,
    CorruptBioByte,
    RandomReadCorrupt,
    RandomWriteCorrupt,
    Delay,
}

impl Word {
    pub const ALL: [(&str, Word); 9] = [
        ("allow_writes", Word::AllowWrites),
        ("drop_writes", Word::DropWrites),
        ("error_writes", Word::ErrorWrites),
        ("error_reads", Word::ErrorReads),
        ("error_all", Word::ErrorAll),
        ("corrupt_bio_byte", Word::CorruptBioByte),
        ("random_read_corrupt", Word::RandomReadCorrupt),
        ("random_write_corrupt", Word::RandomWriteCorrupt),
        ("delay", Word::Delay),
    ];

    fn parse(pointer: &str, text: &str) -> Result<Word, Problem> {
        let known = Word::ALL.iter().map(|(word, _)| *word);
        let found = Word::ALL.iter().find(|(word, _)| *word == text).map(|(_, word)| *word);
        found.ok_or_else(|| Problem::new(pointer, format!("unknown mode {text:?}")).nearest(text, known))
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = Word::ALL.iter().find(|(_, word)| word == self).map(|(text, _)| *text);
        f.write_str(word.unwrap_or_default())
    }
}

/// Reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    Read,
    Write,
}

/// One byte of each request that has all the flags is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Byte {
    /// Counted from 1.
    nth: u32,
    direction: Direction,
    value: u8,
    /// Bits of the kernel's `bi_opf`; 0 asks for none.
    flags: u32,
}

/// How much later requests are done, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delays {
    read: u64,
    write: u64,
    /// None: as writes.
    flush: Option<u64>,
}

/// A mode as clients ask for it.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    pub mode: String,
    #[serde(default)]
    pub and: Vec<String>,
    #[serde(default)]
    pub up: Option<String>,
    #[serde(default)]
    pub down: Option<String>,
    #[serde(default)]
    pub nth: Option<u32>,
    #[serde(default)]
    pub direction: Option<Direction>,
    #[serde(default)]
    pub value: Option<u8>,
    #[serde(default)]
    pub flags: Option<u32>,
    #[serde(default)]
    pub probability: Option<f64>,
    #[serde(default)]
    pub read: Option<String>,
    #[serde(default)]
    pub write: Option<String>,
    #[serde(default)]
    pub flush: Option<String>,
    /// After which the device allows writes again.
    #[serde(default)]
    pub r#for: Option<String>,
    /// The filesystem is synchronised and frozen before.
    #[serde(default)]
    pub sync_fs: bool,
    /// It is not frozen.
    #[serde(default)]
    pub no_lockfs: bool,
}

/// A mode that has been checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mode {
    words: Vec<Word>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    byte: Option<Byte>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    probability: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    delays: Option<Delays>,
    /// Seconds well, seconds not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cycle: Option<(u64, u64)>,
}

impl From<Word> for Mode {
    fn from(word: Word) -> Mode {
        Mode { words: vec![word], byte: None, probability: None, delays: None, cycle: None }
    }
}

impl Mode {
    /// # Errors
    /// With the place of what makes no sense, and of what the kernel would refuse.
    pub fn of(wanted: &Wanted) -> Result<Mode, Refused> {
        let mut words = vec![Word::parse("#/mode", &wanted.mode)?];
        for (i, text) in wanted.and.iter().enumerate() {
            words.push(Word::parse(&format!("#/and/{i}"), text)?);
        }
        let mode = Mode {
            byte: byte(wanted, words.contains(&Word::CorruptBioByte))?,
            probability: probability(wanted, &words)?,
            delays: delays(wanted, words.contains(&Word::Delay))?,
            cycle: cycle(wanted)?,
            words,
        };
        mode.agrees()?;
        Ok(mode)
    }

    pub fn has(&self, word: Word) -> bool {
        self.words.contains(&word)
    }

    /// Nothing is wrong.
    pub fn is_idle(&self) -> bool {
        self.words == [Word::AllowWrites]
    }

    /// The words of the mode, as a person writes them.
    pub fn text(&self) -> String {
        self.words.iter().map(Word::to_string).collect::<Vec<_>>().join(" and ")
    }

    /// The words of a command that sets it.
    pub fn command(&self) -> String {
        let mut text = self.words.iter().map(Word::to_string).collect::<Vec<_>>().join(" --and ");
        let mut option = |name: &str, value: String| text.push_str(&format!(" --{name} {value}"));
        if let Some(Byte { nth, direction, value, flags }) = self.byte {
            let direction = if direction == Direction::Read { "read" } else { "write" };
            option("nth", nth.to_string());
            option("direction", direction.into());
            option("value", value.to_string());
            option("flags", flags.to_string());
        }
        if let Some(probability) = self.probability {
            option("probability", probability.to_string());
        }
        if let Some(Delays { read, write, flush }) = self.delays {
            option("read", format!("{read}ms"));
            option("write", format!("{write}ms"));
            flush.into_iter().for_each(|flush| option("flush", format!("{flush}ms")));
        }
        if let Some((up, down)) = self.cycle {
            option("up", format!("{up}s"));
            option("down", format!("{down}s"));
        }
        text
    }

    /// Refuses what the kernel refuses, and what one table cannot be.
    fn agrees(&self) -> Result<(), Refused> {
        let conflict = |detail: String, hint: &str| Err(Refused::conflict(detail).hint(hint));
        for (i, word) in self.words.iter().enumerate() {
            if self.words[..i].contains(word) {
                return conflict(format!("{word} is there twice"), "once is enough");
            }
        }
        if self.words.len() > 1 && self.has(Word::AllowWrites) {
            return conflict(
                "allow_writes goes with nothing: it is the device with nothing wrong".into(),
                "leave it out",
            );
        }
        if self.words.len() > 1 && self.has(Word::Delay) {
            let detail = "delay goes with nothing: the kernel has another target for it, and a device has one";
            return conflict(detail.into(), "delays beside faults: rules of a mount on top of the device");
        }
        let fails_writes = [Word::ErrorWrites, Word::ErrorAll].into_iter().find(|word| self.has(*word));
        if let (true, Some(other)) = (self.has(Word::DropWrites), fails_writes) {
            return conflict(
                format!("drop_writes and {other}: a write cannot be both dropped and failed"),
                "choose one",
            );
        }
        if self.has(Word::ErrorAll) && (self.has(Word::ErrorReads) || self.has(Word::ErrorWrites)) {
            return conflict("error_all is error_reads and error_writes already".into(), "choose one");
        }
        let stops_writes = fails_writes.or(self.has(Word::DropWrites).then_some(Word::DropWrites));
        if let (Some(Byte { direction: Direction::Write, .. }), Some(other)) = (self.byte, stops_writes) {
            let detail = format!("{other} and corrupt_bio_byte of writes: no write is left to be corrupted");
            return conflict(detail, "corrupt reads, or choose one");
        }
        if self.cycle.is_some() && (self.is_idle() || self.has(Word::Delay)) {
            return conflict(format!("up and down: the kernel has no cycle of {}", self.text()), "leave them out");
        }
        Ok(())
    }

    /// What the kernel accepts and has no effect.
    pub fn warnings(&self) -> Vec<String> {
        let reads_fail = self.has(Word::ErrorReads) || self.has(Word::ErrorAll);
        let writes_end = self.has(Word::DropWrites) || self.has(Word::ErrorWrites) || self.has(Word::ErrorAll);
        let of_reads = self.byte.is_some_and(|byte| byte.direction == Direction::Read);
        let hidden = [
            (reads_fail && of_reads, "corrupt_bio_byte changes nothing: every read fails before"),
            (
                reads_fail && self.has(Word::RandomReadCorrupt),
                "random_read_corrupt changes nothing: every read fails before",
            ),
            (
                writes_end && self.has(Word::RandomWriteCorrupt),
                "random_write_corrupt changes nothing: no write gets there",
            ),
        ];
        hidden.into_iter().filter(|(holds, _)| *holds).map(|(_, text)| text.to_string()).collect()
    }

    /// The kernel's target that does it.
    pub fn target(&self) -> &'static str {
        if self.has(Word::Delay) { "delay" } else { "flakey" }
    }

    /// The table of a device of so many sectors over another one.
    pub fn table(&self, below: &str, sectors: u64) -> String {
        match self.delays {
            Some(Delays { read, write, flush }) => {
                let flush = flush.map(|ms| format!(" {below} 0 {ms}")).unwrap_or_default();
                format!("0 {sectors} delay {below} 0 {read} {below} 0 {write}{flush}")
            }
            None => {
                let (up, down) = self.cycle.unwrap_or(if self.is_idle() { (ALWAYS, 0) } else { (0, ALWAYS) });
                let words: Vec<String> = self.words.iter().flat_map(|word| self.feature(*word)).collect();
                let count = words.iter().map(|word| format!(" {word}")).collect::<String>();
                format!("0 {sectors} flakey {below} 0 {up} {down} {}{count}", words.len())
            }
        }
    }

    /// Whether the kernel's table is this mode.
    pub fn is_in(&self, table: &str) -> bool {
        canonical(table).is_some_and(|table| Some(table) == canonical(&self.table("-", 0)))
    }

    /// The arguments of one feature. Without any, all requests fail, also where the kernel has no error_reads yet.
    fn feature(&self, word: Word) -> Vec<String> {
        let chance = || vec![word.to_string(), parts(self.probability.unwrap_or_default()).to_string()];
        match word {
            Word::AllowWrites | Word::Delay => Vec::new(),
            Word::ErrorAll if self.words.len() == 1 => Vec::new(),
            Word::ErrorAll => vec![Word::ErrorReads.to_string(), Word::ErrorWrites.to_string()],
            Word::CorruptBioByte => {
                let Some(Byte { nth, direction, value, flags }) = self.byte else { return Vec::new() };
                let direction = if direction == Direction::Read { "r" } else { "w" };
                vec![word.to_string(), nth.to_string(), direction.into(), value.to_string(), flags.to_string()]
            }
            Word::RandomReadCorrupt | Word::RandomWriteCorrupt => chance(),
            Word::DropWrites | Word::ErrorWrites | Word::ErrorReads => vec![word.to_string()],
        }
    }

    /// Each of its words as a mode of its own, to find out which of them the kernel lacks.
    pub fn alone(&self) -> impl Iterator<Item = (Word, Mode)> {
        self.words.iter().map(|word| (*word, Mode { words: vec![*word], cycle: None, ..self.clone() }))
    }
}

/// What a table does, without where: its target and numbers, and features in any order. The kernel names disks by their
/// numbers, and for no features the two that have the same effect.
fn canonical(table: &str) -> Option<Vec<String>> {
    let words: Vec<&str> = table.split_whitespace().skip(2).collect();
    let own = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
    match words.as_slice() {
        ["delay", places @ ..] => {
            Some(places.chunks(3).filter_map(|place| place.get(2)).map(ToString::to_string).collect())
        }
        ["flakey", _, _, up, "0", ..] => Some(own(&["flakey", up, "0"])),
        ["flakey", _, _, up, down, _, features @ ..] => {
            let is_name = |word: &&str| word.len() > 1 && word.starts_with(|c: char| c.is_ascii_lowercase());
            let mut groups: Vec<Vec<&str>> = Vec::new();
            for word in features {
                match groups.last_mut() {
                    Some(group) if !is_name(word) => group.push(word),
                    _ => groups.push(vec![word]),
                }
            }
            if groups.is_empty() {
                groups = vec![vec!["error_reads"], vec!["error_writes"]];
            }
            groups.sort();
            Some(own(&[&["flakey", up, down], groups.concat().as_slice()].concat()))
        }
        _ => None,
    }
}

fn parts(probability: f64) -> u32 {
    (probability * PARTS).round() as u32
}

fn byte(wanted: &Wanted, is_wanted: bool) -> Result<Option<Byte>, Refused> {
    let Wanted { nth, direction, value, flags, .. } = *wanted;
    let given = [("nth", nth.is_some()), ("direction", direction.is_some()), ("value", value.is_some())];
    if !is_wanted {
        let all = given.into_iter().chain([("flags", flags.is_some())]);
        return no_word_for(all, "corrupt_bio_byte").map(|()| None);
    }
    let (Some(nth), Some(direction), Some(value)) = (nth, direction, value) else {
        let missing = given.iter().find(|(_, given)| !given).map_or("nth", |(name, _)| name);
        let hint = "nth: which byte of a request, from 1; direction: read or write; value: what it becomes, 0 to 255";
        return Err(invalid(missing, format!("corrupt_bio_byte needs {missing}")).hint(hint));
    };
    match nth {
        0 => Err(invalid("nth", "nth: bytes are counted from 1")),
        _ => Ok(Some(Byte { nth, direction, value, flags: flags.unwrap_or_default() })),
    }
}

fn probability(wanted: &Wanted, words: &[Word]) -> Result<Option<f64>, Refused> {
    let random = words.iter().find(|word| matches!(word, Word::RandomReadCorrupt | Word::RandomWriteCorrupt));
    match (random, wanted.probability) {
        (None, None) => Ok(None),
        (None, Some(_)) => no_word_for([("probability", true)], "random_read_corrupt").map(|()| None),
        (Some(word), None) => Err(invalid("probability", format!("{word} needs a probability"))
            .hint("from 0 to 1: 0.01 is one request of 100")),
        // With 0 of 10^9 the kernel takes the feature as not there, and fails everything.
        (_, Some(value)) if value <= 1.0 && parts(value) > 0 => Ok(Some(value)),
        (_, Some(value)) => {
            let detail = format!("probability: {value} is not above 0 and at most 1");
            Err(invalid("probability", detail).hint("the kernel counts in parts of 10^9"))
        }
    }
}

fn delays(wanted: &Wanted, is_wanted: bool) -> Result<Option<Delays>, Refused> {
    let given = [("read", &wanted.read), ("write", &wanted.write), ("flush", &wanted.flush)];
    if !is_wanted {
        return no_word_for(given.map(|(name, text)| (name, text.is_some())), "delay").map(|()| None);
    }
    if given.iter().all(|(_, text)| text.is_none()) {
        return Err(invalid("read", "delay needs read, write or flush").hint("how long each takes more: 10ms"));
    }
    let [read, write, flush] =
        given.map(|(name, text)| text.as_deref().map(|text| milliseconds(name, text)).transpose());
    Ok(Some(Delays { read: read?.unwrap_or(0), write: write?.unwrap_or(0), flush: flush? }))
}

fn milliseconds(name: &str, text: &str) -> Result<u64, Refused> {
    let bad = |why: &str| invalid(name, format!("{name}: {text:?} {why}")).hint("write \"10ms\" or \"2s\"");
    let ns = nanoseconds(text).ok_or_else(|| bad("is not a duration"))?;
    match (ns / 1_000_000, ns % 1_000_000) {
        (ms, 0) if ms <= LONGEST_MS => Ok(ms),
        (_, 0) => Err(bad("is longer than an hour")),
        _ => Err(bad("is not a whole number of milliseconds, in which the kernel counts")),
    }
}

fn cycle(wanted: &Wanted) -> Result<Option<(u64, u64)>, Refused> {
    match (&wanted.up, &wanted.down) {
        (None, None) => Ok(None),
        (Some(up), Some(down)) => Ok(Some((seconds("up", up)?, seconds("down", down)?))),
        (up, _) => {
            let missing = if up.is_some() { "down" } else { "up" };
            let hint = "up: how long the disk is well; down: how long it then fails";
            Err(invalid(missing, format!("{missing}: one alone is no cycle")).hint(hint))
        }
    }
}

fn seconds(name: &str, text: &str) -> Result<u64, Refused> {
    let bad = |why: &str| invalid(name, format!("{name}: {text:?} {why}")).hint("write \"1s\" or \"2m\"");
    let ns = nanoseconds(text).ok_or_else(|| bad("is not a duration"))?;
    match (ns / 1_000_000_000, ns % 1_000_000_000) {
        (0, 0) => Err(bad("is no time: the kernel would never change")),
        (seconds, 0) if seconds <= u64::from(u32::MAX / 2) => Ok(seconds),
        (_, 0) => Err(bad("is longer than the kernel counts")),
        _ => Err(bad("is not a whole number of seconds, in which the kernel counts")),
    }
}

fn no_word_for<'a>(given: impl IntoIterator<Item = (&'a str, bool)>, word: &str) -> Result<(), Refused> {
    match given.into_iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(invalid(name, format!("{name} belongs to {word}, which is not asked for"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(text: &str) -> Wanted {
        serde_json::from_str(text).unwrap()
    }

    fn table(text: &str) -> String {
        Mode::of(&wanted(text)).unwrap().table("/dev/loop0", 2048)
    }

    fn refusal(text: &str) -> String {
        Mode::of(&wanted(text)).unwrap_err().to_string()
    }

    #[test]
    fn each_mode_is_a_table_that_stays_as_it_is() {
        for (mode, expected) in [
            ("allow_writes", "0 2048 flakey /dev/loop0 0 3600 0 0"),
            ("drop_writes", "0 2048 flakey /dev/loop0 0 0 3600 1 drop_writes"),
            ("error_writes", "0 2048 flakey /dev/loop0 0 0 3600 1 error_writes"),
            ("error_reads", "0 2048 flakey /dev/loop0 0 0 3600 1 error_reads"),
            ("error_all", "0 2048 flakey /dev/loop0 0 0 3600 0"),
        ] {
            assert_eq!(table(&format!(r#"{{"mode":"{mode}"}}"#)), expected);
        }
    }

    #[test]
    fn the_table_of_the_kernel_is_known_as_a_mode_or_as_another_one() {
        let is_in = |text: &str, table: &str| Mode::of(&wanted(text)).unwrap().is_in(table);
        let (idle, all) = (r#"{"mode":"allow_writes"}"#, r#"{"mode":"error_all"}"#);
        let both = r#"{"mode":"drop_writes","and":["error_reads"]}"#;
        assert!(is_in(idle, "0 2048 flakey 7:0 0 3600 0 2 error_reads error_writes"));
        assert!(is_in(all, "0 2048 flakey 7:0 0 0 3600 2 error_reads error_writes"));
        assert!(!is_in(all, "0 2048 flakey 7:0 0 3600 0 2 error_reads error_writes"));
        assert!(is_in(both, "0 2048 flakey 7:0 0 0 3600 2 error_reads drop_writes"));
        assert!(!is_in(both, "0 2048 flakey 7:0 0 0 3600 1 drop_writes"));
        let byte = r#"{"mode":"corrupt_bio_byte","and":["error_writes"],"nth":3,"direction":"read","value":1}"#;
        assert!(is_in(byte, "0 2048 flakey 7:0 0 0 3600 6 error_writes corrupt_bio_byte 3 r 1 0"));
        assert!(!is_in(byte, "0 2048 flakey 7:0 0 0 3600 6 error_writes corrupt_bio_byte 4 r 1 0"));
        let delay = r#"{"mode":"delay","write":"5ms"}"#;
        assert!(is_in(delay, "0 2048 delay 7:0 0 0 7:0 0 5"));
        assert!(!is_in(delay, "0 2048 delay 7:0 0 5 7:0 0 0") && !is_in(idle, "0 2048 delay 7:0 0 0 7:0 0 5"));
    }

    #[test]
    fn parameters_are_in_the_order_and_units_of_the_kernel() {
        let byte = r#"{"mode":"corrupt_bio_byte","nth":32,"direction":"read","value":171}"#;
        assert_eq!(table(byte), "0 2048 flakey /dev/loop0 0 0 3600 5 corrupt_bio_byte 32 r 171 0");
        let random = r#"{"mode":"random_read_corrupt","and":["random_write_corrupt"],"probability":0.25}"#;
        let features = "4 random_read_corrupt 250000000 random_write_corrupt 250000000";
        assert_eq!(table(random), format!("0 2048 flakey /dev/loop0 0 0 3600 {features}"));
        let delay = r#"{"mode":"delay","read":"5ms","write":"1s"}"#;
        assert_eq!(table(delay), "0 2048 delay /dev/loop0 0 5 /dev/loop0 0 1000");
        let flush = r#"{"mode":"delay","flush":"20ms"}"#;
        assert_eq!(table(flush), "0 2048 delay /dev/loop0 0 0 /dev/loop0 0 0 /dev/loop0 0 20");
    }

    #[test]
    fn modes_go_together_where_the_kernel_lets_them() {
        let both = r#"{"mode":"drop_writes","and":["error_reads"]}"#;
        assert_eq!(table(both), "0 2048 flakey /dev/loop0 0 0 3600 2 drop_writes error_reads");
        let three = r#"{"mode":"drop_writes","and":["corrupt_bio_byte"],"nth":1,"direction":"read","value":0}"#;
        assert_eq!(table(three), "0 2048 flakey /dev/loop0 0 0 3600 6 drop_writes corrupt_bio_byte 1 r 0 0");
        let all = r#"{"mode":"error_all","and":["random_read_corrupt"],"probability":1}"#;
        let features = "4 error_reads error_writes random_read_corrupt 1000000000";
        assert_eq!(table(all), format!("0 2048 flakey /dev/loop0 0 0 3600 {features}"));
        assert_eq!(Mode::of(&wanted(all)).unwrap().warnings().len(), 1);
    }

    #[test]
    fn what_the_kernel_forbids_is_refused_before_it_does() {
        for text in [
            r#"{"mode":"drop_writes","and":["error_writes"]}"#,
            r#"{"mode":"drop_writes","and":["error_all"]}"#,
            r#"{"mode":"error_writes","and":["corrupt_bio_byte"],"nth":1,"direction":"write","value":0}"#,
            r#"{"mode":"corrupt_bio_byte","and":["drop_writes"],"nth":1,"direction":"write","value":0}"#,
            r#"{"mode":"drop_writes","and":["drop_writes"]}"#,
            r#"{"mode":"allow_writes","and":["error_reads"]}"#,
            r#"{"mode":"delay","and":["error_reads"],"read":"1ms"}"#,
            r#"{"mode":"allow_writes","up":"1s","down":"1s"}"#,
        ] {
            let error = Mode::of(&wanted(text)).unwrap_err();
            assert_eq!(error.code(), "conflict", "{text}: {error}");
        }
    }

    #[test]
    fn a_cycle_is_of_whole_seconds_and_has_two_sides() {
        let text = r#"{"mode":"error_all","up":"2s","down":"1m"}"#;
        assert_eq!(table(text), "0 2048 flakey /dev/loop0 0 2 60 0");
        assert!(refusal(r#"{"mode":"error_all","up":"2s"}"#).contains("one alone"));
        assert!(refusal(r#"{"mode":"error_all","up":"0s","down":"1s"}"#).contains("never change"));
        assert!(refusal(r#"{"mode":"error_all","up":"1500ms","down":"1s"}"#).contains("whole number of seconds"));
    }

    #[test]
    fn parameters_must_be_there_and_belong_to_the_mode() {
        assert!(refusal(r#"{"mode":"corrupt_bio_byte","nth":3}"#).contains("needs direction"));
        assert!(refusal(r#"{"mode":"corrupt_bio_byte","nth":0,"direction":"read","value":1}"#).contains("from 1"));
        assert!(refusal(r#"{"mode":"random_read_corrupt"}"#).contains("needs a probability"));
        assert!(refusal(r#"{"mode":"random_read_corrupt","probability":0}"#).contains("above 0"));
        assert!(refusal(r#"{"mode":"random_read_corrupt","probability":1e-12}"#).contains("above 0"));
        assert!(refusal(r#"{"mode":"error_all","probability":0.5}"#).contains("belongs to"));
        assert!(refusal(r#"{"mode":"error_all","write":"1ms"}"#).contains("belongs to delay"));
        assert!(refusal(r#"{"mode":"delay","write":"10us"}"#).contains("milliseconds"));
        let error = Mode::of(&wanted(r#"{"mode":"drop_write"}"#)).unwrap_err();
        assert_eq!(error.hint.as_deref(), Some("did you mean \"drop_writes\"?"));
    }

    #[test]
    fn the_command_of_a_mode_says_all_of_it() {
        let text = r#"{"mode":"drop_writes","and":["corrupt_bio_byte"],"nth":9,"direction":"read","value":1,"up":"1s","down":"2s"}"#;
        let command = Mode::of(&wanted(text)).unwrap().command();
        let options = "--nth 9 --direction read --value 1 --flags 0 --up 1s --down 2s";
        assert_eq!(command, format!("drop_writes --and corrupt_bio_byte {options}"));
    }
}
