//! Cores that are being written now. A switch in the middle of one would lose it: systemd-coredump opens a file without
//! a name in the directory, and links it there at the end.
//!
//! Any thread that may wait. Takes no locks. Must never: wait without an end.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

const LOOK: Duration = Duration::from_millis(50);
/// The kernel keeps 15 bytes of a name. It is that of the kernel's helper and that of the service.
const SYSTEMD: &str = "systemd-coredum";
/// Services of systemd-coredump have a directory here before they have a process.
const SERVICES: &str = "/sys/fs/cgroup/system.slice/system-systemd\\x2dcoredump.slice";

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dump {
    pub pid: u32,
    pub comm: String,
}

/// All at this moment.
pub fn now() -> Vec<Dump> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut dumps: Vec<Dump> = processes.filter_map(|entry| dump(&entry.path())).collect();
    let services = fs::read_dir(SERVICES).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let names = services.map(|name| name.to_string_lossy().into_owned());
    let services = names.filter(|name| name.starts_with("systemd-coredump@"));
    dumps.extend(services.map(|comm| Dump { pid: 0, comm }));
    dumps
}

fn dump(process: &Path) -> Option<Dump> {
    let pid = process.file_name()?.to_str()?.parse().ok()?;
    let comm = fs::read_to_string(process.join("comm")).ok()?.trim_end().to_string();
    (comm == SYSTEMD || is_dumping(process)).then_some(Dump { pid, comm })
}

/// `CoreDumping` of proc_pid_status(5). A first thread that has ended before the others knows nothing.
fn is_dumping(process: &Path) -> bool {
    let says = |dir: &Path, line: &str| {
        fs::read_to_string(dir.join("status")).is_ok_and(|status| status.lines().any(|found| found == line))
    };
    let dumping = |dir: &Path| says(dir, "CoreDumping:\t1");
    let threads = || fs::read_dir(process.join("task")).into_iter().flatten().flatten().map(|entry| entry.path());
    dumping(process) || (says(process, "State:\tZ (zombie)") && threads().any(|thread| dumping(&thread)))
}

/// Waits until no core is being written; `told` hears once of those that are.
///
/// # Errors
/// With those that still are.
pub fn wait(patience: Duration, told: impl FnOnce(&[Dump])) -> Result<Duration, Vec<Dump>> {
    let began = Instant::now();
    let mut told = Some(told);
    loop {
        let dumps = now();
        if dumps.is_empty() {
            return Ok(began.elapsed());
        }
        if let Some(told) = told.take() {
            told(&dumps);
        }
        if began.elapsed() >= patience {
            return Err(dumps);
        }
        std::thread::sleep(LOOK);
    }
}

/// For people.
pub fn text(dumps: &[Dump]) -> String {
    let one = |dump: &Dump| match dump.pid {
        0 => dump.comm.clone(),
        pid => format!("{pid} ({})", dump.comm),
    };
    dumps.iter().map(one).collect::<Vec<_>>().join(", ")
}
