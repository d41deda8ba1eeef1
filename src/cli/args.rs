//! What the arguments of several commands are made of: the flags that are everywhere, durations, quoting.
//!
//! Thread: the caller's. Locks: none. Must never: know the words that the server validates.

use std::str::FromStr;
use std::time::Duration;

use clap::Args;

/// The flags that every command takes.
#[derive(Debug, Clone, Args)]
pub struct Globals {
    /// The instance to talk to: unix:///path, tcp://host:port, or the name of an instance of this host. A glob of paths
    /// or names means several. Repeatable. Not needed when one instance runs here
    #[arg(
        short = 'H',
        long,
        value_name = "HOST",
        global = true,
        env = "NEMESISFS_HOST",
        value_delimiter = ',',
        help_heading = "Everywhere"
    )]
    pub host: Vec<String>,

    /// Print the server's JSON; with several hosts, one line for each
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub json: bool,

    /// Print nothing but errors
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub quiet: bool,

    /// How long a connection may take
    #[arg(long, value_name = "DURATION", global = true, default_value = "5s", help_heading = "Everywhere")]
    pub connect_timeout: Span,
}

/// A duration as the user wrote it, which is how it is sent, and its length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub text: String,
    pub length: Duration,
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match humantime::parse_duration(text) {
            Ok(length) => Ok(Span { text: text.to_owned(), length }),
            Err(error) => Err(format!("{error}; write it as 10ms, 3s or 5m")),
        }
    }
}

/// A probability, 0 to 1.
pub fn probability(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("a probability is a number from 0 to 1".to_owned()),
    }
}

/// `KEY=VALUE`.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("a label is KEY=VALUE".to_owned()),
    }
}

/// A word as a shell reads it. Commas and percent signs need no quotes, which would only make it harder to read.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,%=+@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    shlex::try_quote(word).map_or_else(|_| word.to_owned(), |quoted| quoted.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units_and_probabilities_limits() {
        assert_eq!("1m 30s".parse::<Span>().unwrap().length, Duration::from_secs(90));
        assert!("30".parse::<Span>().unwrap_err().contains("10ms"));
        assert_eq!(probability("0.25"), Ok(0.25));
        assert!(probability("1.5").is_err() && probability("NaN").is_err() && probability("-0.1").is_err());
    }
}
