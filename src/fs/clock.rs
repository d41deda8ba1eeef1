//! The clock: one thread that lets delayed requests go when their time has come, ends the lives of rules and wakes those
//! that come later or come and go, and lets the callers of parked requests die.
//!
//! FUSE holds a killed caller until its request is answered, and fuser does not pass the kernel's interrupts on; so the
//! clock looks at the callers of parked requests, at least every 50 ms while there are few, and answers for those with
//! a fatal signal pending. Takes the lock of the parking table for moments; does no I/O but reads of procfs, and never
//! touches the mount.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};

use serde_json::json;

use super::arming::Turns;
use super::kernel_cache;
use super::process;
use super::serve::{Core, Ended};

const TICK_NS: u64 = 50_000_000;
/// A look at one caller costs about 8 µs; with very many, most of the time is left to others.
const SHARE: u64 = 3;

/// Runs until told to stop. `stop` is seen at the next tick, or at once with [`super::park::Parking::wake_clock`].
pub fn run(core: &Arc<Core>, stop: &AtomicBool) {
    let mut seen_ns = core.ring.now_ns();
    let mut next_look_ns = 0;
    while !stop.load(Acquire) {
        let now = core.ring.now_ns();
        turn(core, seen_ns, now);
        seen_ns = now;
        let due = core.parking.due(now);
        core.resume(due, Ended::Released);
        if !core.parking.is_empty() && now >= next_look_ns {
            let_die(core);
            let took = core.ring.now_ns() - now;
            next_look_ns = now + TICK_NS.max(SHARE * took);
        }
        let idle = if core.parking.is_empty() { u64::MAX / 2 } else { next_look_ns };
        let latest = core.arming.next_turn(now).unwrap_or(u64::MAX / 2).min(idle).min(now + 3600 * 1_000_000_000);
        core.parking.sleep(core.ring.now_ns(), latest);
    }
}

/// Rules whose life has ended, or that wake or fall asleep by themselves: what they hold goes on, what could hide them is
/// forgotten by the kernel, and the stream says so.
fn turn(core: &Arc<Core>, from_ns: u64, to_ns: u64) {
    let Turns { ended, woken, asleep } = core.arming.turns(from_ns, to_ns);
    for rule in &ended {
        if &*rule.name != "mode" {
            core.ring.change("rule", json!({"rule": &*rule.name, "action": "expired"}));
        } else if core.arming.end_mode(rule, to_ns) {
            core.ring.change("mode", json!({"mode": "allow_writes", "action": "expired"}));
        }
    }
    for (rules, action) in [(&woken, "down"), (&asleep, "up")] {
        for rule in rules {
            let event = if &*rule.name == "mode" { "mode" } else { "rule" };
            core.ring.change(event, json!({"rule": &*rule.name, "action": action}));
        }
    }
    core.follow_mode();
    core.let_go(ended.iter().chain(&asleep));
    let traces = ended.into_iter().filter(|rule| kernel_cache::leaves_traces(rule));
    let rules: Vec<_> = woken.into_iter().chain(traces).collect();
    if kernel_cache::can_hide(&rules) {
        kernel_cache::turned(core, rules);
    }
}

fn let_die(core: &Arc<Core>) {
    let dying = core.parking.callers().into_iter().filter(|(_, tid, started)| process::is_dying(*tid, *started));
    let ids: Vec<u64> = dying.map(|(id, ..)| id).collect();
    if ids.is_empty() {
        return;
    }
    let parked = core.parking.take_by_id(&ids);
    for one in &parked {
        let (op, tid) = (one.pending.call.op().word(), one.pending.caller.tid);
        core.ring.change("request", json!({"action": "caller_died", "op": op, "tid": tid}));
    }
    core.resume(parked, Ended::CallerDied);
}
