//! What a client asks for when it wants a device: the document, checked as far as that goes without looking at the host.
//!
//! Pure: on any thread, no locks.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Refused, absolute, invalid};
use crate::fault::compile::{Problem, bytes};
use crate::host::state::is_name;

/// Smaller than this is no disk.
const SMALLEST: u64 = 1 << 20;
/// Images end at a page.
const PAGE: u64 = 4096;
/// `NAME-log` has to be a name of the mapper, too.
const LONGEST_NAME: usize = 60;

/// The body of a `PUT`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    #[serde(default)]
    image: Option<String>,
    #[serde(default)]
    size: Option<Value>,
    /// The image is there already, and stays.
    #[serde(default)]
    existing: bool,
    #[serde(default)]
    device: Option<String>,
    #[serde(default)]
    filesystem: Option<String>,
    #[serde(default)]
    mkfs_options: Option<String>,
    #[serde(default)]
    mountpoint: Option<String>,
    #[serde(default)]
    mount_options: Option<String>,
    /// A filesystem that is there may be overwritten.
    #[serde(default)]
    force: bool,
    #[serde(default)]
    log: Option<AskedLog>,
}

/// Where writes are logged.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedLog {
    #[serde(default)]
    image: Option<String>,
    #[serde(default)]
    size: Option<Value>,
    #[serde(default)]
    device: Option<String>,
}

/// What a device stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ground {
    /// A file that we make, of so many bytes.
    NewImage(PathBuf, u64),
    OldImage(PathBuf),
    Device(PathBuf),
}

