//! Which instances a command is for: `-H`, or the environment, or the only one that lives here.
//!
//! Thread: the caller's. Locks: those of `instances`, for an instant. Must never: connect to anything, or touch a
//! mount.

use std::fmt;
use std::path::{Path, PathBuf};

use super::error::ClientError;
use crate::exit;
use crate::instances::{self, Instance};

/// Where a daemon listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    Unix(PathBuf),
    Tcp(String),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Unix(path) => write!(f, "unix://{}", path.display()),
            Host::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

/// A host that a command was sent to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub host: Host,
    /// What to call it until it has told its name.
    pub name: String,
    /// Whether the user chose it, and an undo line has to choose it again.
    pub chosen: bool,
}

impl Target {
    fn of(host: Host) -> Self {
        let name = match &host {
            Host::Unix(path) => path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
            Host::Tcp(address) => address.clone(),
        };
        Target { host, name, chosen: true }
    }

    fn of_instance(instance: &Instance, chosen: bool) -> Self {
        let host = Host::Unix(instance.state.socket.clone());
        Target { host, name: instance.state.instance.clone(), chosen }
    }
}

/// The instances that the words of `-H` mean, or without any, the only living one of `run_dir`. Of several words one that
/// nobody answers to keeps nothing from being done on the others: it is found out when it is asked.
pub fn resolve(words: &[String], run_dir: &Path) -> Result<Vec<Target>, ClientError> {
    if words.is_empty() {
        return only_living(run_dir).map(|target| vec![target]);
    }
    let mut targets: Vec<Target> = Vec::new();
    for word in words {
        let found = match parse(word, run_dir) {
            Err(error) if error.exit == exit::NO_INSTANCE && words.len() > 1 => vec![absent(word, run_dir)],
            found => found?,
        };
        for target in found {
            if !targets.iter().any(|known| known.host == target.host) {
                targets.push(target);
            }
        }
    }
    Ok(targets)
}

/// Where the one would be that a word means.
fn absent(word: &str, run_dir: &Path) -> Target {
    let path = word.strip_prefix("unix://").or_else(|| word.strip_prefix("unix:")).unwrap_or(word);
    Target::of(Host::Unix(match path.contains('/') {
        true => path.into(),
        false => run_dir.join(format!("{path}.sock")),
    }))
}

fn parse(word: &str, run_dir: &Path) -> Result<Vec<Target>, ClientError> {
    if let Some(address) = word.strip_prefix("tcp://") {
        return tcp(address.trim_end_matches('/')).map(|target| vec![target]);
    }
    let path = word.strip_prefix("unix://").or_else(|| word.strip_prefix("unix:"));
    match path {
        Some("") => Err(ClientError::usage(format!("-H {word}: no path"))),
        Some(path) => sockets(path),
        None if word.contains("://") => {
            Err(ClientError::usage(format!("-H {word}: unknown scheme")).hint("use unix:///path or tcp://host:port"))
        }
        None if word.contains('/') => sockets(word),
        None if is_glob(word) => by_glob(word, run_dir),
        None => by_name(word, run_dir).map(|target| vec![target]),
    }
}

