//! Leases: who wants cores to go elsewhere, and until when. The first takes, the last gives back.
//!
//! On helper threads and the `machine` thread. Holds the lock of the part while it switches, not while cores are brought
//! home. Must never: tell a lease as taken that is not in force.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::about;
use super::book::{self, Away, Book, Lease, Means, Stage, Switch, milliseconds};
use super::choice::{Choice, choose, is_refuge};
use super::found::{self, Found, Ground, Hindrance, Taker};
use super::room::{Room, resolved};
use super::steps::{self, What};
use super::switch::{Place, Steps, by_others, is_done, pattern, place};
use super::{By, EVENT, LIFE, NEED, OnLow, PATIENCE, Released, Taken, Wanted, flight, home};
use crate::event::record::rfc3339;
use crate::host::state::{Deadline, Part, boot, is_name};
use crate::host::tool::Tools;
use crate::host::{AtWork, Kind, Machine, Refused, shown};
use crate::sys::mounts;

/// How soon what could not be undone is tried again.
const AGAIN: Duration = Duration::from_secs(5);
/// How long the `machine` thread waits for cores in flight; it comes again.
const BRIEFLY: Duration = Duration::from_secs(2);
/// How soon it comes again when another one is at it.
const SOON: Duration = Duration::from_secs(1);
/// How long a redirection that others have undone is left to them: systemd unmounts all before it mounts anew.
const SETTLES: Duration = Duration::from_secs(1);
const LOST: &str = "others have undone it; it is done again";

/// Takes a lease, or renews it: from the return on cores go elsewhere, or have no need to.
///
/// # Errors
/// With what is in the way; then nothing was changed.
pub fn redirect(machine: &Machine, name: &str, wanted: &Wanted) -> Result<Taken, Refused> {
    Leases::of(machine).redirect(name, wanted)
}

/// Lets a lease that is there last longer.
///
/// # Errors
/// When there is none, and as [`redirect`].
pub fn renew(machine: &Machine, name: &str, wanted: &Wanted) -> Result<Taken, Refused> {
    let there = book::look(&machine.state)?.lease(name).is_some_and(|lease| !lease.until.has_passed());
    if !there {
        let failure = Refused::new(Kind::NotFound, format!("there is no lease {name:?}"));
        return Err(failure.hint("it may have ended: `nemesisfs coredump status` lists those that there are"));
    }
    redirect(machine, name, wanted)
}

/// Gives a lease back; that there is none is no error. Who gives back the last one restores.
///
/// # Errors
/// When the state cannot be read, or an agent does not answer. That something is in the way of restoring is no error:
/// it is told, and tried again by [`expire`].
pub fn release(machine: &Machine, name: &str, timeout: Duration) -> Result<Released, Refused> {
    Leases::of(machine).release(Some(name), timeout)
}

/// Gives all leases back, whoever has taken them.
///
/// # Errors
/// As [`release`].
pub fn release_all(machine: &Machine, timeout: Duration) -> Result<Released, Refused> {
    Leases::of(machine).release(None, timeout)
}

/// How long until there is something to do that nobody asks for, but for bringing cores home. Zero is now.
pub fn due(machine: &Machine) -> Option<Duration> {
    due_on(&Ground::default(), &book::peek(&machine.state))
}

/// How long until cores can be brought home. Zero is now.
pub fn carry_due(machine: &Machine) -> Option<Duration> {
    book::peek(&machine.state).carry_due()
}

/// Do cores go elsewhere, or is there anything left to do about that? So it is when nobody can know.
pub fn is_pending(machine: &Machine) -> bool {
    let is = |book: Book| book.switch.is_some() || book.due().is_some() || book.carry_due().is_some();
    book::look(&machine.state).map_or(true, is)
}

/// Brings home what can be, which may take minutes.
pub fn carry(machine: &Machine) {
    let _at_work = machine.begin();
    home::carry(machine, home::alone(machine));
}

