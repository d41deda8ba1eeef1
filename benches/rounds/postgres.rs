//! pgbench on PostgreSQL: one server for each target, all at once, and short runs by turns.
//!
//! Used by the main thread; no locks. The servers run as PostgreSQL's own user, over a root daemon; a competitor that gives
//! all files to itself is run as that user too. A server is stopped before what it lies on is unmounted, on every way out.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

use crate::target::{Failed, How, Place, Stage, Target, succeed};

const LIMIT: Duration = Duration::from_secs(30);
const CLIENTS: &str = "4";
const SECONDS: &str = "3";
const SCALE: &str = "5";

/// Where the programs are, and who runs them.
struct Installed {
    programs: PathBuf,
    uid: u32,
    gid: u32,
}

impl Installed {
    fn find() -> io::Result<Installed> {
        let missing = || io::Error::other("--pgbench needs PostgreSQL in /usr/lib/postgresql, and its user postgres");
        let versions = fs::read_dir("/usr/lib/postgresql").map_err(|_| missing())?.flatten();
        let programs = versions.map(|entry| entry.path().join("bin")).filter(|dir| dir.join("initdb").exists()).max();
        let user = User::from_name("postgres")?.ok_or_else(missing)?;
        Ok(Installed { programs: programs.ok_or_else(missing)?, uid: user.uid.as_raw(), gid: user.gid.as_raw() })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command.uid(self.uid).gid(self.gid).current_dir("/").stdin(Stdio::null());
        command
    }

    fn directory(&self, dir: &Path, mode: u32) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(mode))?;
        chown(dir, Some(self.uid), Some(self.gid))
    }
}

/// A server on one target. Its files go before the place that they lie on.
struct Cluster<'a> {
    installed: &'a Installed,
    child: Child,
    socket: PathBuf,
    place: Place,
    runs: Vec<Run>,
}

/// What one run of pgbench says.
#[derive(Clone, Copy)]
struct Run {
    per_second: f64,
    latency_ms: f64,
}

impl<'a> Cluster<'a> {
    fn start(installed: &'a Installed, target: &Target, stage: &Stage) -> Result<Cluster<'a>, Failed> {
        let initdb = |backing: &Path| {
            let data = backing.join("data");
            installed.directory(&data, 0o700)?;
            let mut initdb = installed.command("initdb");
            succeed(initdb.args(["-A", "trust", "-U", "postgres", "--no-sync", "-D"]).arg(&data)).map(drop)
        };
        let place = Place::up(target, stage, initdb)?;
        let socket = stage.home.join(format!("socket-{}", target.name));
        installed.directory(&socket, 0o755)?;
        let log = fs::File::create(socket.join("log"))?;
        let mut postgres = installed.command("postgres");
        postgres.arg("-D").arg(place.dir.join("data")).arg("-k").arg(&socket).args(["-c", "listen_addresses="]);
        let child = postgres.stdout(Stdio::null()).stderr(log).spawn()?;
        let cluster = Cluster { installed, child, socket, place, runs: Vec::new() };
        cluster.wait_until_ready()?;
        succeed(cluster.pgbench().args(["-i", "-q", "-s", SCALE]))?;
        Ok(cluster)
    }

    fn wait_until_ready(&self) -> io::Result<()> {
        let until = Instant::now() + LIMIT;
        loop {
            let mut asked = self.installed.command("pg_isready");
            match succeed(asked.args(["-q", "-h"]).arg(&self.socket)) {
                Err(error) if Instant::now() > until => {
                    let log = fs::read_to_string(self.socket.join("log")).unwrap_or_default();
                    return Err(io::Error::other(format!("{error}\n{log}")));
                }
                Err(_) => sleep(Duration::from_millis(50)),
                Ok(_) => return Ok(()),
            }
        }
    }

    fn pgbench(&self) -> Command {
        let mut pgbench = self.installed.command("pgbench");
        pgbench.arg("-h").arg(&self.socket).args(["-U", "postgres"]);
        pgbench
    }

    fn run(&mut self) -> io::Result<()> {
        let said = succeed(self.pgbench().args(["-n", "-c", CLIENTS, "-T", SECONDS, "postgres"]))?;
        let number = |key: &str| {
            let rest = said.lines().find_map(|line| line.strip_prefix(key))?;
            rest.split_whitespace().next()?.parse().ok()
        };
        match (number("tps = "), number("latency average = ")) {
            (Some(per_second), Some(latency_ms)) => self.runs.push(Run { per_second, latency_ms }),
            _ => return Err(io::Error::other(format!("pgbench said: {said}"))),
        }
        Ok(())
    }

    fn median(&self, of: impl Fn(&Run) -> f64) -> f64 {
        let mut values: Vec<f64> = self.runs.iter().map(of).collect();
        values.sort_unstable_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn mean(&self, of: impl Fn(&Run) -> f64) -> f64 {
        self.runs.iter().map(of).sum::<f64>() / self.runs.len() as f64
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        // A fast shutdown; whoever does not hear it is ended.
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT);
        let until = Instant::now() + LIMIT;
        while Instant::now() < until && matches!(self.child.try_wait(), Ok(None)) {
            sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Servers of ours that know no identities cannot hold a database of another user.
fn can_hold_a_database(target: &Target) -> bool {
    !matches!(target.how, How::Server { .. })
}

/// All rounds, and what came of them.
pub fn measure(targets: &[Target], stage: &Stage, rounds: usize, stop: &AtomicBool) -> io::Result<String> {
    let installed = Installed::find()?;
    let stage = Stage { user: Some((installed.uid, installed.gid)), ..stage.clone() };
    // Its user has to get through.
    fs::set_permissions(&stage.home, fs::Permissions::from_mode(0o755))?;
    let mut clusters = Vec::new();
    for target in targets.iter().filter(|target| can_hold_a_database(target)) {
        match Cluster::start(&installed, target, &stage) {
            Ok(cluster) => clusters.push(cluster),
            Err(Failed::Missing(why)) => println!("{} is left out: {why}", target.name),
            Err(Failed::Error(error)) => return Err(io::Error::other(format!("{}: {error}", target.name))),
        }
    }
    for round in 0..rounds {
        for turn in 0..clusters.len() {
            if stop.load(Relaxed) {
                return Err(io::Error::other("interrupted"));
            }
            let c = (round + turn) % clusters.len();
            clusters[c].run()?;
        }
    }
    Ok(report(&clusters))
}

fn report(clusters: &[Cluster<'_>]) -> String {
    let mut text = format!("\npgbench, {CLIENTS} clients, scale {SCALE}, runs of {SECONDS} s\n");
    let heads = ["tps, median", "tps, mean", "latency, median ms", "of bare"];
    text += &format!("{:24}{}\n", "", heads.map(|head| format!("{head:>20}")).concat());
    let bare = clusters.first().map_or(f64::NAN, |cluster| cluster.median(|run| run.per_second));
    for cluster in clusters {
        let median = cluster.median(|run| run.per_second);
        let cells = [median, cluster.mean(|run| run.per_second), cluster.median(|run| run.latency_ms), median / bare];
        text += &format!("{:24}{}\n", cluster.place.name, cells.map(|cell| format!("{cell:>20.2}")).concat());
    }
    text
}
