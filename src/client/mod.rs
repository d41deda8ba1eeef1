//! The HTTP client of the command line: one request a connection, over the Unix socket or TCP, blocking.
//!
//! Thread: the caller's, which drives a small tokio runtime for the length of a call; each client has its own, so
//! several hosts are served by several threads. Locks: none. Must never: touch the mount, or wait for ever on a daemon
//! that hangs, unless the caller asked for that.

pub mod error;
pub mod host;
pub mod rule_file;
mod stream;

use std::future::Future;
use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, Response, header};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Runtime;

pub use error::ClientError;
pub use host::{Host, Target};

/// How long a daemon may take for an answer that it should have at once: twice what it may spend on invalidation, and
/// ample time for a machine under load.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// What stays as it is in one segment of a path.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// What a daemon said to a request that it did not refuse.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    pub status: u16,
    pub body: Value,
}

/// One segment of a path, whatever it is made of.
pub fn segment(name: &str) -> String {
    utf8_percent_encode(name, SEGMENT).to_string()
}

/// A path with those of its parameters that have a value.
pub fn with_query<'a>(path: &str, parameters: impl IntoIterator<Item = (&'a str, Option<String>)>) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    for (name, value) in parameters {
        if let Some(value) = value {
            query.append_pair(name, &value);
        }
    }
    match query.finish() {
        query if query.is_empty() => path.to_owned(),
        query => format!("{path}?{query}"),
    }
}

/// A client of one host.
#[derive(Debug)]
pub struct Client {
    host: Host,
    connect_timeout: Duration,
    answer_timeout: Option<Duration>,
    runtime: Runtime,
}

impl Client {
    /// Nothing is connected until the first request.
    pub fn new(host: Host, connect_timeout: Duration) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| ClientError::failed(format!("no runtime for the connection: {error}")))?;
        Ok(Client { host, connect_timeout, answer_timeout: Some(ANSWER_TIMEOUT), runtime })
    }

    /// The same client with another limit for each answer; `None` waits until the daemon answers or the connection
    /// ends.
    #[must_use]
    pub fn answer_within(mut self, limit: Option<Duration>) -> Self {
        self.answer_timeout = limit;
        self
    }

    pub fn get(&self, path: &str) -> Result<Reply, ClientError> {
        self.request(Method::GET, path, None)
    }

    pub fn put(&self, path: &str, body: &Value) -> Result<Reply, ClientError> {
        self.request(Method::PUT, path, Some(body))
    }

    pub fn patch(&self, path: &str, body: &Value) -> Result<Reply, ClientError> {
        self.request(Method::PATCH, path, Some(body))
    }

    pub fn post(&self, path: &str, body: &Value) -> Result<Reply, ClientError> {
        self.request(Method::POST, path, Some(body))
    }

    pub fn delete(&self, path: &str) -> Result<Reply, ClientError> {
        self.request(Method::DELETE, path, None)
    }

    fn request(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Reply, ClientError> {
        let request = build(&self.host, method, path, "application/json", body)?;
        self.runtime.block_on(async {
            let mut connection = self.connect().await?;
            let exchange = async {
                let response = connection.send_request(request).await.map_err(|error| self.lost(&error))?;
                self.read(response).await
            };
            let reply = self.in_time(exchange).await?;
            if reply.status >= 400 { Err(ClientError::refused(reply.status, reply.body)) } else { Ok(reply) }
        })
    }

    /// Hands each event of a stream to `each`, until that breaks off or the daemon ends the stream.
    pub fn stream_events(&self, path: &str, mut each: impl FnMut(Value) -> ControlFlow<()>) -> Result<(), ClientError> {
        let request = build(&self.host, Method::GET, path, "application/x-ndjson", None)?;
        self.runtime.block_on(async {
            let mut connection = self.connect().await?;
            let sent = async { connection.send_request(request).await.map_err(|error| self.lost(&error)) };
            let response = self.in_time(sent).await?;
            if response.status().as_u16() >= 400 {
                let reply = self.in_time(self.read(response)).await?;
                return Err(ClientError::refused(reply.status, reply.body));
            }
            self.follow(response, &mut each).await
        })
    }

    async fn follow(
        &self,
        response: Response<Incoming>,
        each: &mut impl FnMut(Value) -> ControlFlow<()>,
    ) -> Result<(), ClientError> {
        let content_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let mut decoder = stream::Decoder::new(content_type.unwrap_or_default());
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.lost(&error))?;
            for event in decoder.feed(frame.data_ref().map_or(&[], |bytes| bytes.as_ref())) {
                if each(event).is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let connecting = async {
            match &self.host {
                Host::Unix(path) => handshake(UnixStream::connect(path).await?).await,
                Host::Tcp(address) => handshake(TcpStream::connect(address).await?).await,
            }
        };
        match tokio::time::timeout(self.connect_timeout, connecting).await {
            Ok(connected) => connected.map_err(|error| self.unreachable(&error)),
            Err(_) => Err(self.silent(self.connect_timeout)),
        }
    }

    async fn read(&self, response: Response<Incoming>) -> Result<Reply, ClientError> {
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.map_err(|error| self.lost(&error))?.to_bytes();
        let body = match bytes.as_ref() {
            [] => Value::Null,
            bytes => serde_json::from_slice(bytes)
                .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(bytes).into_owned())),
        };
        Ok(Reply { status, body })
    }

    async fn in_time<T>(&self, answer: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
        let Some(limit) = self.answer_timeout else {
            return answer.await;
        };
        tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| Err(self.silent(limit)))
    }

    fn unreachable(&self, error: &io::Error) -> ClientError {
        let told = ClientError::no_instance(format!("no instance answers at {}: {error}", self.host));
        match error.kind() {
            io::ErrorKind::PermissionDenied => told.hint("the socket is for its owner and group: run as one of them"),
            _ => told.hint("`nemesisfs list` shows the instances of this host and their state"),
        }
    }

    fn silent(&self, limit: Duration) -> ClientError {
        let limit = humantime::format_duration(limit);
        ClientError::no_instance(format!("{} does not answer within {limit}", self.host))
            .hint("its log may say why; `nemesisfs umount --force` ends a mount whose daemon hangs")
    }

    fn lost(&self, error: &hyper::Error) -> ClientError {
        ClientError::no_instance(format!("{} ended the connection: {error}", self.host))
            .hint("`nemesisfs list` shows whether the instance still lives")
    }
}

