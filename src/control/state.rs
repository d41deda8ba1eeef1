//! The state of the whole: version, health, reset, unmount.
//!
//! On the control thread; unmounting is done by another.

use axum::body::Body;
use axum::extract::{RawQuery, State};
use serde::Deserialize;
use serde_json::{Value, json};

use super::problem::Problem;
use super::{Answer, OfAny, Service, Shared, Unmount, Unmounted, body, document, helper};
use crate::fault::{Life, Mode};
use crate::fs::Ended;
use crate::fs::arming::Changed;
use crate::fs::mount::{Holder, How, lives_on, place_of};
use crate::host::{coredump, device};
use crate::sys::mounts;

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
        "mounted": mount.map(|mount| !matches!(place_of(&mount.mountpoint, mount.connection), Ok(None))),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// Back to an idle mount, from every state, as often as one likes.
pub async fn reset(State(control): Shared, RawQuery(query): RawQuery, body: Body) -> Answer {
    let Nothing {} = body::read(body).await?;
    let all = is_all(query.as_deref())?;
    let cursor = control.cursor();
    // All that programs meet, before anything is awaited: the client may be gone by then, and this with it.
    let rules = control.core.arming.remove(|_| true);
    let mode = control.core.arming.set_mode(Mode::AllowWrites, &Life::default(), control.ring().now_ns());
    control.core.follow_mode();
    let clearing = control.clear_space();
    let held = control.core.parking.take(usize::MAX, |_| true);
    let released = held.len();
    control.core.resume(held, Ended::Removed);
    let removed: Vec<String> = rules.released.iter().map(|rule| rule.name.to_string()).collect();
    let awaited = rules.released.iter().filter(|rule| rule.is_awaited());
    let unfired: Vec<String> =
        awaited.map(|rule| format!("rule {:?} was required, and has not fired", rule.name)).collect();
    let released_rules = rules.released.into_iter().chain(mode.released).collect();
    control.in_force(Changed { released: released_rules, ..Changed::default() }).await;
    control.set_mode(Mode::AllowWrites, Life::default()).await;
    let (space, mut warnings) = clearing.await;
    warnings.extend(control.give_coredumps_back().await);
    warnings.extend(unfired);
    control.core.holds.forget(None);
    control.ring().change("rule", json!({"action": "reset", "rules": removed, "space": space, "released": released}));
    let mode = control.core.arming.mode().0.word();
    let mut answer =
        json!({"removed": removed, "mode": mode, "released": released, "warnings": warnings, "cursor": cursor});
    if all {
        control.reset_machine(&mut answer).await?;
    }
    Ok(document(200, &answer))
}

fn is_all(query: Option<&str>) -> Result<bool, Problem> {
    match body::query(query, &["all"])?.get("all").and_then(Value::as_str) {
        None | Some("false") => Ok(false),
        Some("" | "true") => Ok(true),
        Some(other) => Err(Problem::bad_request(format!("all: {other:?} is not true or false"))),
    }
}

impl Service {
    /// Devices removed, coredumps where they belong: adds to an answer what there was, and what could not be undone.
    async fn reset_machine(&self, answer: &mut Value) -> Result<(), Problem> {
        let machine = self.machine.clone();
        let (devices, leases, released) = helper(move || {
            // Coredumps first: they may lie on a device.
            let leases = coredump::leases(&machine).unwrap_or_default();
            let released = coredump::release_all(&machine, coredump::TIMEOUT);
            (device::remove_all(&machine), leases, released)
        })
        .await?;
        let mut warnings: Vec<String> =
            answer["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_string).collect();
        let (gone, left): (Vec<_>, Vec<_>) = devices.into_iter().partition(|(_, result)| result.is_ok());
        warnings.extend(left.into_iter().filter_map(|(_, result)| result.err()));
        answer["leases"] = leases.iter().map(|lease| lease["name"].clone()).collect::<Vec<_>>().into();
        match released {
            Ok(released) => warnings.extend(released.warnings),
            Err(failure) => warnings.push(format!("coredumps are not where they belong: {failure}")),
        }
        answer["devices"] = gone.into_iter().map(|(name, _)| name).collect::<Vec<_>>().into();
        answer["warnings"] = warnings.into();
        Ok(())
    }
}

/// There is nothing of a mount's here.
pub async fn reset_of_machine(State(service): OfAny, RawQuery(query): RawQuery, body: Body) -> Answer {
    let Nothing {} = body::read(body).await?;
    let mut answer = json!({"warnings": [], "cursor": service.cursor()});
    if is_all(query.as_deref())? {
        service.reset_machine(&mut answer).await?;
    }
    Ok(document(200, &answer))
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
        Ok(holders) if holders.is_empty() => Ok(document(200, &json!({"unmounted": true}))),
        Ok(holders) => {
            let detail = format!("{} is detached; {}", place(&service), lives_on(&holders));
            Ok(document(200, &json!({"unmounted": true, "detail": detail, "holders": list(&holders)})))
        }
        Err(Unmounted::Failed(reason)) => Err(Problem::new(500, "internal", format!("umount: {reason}"))),
        Err(Unmounted::Covered(reason)) => Err(Problem::new(409, "busy", reason).hint("unmount that first")),
        Err(Unmounted::Busy(holders)) => Err(busy(&service, &holders)),
    }
}

fn place(service: &Service) -> String {
    service.identity.mount.as_ref().map(|mount| mount.mountpoint.display().to_string()).unwrap_or_default()
}

fn list(holders: &[Holder]) -> Value {
    holders.iter().map(|h| json!({"pid": h.pid, "comm": h.comm, "what": h.what.to_string_lossy()})).collect()
}

fn busy(service: &Service, holders: &[Holder]) -> Problem {
    let pids = holders.iter().map(|holder| format!("{} ({})", holder.pid, holder.comm));
    let mountpoint = service.identity.mount.as_ref().map(|mount| mount.mountpoint.as_path());
    let mounts = mounts::all().unwrap_or_default();
    let inside = mounts
        .iter()
        .filter(|mount| mountpoint.is_some_and(|ours| mount.mountpoint != ours && mount.mountpoint.starts_with(ours)));
    let inside = inside.map(|mount| format!("the mount at {}", mount.mountpoint.display()));
    let who: Vec<String> = pids.chain(inside).collect();
    let detail = format!("{} is busy: held by {}", place(service), who.join(", "));
    Problem::new(409, "busy", detail).hint("stop them, or use --lazy or --force").with("holders", list(holders))
}
