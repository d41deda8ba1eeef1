//! `/v1/space`: how full the mount pretends to be, how much owners and subtrees may use, and how full the disk is made.
//!
//! On the control thread; a helper counts the tree where that is needed, and fills the disk. The lock of what was
//! requested is held for a few instructions, never while something is counted or filled: status, clear and reset go on.
//! What was counted is set only if it is still wanted then.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::State;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use super::redirect::Fills;
use super::{Answer, Control, FORGET_LIMIT, LOOK_LIMIT, Shared, body, document};
use crate::fault::Problem;
use crate::fault::compile::{bytes, nanoseconds, rooted_glob};
use crate::fault::document::from_value;
use crate::fs::usage::{self, Reserve, Size};
use crate::fs::{Core, usage::Wanted as Limits};
use crate::space::ballast::{Failure, Status, Target};
use crate::space::quota::MOST;
use crate::space::{Quota, Quotas};

/// How long filling may take if nobody says so.
const DEADLINE: Duration = Duration::from_secs(60);
/// How much longer a filesystem that hangs is waited for.
const GRACE: Duration = Duration::from_secs(2);

/// The requests in force, as they were made.
#[derive(Debug, Default)]
pub struct Requested {
    r#virtual: Option<Value>,
    quota: Vec<Value>,
    /// Of what fills the disk, or did last: whether it still does is for the ballast to tell.
    ballast: Option<Value>,
    /// By part.
    numbers: [Numbers; 3],
}

#[derive(Clone, Copy, Debug, Default)]
struct Numbers {
    /// Of what is set: a life ends only what it was given to.
    set: u64,
    /// Of what is to be set: what comes later takes its place.
    coming: u64,
    /// When the life of what is set ends.
    ends: Option<Instant>,
}

impl Numbers {
    /// Something else is set from now on, or nothing.
    fn begin(&mut self, life: Option<Duration>) -> u64 {
        self.set += 1;
        self.ends = life.and_then(|life| Instant::now().checked_add(life));
        self.set
    }
}

impl Requested {
    fn of(&mut self, part: Part) -> &mut Numbers {
        &mut self.numbers[part as usize]
    }

    /// Nothing that is on its way to a part is wanted any more.
    fn overtake(&mut self, part: Part) -> u64 {
        self.of(part).coming += 1;
        self.of(part).coming
    }

    /// What of its time is left to what is set, in the words of a mode.
    fn remaining(&self, part: Part) -> Option<String> {
        let left = self.numbers[part as usize].ends?.saturating_duration_since(Instant::now());
        let left = Duration::from_millis(u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
        Some(humantime::format_duration(left).to_string())
    }

    fn ballast_redirects(&self) -> bool {
        redirects(self.ballast.as_ref())
    }
}

fn redirects(asked: Option<&Value>) -> bool {
    asked.is_some_and(|asked| asked["redirect_coredumps"] == true)
}

/// The parts of a capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Virtual,
    Quota,
    Ballast,
}

impl Part {
    const ALL: [Part; 3] = [Part::Virtual, Part::Quota, Part::Ballast];

    fn word(self) -> &'static str {
        match self {
            Part::Virtual => "virtual",
            Part::Quota => "quota",
            Part::Ballast => "ballast",
        }
    }
}

