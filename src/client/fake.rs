//! A daemon for unit tests: answers on a Unix socket what a test told it to, and remembers what it was asked.
//!
//! Thread: one of its own, which ends with the test's process. Locks: one around the table of answers, for an instant.
//! Must never: be part of anything but tests.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::{Client, Host};

#[derive(Default)]
struct Script {
    answers: HashMap<String, (u16, String, Duration)>,
    seen: Vec<(String, Value)>,
}

/// A fake daemon named `fake`, which lives until it is dropped.
pub struct Fake {
    pub socket: PathBuf,
    dir: tempfile::TempDir,
    script: Arc<Mutex<Script>>,
}

impl Fake {
    pub fn start() -> Self {
        Self::named("fake")
    }

    pub fn named(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join(format!("{name}.sock"));
        let script = Arc::new(Mutex::new(Script::default()));
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let router = Router::new().fallback(answer).with_state(script.clone());
        std::thread::spawn(move || serve(listener, router));
        let fake = Fake { socket, dir, script };
        fake.answer("GET /v1/version", 200, json!({"name": "nemesisfs", "instance": name, "boot_id": "b"}));
        fake
    }

    pub fn client(&self) -> Client {
        Client::new(self.host(), Duration::from_secs(5)).unwrap()
    }

    pub fn host(&self) -> Host {
        Host::Unix(self.socket.clone())
    }

    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// From now on, `what` (method and path) is answered so.
    pub fn answer(&self, what: &str, status: u16, body: Value) {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        self.set(what, status, text, Duration::ZERO);
    }

    pub fn answer_text(&self, what: &str, text: &str) {
        self.set(what, 200, text.to_owned(), Duration::ZERO);
    }

    pub fn answer_late(&self, what: &str, after: Duration, body: Value) {
        self.set(what, 200, body.to_string(), after);
    }

    fn set(&self, what: &str, status: u16, text: String, after: Duration) {
        self.script.lock().unwrap().answers.insert(what.to_owned(), (status, text, after));
    }

    /// What was asked so far, as method and path with query, and body.
    pub fn seen(&self) -> Vec<(String, Value)> {
        self.script.lock().unwrap().seen.clone()
    }
}

fn serve(listener: std::os::unix::net::UnixListener, router: Router) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        axum::serve(listener, router).await.unwrap();
    });
}

async fn answer(State(script): State<Arc<Mutex<Script>>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await.unwrap();
    let what = format!("{} {}", head.method, head.uri.path());
    let asked = format!("{} {}", head.method, head.uri);
    let known = {
        let mut script = script.lock().unwrap();
        script.seen.push((asked, serde_json::from_slice(&body).unwrap_or(Value::Null)));
        script.answers.get(&what).cloned()
    };
    let missing = || (404, json!({"code": "unknown_route", "detail": what}).to_string(), Duration::ZERO);
    let (status, text, after) = known.unwrap_or_else(missing);
    tokio::time::sleep(after).await;
    (StatusCode::from_u16(status).unwrap(), Body::from(text)).into_response()
}
