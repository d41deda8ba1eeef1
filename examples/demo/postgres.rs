//! The story of PostgreSQL, whose log of changes (WAL) runs out of space. Needs a PostgreSQL on this machine.
//!
//! Runs on the thread of the story; the server is a child that the scene ends. Under root, server and tools run as the
//! user `postgres`. Must never take a row for stored that the server has not acknowledged.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::{User, chown, geteuid};

use super::scene::{Scene, Told};

type Result<T> = std::result::Result<T, super::scene::Error>;

/// The rows are large, so that the log is full soon: one has 64 KiB.
const MOST_ROWS: u64 = 2000;

pub fn story(scene: &Scene) -> Told {
    let server = Server::find(scene)?;

    scene.step("A directory, seen through a disk that can be told to misbehave");
    scene.mount()?;

    scene.step(&format!("PostgreSQL works on it as on any disk ({})", server.version()?));
    server.init()?;
    server.start()?;
    server.sql("CREATE TABLE orders (id bigint PRIMARY KEY, note text NOT NULL)")?;
    // Else the rows would be compressed to next to nothing.
    server.sql("ALTER TABLE orders ALTER note SET STORAGE EXTERNAL")?;
    let before = server.insert(1, 20)?;
    scene.say(&format!("The server acknowledged {before} rows, each in a transaction of its own."));

    scene.step("From now on nothing in the directory of its WAL can grow");
    let rule = "rule add wal-full --kind error --errno ENOSPC --op grow --path /data/pg_wal/**";
    scene.nemesisfs(rule.split(' ').map(AsRef::as_ref))?;

    scene.step("PostgreSQL meets it: what was injected, and what the server makes of it");
    let during = server.insert(before + 1, MOST_ROWS)?;
    scene.end_server(None)?;
    let injections = scene.injections()?;
    let panics = server.said("PANIC")?;
    if panics.is_empty() {
        return Err("the server ended without a PANIC".into());
    }
    for line in panics {
        scene.say(&format!("PostgreSQL says | {line}"));
    }
    scene.say(&format!("{injections} injection(s), {during} more rows acknowledged before the server gave up."));

    scene.step("There is room again");
    scene.nemesisfs(["reset"].map(AsRef::as_ref))?;
    server.start()?;
    scene.say("The server has started again and recovered from its WAL.");

    scene.step("Is the database whole?");
    let acknowledged = before + during;
    server.check(acknowledged)
}

struct Server<'a> {
    scene: &'a Scene,
    programs: PathBuf,
    /// Under root: whose server it is.
    user: Option<User>,
}

