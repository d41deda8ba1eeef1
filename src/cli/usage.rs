//! Wrong command lines, told as every other error is: what is wrong, and a hint. The parser's own words have empty lines,
//! tips that make no sense here, and no document for `--json`.
//!
//! Thread: the main one. Locks: none. Must never: guess a word that is not one of the command's own.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, Error};

use crate::client::ClientError;
use crate::fault::compile::nearest;

/// None of what is no error: help and version are printed as they are.
pub fn explained(error: &Error, arguments: &[String], program: Command) -> Option<ClientError> {
    let is_help = matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    );
    if is_help {
        return None;
    }
    let unknown = word(error, ContextKind::InvalidSubcommand);
    let command = meant(arguments, unknown, program);
    if let Some(later) = unknown.filter(|unknown| is_later(&command, unknown)) {
        return Some(not_yet(&command, later));
    }
    let text = error.render().to_string();
    let what: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    let what = what.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let (what, written) = invalid_value(error).unwrap_or_else(|| (what.to_owned(), None));
    let what = what.split(" [possible values: ").next().unwrap_or(&what);
    let hint = written.or_else(|| near(error, &command)).or_else(|| possible(error));
    Some(ClientError::usage(what).hint(hint.unwrap_or_else(|| usage(error, &command))))
}

/// Words that are declared, each with the command below which it will be. None of them is a word that is written wrong.
const LATER: &[(&str, &str)] = &[
    ("nemesisfs", "run clean power request connection gate scenario recorder top shell doctor capabilities man"),
    ("inspect", "handles inode map mounts threads instruments dump"),
];

fn is_later(command: &Command, word: &str) -> bool {
    let below = LATER.iter().filter(|(above, _)| *above == command.get_name());
    below.flat_map(|(_, words)| words.split(' ')).any(|later| later == word)
}

fn not_yet(command: &Command, word: &str) -> ClientError {
    let name = command.get_bin_name().unwrap_or("nemesisfs");
    let mut error = ClientError::usage(format!("`{name} {word}` is not built yet"));
    error.problem["code"] = "not_yet".into();
    error.hint(format!("`{name} --help` shows what is"))
}

/// What is wrong with a value, and how it is written, which values say themselves after a semicolon. One of the user's own
/// may have semicolons and lines, too.
fn invalid_value(error: &Error) -> Option<(String, Option<String>)> {
    let reason = std::error::Error::source(error).filter(|_| error.kind() == ErrorKind::ValueValidation)?.to_string();
    let (reason, written) = match reason.rsplit_once("; ") {
        Some((reason, written)) => (reason, Some(written.to_owned())),
        None => (&*reason, None),
    };
    let (value, argument) = (word(error, ContextKind::InvalidValue)?, word(error, ContextKind::InvalidArg)?);
    let value = value.replace(char::is_control, " ");
    Some((format!("invalid value '{value}' for '{argument}': {reason}"), written))
}

/// The command that the words lead to, as far as they are commands.
fn meant(arguments: &[String], unknown: Option<&str>, mut program: Command) -> Command {
    // This hands down what all of them take.
    program.build();
    let mut command = &program;
    for word in arguments.iter().skip(1).take_while(|word| Some(word.as_str()) != unknown) {
        match command.find_subcommand(word) {
            Some(next) => command = next,
            // What stands before the first command may be the value of a flag.
            None if word.starts_with('-') || command.get_name() == program.get_name() => {}
            None => break,
        }
    }
    command.clone()
}

fn word(error: &Error, kind: ContextKind) -> Option<&str> {
    match error.get(kind)? {
        ContextValue::String(word) => Some(word),
        _ => None,
    }
}

fn near(error: &Error, command: &Command) -> Option<String> {
    if let Some(wrong) = word(error, ContextKind::InvalidSubcommand) {
        let found = nearest(wrong, command.get_subcommands().map(Command::get_name))?;
        return Some(format!("did you mean \"{found}\"?"));
    }
    let wrong = word(error, ContextKind::InvalidArg).filter(|_| error.kind() == ErrorKind::UnknownArgument)?;
    let flags = command.get_arguments().filter(|flag| !flag.is_hide_set()).filter_map(|flag| flag.get_long());
    nearest(wrong.strip_prefix("--")?, flags).map(|found| format!("did you mean --{found}?"))
}

