//! The state of the whole: version, health, reset, unmount.
//!
//! On the control thread; unmounting is done by another.

use axum::body::Body;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::problem::Problem;
use super::{Answer, OfAny, Service, Shared, Unmount, Unmounted, body, document};
use crate::fs::arming::Life;
use crate::fs::mount::How;
use crate::fs::{Ended, Mode};

pub async fn version(State(service): OfAny) -> Answer {
    let identity = &service.identity;
    Ok(document(
        200,
        &json!({
            "name": "nemesisfs", "version": env!("CARGO_PKG_VERSION"), "api": "v1", "instance": identity.instance,
            "boot_id": identity.boot_id,
        }),
    ))
}

pub async fn health(State(control): Shared) -> Answer {
    let core = &control.core;
    let mut health = healthy(&control);
    health["open_files"] = core.files.open_count().into();
    health["parked"] = core.parking.len().into();
    health["rules"] = core.arming.rules().len().into();
    health["mode"] = core.arming.mode().0.word().into();
    Ok(document(200, &health))
}

pub async fn health_of_machine(State(service): OfAny) -> Answer {
    Ok(document(200, &healthy(&service)))
}

/// What every daemon says of itself.
fn healthy(service: &Service) -> Value {
    let (identity, mount) = (&service.identity, service.identity.mount.as_ref());
    json!({
        "status": "ok", "instance": identity.instance, "mountpoint": mount.map(|mount| &mount.mountpoint),
        "backing": mount.map(|mount| &mount.backing), "socket": identity.socket, "log": identity.log,
        "pid": std::process::id(), "seed": service.seed, "uptime_ms": service.started.elapsed().as_millis() as u64,
        "readers": mount.map(|mount| mount.readers),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// Back to an idle mount, from every state, as often as one likes.
pub async fn reset(State(control): Shared, body: Body) -> Answer {
    let Nothing {} = body::read(body).await?;
    let cursor = control.cursor();
    let changed = control.core.arming.remove(|_| true);
    let removed: Vec<String> = changed.released.iter().map(|rule| rule.name.to_string()).collect();
    let awaited = changed.released.iter().filter(|rule| rule.is_awaited());
    let unfired: Vec<String> =
        awaited.map(|rule| format!("rule {:?} was required, and has not fired", rule.name)).collect();
    control.in_force(changed).await;
    control.set_mode(Mode::AllowWrites, Life::default()).await;
    let (space, mut warnings) = control.clear_space().await;
    warnings.extend(unfired);
    let held = control.core.parking.take(usize::MAX, |_| true);
    let released = held.len();
    control.core.resume(held, Ended::Removed);
    control.core.holds.forget(None);
    control.ring().change("rule", json!({"action": "reset", "rules": removed, "space": space, "released": released}));
    let mode = control.core.arming.mode().0.word();
    let answer =
        json!({"removed": removed, "mode": mode, "released": released, "warnings": warnings, "cursor": cursor});
    Ok(document(200, &answer))
}

/// There is nothing of a mount's here.
pub async fn reset_of_machine(State(service): OfAny, body: Body) -> Answer {
    let Nothing {} = body::read(body).await?;
    let cursor = service.cursor();
    Ok(document(200, &json!({"warnings": [], "cursor": cursor})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WantedEnd {
    #[serde(default)]
    how: Option<String>,
}

pub async fn unmount(State(service): OfAny, body: Body) -> Answer {
    let wanted: WantedEnd = body::read(body).await?;
    let how = match wanted.how.as_deref() {
        None | Some("normal") => How::Normal,
        Some("lazy") => How::Lazy,
        Some("force") => How::Force,
        Some(other) => {
            return Err(Problem::bad_request(format!("how: {other:?}")).hint("one of: normal lazy force"));
        }
    };
    let (done, ended) = tokio::sync::oneshot::channel();
    let gone = |_| Problem::new(500, "internal", "the daemon is ending already");
    service.unmount.send(Unmount { how, done }).map_err(|error| gone(error.to_string()))?;
    match ended.await.map_err(|error| gone(error.to_string()))? {
        Ok(()) => Ok(document(200, &json!({"unmounted": true}))),
        Err(Unmounted::Failed(reason)) => Err(Problem::new(500, "internal", format!("umount: {reason}"))),
        Err(Unmounted::Busy(holders)) => Err(busy(&service, &holders)),
    }
}

fn busy(service: &Service, holders: &[crate::fs::mount::Holder]) -> Problem {
    let list: Vec<Value> =
        holders.iter().map(|h| json!({"pid": h.pid, "comm": h.comm, "what": h.what.to_string_lossy()})).collect();
    let pids: Vec<String> = holders.iter().map(|holder| format!("{} ({})", holder.pid, holder.comm)).collect();
    let place = service.identity.mount.as_ref().map(|mount| mount.mountpoint.display().to_string());
    let detail = format!("{} is busy: held by {}", place.unwrap_or_default(), pids.join(", "));
    Problem::new(409, "busy", detail).hint("stop them, or use --lazy or --force").with("holders", list.into())
}