/// Ends leases whose time has come, undoes what nobody wants any more, whoever has begun it, and redirects again what
/// others have undone.
pub fn expire(machine: &Machine) {
    Leases::of(machine).expire();
}

/// Is there room where cores would be redirected to? Tells if not. For the start of a daemon: none where cores would not
/// be redirected.
pub fn check_root(machine: &Machine) -> Option<Room> {
    Leases::of(machine).check_root()
}

/// All that is known.
///
/// # Errors
/// When the system cannot be read.
pub fn status(machine: &Machine) -> Result<Value, Refused> {
    Leases::of(machine).status()
}

/// One lease, if it lives.
pub fn lease(machine: &Machine, name: &str) -> Option<Value> {
    let book = book::peek(&machine.state);
    book.lease(name).filter(|lease| !lease.until.has_passed()).map(Lease::json)
}

/// All that live.
///
/// # Errors
/// When the state cannot be read.
pub fn leases(machine: &Machine) -> Result<Vec<Value>, Refused> {
    let book = book::look(&machine.state)?;
    Ok(book.leases.iter().filter(|lease| !lease.until.has_passed()).map(Lease::json).collect())
}

/// Can this process change where cores go?
///
/// # Errors
/// With what hinders it.
pub fn may_act() -> Result<(), Refused> {
    match found::hindrance(&Ground::default()) {
        None => Ok(()),
        Some(Hindrance::Privilege(why)) => {
            Err(Refused::not_supported(format!("running {why}, it cannot change where cores go")))
        }
        Some(Hindrance::Container(why)) => {
            let detail = format!("in {why}, it cannot change where cores go");
            Err(Refused::not_supported(detail).hint("run it on the node itself, in no container"))
        }
    }
}

pub(super) struct Leases<'a> {
    machine: &'a Machine,
    ground: Ground,
    /// A daemon that is needed for nothing else must not end meanwhile.
    _at_work: AtWork<'a>,
}

fn filled(wanted: &Wanted) -> Vec<PathBuf> {
    wanted.fills.iter().map(|path| resolved(path)).collect()
}

