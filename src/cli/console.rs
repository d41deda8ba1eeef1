//! Where words go: results to standard output, errors to standard error, each line whole, with the instance in front
//! when there are several.
//!
//! Thread: any; commands for several hosts print from one thread each. Locks: one for each of the two streams, for the
//! length of a line. Must never: panic because a reader has gone (`| head`).

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use crate::client::{ClientError, Target};

/// What one command on one host came to.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    /// What was done and how to undo it, or what was asked for.
    pub lines: Vec<String>,
    /// What goes to standard error although nothing was refused, such as that the time ran out.
    pub complaints: Vec<String>,
    /// The document of the server, for `--json`; `None` when lines were already printed one by one.
    pub body: Option<Value>,
    pub status: u16,
    pub exit: u8,
}

/// Both streams, and how the user wants to be told.
pub struct Console {
    out: Mutex<Box<dyn Write + Send>>,
    err: Mutex<Box<dyn Write + Send>>,
    pub json: bool,
    pub quiet: bool,
}

impl Console {
    pub fn new(out: Box<dyn Write + Send>, err: Box<dyn Write + Send>, json: bool, quiet: bool) -> Self {
        Console { out: Mutex::new(out), err: Mutex::new(err), json, quiet }
    }

    /// One line of a result. An error means that nobody reads any more.
    pub fn line(&self, line: &str) -> io::Result<()> {
        if self.quiet { Ok(()) } else { write_line(&self.out, line) }
    }

    /// One line of an error, which `--quiet` does not hide.
    pub fn complain(&self, line: &str) {
        let _ = write_line(&self.err, line);
    }

    /// A value as a document of its own.
    pub fn document(&self, value: &Value) -> io::Result<()> {
        self.line(&value.to_string())
    }

    /// The result of one host. A reader that went away is no failure of the command.
    pub fn result(&self, target: &Target, several: bool, result: Result<Outcome, ClientError>) -> u8 {
        match result {
            Ok(outcome) => {
                self.outcome(target, several, &outcome);
                outcome.exit
            }
            Err(error) => {
                self.error_of(target, several, &error);
                error.exit
            }
        }
    }

    fn outcome(&self, target: &Target, several: bool, outcome: &Outcome) {
        let prefix = prefix(target, several);
        if self.json {
            if let Some(body) = &outcome.body {
                let _ = self.document(&envelope(target, several, Some(outcome.status), body.clone()));
            }
            return;
        }
        for line in outcome.lines.iter().flat_map(|line| line.lines()) {
            if self.line(&format!("{prefix}{line}")).is_err() {
                break;
            }
        }
        for line in &outcome.complaints {
            self.complain(&format!("{prefix}{line}"));
        }
    }

    fn error_of(&self, target: &Target, several: bool, error: &ClientError) {
        if self.json {
            self.complain(&envelope(target, several, error.status, error.problem.clone()).to_string());
            return;
        }
        for line in error.lines() {
            self.complain(&format!("{}{line}", prefix(target, several)));
        }
    }

    /// A failure that belongs to no host. Gives its exit code.
    pub fn error(&self, error: &ClientError) -> u8 {
        if self.json {
            self.complain(&error.problem.to_string());
        } else {
            error.lines().iter().for_each(|line| self.complain(line));
        }
        error.exit
    }
}

fn write_line(stream: &Mutex<Box<dyn Write + Send>>, line: &str) -> io::Result<()> {
    let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
    writeln!(stream, "{line}")?;
    stream.flush()
}

fn prefix(target: &Target, several: bool) -> String {
    if several { format!("{}: ", target.name) } else { String::new() }
}

fn envelope(target: &Target, several: bool, status: Option<u16>, body: Value) -> Value {
    match several {
        true => {
            json!({"host": target.host.to_string(), "instance": target.name, "status": status, "body": body})
        }
        // A reply without a body is still a document, so that a program can read it.
        false if body.is_null() => json!({}),
        false => body,
    }
}
