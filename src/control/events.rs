//! `/v1/events`: the stream, as server-sent events or as lines of JSON.
//!
//! On the control thread. Each client is a cursor into the ring, moved when its connection takes more: a client that
//! does not read costs nothing and is told afterwards how much it missed. One that reads a lot takes turns with the others
//! and with all else that the socket is asked; those that read the same events share their lines.
//!
//! Locks: that of the lines, for an instant, and taken by this thread alone.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::{self, Stream};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use super::body::text;
use super::problem::Problem;
use super::{Answer, AnyDaemon, OfAny, Service, body};
use crate::event::{Cursor, Filter, Read, Record};
use crate::fault;
use crate::fault::compile::{name_glob, rooted_glob};

const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// So many events a client looks at in one turn: then others have theirs.
const TURN: u32 = 32;
/// So many lines are kept for other clients: enough for those that take turns at the same place.
const LINES: usize = 1024;

/// What a cursor says.
#[derive(Debug, PartialEq, Eq)]
pub enum Id {
    Ours(u64),
    /// Of an earlier daemon: what came since is all that we have.
    Earlier,
}

/// Reads `7f3a9c-1042`.
pub fn parse_id(id: &str, boot_id: &str) -> Option<Id> {
    let (boot, seq) = id.rsplit_once('-')?;
    let seq = seq.parse().ok()?;
    Some(if boot == boot_id { Id::Ours(seq) } else { Id::Earlier })
}

/// One message to a client.
struct Message {
    id: Option<String>,
    name: &'static str,
    /// One JSON object and the end of the line.
    line: Bytes,
}

impl Message {
    /// One of the stream itself.
    fn new(name: &'static str, data: &Value) -> Message {
        Message { id: None, name, line: line(data) }
    }
}

fn line(data: &Value) -> Bytes {
    format!("{data}\n").into()
}

/// The lines of events that were asked for last, by the events' numbers.
pub struct Lines(Mutex<Vec<Option<(u64, Bytes)>>>);

impl Default for Lines {
    fn default() -> Self {
        Lines(Mutex::new(vec![None; LINES]))
    }
}

impl Lines {
    fn of(&self, seq: u64, make: impl FnOnce() -> Bytes) -> Bytes {
        let place = seq as usize % LINES;
        let known = self.0.lock()[place].clone().filter(|(known, _)| *known == seq);
        if let Some((_, line)) = known {
            return line;
        }
        let line = make();
        self.0.lock()[place] = Some((seq, line.clone()));
        line
    }
}

/// A client's place.
struct Place {
    service: AnyDaemon,
    filter: Filter,
    at: Cursor,
    follow: bool,
    /// Events still to be sent, if there is a limit.
    left: Option<u64>,
    greeted: bool,
    /// A gap to be told before all else: it resumed after a restart.
    lost: bool,
    ended: bool,
    /// Events that were looked at in this turn.
    looked: u32,
}

const PARAMETERS: &[&str] = &["follow", "since", "rule", "kind", "op", "path", "pid", "limit"];

pub async fn stream(State(service): OfAny, headers: HeaderMap, RawQuery(query): RawQuery) -> Answer {
    let query = body::query(query.as_deref(), PARAMETERS)?;
    let follow = match text(&query, "follow") {
        None | Some("true") => true,
        Some("false") => false,
        Some(other) => return Err(Problem::bad_request(format!("follow: {other:?} is not true or false"))),
    };
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok());
    let since = text(&query, "since").or(last);
    let (at, lost) = match since.map(|id| (id, parse_id(id, &service.identity.boot_id))) {
        Some((_, Some(Id::Ours(seq)))) => (Cursor(seq.saturating_add(1)), false),
        Some((_, Some(Id::Earlier))) => (service.ring().oldest(), true),
        Some((id, None)) => return Err(Problem::bad_request(format!("since: {id:?} is not the id of an event"))),
        None if follow => (service.ring().cursor(), false),
        None => (service.ring().oldest(), false),
    };
    let place = Place {
        filter: filter(&query)?,
        left: body::number(&query, "limit")?,
        service,
        at,
        follow,
        greeted: false,
        lost,
        ended: false,
        looked: 0,
    };
    let accepted = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    Ok(match accepted.contains("application/x-ndjson") {
        true => lines(place),
        false => Sse::new(messages(place).map(|message| Ok::<_, std::convert::Infallible>(event(message))))
            .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
            .into_response(),
    })
}