impl<'a> Leases<'a> {
    pub fn of(machine: &'a Machine) -> Leases<'a> {
        Leases { machine, ground: Ground::default(), _at_work: machine.begin() }
    }

    #[cfg(test)]
    pub fn on(machine: &'a Machine, ground: Ground) -> Leases<'a> {
        Leases { machine, ground, _at_work: machine.begin() }
    }

    fn tell(&self, detail: Value) {
        self.machine.tell(EVENT, detail);
    }

    fn steps(&self, patience: Duration) -> Steps<'_> {
        Steps { machine: self.machine, ground: &self.ground, tools: Tools::default(), patience }
    }

    pub fn redirect(&self, name: &str, wanted: &Wanted) -> Result<Taken, Refused> {
        check(name, wanted)?;
        match found::hindrance(&self.ground) {
            _ if wanted.by == By::Agent => self.ask_to_redirect(name, wanted),
            Some(Hindrance::Container(why)) => self.ask_to_redirect(name, wanted).map(|mut taken| {
                taken.how = format!("{} (we are in {why})", taken.how);
                taken
            }),
            Some(Hindrance::Privilege(why)) => Err(no_privilege(why)),
            None => self.redirect_here(name, wanted),
        }
    }

    fn redirect_here(&self, name: &str, wanted: &Wanted) -> Result<Taken, Refused> {
        let part = book::lock(self.machine)?;
        let mut book = Book::read(&part)?;
        self.drop_expired(&mut book);
        let mut steps = self.steps(wanted.patience);
        self.forget_broken(&mut book, &mut steps, &part)?;
        let renewed = book.lease(name).is_some();
        let need = needed(book.lease(name), wanted);
        let wanted = &Wanted { need: Some(need), ..wanted.clone() };
        let mut warnings = Vec::new();
        let (redirected, how, found) = match &book.switch {
            Some(switch) => {
                is_refuge(&switch.fallback, &filled(wanted), &table()?)?;
                self.check_room(&switch.fallback, wanted)?;
                if wanted.to.as_ref().is_some_and(|to| resolved(to) != switch.fallback) {
                    warnings.push(format!("cores go to {} already, for another lease", switch.fallback.display()));
                }
                (true, switch.how.clone(), switch.found.clone())
            }
            None => self.take(&mut book, name, wanted, &mut steps, &part)?,
        };
        let fallback = book.switch.as_ref().map(|switch| switch.fallback.clone());
        let room = fallback.map(|dir| Room::look(&dir, need)).transpose()?;
        let lease = write_lease(&mut book, name, wanted, false);
        if let Some(switch) = &mut book.switch {
            (switch.stage, switch.trouble, switch.again) = (Stage::Taken, None, None);
        }
        book.write(&part)?;
        let remaining_ms = milliseconds(lease.until.left());
        if !renewed {
            let owner = &lease.owner;
            let taken = json!({"action": "taken", "lease": name, "owner": owner, "for_ms": lease.life_ms,
                "redirected": redirected, "how": how});
            self.tell(taken);
        }
        warnings.extend(room.as_ref().and_then(Room::complaint));
        warnings.extend(book.switch.as_ref().and_then(|switch| self.closed_to_others(&switch.fallback)));
        let commands = steps.tools.lines;
        Ok(Taken { lease: name.into(), renewed, remaining_ms, redirected, how, found, room, commands, warnings })
    }

    /// What was switched and is not in force: somebody has undone it, it was done half, or the machine has booted since.
    fn forget_broken(&self, book: &mut Book, steps: &mut Steps, part: &Part) -> Result<(), Refused> {
        let Some(switch) = &book.switch else { return Ok(()) };
        if switch.boot == boot() && is_done(&self.ground, &switch.means) {
            return Ok(());
        }
        let in_the_way =
            |reason: String| Refused::conflict(reason).hint("`nemesisfs coredump status` shows what is there");
        steps.give_back(switch).map_err(in_the_way)?;
        self.put_away(book);
        book.write(part)
    }

    /// The first lease: looks, chooses, checks, and switches. The lease is in the book before anything is done, so that it
    /// is ended if we are killed.
    fn take(
        &self,
        book: &mut Book,
        name: &str,
        wanted: &Wanted,
        steps: &mut Steps,
        part: &Part,
    ) -> Result<(bool, String, Value), Refused> {
        let found = self.look()?;
        let fallback = self.fallback(&found, wanted);
        let choice = choose(&found, &fallback, &filled(wanted), &table()?)?;
        if let Choice::Nothing { why } = &choice {
            return Ok((false, why.clone(), found.json()));
        }
        self.check_room(&fallback, wanted)?;
        let made = make(&fallback, &found)?;
        let switch = Switch { made, ..planned(name, &found, &choice, fallback)? };
        let how = switch.how.clone();
        book.switch = Some(switch.clone());
        write_lease(book, name, wanted, false);
        book.write(part)?;
        self.tell(json!({"action": "redirecting", "lease": name, "how": how, "found": found.json()}));
        if let Err(failure) = steps.take(&switch) {
            self.tell(json!({"action": "failed", "lease": name, "error": failure.to_string()}));
            book.leases.retain(|lease| lease.name != name);
            self.undo(book, steps, part)?;
            return Err(failure);
        }
        self.tell(json!({"action": "redirected", "lease": name, "to": shown(&switch.fallback), "how": how}));
        Ok((true, how, found.json()))
    }

    fn look(&self) -> Result<Found, Refused> {
        let switch = book::peek(&self.machine.state).switch;
        let ours = |mount: &mounts::Mount| switch.as_ref().is_some_and(|switch| switch.means.is(mount));
        Found::look(&self.ground, ours).map_err(|error| about(&self.ground.pattern, &error))
    }

    /// Where cores are to go: a directory of ours for each core directory, with a name that tells whose cores are in it.
    fn fallback(&self, found: &Found, wanted: &Wanted) -> PathBuf {
        if let Some(to) = &wanted.to {
            return resolved(to);
        }
        let of = found.directory.as_deref().map(|dir| dir.to_string_lossy().trim_matches('/').replace('/', "-"));
        let name = of.filter(|name| !name.is_empty()).unwrap_or_else(|| "working-directories".into());
        resolved(&self.machine.state.path().join("cores").join(name))
    }

    fn check_room(&self, fallback: &Path, wanted: &Wanted) -> Result<(), Refused> {
        let room = Room::look(fallback, wanted.need.unwrap_or(NEED))?;
        let Some(complaint) = room.complaint() else { return Ok(()) };
        self.machine.ring.change(super::EVENT, json!({"action": "low", "room": room}));
        match wanted.on_low {
            OnLow::Warn => Ok(()),
            OnLow::Refuse => Err(Refused::conflict(complaint).hint("--need SIZE, --to DIR, or --on-low warn")),
        }
    }

    /// A core that the kernel writes is written with the rights of the process: can all write where it goes?
    fn closed_to_others(&self, fallback: &Path) -> Option<String> {
        let found = self.look().ok()?;
        let by_kernel = matches!(found.taker, Taker::Directory | Taker::Directories | Taker::WorkingDirectory);
        let closed = closed_to_others(fallback).filter(|_| by_kernel)?;
        let (fallback, closed) = (fallback.display(), closed.display());
        Some(format!("{closed} is closed to others: processes that are not root's leave no cores in {fallback}"))
    }

    fn ask_to_redirect(&self, name: &str, wanted: &Wanted) -> Result<Taken, Refused> {
        let life = match wanted.life {
            Some(life) => life,
            None => self.former_life(name),
        };
        let answer = steps::ask(self.machine, What::Redirect, name, life, wanted.timeout)?;
        let part = book::lock(self.machine)?;
        let mut book = Book::read(&part)?;
        let renewed = book.lease(name).is_some();
        let lease = write_lease(&mut book, name, wanted, true);
        book.write(&part)?;
        Ok(Taken {
            lease: name.into(),
            renewed,
            remaining_ms: milliseconds(lease.until.left()),
            redirected: answer.redirected,
            how: answer.said,
            found: Value::Null,
            room: None,
            commands: answer.commands,
            warnings: Vec::new(),
        })
    }

    fn former_life(&self, name: &str) -> Duration {
        let book = book::peek(&self.machine.state);
        book.lease(name).map_or(LIFE, |lease| Duration::from_millis(lease.life_ms))
    }

    pub fn release(&self, name: Option<&str>, timeout: Duration) -> Result<Released, Refused> {
        let alone = home::alone(self.machine);
        let part = book::lock(self.machine)?;
        let mut book = Book::read(&part)?;
        self.drop_expired(&mut book);
        let is_meant = |lease: &Lease| name.is_none_or(|name| lease.name == name);
        let of_agent: Vec<Lease> = book.leases.iter().filter(|l| l.by_agent && is_meant(l)).cloned().collect();
        let (gone, left): (Vec<Lease>, _) = book.leases.drain(..).partition(|lease| !lease.by_agent && is_meant(lease));
        book.leases = left;
        book.write(&part)?;
        for lease in &gone {
            self.tell(json!({"action": "released", "lease": lease.name}));
        }
        let is_any = !gone.is_empty() || !of_agent.is_empty();
        let mut released = Released { released: is_any, ..Released::default() };
        if !book.is_wanted() {
            let mut steps = self.steps(PATIENCE);
            released.warnings = self.undo(&mut book, &mut steps, &part)?;
            released.commands = steps.tools.lines;
        }
        drop(part);
        let carried = home::carry(self.machine, alone);
        let all = |paths: &[PathBuf]| paths.iter().map(shown).collect();
        (released.brought_home, released.away) = (all(&carried.home), all(&carried.away));
        released.warnings.extend(carried.warnings);
        released.commands.extend(self.ask_to_restore(&of_agent, timeout)?);
        let book = book::look(&self.machine.state)?;
        released.restored = book.switch.is_none() && book.leases.iter().all(|lease| !lease.by_agent);
        released.leases = book.leases.into_iter().map(|lease| lease.name).collect();
        Ok(released)
    }

    /// Has leases given back by their agent. One that it has not given back stays in the book until it ends by itself, as
    /// it does on the node; the others go.
    fn ask_to_restore(&self, leases: &[Lease], timeout: Duration) -> Result<Vec<String>, Refused> {
        let (mut commands, mut failures) = (Vec::new(), Vec::new());
        for lease in leases {
            match steps::ask(self.machine, What::Restore, &lease.name, Duration::ZERO, timeout) {
                Ok(answer) => {
                    commands.extend(answer.commands);
                    self.strike_out(lease)?;
                }
                Err(failure) => failures.push(failure),
            }
        }
        if failures.is_empty() { Ok(commands) } else { Err(Refused::all(failures)) }
    }

    /// Not if somebody has taken it again meanwhile.
    fn strike_out(&self, gone: &Lease) -> Result<(), Refused> {
        let part = book::lock(self.machine)?;
        let mut book = Book::read(&part)?;
        book.leases.retain(|lease| lease.name != gone.name || lease.until != gone.until);
        book.write(&part)?;
        self.tell(json!({"action": "released", "lease": gone.name}));
        Ok(())
    }

    /// Restores, if anything was switched. What is in the way is written down, told, and tried again later. Gives warnings.
    fn undo(&self, book: &mut Book, steps: &mut Steps, part: &Part) -> Result<Vec<String>, Refused> {
        let Some(switch) = &mut book.switch else { return Ok(Vec::new()) };
        switch.stage = Stage::GivingBack;
        let switch = switch.clone();
        book.write(part)?;
        match steps.give_back(&switch) {
            Ok(warnings) => {
                self.put_away(book);
                book.write(part)?;
                self.tell(json!({"action": "restored", "means": switch.means.word(), "warnings": warnings}));
                Ok(warnings)
            }
            Err(trouble) => {
                let known = switch.trouble.as_ref() == Some(&trouble);
                if let Some(switch) = &mut book.switch {
                    switch.again = Some(Deadline::after(AGAIN));
                    switch.trouble = Some(trouble.clone());
                }
                book.write(part)?;
                if !known {
                    self.tell(json!({"action": "not_restored", "error": trouble, "again_ms": milliseconds(AGAIN)}));
                }
                Ok(vec![format!("not restored yet: {trouble}; tried again until it is done")])
            }
        }
    }

    /// The switch is undone; what was written meanwhile is still there.
    fn put_away(&self, book: &mut Book) {
        let Some(switch) = book.switch.take() else { return };
        let mounted = matches!(switch.means, Means::Bind { mounted: true, .. });
        let (dir, home, made) = (switch.fallback, switch.means.home(), switch.made);
        let away = Away { dir, home, mounted, made, again: None, why: None };
        if !home::has_cores(&away.dir) {
            home::remove_if_ours(self.machine, &away);
        } else if book.away.iter().all(|known| known.dir != away.dir || known.home != away.home) {
            book.away.push(away);
        }
    }

    fn drop_expired(&self, book: &mut Book) {
        for lease in book.take_expired() {
            self.tell(json!({"action": "expired", "lease": lease.name, "owner": lease.owner}));
        }
    }

    pub fn expire(&self) -> Option<Duration> {
        let wait = self.due()?;
        if !wait.is_zero() {
            return Some(wait);
        }
        match self.heal() {
            Ok(next) => next,
            Err(failure) => {
                complain(&failure);
                Some(AGAIN)
            }
        }
    }

    pub fn due(&self) -> Option<Duration> {
        due_on(&self.ground, &book::peek(&self.machine.state))
    }

    fn heal(&self) -> Result<Option<Duration>, Refused> {
        let cannot = |error: std::io::Error| about(self.machine.state.path(), &error);
        let Some(part) = self.machine.state.try_part(book::PART).map_err(cannot)? else { return Ok(Some(SOON)) };
        let mut book = Book::read(&part)?;
        let before = book.leases.len();
        self.drop_expired(&mut book);
        if book.leases.len() != before {
            book.write(&part)?;
        }
        if let Some(switch) = book.switch.clone() {
            // Nobody is at it, for the lock is ours: who was has been killed, and nobody was told that it is in force.
            let half_done = switch.stage == Stage::Taking;
            book.leases.retain(|lease| !half_done || lease.name != switch.lease);
            let due = switch.again.as_ref().is_none_or(Deadline::has_passed);
            if due && (half_done || !book.is_wanted() || switch.boot != boot()) {
                self.undo(&mut book, &mut self.steps(BRIEFLY), &part)?;
            } else if due && Standing::of(&self.ground, &switch).needs_us() {
                self.keep_in_force(&mut book, switch, &part)?;
            }
        }
        drop(part);
        Ok(self.due())
    }

    /// What is wanted and was taken has been undone by others, or stands again.
    fn keep_in_force(&self, book: &mut Book, mut switch: Switch, part: &Part) -> Result<(), Refused> {
        let known = switch.trouble.take();
        let (trouble, again) = match Standing::of(&self.ground, &switch).now {
            Now::InForce => (None, AGAIN),
            Now::Covered(by) => (Some(by), AGAIN),
            // Who has undone it may be about to mount something there.
            Now::Lost if known.as_deref() != Some(LOST) => (Some(LOST.to_string()), SETTLES),
            Now::Lost => match self.steps(BRIEFLY).take(&switch) {
                Ok(()) => (None, AGAIN),
                Err(failure) => {
                    complain(&failure);
                    (Some(LOST.to_string()), AGAIN)
                }
            },
        };
        if trouble != known {
            let (means, to) = (switch.means.word(), shown(&switch.fallback));
            self.tell(match &trouble {
                None => json!({"action": "redirected", "to": to, "how": switch.how, "again": true}),
                Some(text) if text == LOST => json!({"action": "lost", "means": means, "to": to}),
                Some(text) => json!({"action": "covered", "means": means, "to": to, "error": text}),
            });
        }
        switch.again = trouble.is_some().then(|| Deadline::after(again));
        switch.trouble = trouble;
        book.switch = Some(switch);
        book.write(part)
    }

    fn check_root(&self) -> Option<Room> {
        let found = self.look().ok()?;
        if found::hindrance(&self.ground).is_some() {
            return None;
        }
        let fallback = self.fallback(&found, &Wanted::default());
        let choice = choose(&found, &fallback, &[], &table().ok()?).ok()?;
        let room = Room::look(&fallback, NEED).ok().filter(|_| !matches!(choice, Choice::Nothing { .. }))?;
        if let Some(complaint) = room.complaint() {
            tracing::warn!("{complaint}");
            self.machine.ring.change(super::EVENT, json!({"action": "low", "room": room}));
        }
        Some(room)
    }

    fn status(&self) -> Result<Value, Refused> {
        let book = book::look(&self.machine.state)?;
        let found = self.look()?;
        let fallback = book.switch.as_ref().map(|switch| switch.fallback.clone());
        let fallback = fallback.unwrap_or_else(|| self.fallback(&found, &Wanted::default()));
        let choice = match choose(&found, &fallback, &[], &table()?) {
            Ok(choice) => choice.json(),
            Err(failure) => json!({"means": null, "refused": failure.to_string()}),
        };
        let in_force = book.switch.as_ref().map(|switch| is_done(&self.ground, &switch.means));
        let covered = book.switch.as_ref().is_some_and(|switch| matches!(place(&switch.means), Ok(Place::Covered(_))));
        let away: Vec<Value> = book.away.iter().map(Away::json).collect();
        let hindrance = match found::hindrance(&self.ground) {
            None => Value::Null,
            Some(Hindrance::Privilege(why)) => why.into(),
            Some(Hindrance::Container(why)) => format!("in {why}: an agent on the node is asked").into(),
        };
        Ok(json!({
            "redirected": in_force.unwrap_or(false), "covered": covered, "found": found.json(), "text": found.text(),
            "would": choice, "hindrance": hindrance, "switch": book.switch.as_ref().map(Switch::json),
            "leases": book.leases.iter().map(Lease::json).collect::<Vec<_>>(), "away": away,
            "room": Room::look(&fallback, NEED)?, "in_flight": flight::now(),
        }))
    }
}

/// How what was switched stands.
struct Standing {
    now: Now,
    /// Was it told that it is not in force?
    is_troubled: bool,
}

enum Now {
    InForce,
    /// By what somebody else has done, for people.
    Covered(String),
    Lost,
}

impl Standing {
    fn of(ground: &Ground, switch: &Switch) -> Standing {
        let now = match &switch.means {
            Means::Bind { .. } => match place(&switch.means) {
                Ok(Place::Absent) => Now::Lost,
                Ok(Place::Covered(by)) => Now::Covered(by_others(&switch.means, &by)),
                // Without a mount table nothing can be done about it.
                Ok(Place::Uppermost) | Err(_) => Now::InForce,
            },
            Means::Pattern { old, new } => match pattern(ground) {
                Ok(now) if now == *old => Now::Lost,
                Ok(now) if now != *new => Now::Covered(format!("somebody has set kernel.core_pattern to {now:?}")),
                Ok(_) | Err(_) => Now::InForce,
            },
        };
        Standing { now, is_troubled: switch.trouble.is_some() }
    }

