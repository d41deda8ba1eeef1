//! Compiles `match`: where a rule holds.
//!
//! Pure, as all of the compiler. The operations are left to the kind, which knows what it can act on.

use globset::{Glob, GlobBuilder, GlobMatcher};

use super::{Check, Problem, words};
use crate::fault::op::FileType;
use crate::fault::plan::Place;
use crate::fault::spec::MatchSpec;

/// The kernel keeps so much of a program's name.
const LONGEST_COMM: usize = 15;
/// A larger automaton than any expression over paths needs would only eat memory.
const LARGEST_REGEX: usize = 1 << 20;

/// As long as a path may be.
const LONGEST_GLOB: usize = 4096;
/// A glob is built as a regular expression, whose brackets may not be deeper; globset panics where it cannot be built.
const MOST_BRACES: usize = 32;

/// A glob over paths below the mountpoint: `*` stops at a slash, `**` does not.
///
/// # Errors
/// Why it is none.
pub fn path_glob(glob: &str) -> Result<Glob, String> {
    built(glob, true)
}

/// A glob over paths below the mountpoint, at a place of a document, which must begin where paths do.
///
/// # Errors
/// Why it is none, or can match nothing, and what was meant.
pub fn rooted_glob(pointer: &str, glob: &str) -> Result<Glob, Problem> {
    let name = words(pointer);
    if !glob.starts_with('/') {
        let problem = Problem::new(pointer, format!("{name}: {glob:?} does not start with \"/\", the mountpoint"));
        let rooted = format!("/{glob}");
        return Err(match path_glob(&rooted) {
            Ok(_) => problem.hint(format!("did you mean \"{rooted}\"?")),
            Err(_) => problem,
        });
    }
    path_glob(glob).map_err(|error| Problem::new(pointer, format!("{name}: {error}")))
}

/// A glob over names, in which a slash is nothing special.
///
/// # Errors
/// Why it is none.
pub fn name_glob(glob: &str) -> Result<Glob, String> {
    built(glob, false)
}

fn built(glob: &str, literal_separator: bool) -> Result<Glob, String> {
    if glob.len() > LONGEST_GLOB {
        return Err(format!("a glob of more than {LONGEST_GLOB} bytes"));
    }
    if glob.matches('{').count() > MOST_BRACES {
        return Err(format!("a glob with more than {MOST_BRACES} braces"));
    }
    let built = GlobBuilder::new(glob).literal_separator(literal_separator).build();
    built.map_err(|error| error.to_string())
}

impl Check {
    pub(super) fn place(&mut self, spec: &MatchSpec) -> Place {
        Place {
            path: spec.path.as_deref().and_then(|path| self.path(path)),
            regex: spec.path_regex.as_deref().and_then(|regex| self.regex(regex)),
            pid: spec.pid,
            tree: spec.tree,
            comm: spec.comm.as_deref().and_then(|comm| self.comm(comm)),
            uid: spec.uid,
            gid: spec.gid,
            offset: spec.offset.as_deref().and_then(|range| self.range("#/match/offset", range)),
            length: spec.length.as_deref().and_then(|range| self.range("#/match/length", range)),
            direct: spec.direct,
            file_type: spec.r#type.as_deref().and_then(|word| self.file_type(word)),
            ..Place::default()
        }
    }

    fn path(&mut self, path: &str) -> Option<GlobMatcher> {
        match rooted_glob("#/match/path", path) {
            Ok(glob) => Some(glob.compile_matcher()),
            Err(problem) => {
                self.found(problem);
                None
            }
        }
    }

    fn regex(&mut self, text: &str) -> Option<regex::bytes::Regex> {
        match regex::bytes::RegexBuilder::new(text).size_limit(LARGEST_REGEX).build() {
            Ok(regex) => Some(regex),
            Err(error) => {
                let detail = format!("match.path_regex: {error}");
                let hint = "as in https://docs.rs/regex; it need not match the whole path: anchor it with ^ and $";
                self.found(Problem::new("#/match/path_regex", detail).hint(hint));
                None
            }
        }
    }

    fn comm(&mut self, text: &str) -> Option<GlobMatcher> {
        let literal = !text.contains(['*', '?', '[', '{', '\\']);
        if text.is_empty() || (literal && text.len() > LONGEST_COMM) {
            let detail = format!("match.comm: {text:?} can be no program's name: the kernel keeps 1 to 15 bytes of it");
            let cut = (1..=LONGEST_COMM).rev().find_map(|length| text.get(..length));
            let problem = Problem::new("#/match/comm", detail);
            self.found(match cut {
                Some(cut) => problem.hint(format!("did you mean {cut:?}?")),
                None => problem,
            });
            return None;
        }
        match name_glob(text) {
            Ok(glob) => Some(glob.compile_matcher()),
            Err(error) => {
                self.found(Problem::new("#/match/comm", format!("match.comm: {error}")));
                None
            }
        }
    }

    fn file_type(&mut self, word: &str) -> Option<FileType> {
        let parsed = FileType::parse(word);
        if parsed.is_none() {
            let problem = Problem::new("#/match/type", format!("match.type: unknown type {word:?}"));
            self.found(problem.nearest(word, FileType::WORDS.iter().map(|(word, _)| *word)));
        }
        parsed
    }
}
