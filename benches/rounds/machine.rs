//! What the figures depend on: processors, kernel, filesystem, load.
//!
//! Used by the main thread; no locks. What cannot be found out is shown as `?`.

use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn field(text: &str, key: &str) -> String {
    let line = text.lines().find(|line| line.starts_with(key)).and_then(|line| line.split_once(':'));
    line.map_or_else(|| "?".into(), |(_, value)| value.trim().to_owned())
}

pub fn load() -> String {
    read("/proc/loadavg").split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

pub fn describe(dir: &Path) -> String {
    let processor = field(&read("/proc/cpuinfo"), "model name");
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let kernel = read("/proc/sys/kernel/osrelease");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let filesystem = filesystem_of(dir).unwrap_or_else(|| "?".into());
    format!(
        "nemesisfs {}{}\nLinux {}, {cores} x {processor}, {memory}, load before {}\n{} on {filesystem}",
        env!("CARGO_PKG_VERSION"),
        if cfg!(debug_assertions) { " (debug build: the figures mean nothing)" } else { "" },
        kernel.trim(),
        load(),
        dir.display(),
    )
}

/// The type of the mount that a directory lies on: of those that hold it, the one with the longest path.
fn filesystem_of(dir: &Path) -> Option<String> {
    let real = dir.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let words = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let holding = words.filter(|words| words.len() > 2 && real.starts_with(words[1]));
    holding.max_by_key(|words| words[1].len()).map(|words| words[2].to_owned())
}
