//! Runs the tools of the system (`dmsetup`, `losetup`, `mkfs`, `mount`), each within a limit, and keeps the lines that a
//! person would have typed.
//!
//! On helper threads: it waits for the tool. Takes no locks. Must never: wait for ever on a tool that hangs in the kernel.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long a tool may take, unless it is known to take longer.
pub const LIMIT: Duration = Duration::from_secs(30);
/// How long one that was killed may take to be gone.
const DYING: Duration = Duration::from_secs(1);
/// Where the tools are that a user's own PATH may not name.
const SYSTEM: &str = "/usr/local/sbin:/usr/sbin:/sbin";

/// Why a tool did not do it.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not there.
    #[error("{0} is not installed here")]
    Missing(String),
    /// It ran and said no. `says` is the last line of what it wrote, or how it ended.
    #[error("{line}: {says}")]
    Failed { line: String, code: Option<i32>, says: String },
    /// It did not end in time; it may have had an effect.
    #[error("{line}: not done after {} s", limit.as_secs())]
    Late { line: String, limit: Duration },
    #[error("{line}: {error}")]
    Io { line: String, error: std::io::Error },
}

/// What was run, in order: the equivalent command lines of an operation.
#[derive(Debug, Default)]
pub struct Tools {
    pub lines: Vec<String>,
}

impl Tools {
    /// Runs a tool, which is kept as a line whether it succeeds or not. Gives its standard output.
    ///
    /// # Errors
    /// When it is not there, fails, or is not done after [`LIMIT`].
    pub fn run<S: AsRef<OsStr>>(&mut self, words: &[S]) -> Result<String, ToolError> {
        self.run_within(LIMIT, words)
    }

    /// The same with another limit.
    ///
    /// # Errors
    /// As `run`.
    pub fn run_within<S: AsRef<OsStr>>(&mut self, limit: Duration, words: &[S]) -> Result<String, ToolError> {
        self.lines.push(line(words));
        ask_within(limit, words)
    }
}

/// Runs a tool that only looks, so that it is no line of the operation.
///
/// # Errors
/// As [`Tools::run`].
pub fn ask<S: AsRef<OsStr>>(words: &[S]) -> Result<String, ToolError> {
    ask_within(LIMIT, words)
}

/// Whether a tool is installed where it would be looked for.
pub fn is_there(program: &str) -> bool {
    std::env::split_paths(&search_path()).any(|dir| dir.join(program).is_file())
}

fn ask_within<S: AsRef<OsStr>>(limit: Duration, words: &[S]) -> Result<String, ToolError> {
    let shown = line(words);
    let Some((program, arguments)) = words.split_first() else {
        return Err(ToolError::Missing("a tool without a name".into()));
    };
    let mut command = Command::new(program.as_ref());
    command
        .args(arguments.iter().map(AsRef::as_ref))
        .env("LC_ALL", "C")
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let child = command.spawn().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => ToolError::Missing(program.as_ref().to_string_lossy().into_owned()),
        _ => ToolError::Io { line: shown.clone(), error },
    })?;
    let group = Pid::from_raw(child.id() as i32);
    let (said, heard) = mpsc::channel();
    // One that cannot be killed holds this thread, and nobody else.
    std::thread::Builder::new()
        .name("helper".into())
        .spawn(move || said.send(child.wait_with_output()))
        .map_err(|error| ToolError::Io { line: shown.clone(), error })?;
    match heard.recv_timeout(limit) {
        Ok(Ok(output)) => result(shown, &output),
        Ok(Err(error)) => Err(ToolError::Io { line: shown, error }),
        Err(_) => {
            let _ = killpg(group, Signal::SIGKILL);
            let _ = heard.recv_timeout(DYING);
            Err(ToolError::Late { line: shown, limit })
        }
    }
}

fn result(line: String, output: &Output) -> Result<String, ToolError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    // dmsetup ends with that it failed, whatever it has said before.
    let says_why = |line: &&str| !line.is_empty() && line.trim_end_matches('.') != "Command failed";
    let last = said.lines().map(str::trim).rfind(says_why);
    let says = last.map_or_else(|| output.status.to_string(), str::to_string);
    Err(ToolError::Failed { line, code: output.status.code(), says })
}

fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").filter(|path| !path.is_empty()).unwrap_or_else(|| "/usr/bin:/bin".into());
    path.push(":");
    path.push(SYSTEM);
    path
}

/// The words as a shell takes them.
pub fn line<S: AsRef<OsStr>>(words: &[S]) -> String {
    let words = words.iter().map(|word| word.as_ref().to_string_lossy().into_owned());
    let quoted = words.map(|word| shlex::try_quote(&word).map_or_else(|_| format!("{word:?}"), Into::into));
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_tool_prints_comes_back_and_its_line_is_kept() {
        let mut tools = Tools::default();
        assert_eq!(tools.run(&["echo", "-n", "a b"]).unwrap(), "a b");
        assert_eq!(tools.lines, ["echo -n 'a b'"]);
    }

    #[test]
    fn one_that_fails_is_told_by_its_last_words_and_one_that_is_not_there_by_name() {
        let error = ask(&["sh", "-c", "echo first >&2; echo no such device >&2; exit 3"]).unwrap_err();
        assert!(matches!(&error, ToolError::Failed { code: Some(3), says, .. } if says == "no such device"), "{error}");
        let error = ask(&["nemesisfs-has-no-such-tool"]).unwrap_err();
        assert_eq!(error.to_string(), "nemesisfs-has-no-such-tool is not installed here");
    }

    #[test]
    fn one_that_hangs_is_killed_with_all_that_it_has_started() {
        let mark = format!("{}.25", 3_000_000 + std::process::id());
        let error = ask_within(Duration::from_millis(300), &["sh", "-c", &format!("sleep {mark} & wait")]).unwrap_err();
        assert!(matches!(error, ToolError::Late { .. }), "{error}");
        assert!(ask(&["pgrep", "-f", &format!("sleep {mark}")]).is_err());
    }
}