/// Each part that is there is replaced, or cleared by `null`; the others stay.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    #[serde(default, deserialize_with = "given")]
    r#virtual: Option<Option<Virtual>>,
    #[serde(default, deserialize_with = "given_list")]
    quota: Option<Vec<WantedQuota>>,
    #[serde(default, deserialize_with = "given")]
    ballast: Option<Option<WantedBallast>>,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Virtual {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    free: Option<Amount>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    used: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size: Option<Amount>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inodes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reserve: Option<Amount>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    late: bool,
    /// Coredumps go to the root filesystem before there is no room, and home when there is again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    redirect_coredumps: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    r#for: Option<String>,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct WantedQuota {
    limit: Amount,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct WantedBallast {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until_free: Option<Amount>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    used: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    force: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    redirect_coredumps: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    deadline: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    r#for: Option<String>,
}

/// A number of bytes, as a number or with its unit.
#[derive(Clone, Deserialize, Serialize)]
#[serde(untagged, expecting = "not a size: write 4096, \"4KiB\" or \"10GiB\"")]
enum Amount {
    Bytes(u64),
    Text(String),
}

impl Amount {
    fn bytes(&self, pointer: &str) -> Result<u64, Problem> {
        match self {
            Amount::Bytes(number) => Ok(*number),
            Amount::Text(text) => bytes(text).ok_or_else(|| {
                Problem::new(pointer, format!("{text:?} is not a size")).hint("write \"0\", \"4KiB\" or \"10GiB\"")
            }),
        }
    }
}

/// Tells what is not there from `null`.
fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// One, or a list of them; `null` is the empty list.
fn given_list<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<WantedQuota>>, D::Error> {
    let list = match Value::deserialize(from)? {
        Value::Null => Vec::new(),
        Value::Array(list) => list,
        one => vec![one],
    };
    let read = |value| from_value(value).map_err(|problem| serde::de::Error::custom(problem.detail));
    list.into_iter().map(read).collect::<Result<_, _>>().map(Some)
}

fn percent(text: &str, pointer: &str) -> Result<f64, Problem> {
    let number = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
    number.filter(|percent| *percent > 0.0 && *percent <= 100.0).ok_or_else(|| {
        let name = pointer.trim_start_matches("#/").replace('/', ".");
        Problem::new(pointer, format!("{name}: {text:?} is not a percentage")).hint("write \"98%\"")
    })
}

fn duration(text: Option<&String>, pointer: &str) -> Result<Option<Duration>, Problem> {
    let parse = |text: &String| {
        nanoseconds(text).map(Duration::from_nanos).ok_or_else(|| {
            Problem::new(pointer, format!("{text:?} is not a duration")).hint("write \"10ms\", \"3s\" or \"5m\"")
        })
    };
    text.map(parse).transpose()
}

impl Virtual {
    fn limits(&self) -> Result<Limits, Problem> {
        let size = match (&self.free, &self.used, &self.size) {
            (Some(free), None, None) => Some(Size::Free(free.bytes("#/virtual/free")?)),
            (None, None, Some(size)) => Some(Size::Total(size.bytes("#/virtual/size")?)),
            (None, Some(used), None) => Some(Size::UsedPercent(percent(used, "#/virtual/used")?)),
            (None, None, None) if self.inodes.is_some() => None,
            _ => return Err(Problem::new("#/virtual", "virtual: give one of free, used and size, or inodes")),
        };
        for (name, given) in [("reserve", self.reserve.is_some()), ("late", self.late)] {
            if given && size.is_none() {
                let detail = format!("virtual.{name}: needs one of free, used and size");
                return Err(Problem::new(format!("#/virtual/{name}"), detail));
            }
        }
        let reserve = match &self.reserve {
            None => None,
            Some(Amount::Text(text)) if text.ends_with('%') => {
                Some(Reserve::Percent(percent(text, "#/virtual/reserve")?))
            }
            Some(amount) => Some(Reserve::Bytes(amount.bytes("#/virtual/reserve")?)),
        };
        Ok(Limits { size, reserve, inodes: self.inodes, late: self.late })
    }
}

fn quotas(wanted: &[WantedQuota]) -> Result<Quotas, Problem> {
    if wanted.len() > MOST {
        return Err(Problem::new("#/quota", format!("a mount can have {MOST} quotas")));
    }
    let one = |(i, quota): (usize, &WantedQuota)| {
        let limit = quota.limit.bytes(&format!("#/quota/{i}/limit"))?;
        // What is for all paths asks for none.
        let path = quota.path.as_deref().filter(|path| *path != "/**");
        let path = path.map(|path| rooted_glob(&format!("#/quota/{i}/path"), path).map(|glob| glob.compile_matcher()));
        Ok(Quota::new(limit, quota.uid, path.transpose()?))
    };
    Ok(Quotas::new(wanted.iter().enumerate().map(one).collect::<Result<_, Problem>>()?))
}

/// A ballast, checked.
struct Filling {
    target: Target,
    deadline: Duration,
    life: Option<Duration>,
    force: bool,
}

impl WantedBallast {
    fn filling(&self) -> Result<Filling, Problem> {
        let target = match (&self.until_free, &self.used) {
            (Some(free), None) => Target::UntilFree(free.bytes("#/ballast/until_free")?),
            (None, Some(used)) => Target::UsedPercent(percent(used, "#/ballast/used")?),
            _ => return Err(Problem::new("#/ballast", "ballast: give one of until_free and used")),
        };
        let deadline = duration(self.deadline.as_ref(), "#/ballast/deadline")?.unwrap_or(DEADLINE);
        let life = duration(self.r#for.as_ref(), "#/ballast/for")?;
        Ok(Filling { target, deadline, life, force: self.force })
    }
}

impl Control {
    async fn show_space(&self) -> Value {
        let core = self.core.clone();
        // The backing filesystem may hang; the mount itself is not asked.
        let asking = tokio::time::timeout(LOOK_LIMIT, self.looks.statfs.ask(move || core.space_left()));
        let statfs = asking.await.ok().and_then(Result::ok).and_then(Result::ok);
        let filled = self.core.ballast.status();
        let (limit, quota, ballast) = {
            let requested = self.space.lock();
            let ballast = filled.map(|status| show_filled(&status, &requested));
            (self.show_virtual(&requested), self.show_quotas(&requested), ballast)
        };
        let statfs = statfs.map(|s| {
            json!({"blocks": s.blocks, "free": s.free, "available": s.available, "block_size": s.fragment_size,
                "files": s.files, "files_free": s.files_free})
        });
        json!({"virtual": limit, "quota": quota, "ballast": ballast, "statfs": statfs,
            "cursor": self.cursor()})
    }

    fn show_virtual(&self, requested: &Requested) -> Option<Value> {
        let capacity = &self.core.capacity;
        let mut account = json!({});
        if let Some(size) = capacity.size() {
            let free = capacity.free();
            account = json!({"free": free, "size": size, "used": size.saturating_sub(free),
                "reserve": capacity.reserved_for_root(), "late": capacity.is_late()});
        }
        if let Some((all, free)) = capacity.inodes() {
            account["inodes"] = json!({"free": free, "all": all});
        }
        account["requested"] = requested.r#virtual.clone()?;
        account["remaining"] = requested.remaining(Part::Virtual).into();
        Some(account)
    }

    fn show_quotas(&self, requested: &Requested) -> Vec<Value> {
        let quotas = self.core.capacity.quotas();
        let each = quotas.iter().zip(&requested.quota).map(|(quota, asked)| {
            json!({"limit": quota.limit, "used": quota.used(), "free": quota.free(), "uid": asked.get("uid"),
                "path": asked.get("path"), "requested": asked})
        });
        each.collect()
    }

    /// Everything that was set is gone, and the ballast on its way: whether there was any, and what could not be
    /// removed in time. All of that is begun by the call; awaited is only its end.
    pub(super) fn clear_space(self: &Arc<Self>) -> impl Future<Output = (bool, Vec<String>)> + use<> {
        let was = self.clear_account();
        let (control, removing) = (self.clone(), self.remove_ballast());
        async move {
            let (ballast, warnings) = removing.await;
            let was = was || ballast;
            if was {
                control.ring().change("space", json!({"action": "cleared"}));
            }
            (was, warnings)
        }
    }

    /// Nothing of what was set refuses anything any more, nor what is being counted or filled.
    fn clear_account(&self) -> bool {
        self.core.ballast.cancel();
        let mut requested = self.space.lock();
        let was = requested.r#virtual.take().is_some() | !std::mem::take(&mut requested.quota).is_empty();
        for part in Part::ALL {
            requested.overtake(part);
            requested.of(part).begin(None);
        }
        self.core.capacity.clear();
        if was {
            self.core.arming.renew_space(self.ring().now_ns());
        }
        was
    }

    /// Where nothing was limited, refusals are counted from 0.
    fn begin_space(&self) {
        if !self.core.capacity.is_set() {
            self.core.arming.renew_space(self.ring().now_ns());
        }
    }

    /// Removes the ballast, from now on: whether there was any, and that it takes its time.
    fn remove_ballast(&self) -> impl Future<Output = (bool, Vec<String>)> + use<> {
        let core = self.core.clone();
        core.ballast.cancel();
        self.space.lock().of(Part::Ballast).begin(None);
        // One that is refused because others hang is done by them.
        let removing = self.looks.remove.ask(move || {
            core.ballast.remove(core.tree.backing()).unwrap_or_else(|error| {
                tracing::error!(%error, "ballast could not be removed");
                core.ring.change("space", json!({"action": "not_removed", "error": error.to_string()}));
                true
            })
        });
        async move {
            match tokio::time::timeout(FORGET_LIMIT, removing).await {
                Ok(Ok(was)) => (was, Vec::new()),
                _ => (true, vec!["the ballast is still being removed".to_string()]),
            }
        }
    }

    /// Is the disk full, or being filled, with coredumps elsewhere?
    pub(super) fn ballast_redirects(&self) -> bool {
        self.space.lock().ballast_redirects()
    }

    /// Does a capacity that is in force want coredumps elsewhere?
    pub(super) fn space_redirects(&self) -> bool {
        let requested = self.space.lock();
        let (by_virtual, by_ballast) = (redirects(requested.r#virtual.as_ref()), requested.ballast_redirects());
        drop(requested);
        by_virtual || (by_ballast && self.core.ballast.status().is_some())
    }

    fn clear_virtual(&self, requested: &mut Requested) {
        requested.r#virtual = None;
        requested.of(Part::Virtual).begin(None);
        self.core.capacity.set(crate::space::Limits::default());
    }

    async fn set_virtual(self: &Arc<Self>, wanted: Option<(Virtual, Limits)>) -> Result<(), super::Problem> {
        let asked = wanted.as_ref().map(|(wanted, _)| serde_json::to_value(wanted).unwrap_or_default());
        match wanted {
            None => {
                let mut requested = self.space.lock();
                requested.overtake(Part::Virtual);
                self.clear_virtual(&mut requested);
            }
            Some((wanted, limits)) => {
                let life = duration(wanted.r#for.as_ref(), "").ok().flatten();
                let asked = asked.clone();
                let set = move |control: &Arc<Control>, requested: &mut Requested, limits| {
                    control.begin_space();
                    control.core.set_capacity(limits);
                    requested.r#virtual = asked;
                    control.begin_life(requested, Part::Virtual, life);
                };
                self.set_counted(Part::Virtual, move |core| usage::measure(core, limits), set).await?;
            }
        }
        self.ring().change("space", json!({"action": "set", "virtual": asked}));
        Ok(())
    }

    async fn set_quotas(self: &Arc<Self>, wanted: Vec<WantedQuota>, quotas: Quotas) -> Result<(), super::Problem> {
        let asked: Vec<Value> = wanted.iter().map(|quota| serde_json::to_value(quota).unwrap_or_default()).collect();
        let count = move |core: &Core| usage::count(core, &quotas).map(|()| quotas);
        let shown = asked.clone();
        let set = move |control: &Arc<Control>, requested: &mut Requested, quotas| {
            control.begin_space();
            control.core.set_quotas(quotas);
            requested.quota = shown;
        };
        self.set_counted(Part::Quota, count, set).await?;
        self.ring().change("space", json!({"action": "set", "quota": asked}));
        Ok(())
    }

    /// Counts, which may take long, and then sets what came of it, under the lock: if nobody has set or cleared the
    /// part meanwhile, and the client is still there.
    async fn set_counted<T>(
        self: &Arc<Self>,
        part: Part,
        count: impl FnOnce(&Core) -> std::io::Result<T> + Send + 'static,
        set: impl FnOnce(&Arc<Control>, &mut Requested, T) + Send + 'static,
    ) -> Result<(), super::Problem> {
        let coming = self.space.lock().overtake(part);
        let _abandoned = Overtaken { control: self.clone(), part, coming };
        let control = self.clone();
        let counting = self.looks.count.ask(move || {
            let counted = count(&control.core).map_err(not_counted)?;
            let mut requested = control.space.lock();
            if requested.of(part).coming != coming {
                let detail = format!("{}: it was set anew or cleared before the tree was counted", part.word());
                return Err(super::Problem::new(409, "conflict", detail));
            }
            set(&control, &mut requested, counted);
            Ok(())
        });
        counting.await?
    }

    async fn set_ballast(self: &Arc<Self>, wanted: &WantedBallast, filling: Filling) -> Result<(), super::Problem> {
        let asked = serde_json::to_value(wanted).unwrap_or_default();
        let ticket = self.core.ballast.ticket();
        if !filling.force {
            let (core, identity) = (self.core.clone(), self.identity.clone());
            let asking = self.looks.statfs.ask(move || {
                let others = [Some(("/", Path::new("/"))), Some(("the socket", &identity.socket))];
                let log = identity.log.as_deref().map(|log| ("the log", log));
                others.into_iter().chain([log]).flatten().find(|(_, path)| is_same(&core, path)).map(|(name, _)| name)
            });
            let shares = tokio::time::timeout(LOOK_LIMIT, asking).await.map_err(|_| super::hangs())?;
            if let Some(name) = shares? {
                let detail = format!("the backing filesystem is also that of {name}");
                return Err(super::Problem::new(409, "conflict", detail)
                    .hint("a filesystem of its own for the data, or force (--force) to fill this one"));
            }
        }
        {
            let mut requested = self.space.lock();
            requested.ballast = Some(asked.clone());
            // The life of the one before is not that of this one.
            requested.of(Part::Ballast).begin(None);
        }
        // A client that goes away does not want it any more.
        let mut abandoned = Abandoned(Some(self.core.clone()));
        let core = self.core.clone();
        let (target, deadline) = (filling.target, filling.deadline);
        let filled = self.looks.fill.ask(move || {
            let tell = |status: &Status| {
                core.ring.change("space", json!({"action": "filling", "ballast": show_ballast(status)}));
            };
            core.ballast.fill(core.tree.backing(), target, deadline, ticket, tell)
        });
        let filled = tokio::time::timeout(deadline.saturating_add(GRACE), filled).await.map_err(|_| {
            let detail = "ballast: the backing filesystem hangs: what was made is removed when it goes on";
            super::Problem::new(409, "conflict", detail)
        })??;
        abandoned.0 = None;
        match filled {
            Ok(status) => {
                self.begin_life(&mut self.space.lock(), Part::Ballast, filling.life);
                let ballast = show_ballast(&status);
                self.ring().change("space", json!({"action": "set", "ballast": ballast, "requested": asked}));
                Ok(())
            }
            Err(failure) => {
                let reason = failure.to_string();
                self.ring().change("space", json!({"action": "failed", "ballast": null, "reason": reason}));
                Err(failed(&failure))
            }
        }
    }

    /// What was set ends after a time, unless it was set anew or cleared meanwhile.
    fn begin_life(self: &Arc<Self>, requested: &mut Requested, part: Part, life: Option<Duration>) {
        let set = requested.of(part).begin(life);
        let Some(life) = life else { return };
        let control = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(life).await;
            if control.end(part, set) {
                if part == Part::Ballast {
                    control.remove_ballast().await;
                }
                control.ring().change("space", json!({"action": "expired", "what": part.word()}));
            }
        });
    }

    /// The life of what was set is over, if it is still that.
    fn end(&self, part: Part, set: u64) -> bool {
        let mut requested = self.space.lock();
        let is_that = requested.of(part).set == set;
        if is_that && part == Part::Virtual {
            self.clear_virtual(&mut requested);
        }
        is_that
    }
}

/// What is being counted is not wanted any more, once its client has gone away.
struct Overtaken {
    control: Arc<Control>,
    part: Part,
    coming: u64,
}

impl Drop for Overtaken {
    fn drop(&mut self) {
        let mut requested = self.control.space.lock();
        if requested.of(self.part).coming == self.coming {
            requested.overtake(self.part);
        }
    }
}

/// Cancels a filling that nobody waits for.
struct Abandoned(Option<Arc<Core>>);

impl Drop for Abandoned {
    fn drop(&mut self) {
        if let Some(core) = &self.0 {
            core.ballast.cancel();
        }
    }
}

fn show_ballast(status: &Status) -> Value {
    json!({"state": if status.full { "full" } else { "filling" }, "file": status.file, "allocated": status.allocated,
        "free": status.free, "target_free": status.target_free})
}

fn show_filled(status: &Status, requested: &Requested) -> Value {
    let mut ballast = show_ballast(status);
    ballast["requested"] = requested.ballast.clone().into();
    ballast["remaining"] = requested.remaining(Part::Ballast).into();
    ballast
}

fn not_counted(error: std::io::Error) -> super::Problem {
    super::Problem::new(500, "internal", format!("the backing directory: {error}"))
}

fn failed(failure: &Failure) -> super::Problem {
    let detail = format!("ballast: {failure}");
    match failure {
        Failure::NotSupported(_) => super::Problem::new(501, "not_supported", detail),
        Failure::Io(_) => super::Problem::new(500, "internal", detail),
        _ => super::Problem::new(409, "conflict", detail).hint("what was made is removed again"),
    }
}

/// Does a path lie on the backing filesystem? What stands for several filesystems, or is one of several of its pool, has
/// device numbers of its own: there the numbers of blocks must not agree either.
fn is_same(core: &Core, path: &Path) -> bool {
    let backing = core.tree.backing();
    // A log may have been moved away; its directory is where the next lines go.
    let there = path.metadata().or_else(|_| path.parent().unwrap_or(path).metadata());
    let (Ok(ours), Ok(theirs)) = (backing.metadata(), there) else { return false };
    if ours.dev() == theirs.dev() {
        return true;
    }
    const SHARED: [i64; 2] = [libc::OVERLAYFS_SUPER_MAGIC, libc::BTRFS_SUPER_MAGIC];
    let kinds = (nix::sys::statfs::fstatfs(backing), nix::sys::statfs::statfs(path));
    let (Ok(ours), Ok(theirs)) = kinds else { return false };
    let shared = [&ours, &theirs].iter().any(|fs| SHARED.contains(&fs.filesystem_type().0));
    let numbers = |fs: &nix::sys::statfs::Statfs| (fs.blocks(), fs.blocks_free(), fs.files());
    shared && numbers(&ours) == numbers(&theirs)
}

pub async fn show(State(control): Shared) -> Answer {
    Ok(document(200, &control.show_space().await))
}

pub async fn set(State(control): Shared, body: Body) -> Answer {
    let wanted: Wanted = body::read(body).await?;
    // All is checked before anything is changed.
    let r#virtual = match wanted.r#virtual {
        None => None,
        Some(None) => Some(None),
        Some(Some(wanted)) => {
            duration(wanted.r#for.as_ref(), "#/virtual/for")?;
            let limits = wanted.limits()?;
            Some(Some((wanted, limits)))
        }
    };
    let quota = match wanted.quota {
        None => None,
        Some(list) => {
            let quotas = quotas(&list)?;
            Some((list, quotas))
        }
    };
    let filling = match &wanted.ballast {
        Some(Some(ballast)) => Some(ballast.filling()?),
        _ => None,
    };
    if r#virtual.is_none() && quota.is_none() && wanted.ballast.is_none() {
        let nothing = Problem::new("#/virtual", "nothing is asked for");
        return Err(nothing.hint("{\"virtual\":{\"free\":\"0\"}}").into());
    }
    let cursor = control.cursor();
    let fills = match wanted.ballast.iter().flatten().any(|wanted| wanted.redirect_coredumps) {
        true => Fills::Disk,
        false => Fills::mount_if(r#virtual.iter().flatten().any(|(wanted, _)| wanted.redirect_coredumps)),
    };
    let set = async {
        if let Some(wanted) = r#virtual {
            control.set_virtual(wanted).await?;
        }
        if let Some((wanted, quotas)) = quota {
            control.set_quotas(wanted, quotas).await?;
        }
        match (&wanted.ballast, filling) {
            (Some(Some(wanted)), Some(filling)) => control.set_ballast(wanted, filling).await?,
            (Some(None), _) => {
                control.remove_ballast().await;
                control.ring().change("space", json!({"action": "set", "ballast": null}));
            }
            _ => {}
        }
        Ok(())
    };
    let ((), mut warnings) = control.redirected(fills, set).await?;
    warnings.extend(control.give_coredumps_back().await);
    let mut value = control.show_space().await;
    if !warnings.is_empty() {
        value["warnings"] = warnings.into();
    }
    value["cursor"] = cursor.into();
    Ok(document(200, &value))
}

pub async fn clear(State(control): Shared) -> Answer {
    let cursor = control.cursor();
    let (_, mut warnings) = control.clear_space().await;
    warnings.extend(control.give_coredumps_back().await);
    let mut value = control.show_space().await;
    value["warnings"] = warnings.into();
    value["cursor"] = cursor.into();
    Ok(document(200, &value))
}