fn is_glob(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

fn tcp(address: &str) -> Result<Target, ClientError> {
    let port = address.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
    if !matches!(port, Some(Ok(_))) {
        return Err(ClientError::usage(format!("-H tcp://{address}: no port")).hint("use tcp://host:port"));
    }
    Ok(Target::of(Host::Tcp(address.to_owned())))
}

fn sockets(path: &str) -> Result<Vec<Target>, ClientError> {
    if !is_glob(path) {
        return Ok(vec![Target::of(Host::Unix(path.into()))]);
    }
    let paths = glob::glob(path).map_err(|error| ClientError::usage(format!("-H {path}: {error}")))?;
    let targets: Vec<Target> = paths.flatten().map(|path| Target::of(Host::Unix(path))).collect();
    if targets.is_empty() {
        return Err(ClientError::no_instance(format!("no socket matches {path}")));
    }
    Ok(targets)
}

/// The mounts with such names; of one whose daemon has died it is found out when it is asked, or nobody would be told that
/// there was anything that is not done. A daemon without a mount may have come by itself.
fn by_glob(name: &str, run_dir: &Path) -> Result<Vec<Target>, ClientError> {
    let glob = glob::Pattern::new(name).map_err(|error| ClientError::usage(format!("-H {name}: {error}")))?;
    let mut found = all(run_dir)?;
    found.retain(|instance| instance.state.mountpoint.is_some() && glob.matches(&instance.state.instance));
    if found.is_empty() {
        return Err(ClientError::no_instance(format!("no instance with a mount has a name like {name}"))
            .hint("`nemesisfs list` shows what there is; one without a mount is chosen by its whole name"));
    }
    Ok(found.iter().map(|instance| Target::of_instance(instance, true)).collect())
}

fn by_name(name: &str, run_dir: &Path) -> Result<Target, ClientError> {
    let living = living(run_dir)?;
    match living.iter().find(|instance| instance.state.instance == name) {
        Some(instance) => Ok(Target::of_instance(instance, true)),
        None => {
            Err(ClientError::no_instance(format!("no instance \"{name}\" lives here")).hint(match names(&living) {
                names if names.is_empty() => "`nemesisfs list` shows what there is".to_owned(),
                names => format!("these do: {names}"),
            }))
        }
    }
}

fn only_living(run_dir: &Path) -> Result<Target, ClientError> {
    let mut found = all(run_dir)?;
    // Those with a mount come first: one without may have come by itself. It does not answer for one whose daemon is dead
    // either, or what was meant for a mount would seem to be done.
    let are_mounts = found.iter().any(|instance| instance.state.mountpoint.is_some());
    if are_mounts {
        found.retain(|instance| instance.state.mountpoint.is_some());
    }
    let none = if are_mounts { "no instance with a mount runs here" } else { "no instance runs here" };
    let (living, dead): (Vec<Instance>, Vec<Instance>) = found.into_iter().partition(|instance| instance.alive);
    match (living.as_slice(), dead.as_slice()) {
        ([one], _) => Ok(Target::of_instance(one, false)),
        ([], []) => Err(ClientError::no_instance("no instance runs here").hint(format!(
            "`nemesisfs mount BACKING MOUNTPOINT` starts one; -H chooses one elsewhere (looked in {})",
            run_dir.display()
        ))),
        ([], [one, ..]) => Err(ClientError::no_instance(format!("{none}: {} has died", names(&dead)))
            .hint(format!("its log may tell why; `nemesisfs umount --instance {}` cleans up", one.state.instance))),
        (several, _) => Err(ClientError::usage(format!("several instances run here: {}", names(several)))
            .hint("choose with -H NAME, which can be given more than once")),
    }
}

fn all(run_dir: &Path) -> Result<Vec<Instance>, ClientError> {
    instances::list(run_dir).map_err(|error| ClientError::failed(format!("{}: {error}", run_dir.display())))
}

fn living(run_dir: &Path) -> Result<Vec<Instance>, ClientError> {
    Ok(all(run_dir)?.into_iter().filter(|instance| instance.alive).collect())
}

fn names(instances: &[Instance]) -> String {
    instances.iter().map(|instance| instance.state.instance.as_str()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve_in(dir: &Path, words: &[&str]) -> Result<Vec<String>, ClientError> {
        let words: Vec<String> = words.iter().map(ToString::to_string).collect();
        Ok(resolve(&words, dir)?.iter().map(|target| target.host.to_string()).collect())
    }

    #[test]
    fn sockets_are_chosen_by_url_by_path_and_by_glob_each_once() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a.sock", "b.sock"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let at = |name: &str| format!("unix://{}/{name}", dir.path().display());
        assert_eq!(resolve_in(dir.path(), &[&at("*.sock"), &at("a.sock")]).unwrap(), [at("a.sock"), at("b.sock")]);
        assert_eq!(resolve_in(dir.path(), &["unix:x.sock"]).unwrap(), ["unix://x.sock"]);
        assert_eq!(resolve_in(dir.path(), &["/x/y"]).unwrap(), ["unix:///x/y"]);
        assert_eq!(resolve_in(dir.path(), &[&at("*.no")]).unwrap_err().exit, exit::NO_INSTANCE);
    }

    #[test]
    fn a_glob_of_names_means_the_mounts_also_those_whose_daemons_have_died() {
        use nix::fcntl::{Flock, FlockArg};
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, mountpoint: Option<&str>| {
            let state = serde_json::json!({"instance": name, "pid": 1, "mountpoint": mountpoint, "backing": mountpoint,
                "socket": format!("/run/{name}.sock")});
            let file = dir.path().join(format!("{name}.json"));
            std::fs::write(&file, state.to_string()).unwrap();
            file
        };
        let hold = |file| Flock::lock(std::fs::File::open(file).unwrap(), FlockArg::LockExclusiveNonblock).unwrap();
        let _locks = [hold(write("n1", Some("/1"))), hold(write("n2", Some("/2"))), hold(write("nhost", None))];
        write("n3", Some("/3"));
        let expected = ["unix:///run/n1.sock", "unix:///run/n2.sock", "unix:///run/n3.sock"];
        assert_eq!(resolve_in(dir.path(), &["n*"]).unwrap(), expected);
        assert_eq!(resolve_in(dir.path(), &["n2", "n[12]"]).unwrap(), [expected[1], expected[0]]);
        for none in ["x*", "nh*"] {
            let error = resolve_in(dir.path(), &[none]).unwrap_err();
            assert!(error.detail().contains("no instance with a mount has a name like"), "{error}");
            assert_eq!((error.exit, error.lines().len()), (exit::NO_INSTANCE, 2), "{none}");
        }
    }

    #[test]
    fn a_host_that_makes_no_sense_is_a_usage_error() {
        let dir = tempfile::tempdir().unwrap();
        for word in ["tcp://host", "http://host:1", "unix://", "tcp://host:99999"] {
            assert_eq!(resolve_in(dir.path(), &[word]).unwrap_err().exit, exit::USAGE, "{word}");
        }
        assert_eq!(resolve_in(dir.path(), &["tcp://[::1]:80"]).unwrap(), ["tcp://[::1]:80"]);
    }

    #[test]
    fn of_several_one_that_does_not_live_keeps_the_others_from_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let gone = format!("unix://{}/gone.sock", dir.path().display());
        assert_eq!(resolve_in(dir.path(), &["/x/y", "gone"]).unwrap(), ["unix:///x/y", &gone]);
        assert_eq!(resolve_in(dir.path(), &["/no/*.sock", "/x/y"]).unwrap(), ["unix:///no/*.sock", "unix:///x/y"]);
    }

    #[test]
    fn without_a_choice_no_instance_is_exit_3_and_a_name_that_nobody_has_too() {
        let dir = tempfile::tempdir().unwrap();
        let error = resolve_in(dir.path(), &[]).unwrap_err();
        assert_eq!(error.exit, exit::NO_INSTANCE);
        assert!(error.lines()[1].starts_with("hint: "));
        assert_eq!(resolve_in(dir.path(), &["n7"]).unwrap_err().exit, exit::NO_INSTANCE);
    }
}