fn filter(query: &Map<String, Value>) -> Result<Filter, Problem> {
    let bad = |error: String| Problem::bad_request(format!("rule: {error}"));
    let rule = text(query, "rule").map(name_glob).transpose().map_err(bad)?;
    let path =
        text(query, "path").map(|glob| rooted_glob("#/path", glob)).transpose().map_err(Problem::of_parameter)?;
    Ok(Filter {
        rule: rule.map(|glob| glob.compile_matcher()),
        kind: word(query, "kind", Filter::kinds())?,
        op: word(query, "op", Filter::ops())?,
        path: path.map(|glob| glob.compile_matcher()),
        pid: body::number(query, "pid")?,
    })
}

/// A word that some event can have.
fn word(
    query: &Map<String, Value>,
    name: &str,
    known: impl Iterator<Item = &'static str> + Clone,
) -> Result<Option<String>, Problem> {
    let Some(word) = text(query, name) else { return Ok(None) };
    if known.clone().any(|known| known == word) {
        return Ok(Some(word.to_string()));
    }
    let problem = fault::Problem::new(format!("#/{name}"), format!("{name}: no event has {word:?}"));
    Err(Problem::of_parameter(problem.nearest(word, known)))
}

fn event(message: Message) -> Event {
    let data = String::from_utf8_lossy(&message.line);
    // The place first: a script that reads line by line has it when it meets the data.
    let event = message.id.into_iter().fold(Event::default(), Event::id);
    event.event(message.name).data(data.trim_end())
}

fn lines(place: Place) -> Response {
    let lines = messages(place).map(|message| Ok::<_, std::convert::Infallible>(message.line));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

fn messages(place: Place) -> impl Stream<Item = Message> + Send {
    stream::unfold(place, |mut place| async move { place.next().await.map(|message| (message, place)) })
}

impl Place {
    /// The next message; none at the end of the stream.
    async fn next(&mut self) -> Option<Message> {
        if !self.greeted {
            self.greeted = true;
            return Some(self.hello());
        }
        if self.lost {
            self.lost = false;
            return Some(self.gap(None));
        }
        let service = self.service.clone();
        loop {
            if self.ended || self.left == Some(0) {
                return None;
            }
            if self.looked == TURN {
                self.looked = 0;
                tokio::task::yield_now().await;
            }
            self.looked += 1;
            let published = service.published.notified();
            tokio::pin!(published);
            published.as_mut().enable();
            service.ring().listen();
            match service.ring().read(self.at) {
                Read::Event(record) => {
                    self.at = Cursor(self.at.0 + 1);
                    self.ended = record.event() == "bye";
                    if self.ended || self.filter.wants(&record) {
                        self.left = self.left.map(|left| left - 1);
                        let (id, name) = (service.id(Cursor(record.seq)), record.event());
                        let line = service.lines.of(record.seq, || line(&service.record_json(&record)));
                        return Some(Message { id: Some(id), name, line });
                    }
                }
                Read::Gap { missed, next } => {
                    self.at = next;
                    return Some(self.gap(Some(missed)));
                }
                Read::Empty if !self.follow => return None,
                Read::Empty => published.await,
            }
        }
    }

    fn hello(&self) -> Message {
        let (ring, boot_id) = (self.service.ring(), &self.service.identity.boot_id);
        let data = json!({
            "event": "hello", "boot_id": boot_id, "instance": self.service.identity.instance,
            "oldest": self.service.id(ring.oldest()), "newest": self.service.cursor(),
            "seed": self.service.seed,
        });
        Message::new("hello", &data)
    }

    /// Events were lost to this client: so many, or, over a restart, nobody knows how many.
    fn gap(&self, missed: Option<u64>) -> Message {
        let data = json!({"event": "gap", "missed": missed, "next": self.service.id(self.at)});
        Message::new("gap", &data)
    }
}

impl Service {
    pub(super) fn record_json(&self, record: &Record) -> Value {
        record.json(&self.identity.boot_id, &self.identity.instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_made_once_for_those_who_read_the_same_event() {
        let lines = Lines::default();
        let made = std::cell::Cell::new(0);
        let get = |seq: u64| {
            lines.of(seq, || {
                made.set(made.get() + 1);
                line(&json!(seq))
            })
        };
        assert_eq!((get(7), get(7)), ("7\n".into(), "7\n".into()));
        assert_eq!(made.get(), 1);
        assert_eq!(get(7 + LINES as u64), format!("{}\n", 7 + LINES));
        assert_eq!((get(7), made.get()), ("7\n".into(), 3));
    }

    #[test]
    fn an_id_of_an_earlier_daemon_is_told_from_ours_and_from_rubbish() {
        assert_eq!(parse_id("7f3a9c-1042", "7f3a9c"), Some(Id::Ours(1042)));
        assert_eq!(parse_id("aaaaaa-1042", "7f3a9c"), Some(Id::Earlier));
        assert_eq!(parse_id("1042", "7f3a9c"), None);
        assert_eq!(parse_id("7f3a9c-x", "7f3a9c"), None);
    }
}
