//! The story of SQLite and the full disk. SQLite is built into this program; all it needs is a directory.
//!
//! Runs on the thread of the story. Must never take a row for stored that SQLite has not acknowledged.

use std::path::Path;

use rusqlite::Connection;

use super::scene::{Error, Scene, Told, free_kib};

pub fn story(scene: &Scene) -> Told {
    scene.step("A directory, seen through a disk that can be told to misbehave");
    scene.mount()?;

    scene.step("SQLite works on it as on any disk");
    let path = scene.mountpoint().join("orders.db");
    let database = Connection::open(&path)?;
    database.execute_batch("CREATE TABLE orders (id INTEGER PRIMARY KEY, note TEXT NOT NULL)")?;
    let (before, _) = insert(&database, 100);
    scene.say(&format!("SQLite acknowledged {before} rows, each in a transaction of its own."));

    scene.step("The disk has 64 KiB left from now on");
    scene.nemesisfs(["space", "virtual", "--free", "64KiB"].map(AsRef::as_ref))?;
    scene.show(&format!("df --output=avail {}", scene.mountpoint().display()));
    scene.say(&format!("{} KiB available", free_kib(&scene.mountpoint())?));

    scene.step("SQLite fills it: what was injected, and what SQLite makes of it");
    let (during, error) = insert(&database, 1000);
    let error = error.ok_or("SQLite did not notice that the disk is full")?;
    let injections = scene.injections()?;
    scene.say(&format!("SQLite says | {error}"));
    scene.say(&format!("{injections} injection(s), {during} rows acknowledged meanwhile."));

    scene.step("There is room again");
    scene.nemesisfs(["reset"].map(AsRef::as_ref))?;
    let (after, error) = insert(&database, 100);
    if let Some(error) = error {
        return Err(format!("SQLite still fails: {error}").into());
    }
    scene.say(&format!("SQLite goes on by itself: {after} more rows acknowledged."));

    scene.step("Is the database whole?");
    let acknowledged = before + during + after;
    check(scene, &database, acknowledged)?;
    database.close().map_err(|(_, error)| error)?;
    scene.say("And seen from below, in the backing directory, without the mount:");
    check(scene, &Connection::open(scene.backing().join("orders.db"))?, acknowledged)
}

/// Inserts rows until one fails: how many were acknowledged, and why it ended.
fn insert(database: &Connection, count: u32) -> (u32, Option<rusqlite::Error>) {
    let note = "a row that was paid for ".repeat(20);
    for done in 0..count {
        if let Err(error) = database.execute("INSERT INTO orders (note) VALUES (?1)", [&note]) {
            return (done, Some(error));
        }
    }
    (count, None)
}

fn check(scene: &Scene, database: &Connection, acknowledged: u32) -> Result<(), Error> {
    let integrity: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    let rows: u32 = database.query_row("SELECT count(*) FROM orders", [], |row| row.get(0))?;
    let file = database.path().map(Path::new).and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    scene.say(&format!("{file}: integrity_check says {integrity}; {rows} rows of {acknowledged} acknowledged ones."));
    if integrity != "ok" || rows != acknowledged {
        return Err("the database is not whole".into());
    }
    Ok(())
}