    fn needs_us(&self) -> bool {
        self.is_troubled || !matches!(self.now, Now::InForce)
    }
}

/// Also when what was taken, and is still wanted, is no longer in force.
fn due_on(ground: &Ground, book: &Book) -> Option<Duration> {
    let taken = |switch: &&Switch| switch.stage == Stage::Taken && switch.boot == boot() && book.is_wanted();
    let broken = book.switch.as_ref().filter(taken).filter(|switch| Standing::of(ground, switch).needs_us());
    let broken = broken.map(|switch| switch.again.as_ref().map_or(Duration::ZERO, Deadline::left));
    book.due().into_iter().chain(broken).min()
}

/// Once for each failure in a row: it comes again as long as nothing changes.
fn complain(failure: &Refused) {
    static LAST: Mutex<String> = Mutex::new(String::new());
    let (text, mut last) = (failure.to_string(), LAST.lock());
    if *last != text {
        tracing::error!(text, "coredumps cannot be brought back to where they went");
        *last = text;
    }
}

fn table() -> Result<Vec<mounts::Mount>, Refused> {
    mounts::all().map_err(|error| about(Path::new("/proc/self/mountinfo"), &error))
}

fn check(name: &str, wanted: &Wanted) -> Result<(), Refused> {
    if !is_name(name) {
        let failure = Refused::invalid(format!("{name:?} is no name for a lease"));
        return Err(failure.hint("letters, digits, '.', '-' and '_', at most 64"));
    }
    if wanted.life.is_some_and(|life| life.is_zero()) {
        return Err(Refused::invalid("for: a lease that ends at once is none"));
    }
    let paths = wanted.to.iter().map(|to| ("to", to)).chain(wanted.fills.iter().map(|path| ("fills", path)));
    for (what, path) in paths {
        if !path.is_absolute() {
            return Err(Refused::invalid(format!("{what}: {} is not an absolute path", path.display())));
        }
        if path.exists() && what == "to" && !path.is_dir() {
            return Err(Refused::invalid(format!("to: {} is no directory", path.display())));
        }
    }
    Ok(())
}

fn no_privilege(why: &str) -> Refused {
    let detail = format!("this daemon runs {why}, and cannot change where cores go");
    Refused::not_supported(detail)
        .hint("run it as root, or with --by agent and `nemesisfs coredump agent` as root on the node")
}

/// What is not said stays as it was.
fn needed(former: Option<&Lease>, wanted: &Wanted) -> u64 {
    wanted.need.or(former.map(|lease| lease.need)).unwrap_or(NEED)
}

fn write_lease(book: &mut Book, name: &str, wanted: &Wanted, by_agent: bool) -> Lease {
    let former = book.lease(name).cloned();
    let life = wanted.life.or(former.as_ref().map(|lease| Duration::from_millis(lease.life_ms))).unwrap_or(LIFE);
    let lease = Lease {
        name: name.into(),
        owner: match &former {
            Some(former) if wanted.owner.is_empty() => former.owner.clone(),
            _ => wanted.owner.clone(),
        },
        since: former.as_ref().map_or_else(|| rfc3339(SystemTime::now()), |lease| lease.since.clone()),
        life_ms: milliseconds(life),
        until: Deadline::after(life),
        by_agent,
        need: needed(former.as_ref(), wanted),
    };
    book.leases.retain(|lease| lease.name != name);
    book.leases.push(lease.clone());
    lease
}

/// What a choice comes to, as it is written down.
fn planned(lease: &str, found: &Found, choice: &Choice, fallback: PathBuf) -> Result<Switch, Refused> {
    let means = match choice {
        Choice::Bind { over, .. } => {
            let table = table()?;
            let none = || Refused::failed(format!("{} is on no mount", fallback.display()));
            let mount = mounts::holding(&table, &fallback).ok_or_else(none)?;
            let below = fallback.strip_prefix(&mount.mountpoint).unwrap_or(Path::new(""));
            Means::Bind {
                over: over.clone(),
                device: mount.device.clone(),
                // Joined with nothing, a path would end in a slash.
                root: if below == Path::new("") { mount.root.clone() } else { mount.root.join(below) },
                // A unit that is not mounted now is by the next core, and covers what lies below.
                mounted: found.mounted_by.is_some() || found.unit.is_some(),
            }
        }
        Choice::Pattern { new, .. } => Means::Pattern { old: found.pattern.clone(), new: new.clone() },
        Choice::Nothing { why } => return Err(Refused::failed(why.clone())),
    };
    Ok(Switch {
        boot: boot(),
        lease: lease.into(),
        stage: Stage::Taking,
        means,
        fallback,
        made: false,
        found: found.json(),
        how: choice.why().into(),
        since: rfc3339(SystemTime::now()),
        trouble: None,
        again: None,
    })
}

/// Makes the fallback directory, for those for whom the core directory is: with its owner and mode. Cores of a working
/// directory are written by everybody. Tells whether it was not there.
fn make(fallback: &Path, found: &Found) -> Result<bool, Refused> {
    let is_new = !fallback.exists();
    fs::DirBuilder::new().recursive(true).mode(0o755).create(fallback).map_err(|error| about(fallback, &error))?;
    if !is_new {
        return Ok(false);
    }
    let like = match &found.directory {
        Some(directory) => {
            let there = fs::metadata(directory).map_err(|error| about(directory, &error))?;
            (there.uid(), there.gid(), there.mode() & 0o7777)
        }
        None => (0, 0, 0o1777),
    };
    let owned = std::os::unix::fs::chown(fallback, Some(like.0), Some(like.1));
    let set = owned.and_then(|()| fs::set_permissions(fallback, fs::Permissions::from_mode(like.2)));
    set.map_err(|error| about(fallback, &error))?;
    Ok(true)
}

/// The directory on the way that only some may enter, or the last one if only some may write there.
fn closed_to_others(dir: &Path) -> Option<PathBuf> {
    const ENTER: u32 = 0o001;
    const WRITE: u32 = 0o003;
    let lacks = |dir: &Path, bits: u32| fs::metadata(dir).is_ok_and(|there| there.mode() & bits != bits);
    let above = dir.ancestors().skip(1).find(|above| lacks(above, ENTER));
    above.or_else(|| lacks(dir, WRITE).then_some(dir)).map(Path::to_path_buf)
}