/// The connection is driven by a task of its own and ends with the request that it was made for.
async fn handshake<S>(stream: S) -> io::Result<SendRequest<Full<Bytes>>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    tokio::spawn(connection);
    Ok(sender)
}

fn build(
    host: &Host,
    method: Method,
    path: &str,
    accept: &str,
    body: Option<&Value>,
) -> Result<Request<Full<Bytes>>, ClientError> {
    let authority = match host {
        Host::Unix(_) => "localhost",
        Host::Tcp(address) => address,
    };
    let mut request =
        Request::builder().method(method).uri(path).header(header::HOST, authority).header(header::ACCEPT, accept);
    if body.is_some() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let bytes = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
    request.body(Full::new(bytes)).map_err(|error| ClientError::usage(format!("{path}: {error}")))
}

#[cfg(test)]
pub mod fake;

#[cfg(test)]
mod tests {
    use super::fake::Fake;
    use super::*;
    use crate::exit;
    use serde_json::json;

    const LIMIT: Duration = Duration::from_millis(300);

    #[test]
    fn a_reply_comes_with_its_status_and_a_reply_without_body_is_null() {
        let fake = Fake::start();
        fake.answer("PUT /v1/rules/a", 201, json!({"name": "a"}));
        fake.answer("DELETE /v1/rules/a", 204, Value::Null);
        let client = fake.client();
        let reply = client.put("/v1/rules/a", &json!({"enabled": true})).unwrap();
        assert_eq!(reply, Reply { status: 201, body: json!({"name": "a"}) });
        assert_eq!(client.delete("/v1/rules/a").unwrap(), Reply { status: 204, body: Value::Null });
        assert_eq!(fake.seen()[0], ("PUT /v1/rules/a".to_owned(), json!({"enabled": true})));
    }

    #[test]
    fn a_problem_document_becomes_the_error() {
        let fake = Fake::start();
        fake.answer("GET /v1/rules/a", 404, json!({"code": "not_found", "detail": "no rule \"a\""}));
        let error = fake.client().get("/v1/rules/a").unwrap_err();
        assert_eq!((error.exit, error.status), (exit::NO_SUCH_THING, Some(404)));
        assert_eq!(error.detail(), "no rule \"a\"");
    }

    #[test]
    fn a_socket_that_nobody_listens_on_is_exit_3() {
        let client = Client::new(Host::Unix("/nonexistent/n.sock".into()), LIMIT).unwrap();
        assert_eq!(client.get("/v1/version").unwrap_err().exit, exit::NO_INSTANCE);
    }

    #[test]
    fn a_daemon_that_takes_the_connection_and_is_silent_is_exit_3_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let client = Client::new(Host::Unix(path), LIMIT).unwrap().answer_within(Some(LIMIT));
        assert_eq!(client.get("/v1/version").unwrap_err().exit, exit::NO_INSTANCE);
    }

    #[test]
    fn a_stream_is_handed_over_event_by_event_until_it_ends_or_the_reader_breaks_off() {
        let fake = Fake::start();
        fake.answer_text("GET /v1/events", "{\"n\":1}\n{\"n\":2}\n");
        let mut seen = Vec::new();
        fake.client()
            .stream_events("/v1/events", |event| {
                seen.push(event);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(seen, [json!({"n": 1}), json!({"n": 2})]);
        let mut count = 0;
        let broken_off = |_| {
            count += 1;
            ControlFlow::Break(())
        };
        fake.client().stream_events("/v1/events", broken_off).unwrap();
        assert_eq!(count, 1);
    }

    #[test]
    fn names_and_parameters_are_encoded() {
        assert_eq!(segment("a b/c"), "a%20b%2Fc");
        let path = with_query("/v1/events", [("path", Some("/a&b/**".into())), ("rule", None)]);
        assert_eq!(path, "/v1/events?path=%2Fa%26b%2F**");
        assert_eq!(with_query("/v1/events", []), "/v1/events");
    }
}