impl Ground {
    pub fn path(&self) -> &PathBuf {
        match self {
            Ground::NewImage(path, _) | Ground::OldImage(path) | Ground::Device(path) => path,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filesystem {
    Ext4,
    Xfs,
    Btrfs,
    None,
}

impl Filesystem {
    pub const ALL: [(&str, Filesystem); 4] = [
        ("ext4", Filesystem::Ext4),
        ("xfs", Filesystem::Xfs),
        ("btrfs", Filesystem::Btrfs),
        ("none", Filesystem::None),
    ];

    pub fn word(self) -> &'static str {
        Filesystem::ALL.iter().find(|(_, filesystem)| *filesystem == self).map_or("none", |(word, _)| word)
    }

    /// The smallest disk that its mkfs takes.
    fn smallest(self) -> u64 {
        match self {
            Filesystem::Xfs => 300 << 20,
            Filesystem::Btrfs => 109 << 20,
            Filesystem::Ext4 | Filesystem::None => SMALLEST,
        }
    }
}

/// A device that makes sense.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    pub ground: Ground,
    /// The filesystem that is made on it.
    pub filesystem: Filesystem,
    pub mkfs_options: Vec<String>,
    pub mountpoint: Option<PathBuf>,
    pub mount_options: Option<String>,
    pub log: Option<Ground>,
    pub force: bool,
}

impl Definition {
    /// # Errors
    /// With the place of what makes no sense.
    pub fn of(name: &str, asked: &Asked) -> Result<Definition, Refused> {
        if !is_name(name) || name.len() > LONGEST_NAME || name == "control" {
            let detail = format!("{name:?} cannot be the name of a device");
            return Err(invalid("", detail).hint("letters, digits, dots, dashes and underscores, at most 60"));
        }
        let ground = ground("", asked.image.as_deref(), asked.size.as_ref(), asked.device.as_deref(), asked.existing)?;
        let filesystem = filesystem(asked.filesystem.as_deref(), &ground)?;
        if let Ground::NewImage(_, size) = ground
            && size < filesystem.smallest()
        {
            let detail = format!("size: {} wants at least {} bytes", filesystem.word(), filesystem.smallest());
            return Err(invalid("size", detail).hint("the image is sparse: it takes what is written"));
        }
        if filesystem == Filesystem::None && asked.mkfs_options.is_some() {
            return Err(invalid("mkfs_options", "mkfs_options: there is no filesystem to be made"));
        }
        if asked.mountpoint.is_none() && asked.mount_options.is_some() {
            return Err(invalid("mount_options", "mount_options: there is no mountpoint"));
        }
        if filesystem == Filesystem::None && asked.mountpoint.is_some() && matches!(ground, Ground::NewImage(..)) {
            return Err(invalid("mountpoint", "mountpoint: a new image without a filesystem cannot be mounted"));
        }
        let log =
            asked.log.as_ref().map(|log| ground_of_log(log.image.as_deref(), log.size.as_ref(), log.device.as_deref()));
        let definition = Definition {
            ground,
            filesystem,
            mkfs_options: words(asked.mkfs_options.as_deref())?,
            mountpoint: asked.mountpoint.as_deref().map(|path| absolute("mountpoint", path)).transpose()?,
            mount_options: asked.mount_options.clone(),
            log: log.transpose()?,
            force: asked.force,
        };
        match &definition.log {
            Some(log) if log.path() == definition.ground.path() => {
                Err(invalid("log", "log: the device cannot be its own log"))
            }
            _ => Ok(definition),
        }
    }
}

fn ground(
    below: &str,
    image: Option<&str>,
    size: Option<&Value>,
    device: Option<&str>,
    existing: bool,
) -> Result<Ground, Refused> {
    let field = |name: &str| format!("{below}{name}");
    match (image, size, device) {
        (Some(_), _, Some(_)) => Err(invalid(&field("device"), "image and device: a device stands on one")),
        (None, _, None) => Err(invalid(&field("image"), "a device wants an image or a device to stand on")
            .hint("image and size: a file that is made; device: a disk that is there")),
        (None, Some(_), Some(_)) => Err(invalid(&field("size"), "size: a device has a size already")),
        (None, None, Some(_)) if existing => Err(invalid(&field("existing"), "existing is of images")),
        (None, None, Some(device)) => Ok(Ground::Device(absolute(&field("device"), device)?)),
        (Some(_), Some(_), None) if existing => Err(invalid(&field("size"), "size: an existing image has one already")),
        (Some(image), None, None) if existing => Ok(Ground::OldImage(absolute(&field("image"), image)?)),
        (Some(image), Some(size), None) => {
            Ok(Ground::NewImage(absolute(&field("image"), image)?, bytes_of(&field("size"), size)?))
        }
        (Some(_), None, None) => Err(invalid(&field("size"), "a new image wants a size")
            .hint("size: \"256MiB\"; for an image that is there: existing")),
    }
}

fn ground_of_log(image: Option<&str>, size: Option<&Value>, device: Option<&str>) -> Result<Ground, Refused> {
    ground("log/", image, size, device, false)
}

fn bytes_of(field: &str, value: &Value) -> Result<u64, Refused> {
    let number = match value {
        Value::String(text) => bytes(text),
        value => value.as_u64(),
    };
    let bad = |why: &str| invalid(field, format!("size: {value} {why}")).hint("write \"256MiB\" or \"10GiB\"");
    match number.ok_or_else(|| bad("is not a size"))? / PAGE * PAGE {
        size if size < SMALLEST => Err(bad("is less than 1 MiB")),
        size if size > i64::MAX as u64 => Err(bad("is more than a file can have")),
        size => Ok(size),
    }
}

/// A new image gets ext4, and what was there already stays as it is.
fn filesystem(word: Option<&str>, ground: &Ground) -> Result<Filesystem, Refused> {
    let Some(word) = word else {
        let is_new = matches!(ground, Ground::NewImage(..));
        return Ok(if is_new { Filesystem::Ext4 } else { Filesystem::None });
    };
    let known = Filesystem::ALL.iter().map(|(word, _)| *word);
    let found = Filesystem::ALL.iter().find(|(known, _)| *known == word).map(|(_, filesystem)| *filesystem);
    let problem = || Problem::new("#/filesystem", format!("filesystem: unknown {word:?}")).nearest(word, known);
    found.ok_or_else(|| problem().into())
}

fn words(text: Option<&str>) -> Result<Vec<String>, Refused> {
    let Some(text) = text else { return Ok(Vec::new()) };
    let bad = || invalid("mkfs_options", format!("mkfs_options: {text:?} has a quote without its end"));
    shlex::split(text).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(text: &str) -> Result<Definition, Refused> {
        Definition::of("d0", &serde_json::from_str(text).unwrap())
    }

    #[test]
    fn a_new_image_gets_ext4_and_what_was_there_stays() {
        let new = definition(r#"{"image":"/i","size":"10MiB"}"#).unwrap();
        assert_eq!((new.ground, new.filesystem), (Ground::NewImage("/i".into(), 10 << 20), Filesystem::Ext4));
        let old = definition(r#"{"image":"/i","existing":true}"#).unwrap();
        assert_eq!((old.ground, old.filesystem), (Ground::OldImage("/i".into()), Filesystem::None));
        assert_eq!(definition(r#"{"device":"/dev/sdb"}"#).unwrap().filesystem, Filesystem::None);
    }

    #[test]
    fn sizes_end_at_a_page() {
        let ground = definition(r#"{"image":"/i","size":10000000}"#).unwrap().ground;
        assert_eq!(ground, Ground::NewImage("/i".into(), 9_998_336));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_place() {
        for (text, place) in [
            ("{}", "#/image"),
            (r#"{"image":"/i"}"#, "#/size"),
            (r#"{"image":"i","size":"1GiB"}"#, "#/image"),
            (r#"{"image":"/i","size":"much"}"#, "#/size"),
            (r#"{"image":"/i","size":"4KiB"}"#, "#/size"),
            (r#"{"image":"/i","size":"1GiB","existing":true}"#, "#/size"),
            (r#"{"image":"/i","size":"1GiB","device":"/dev/sdb"}"#, "#/device"),
            (r#"{"device":"/dev/sdb","size":"1GiB"}"#, "#/size"),
            (r#"{"image":"/i","size":"100MiB","filesystem":"xfs"}"#, "#/size"),
            (r#"{"image":"/i","size":"1GiB","filesystem":"ext5"}"#, "#/filesystem"),
            (r#"{"image":"/i","size":"1GiB","filesystem":"none","mountpoint":"/m"}"#, "#/mountpoint"),
            (r#"{"image":"/i","size":"1GiB","mount_options":"ro"}"#, "#/mount_options"),
            (r#"{"image":"/i","size":"1GiB","log":{"image":"/i","size":"1GiB"}}"#, "#/log"),
            (r#"{"image":"/i","size":"1GiB","log":{}}"#, "#/log/image"),
        ] {
            let error = definition(text).unwrap_err();
            assert_eq!(error.pointer.as_deref(), Some(place), "{text}: {error}");
        }
        let asked: Asked = serde_json::from_str(r#"{"image":"/i","size":"1GiB"}"#).unwrap();
        assert!(Definition::of("a/b", &asked).is_err());
    }
}
