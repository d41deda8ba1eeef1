//! `device`: block devices that fail below a filesystem.
//!
//! Thread: one for each host. Locks: none. Must never: know which modes there are and what goes together, which the server
//! does.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::client::{Client, ClientError, Reply};

use super::args::{Span, probability, quoted};
use super::console::Outcome;
use super::session::{Session, World, on_host, on_machine, shown, warnings};

#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// Make one: over an image that is made for it, or over a disk that is there
    Create(Box<CreateArgs>),
    /// What goes wrong from now on: allow_writes drop_writes error_writes error_reads error_all corrupt_bio_byte
    /// random_read_corrupt random_write_corrupt delay
    Mode(Box<ModeArgs>),
    /// All of it stands still: requests wait, none fails
    Suspend {
        name: String,
        /// After which it goes on
        #[arg(long = "for", value_name = "DURATION")]
        life: Option<Span>,
    },
    /// It goes on
    Resume { name: String },
    /// The power fails: what was not written is lost, and it is mounted again
    Cut(CutArgs),
    /// Take it away, with everything that was made for it; not there is no error
    Remove {
        name: String,
        /// Kill who uses it
        #[arg(long)]
        kill: bool,
        /// Unmount instances on top of it
        #[arg(long)]
        umount: bool,
    },
    /// How it is, and who uses it; without a name, all and what this host can do
    Status { name: Option<String> },
    /// Put a mark into its log of writes
    Mark { name: String, mark: String },
    /// Write what its log has up to a mark to another image or disk
    Replay {
        name: String,
        /// The mark
        #[arg(long, value_name = "MARK")]
        to: String,
        /// A file that is made, or a disk
        #[arg(long, value_name = "FILE")]
        into: PathBuf,
        /// Overwrite what is on the disk
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("ground").required(true).args(["image", "device"])))]
pub struct CreateArgs {
    name: String,
    /// A file that is made for it
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// The size of the image, which takes only what is written
    #[arg(long, value_name = "SIZE", conflicts_with = "device")]
    size: Option<String>,
    /// The image is there, and stays
    #[arg(long, conflicts_with_all = ["device", "size"])]
    existing: bool,
    /// A disk that is there
    #[arg(long, value_name = "DEV")]
    device: Option<PathBuf>,
    /// ext4, xfs, btrfs or none, made on it [default: ext4 on a new image, none elsewhere]
    #[arg(long, value_name = "KIND")]
    filesystem: Option<String>,
    /// More for mkfs, as one word
    #[arg(long, value_name = "OPTIONS", allow_hyphen_values = true)]
    mkfs_options: Option<String>,
    /// Where it is mounted; made if it is not there
    #[arg(long, value_name = "DIR")]
    mountpoint: Option<PathBuf>,
    /// As after mount -o
    #[arg(long, value_name = "OPTIONS", requires = "mountpoint")]
    mount_options: Option<String>,
    /// Overwrite a filesystem that is there
    #[arg(long)]
    force: bool,
    /// Log all writes to a file that is made for it
    #[arg(long, value_name = "FILE", requires = "log_size")]
    log_image: Option<PathBuf>,
    /// Its size: what is written, and a sector for each write
    #[arg(long, value_name = "SIZE", requires = "log_image")]
    log_size: Option<String>,
    /// Log all writes to a disk that is there
    #[arg(long, value_name = "DEV", conflicts_with = "log_image")]
    log_device: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ModeArgs {
    name: String,
    #[arg(value_name = "MODE")]
    mode: String,
    /// Another one at the same time
    #[arg(long, value_name = "MODE")]
    and: Vec<String>,
    /// After which writes are allowed again
    #[arg(long = "for", alias = "interval", value_name = "DURATION")]
    life: Option<Span>,
    /// Of a disk that comes and goes: how long it is well, first; whole seconds
    #[arg(long, value_name = "DURATION")]
    up: Option<Span>,
    /// Of a disk that comes and goes: how long the mode then acts
    #[arg(long, value_name = "DURATION")]
    down: Option<Span>,
    /// corrupt_bio_byte: which byte of a request, from 1
    #[arg(long, value_name = "N")]
    nth: Option<u32>,
    /// corrupt_bio_byte: read or write
    #[arg(long, value_name = "read|write")]
    direction: Option<String>,
    /// corrupt_bio_byte: what it becomes
    #[arg(long, value_name = "BYTE")]
    value: Option<u8>,
    /// corrupt_bio_byte: only requests that have these bits of the kernel's bi_opf
    #[arg(long, value_name = "BITS")]
    flags: Option<u32>,
    /// random_read_corrupt, random_write_corrupt: how likely a request is changed
    #[arg(long, value_name = "0..1", value_parser = probability)]
    probability: Option<f64>,
    /// delay: of reads
    #[arg(long, value_name = "DURATION")]
    read: Option<Span>,
    /// delay: of writes
    #[arg(long, value_name = "DURATION")]
    write: Option<Span>,
    /// delay: of flushes
    #[arg(long, value_name = "DURATION")]
    flush: Option<Span>,
    /// Synchronise and freeze the filesystem before: nothing that was written until then is lost
    #[arg(long)]
    sync_fs: bool,
    /// Do not freeze it
    #[arg(long)]
    no_lockfs: bool,
}

#[derive(Debug, Args)]
pub struct CutArgs {
    name: String,
    /// Kill who uses it
    #[arg(long)]
    kill: bool,
    /// Unmount instances on top of it
    #[arg(long)]
    umount: bool,
    /// Detach what is still in use
    #[arg(long)]
    lazy: bool,
}

pub fn run(world: &World, command: &DeviceCommand) -> u8 {
    let may_end_mounts = match command {
        DeviceCommand::Cut(args) => args.umount,
        DeviceCommand::Remove { umount, .. } => *umount,
        _ => false,
    };
    let on = if may_end_mounts { on_host } else { on_machine };
    on(world, &|session| match command {
        DeviceCommand::Create(args) => create(session, args),
        DeviceCommand::Mode(args) => {
            let body = given(&mode_document(args));
            changed(session, patient(session)?.put(&path(&args.name, "/mode"), &body)?)
        }
        DeviceCommand::Suspend { name, life } => {
            let body = given(&json!({"for": life.as_ref().map(|life| &life.text)}));
            changed(session, patient(session)?.post(&path(name, "/suspend"), &body)?)
        }
        DeviceCommand::Resume { name } => changed(session, patient(session)?.post(&path(name, "/resume"), &json!({}))?),
        DeviceCommand::Cut(args) => cut(session, args),
        DeviceCommand::Remove { name, kill, umount } => remove(session, name, *kill, *umount),
        DeviceCommand::Status { name } => status(session, name.as_deref()),
        DeviceCommand::Mark { name, mark } => {
            let reply = patient(session)?.post(&path(name, "/mark"), &json!({"mark": mark}))?;
            let what = format!("device {name}: mark {mark}");
            Ok(told(session, reply, what))
        }
        DeviceCommand::Replay { name, to, into, force } => {
            let body = json!({"to": to, "into": absolute(into)?, "force": force});
            let reply = patient(session)?.post(&path(name, "/replay"), &body)?;
            let mut lines = vec![replayed(name, &reply.body)];
            lines.extend(text(&reply.body, "/replayed/undo").map(|undo| format!("undo: {undo}")));
            Ok(shown(reply, lines))
        }
    })
}

/// A filesystem takes as long as it takes; the daemon has limits of its own.
fn patient(session: &Session) -> Result<Client, ClientError> {
    session.patient(None)
}

fn path(name: &str, verb: &str) -> String {
    let name = percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC);
    format!("/v1/devices/{name}{verb}")
}

