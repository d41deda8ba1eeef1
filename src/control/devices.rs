//! `/v1/devices`: block devices that fail below a filesystem.
//!
//! On the control thread; what looks at the machine or changes it is done by a helper, and may take as long as a filesystem
//! takes to be made.

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRef, Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{get, post, put};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::problem::Problem;
use super::{Answer, AnyDaemon, OfAny, body, document, helper};
use crate::fault;
use crate::host::{Kind, Machine, Refused, device};

pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S>
where
    AnyDaemon: FromRef<S>,
{
    Router::new()
        .route("/v1/devices", get(list))
        .route("/v1/devices/{name}", get(show).put(create).delete(remove))
        .route("/v1/devices/{name}/mode", put(mode))
        .route("/v1/devices/{name}/suspend", post(suspend))
        .route("/v1/devices/{name}/resume", post(resume))
        .route("/v1/devices/{name}/cut", post(cut))
        .route("/v1/devices/{name}/mark", post(mark))
        .route("/v1/devices/{name}/replay", post(replay))
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Problem {
        if let Some(pointer) = &refused.pointer {
            let problem = fault::Problem::new(pointer, refused.detail);
            return Problem::of_body(fault::Problem { hint: refused.hint, ..problem });
        }
        let status = match refused.kind {
            Kind::Invalid => 400,
            Kind::NotFound => 404,
            Kind::Busy | Kind::Conflict => 409,
            Kind::NotSupported => 501,
            Kind::Failed => 500,
        };
        let problem = Problem::new(status, refused.code(), refused.detail);
        let problem = refused.hint.into_iter().fold(problem, Problem::hint);
        refused.more.into_iter().fold(problem, |problem, (name, value)| problem.with(name, value))
    }
}

async fn list(State(service): OfAny) -> Answer {
    let machine = service.machine.clone();
    Ok(document(200, &helper(move || device::all(&machine)).await?))
}

async fn show(State(service): OfAny, Path(name): Path<String>) -> Answer {
    let machine = service.machine.clone();
    Ok(document(200, &helper(move || device::one(&machine, &name)).await??))
}

async fn create(State(service): OfAny, Path(name): Path<String>, body: Body) -> Answer {
    let asked = body::read(body).await?;
    let (machine, cursor) = (service.machine.clone(), service.cursor());
    let (mut answer, is_new) = helper(move || device::create(&machine, &name, &asked)).await??;
    answer["cursor"] = cursor.into();
    Ok(document(if is_new { 201 } else { 200 }, &answer))
}

async fn remove(State(service): OfAny, Path(name): Path<String>, RawQuery(query): RawQuery) -> Answer {
    let values = body::query(query.as_deref(), &["kill", "umount"])?;
    let flag = |name: &str| match values.get(name).and_then(Value::as_str) {
        None | Some("false") => Ok(false),
        Some("" | "true") => Ok(true),
        Some(other) => Err(Problem::bad_request(format!("{name}: {other:?}")).hint("one of: true false")),
    };
    let (kill, umount) = (flag("kill")?, flag("umount")?);
    let (machine, cursor) = (service.machine.clone(), service.cursor());
    let Some(mut answer) = helper(move || device::remove(&machine, &name, kill, umount)).await?? else {
        return Ok(StatusCode::NO_CONTENT.into_response());
    };
    answer["cursor"] = cursor.into();
    Ok(document(200, &answer))
}

async fn mode(service: OfAny, name: Path<String>, body: Body) -> Answer {
    change(service, name, body, |machine, name, wanted| device::set_mode(machine, name, &wanted)).await
}

async fn suspend(service: OfAny, name: Path<String>, body: Body) -> Answer {
    change::<device::AskedStall>(service, name, body, |machine, name, asked| device::suspend(machine, name, &asked))
        .await
}

async fn resume(service: OfAny, name: Path<String>, body: Body) -> Answer {
    change::<Nothing>(service, name, body, |machine, name, _| device::resume(machine, name)).await
}

async fn cut(service: OfAny, name: Path<String>, body: Body) -> Answer {
    change(service, name, body, device::cut).await
}

async fn mark(service: OfAny, name: Path<String>, body: Body) -> Answer {
    change::<device::AskedMark>(service, name, body, |machine, name, asked| device::mark(machine, name, &asked)).await
}

async fn replay(service: OfAny, name: Path<String>, body: Body) -> Answer {
    change::<device::AskedReplay>(service, name, body, |machine, name, asked| device::replay(machine, name, &asked))
        .await
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// Reads what is asked for, has it done by a helper, and answers with where the stream was before.
async fn change<T: DeserializeOwned + Send + 'static>(
    State(service): OfAny,
    Path(name): Path<String>,
    body: Body,
    act: impl FnOnce(&Machine, &str, T) -> Result<Value, Refused> + Send + 'static,
) -> Answer {
    let asked: T = body::read(body).await?;
    let (machine, cursor) = (service.machine.clone(), service.cursor());
    let mut answer = helper(move || act(&machine, &name, asked)).await??;
    answer["cursor"] = cursor.into();
    Ok(document(200, &answer))
}
