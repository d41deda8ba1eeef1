//! `/v1/events`: the stream, as server-sent events or as lines of JSON.
//!
//! On the control thread. Each client is a cursor into the ring, moved when its connection takes more: a client that
//! does not read costs nothing and is told afterwards how much it missed.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::{self, Stream};
use globset::GlobMatcher;
use serde_json::{Map, Value, json};

use super::problem::Problem;
use super::{Answer, AnyDaemon, OfAny, Service, body};
use crate::event::{Cursor, Filter, Read};
use crate::fault::compile::{name_glob, path_glob};

const KEEP_ALIVE: Duration = Duration::from_secs(10);

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
    data: Value,
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
}

const PARAMETERS: &[&str] = &["follow", "since", "rule", "kind", "op", "path", "pid", "limit"];

pub async fn stream(State(service): OfAny, headers: HeaderMap, RawQuery(query): RawQuery) -> Answer {
    let query = body::query(query.as_deref(), PARAMETERS)?;
    let follow = match text(&query, "follow") {
        None | Some("true" | "") => true,
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
    };
    let accepted = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    Ok(match accepted.contains("application/x-ndjson") {
        true => lines(place),
        false => Sse::new(messages(place).map(|message| Ok::<_, std::convert::Infallible>(event(message))))
            .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
            .into_response(),
    })
}

fn text<'a>(query: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    query.get(name).and_then(Value::as_str)
}

fn filter(query: &Map<String, Value>) -> Result<Filter, Problem> {
    let glob = |name: &str| -> Result<Option<GlobMatcher>, Problem> {
        let Some(glob) = text(query, name) else { return Ok(None) };
        let built = if name == "path" { path_glob(glob) } else { name_glob(glob) };
        let bad = |error: String| Problem::bad_request(format!("{name}: {error}"));
        Ok(Some(built.map_err(bad)?.compile_matcher()))
    };
    Ok(Filter {
        rule: glob("rule")?,
        kind: text(query, "kind").map(str::to_string),
        op: text(query, "op").map(str::to_string),
        path: glob("path")?,
        pid: body::number(query, "pid")?.map(|pid| pid as u32),
    })
}

fn event(message: Message) -> Event {
    let event = Event::default().event(message.name).data(message.data.to_string());
    match message.id {
        Some(id) => event.id(id),
        None => event,
    }
}

fn lines(place: Place) -> Response {
    let lines = messages(place).map(|message| Ok::<_, std::convert::Infallible>(format!("{}\n", message.data)));
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
                        return Some(Message { id: Some(id), name, data: service.record_json(&record) });
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
        Message { id: None, name: "hello", data }
    }

    /// Events were lost to this client: so many, or, over a restart, nobody knows how many.
    fn gap(&self, missed: Option<u64>) -> Message {
        let data = json!({"event": "gap", "missed": missed, "next": self.service.id(self.at)});
        Message { id: None, name: "gap", data }
    }
}

impl Service {
    pub(super) fn record_json(&self, record: &crate::event::Record) -> Value {
        record.json(&self.identity.boot_id, &self.identity.instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_of_an_earlier_daemon_is_told_from_ours_and_from_rubbish() {
        assert_eq!(parse_id("7f3a9c-1042", "7f3a9c"), Some(Id::Ours(1042)));
        assert_eq!(parse_id("aaaaaa-1042", "7f3a9c"), Some(Id::Earlier));
        assert_eq!(parse_id("1042", "7f3a9c"), None);
        assert_eq!(parse_id("7f3a9c-x", "7f3a9c"), None);
    }
}
