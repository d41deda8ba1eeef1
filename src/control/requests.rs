//! `/v1/requests`: what waits, for what, and since when.
//!
//! On the control thread; reads procfs for the names of the callers.

use std::sync::Arc;

use axum::extract::State;
use serde_json::{Value, json};

use super::{Answer, Shared, document};
use crate::fs::park::Parked;
use crate::fs::process;

/// More would be a document that nobody reads; the count is in `total`.
const MOST: usize = 1000;

pub async fn list(State(control): Shared) -> Answer {
    let now = control.ring().now_ns();
    let mut requests = Vec::new();
    let mut total = 0;
    control.core.parking.each(|id, parked| {
        total += 1;
        if requests.len() < MOST {
            requests.push((id, parked.pending.caller.tid, describe(id, parked, now)));
        }
    });
    // Names are looked up after the table has been left alone again.
    let requests: Vec<Value> = requests
        .into_iter()
        .map(|(id, tid, mut value)| {
            // One at a time: those who park do not wait for a whole list of paths.
            let paths = control.core.parking.look(id, |parked| control.core.paths_of(parked));
            let text = |path: Option<Arc<[u8]>>| path.map(|path| String::from_utf8_lossy(&path).into_owned());
            let [path, to] = paths.unwrap_or_default().map(text);
            (value["path"], value["to"]) = (path.into(), to.into());
            with_process(value, tid)
        })
        .collect();
    Ok(document(200, &json!({"requests": requests, "total": total, "cursor": control.cursor()})))
}

fn describe(id: u64, parked: &Parked, now: u64) -> Value {
    let (caller, call) = (&parked.pending.caller, &parked.pending.call);
    let range = call.range();
    json!({
        "id": id, "op": call.op().word(), "path": null, "to": null, "ino": call.ino(), "pid": null, "tid": caller.tid,
        "uid": caller.uid, "comm": null, "offset": range.map(|(offset, _)| offset),
        "length": range.map(|(_, length)| length), "state": if parked.stalled { "stalled" } else { "delayed" },
        "rule": parked.rules.first().map(|rule| rule.name.to_string()),
        "waiting_ms": now.saturating_sub(parked.since_ns) / 1_000_000,
    })
}

fn with_process(mut value: Value, tid: u32) -> Value {
    let process = process::of_thread(tid);
    value["pid"] = process.pid.into();
    value["comm"] = process.comm.text().into();
    value
}