/// The daemon has another working directory.
fn absolute(path: &Path) -> Result<String, ClientError> {
    let absolute =
        std::path::absolute(path).map_err(|error| ClientError::usage(format!("{}: {error}", path.display())))?;
    let text = absolute.into_os_string().into_string();
    text.map_err(|path| ClientError::usage(format!("{path:?} is not UTF-8")))
}

/// The fields that have a value.
fn given(document: &Value) -> Value {
    let fields = document.as_object().into_iter().flatten();
    let given = fields.filter(|(_, value)| !value.is_null() && **value != json!(false) && **value != json!([]));
    Value::Object(given.map(|(name, value)| (name.clone(), value.clone())).collect::<Map<_, _>>())
}

fn create(session: &Session, args: &CreateArgs) -> Result<Outcome, ClientError> {
    let place = |path: &Option<PathBuf>| path.as_deref().map(absolute).transpose();
    let log = given(&json!({
        "image": place(&args.log_image)?, "size": args.log_size, "device": place(&args.log_device)?,
    }));
    let log = log.as_object().is_some_and(|log| !log.is_empty()).then_some(log);
    let body = given(&json!({
        "image": place(&args.image)?, "size": args.size, "existing": args.existing, "device": place(&args.device)?,
        "filesystem": args.filesystem, "mkfs_options": args.mkfs_options, "mountpoint": place(&args.mountpoint)?,
        "mount_options": args.mount_options, "force": args.force, "log": log,
    }));
    let reply = patient(session)?.put(&path(&args.name, ""), &body)?;
    changed(session, reply)
}

fn mode_document(args: &ModeArgs) -> Value {
    let span = |span: &Option<Span>| span.as_ref().map(|span| span.text.clone());
    json!({
        "mode": args.mode, "and": args.and, "for": span(&args.life), "up": span(&args.up), "down": span(&args.down),
        "nth": args.nth, "direction": args.direction, "value": args.value, "flags": args.flags,
        "probability": args.probability, "read": span(&args.read), "write": span(&args.write), "flush": span(&args.flush),
        "sync_fs": args.sync_fs, "no_lockfs": args.no_lockfs,
    })
}