impl Server<'_> {
    fn find(scene: &Scene) -> Result<Server<'_>> {
        let missing = "there is no PostgreSQL on this machine: on Debian, apt-get install postgresql; \
                       without -- postgres the demo needs nothing";
        let programs = programs().ok_or(missing)?;
        let user = match geteuid().is_root() {
            true => Some(User::from_name("postgres")?.ok_or("PostgreSQL refuses root, and there is no user postgres")?),
            false => None,
        };
        let server = Server { scene, programs, user };
        for path in [scene.backing(), server.beside()] {
            fs::create_dir_all(&path)?;
            if let Some(user) = &server.user {
                chown(&path, Some(user.uid), Some(user.gid))?;
            }
        }
        Ok(server)
    }

    fn data(&self) -> PathBuf {
        self.scene.mountpoint().join("data")
    }

    /// For what does not belong on the disk that fails: the socket and the log of messages.
    fn beside(&self) -> PathBuf {
        self.scene.path("beside")
    }

    fn log(&self) -> PathBuf {
        self.beside().join("server.log")
    }

    /// One of the programs of PostgreSQL, as its user.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command.current_dir(self.scene.path("")).env("LC_ALL", "C").stdin(Stdio::null());
        if let Some(user) = &self.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        command
    }

    fn version(&self) -> Result<String> {
        let output = self.program("postgres").arg("--version").output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn init(&self) -> Told {
        // Small segments of the log, so that it soon needs a new one.
        let words = ["--no-sync", "--data-checksums", "--wal-segsize=1", "--auth=trust", "--username=demo", "-D"];
        self.scene.show(&format!("initdb {} {}", words.join(" "), self.data().display()));
        succeed(self.program("initdb").args(words).arg(self.data())).map(drop)
    }

    /// Starts the server and waits until it answers.
    fn start(&self) -> Told {
        let options = [
            "listen_addresses=".to_owned(),
            format!("unix_socket_directories={}", self.beside().display()),
            "restart_after_crash=off".to_owned(),
            "min_wal_size=2MB".to_owned(),
            "max_connections=10".to_owned(),
        ];
        self.scene.show(&format!("postgres -D {} -c restart_after_crash=off …", self.data().display()));
        let log = fs::File::options().create(true).append(true).open(self.log())?;
        let mut command = self.program("postgres");
        command.arg("-D").arg(self.data()).args(options.iter().flat_map(|option| ["-c", option]));
        // Ctrl-C is for the demo, which then ends the server.
        command.stdout(log.try_clone()?).stderr(log).process_group(0);
        self.scene.start_server(&mut command)?;
        let until = Instant::now() + Duration::from_secs(30);
        while self.sql("SELECT 1").is_err() {
            if Instant::now() > until {
                return Err(format!("the server does not answer; it says:\n{}", self.said("")?.join("\n")).into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    fn psql(&self) -> Command {
        let mut command = self.program("psql");
        command.arg("--host").arg(self.beside());
        command.args(["--username=demo", "--dbname=postgres", "--no-psqlrc", "-qAt", "-v", "ON_ERROR_STOP=1"]);
        command
    }

    fn sql(&self, statement: &str) -> Result<String> {
        succeed(self.psql().args(["-c", statement]))
    }

    /// Inserts rows with these numbers until one fails, and gives how many were acknowledged: the client prints a row's
    /// number when the server has said that its transaction is committed.
    fn insert(&self, first: u64, count: u64) -> Result<u64> {
        let mut psql = self.psql().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let (input, output) = (psql.stdin.take(), psql.stdout.take());
        let writer = std::thread::spawn(move || {
            let mut input = input?;
            let note = "repeat(md5(random()::text), 2048)";
            // It ends early when the client does.
            let insert = |n| writeln!(input, "INSERT INTO orders VALUES ({n}, {note}) RETURNING id;").ok();
            (first..first + count).try_for_each(insert)
        });
        let rows = BufReader::new(output.ok_or("psql says nothing")?).lines();
        let acknowledged = rows.map_while(std::io::Result::ok).filter(|line| line.parse::<u64>().is_ok()).count();
        psql.wait()?;
        let _ = writer.join();
        Ok(acknowledged as u64)
    }

    /// The lines of the server's log with this word, without what comes before it.
    fn said(&self, word: &str) -> Result<Vec<String>> {
        let log = fs::read_to_string(self.log())?;
        let from = |line: &str| line.find(word).map(|at| line[at..].to_owned());
        Ok(log.lines().filter_map(from).collect())
    }

    /// All acknowledged rows are there, the indexes fit the tables, and every page has its checksum.
    fn check(&self, acknowledged: u64) -> Told {
        let rows = "SELECT count(*) FROM orders WHERE length(note) = 65536";
        self.scene.show(&format!("psql -c '{rows}'"));
        let stored: u64 = self.sql(rows)?.trim().parse()?;
        self.scene.say(&format!("{stored} rows; {acknowledged} were acknowledged."));
        // The last one may have been committed without the server getting to say so.
        if stored < acknowledged || stored > acknowledged + 1 {
            return Err("rows are missing, or there are too many".into());
        }
        self.scene.end_server(Some(Signal::SIGINT))?;
        self.scene.show(&format!("pg_checksums --check -D {}", self.data().display()));
        let said = succeed(self.program("pg_checksums").args(["--check", "-D"]).arg(self.data()))?;
        for line in said.lines().filter(|line| line.contains("scanned") || line.contains("Bad")) {
            self.scene.say(line.trim());
        }
        Ok(())
    }
}

/// The directory of the newest PostgreSQL here: Debian keeps them side by side, others have one on the path.
fn programs() -> Option<PathBuf> {
    let found = glob::glob("/usr/lib/postgresql/*/bin/initdb").into_iter().flatten().flatten();
    let version = |path: &PathBuf| path.components().nth(4).and_then(|v| v.as_os_str().to_str()?.parse::<u32>().ok());
    let newest = found.max_by_key(version).and_then(|path| path.parent().map(Path::to_owned));
    let on_path = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path).find(|dir| dir.join("initdb").is_file() && dir.join("postgres").is_file())
    });
    newest.or(on_path)
}

fn succeed(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let program = command.get_program().to_string_lossy().into_owned();
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()).into())
}