fn possible(error: &Error) -> Option<String> {
    match error.get(ContextKind::ValidValue)? {
        ContextValue::Strings(words) if !words.is_empty() => Some(format!("one of: {}", words.join(" "))),
        _ => None,
    }
}

fn usage(error: &Error, command: &Command) -> String {
    let name = command.get_bin_name().unwrap_or("nemesisfs");
    let help = format!("`{name} --help`");
    match error.get(ContextKind::Usage).map(ToString::to_string) {
        Some(usage) => format!("{}, and {help}", usage.trim().trim_start_matches("Usage: ")),
        None => help,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::{CommandFactory, Parser};

    fn told(words: &str) -> ClientError {
        let words: Vec<String> = shlex::split(&format!("nemesisfs {words}")).unwrap();
        explained(&Cli::try_parse_from(&words).unwrap_err(), &words, Cli::command()).unwrap()
    }

    #[test]
    fn a_wrong_command_line_is_one_line_of_what_is_wrong_and_one_hint_that_leads_on() {
        for (words, what, hint) in [
            ("mode drop_writes --fro 1s", "unexpected argument '--fro' found", "did you mean --for?"),
            ("-H n1 events --limt 3", "unexpected argument '--limt' found", "did you mean --limit?"),
            ("mode x --jsno", "unexpected argument '--jsno' found", "did you mean --json?"),
            ("rule ad", "unrecognized subcommand 'ad'", "did you mean \"add\"?"),
            ("evnts", "unrecognized subcommand 'evnts'", "did you mean \"events\"?"),
            ("mode enospc --for 10", "time unit needed, for example 10sec or 10ms", "write it as 10ms, 3s or 5m"),
            ("completions foo", "invalid value 'foo' for '<SHELL>'", "one of: bash elvish fish powershell zsh"),
            ("rule add a", "were not provided: --kind <KIND>", "nemesisfs rule add --kind <KIND> <NAME>"),
            ("mount a b -x", "unexpected argument '-x' found", "`nemesisfs mount --help`"),
            ("space virtual --free 0 --used 1%", "cannot be used with", "`nemesisfs space virtual --help`"),
            ("rule add a --kind error --errno", "a value is required", "`nemesisfs rule add --help`"),
            ("nonsense", "unrecognized subcommand 'nonsense'", "`nemesisfs --help`"),
            ("nonsense mode", "unrecognized subcommand 'nonsense'", "`nemesisfs --help`"),
            ("events --limit 'a; b'", "'a; b' for '--limit <N>': invalid digit", "`nemesisfs events --help`"),
            ("mode x --for '1\n\n2'", "for '--for <DURATION>': ", "write it as 10ms, 3s or 5m"),
            ("mode x --for '1; 2'", "invalid value '1; 2' for '--for <DURATION>': ", "write it as 10ms, 3s or 5m"),
        ] {
            let lines = told(words).lines();
            let [first, second] = &lines[..] else { panic!("{words}: {lines:?}") };
            assert!(first.starts_with("error: ") && first.contains(what), "{words}: {lines:?}");
            assert!(second.starts_with("hint: ") && second.contains(hint), "{words}: {lines:?}");
            assert!(!lines.concat().contains('\n') && !lines.concat().contains("tip"), "{words}: {lines:?}");
        }
    }

    #[test]
    fn what_is_declared_and_not_built_is_told_to_be_so_and_not_to_be_another_word_written_wrong() {
        let later = LATER.iter().flat_map(|(above, words)| words.split(' ').map(move |word| (*above, word)));
        for (above, word) in later {
            let command = if above == "inspect" { format!("inspect {word}") } else { word.to_owned() };
            for words in [command.clone(), format!("{command} mode -- x")] {
                let error = told(&words);
                assert_eq!((error.exit, error.code()), (crate::exit::USAGE, "not_yet"), "{words}");
                assert_eq!(error.detail(), format!("`nemesisfs {command}` is not built yet"));
            }
        }
        assert_eq!(told("rule run").code(), "usage");
    }
}