fn cut(session: &Session, args: &CutArgs) -> Result<Outcome, ClientError> {
    let body = given(&json!({"kill": args.kill, "umount": args.umount, "lazy": args.lazy}));
    let reply = patient(session)?.post(&path(&args.name, "/cut"), &body)?;
    let steps = reply.body.get("steps").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let what = format!("device {}: cut: {}", args.name, steps.collect::<Vec<_>>().join(", "));
    Ok(told(session, reply, what))
}

fn remove(session: &Session, name: &str, kill: bool, umount: bool) -> Result<Outcome, ClientError> {
    let query = format!("?kill={kill}&umount={umount}");
    let reply = patient(session)?.delete(&path(name, &query))?;
    let was_there = reply.body.get("removed") == Some(&json!(true));
    let what = if was_there { format!("device {name}: removed") } else { format!("device {name}: not there") };
    Ok(told(session, reply, what))
}

fn status(session: &Session, name: Option<&str>) -> Result<Outcome, ClientError> {
    let Some(name) = name else {
        let reply = session.client.get("/v1/devices")?;
        let devices = reply.body.get("devices").and_then(Value::as_array).into_iter().flatten();
        let mut lines: Vec<String> = devices.map(sentence).collect();
        lines.extend(host(&reply.body));
        return Ok(shown(reply, lines));
    };
    let reply = session.client.get(&path(name, ""))?;
    let mut lines = vec![sentence(&reply.body)];
    for field in ["table", "status", "trouble"] {
        lines.extend(text(&reply.body, &format!("/{field}")).map(|line| format!("  {field}: {line}")));
    }
    let holders = reply.body.get("holders").and_then(Value::as_array).into_iter().flatten();
    lines.extend(holders.map(|holder| {
        let word = |key: &str| holder.get(key).and_then(Value::as_str).unwrap_or("?");
        let pid = holder.get("pid").and_then(Value::as_i64).unwrap_or_default();
        format!("  used by {pid} ({}): {}", word("comm"), word("what"))
    }));
    Ok(shown(reply, lines))
}

/// What this host can do.
fn host(body: &Value) -> Vec<String> {
    if body.pointer("/host/supported") == Some(&json!(true)) {
        let targets = body.pointer("/host/targets").and_then(Value::as_array).into_iter().flatten();
        let targets: Vec<&str> = targets.filter_map(Value::as_str).collect();
        return vec![format!("host: device mapper with {}", targets.join(" "))];
    }
    let missing = text(body, "/host/missing").unwrap_or("no device mapper");
    let hint = text(body, "/host/hint").map(|hint| format!("hint: {hint}"));
    [format!("host: no devices here: {missing}")].into_iter().chain(hint).collect()
}

fn text<'a>(body: &'a Value, pointer: &str) -> Option<&'a str> {
    body.pointer(pointer).and_then(Value::as_str)
}

/// A device on one line.
fn sentence(body: &Value) -> String {
    let word = |name: &str| text(body, &format!("/{name}")).unwrap_or("?");
    let mut line = format!("device {} ({}): {}", word("name"), word("device"), word("state"));
    line.push_str(&format!(", mode {}", word("mode")));
    if let Some(remaining) = text(body, "/remaining") {
        line.push_str(&format!(" for {remaining} more"));
    }
    if body.get("in_force") == Some(&json!(false)) {
        line.push_str(&format!(" (not in force: the kernel has {})", word("table")));
    }
    if body.get("suspended") == Some(&json!(true)) {
        line.push_str(", suspended");
    }
    let mounts = body.get("mounts").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let mounts: Vec<String> = mounts.map(quoted).collect();
    if !mounts.is_empty() {
        line.push_str(&format!(", mounted at {}", mounts.join(" ")));
    }
    line
}

fn changed(session: &Session, reply: Reply) -> Result<Outcome, ClientError> {
    let what = sentence(&reply.body);
    Ok(told(session, reply, what))
}

/// What was done, by which commands, and how to undo it.
fn told(session: &Session, reply: Reply, what: String) -> Outcome {
    let commands = reply.body.get("commands").and_then(Value::as_array).into_iter().flatten();
    let mut lines = vec![what];
    lines.extend(commands.filter_map(Value::as_str).map(|line| format!("  {line}")));
    lines.extend(warnings(&reply.body));
    lines.extend(text(&reply.body, "/undo").map(|words| session.undo(words)));
    shown(reply, lines)
}

fn replayed(name: &str, body: &Value) -> String {
    let number = |key: &str| body.pointer(&format!("/replayed/{key}")).and_then(Value::as_u64).unwrap_or_default();
    let word = |key: &str| text(body, &format!("/replayed/{key}")).unwrap_or("?");
    let (writes, discards, bytes) = (number("writes"), number("discards"), bytesize::ByteSize(number("bytes")));
    format!("device {name}: up to {} in {}: {writes} writes ({bytes}), {discards} discards", word("to"), word("into"))
}
