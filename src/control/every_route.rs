//! What holds for every route: parameters that it does not know are refused, and each refusal is a problem document, also where the
//! server finds something wrong before a handler is asked.
//!
//! On the control thread, around the handlers. No locks. Must never: touch an answer that is no refusal.

use axum::extract::{MatchedPath, Request};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::body;
use super::problem::Problem;

/// The routes that take parameters. They judge them by themselves; all others have none.
const WITH_PARAMETERS: &[(Method, &str)] = &[
    (Method::GET, "/v1/events"),
    (Method::GET, "/v1/rules/{name}/wait"),
    (Method::GET, "/v1/repair"),
    (Method::POST, "/v1/reset"),
    (Method::DELETE, "/v1/devices/{name}"),
    (Method::DELETE, "/v1/coredump/leases"),
    (Method::PUT, "/v1/coredump/leases/{name}"),
    (Method::DELETE, "/v1/coredump/leases/{name}"),
];

pub async fn keep(request: Request, next: Next) -> Response {
    if let Some(refused) = unknown_parameter(&request) {
        return refused.into_response();
    }
    let (method, path) = (request.method().clone(), request.uri().path().to_string());
    let response = next.run(request).await;
    if !is_untold(&response) {
        return response;
    }
    match response.status() {
        StatusCode::METHOD_NOT_ALLOWED => {
            Problem::new(405, "method_not_allowed", format!("{path} takes no {method}")).into_response()
        }
        status => refused_by_the_server(status, response).await.into_response(),
    }
}

fn unknown_parameter(request: &Request) -> Option<Problem> {
    let route = request.extensions().get::<MatchedPath>()?.as_str();
    let query = request.uri().query().filter(|query| !query.is_empty())?;
    let method = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
    if WITH_PARAMETERS.iter().any(|(with, path)| with == method && *path == route) {
        return None;
    }
    body::query(Some(query), &[]).err()
}

/// Is it a refusal of which a client cannot read what it is?
fn is_untold(response: &Response) -> bool {
    let status = response.status();
    let kind = response.headers().get(header::CONTENT_TYPE);
    (status.is_client_error() || status.is_server_error())
        && kind.is_none_or(|kind| kind.as_bytes() != b"application/problem+json")
}

/// In the words of the server's own text, which is short.
async fn refused_by_the_server(status: StatusCode, response: Response) -> Problem {
    let text = axum::body::to_bytes(response.into_body(), 4096).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let detail = if text.is_empty() { status.to_string() } else { text.into_owned() };
    let code = if status.is_server_error() { "internal" } else { "bad_request" };
    Problem::new(status.as_u16(), code, detail)
}
