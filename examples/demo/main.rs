//! The main job in a minute: a real database meets a full disk, and every injection is seen as it happens.
//!
//! `cargo run --release --example demo` runs SQLite, which is built in; `--example demo -- postgres` the PostgreSQL of this
//! machine. The story is told on a thread of its own, its events are printed by another, and the main thread waits for the
//! end or for Ctrl-C and then cleans up. The command line and the daemon are this very program, started again: an example
//! cannot know where cargo puts another one. Must never leave a mount, a process or a directory behind.

mod postgres;
mod scene;
mod sqlite;

use std::process::ExitCode;

use crossbeam_channel::{bounded, select};

use scene::{Scene, Told, interrupts};

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().collect();
    match words.get(1).and_then(|word| word.to_str()) {
        Some(scene::AS_NEMESISFS) => nemesisfs::cli::main_from(words.into_iter().skip(1)),
        // So the command line starts its daemon.
        Some("mount") => nemesisfs::cli::main_from(words),
        None | Some("sqlite") => tell(sqlite::story),
        Some("postgres") => tell(postgres::story),
        Some(_) => {
            eprintln!("usage: cargo run --release --example demo [-- sqlite|postgres]");
            ExitCode::from(2)
        }
    }
}

/// Sets the scene, tells the story on it, and clears it, whatever happens.
fn tell(story: fn(&Scene) -> Told) -> ExitCode {
    let interrupted = interrupts();
    let scene = match Scene::new() {
        Ok(scene) => scene,
        Err(error) => return failed(&error),
    };
    let (done, told) = bounded(1);
    let its_scene = scene.clone();
    std::thread::spawn(move || done.send(story(&its_scene)));
    let result = select! {
        // A story that panics sends nothing.
        recv(told) -> told => told.unwrap_or_else(|_| Err("the demo itself has failed".into())),
        recv(interrupted) -> _ => Err("interrupted".into()),
    };
    let cleared = scene.clear(result.is_ok());
    match result.and(cleared) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &scene::Error) -> ExitCode {
    eprintln!("\nerror: {error}");
    ExitCode::FAILURE
}
