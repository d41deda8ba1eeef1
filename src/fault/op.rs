//! The operations a rule can name, and sets of them.
//!
//! Pure data: any thread, no locks, no I/O. The words are those of the FUSE protocol, in the order of the contract;
//! a group is a word for several of them. `grow` and `truncate` are conditions on an operation, not operations.

use std::fmt;

macro_rules! operations {
    ($($variant:ident $word:literal),+ $(,)?) => {
        /// One operation of the filesystem, as the kernel sends it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Op { $($variant),+ }

        impl Op {
            /// Every operation, in the order of its bit.
            pub const ALL: &'static [Op] = &[$(Op::$variant),+];

            /// The word for it in rules, events and documents.
            pub const fn word(self) -> &'static str {
                match self { $(Op::$variant => $word),+ }
            }
        }
    };
}

operations! {
    Lookup "lookup", Getattr "getattr", Setattr "setattr", Readlink "readlink", Mknod "mknod", Mkdir "mkdir",
    Unlink "unlink", Rmdir "rmdir", Symlink "symlink", Rename "rename", Link "link", Open "open", Create "create",
    Read "read", Write "write", CopyFileRange "copy_file_range", Fallocate "fallocate", Flush "flush",
    Release "release", Fsync "fsync", Opendir "opendir", Readdir "readdir", Releasedir "releasedir",
    Fsyncdir "fsyncdir", Statfs "statfs", Setxattr "setxattr", Getxattr "getxattr", Listxattr "listxattr",
    Removexattr "removexattr", Access "access", Lseek "lseek", Ioctl "ioctl",
}

impl Op {
    /// Why no request of this name ever comes; nothing of one that does, or that nobody knows.
    pub fn why_never(word: &str) -> Option<&'static str> {
        match word {
            "access" => Some("the kernel checks permissions by itself"),
            "lock" | "flock" | "getlk" | "setlk" | "setlkw" => Some("the kernel keeps locks by itself"),
            _ => None,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A set of operations, some of them only where their condition holds: a write that needs space, a setattr that changes
/// the size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpSet {
    always: u64,
    /// Of operations that a condition is known of.
    on_condition: u64,
}

impl OpSet {
    pub const fn of(ops: &[Op]) -> OpSet {
        let mut always = 0;
        let mut i = 0;
        while i < ops.len() {
            always |= 1 << ops[i] as u8;
            i += 1;
        }
        OpSet { always, on_condition: 0 }
    }

    /// Operations where their condition holds.
    const fn on_condition(ops: &[Op]) -> OpSet {
        OpSet { always: 0, on_condition: OpSet::of(ops).always }
    }

    pub const fn all() -> OpSet {
        OpSet::of(Op::ALL)
    }

    pub const fn with(self, other: OpSet) -> OpSet {
        OpSet { always: self.always | other.always, on_condition: self.on_condition | other.on_condition }
    }

    /// What of the set can be acknowledged and lost: a setattr only as far as it changes the size.
    pub const fn droppable(self) -> OpSet {
        const LOST: u64 = OpSet::of(&[Op::Write, Op::CopyFileRange, Op::Fallocate, Op::Fsync, Op::Fsyncdir]).always;
        const RESIZED: u64 = OpSet::of(&[Op::Setattr]).always;
        let resized = (self.always | self.on_condition) & RESIZED;
        OpSet { always: self.always & LOST, on_condition: self.on_condition & LOST | resized }
    }

    /// What both name; the conditions of the first.
    pub const fn within(self, able: OpSet) -> OpSet {
        let able = able.always | able.on_condition;
        OpSet { always: self.always & able, on_condition: self.on_condition & able }
    }

    pub const fn has(self, op: Op) -> bool {
        self.always & (1 << op as u8) != 0
    }

    /// Is the operation meant where its condition holds?
    pub const fn has_on_condition(self, op: Op) -> bool {
        self.on_condition & (1 << op as u8) != 0
    }

    pub const fn is_empty(self) -> bool {
        self.always | self.on_condition == 0
    }

    /// Could a request of this operation be meant, conditions left open?
    pub const fn may_concern(self, op: Op) -> bool {
        self.has(op) || self.has_on_condition(op)
    }

    /// The set that a word stands for: an operation, a group or a condition.
    pub fn parse(word: &str) -> Option<OpSet> {
        if let Some(op) = OpSet::single(word) {
            return Some(OpSet::of(&[op]));
        }
        GROUPS.iter().find(|(name, _)| *name == word).map(|(_, set)| *set)
    }

    /// The single operation that a word names, if it is no group or condition.
    pub fn single(word: &str) -> Option<Op> {
        Op::ALL.iter().copied().find(|op| op.word() == word)
    }

    /// The operations and conditions of the set, by their words; `*` for all operations.
    pub fn names(self) -> Vec<&'static str> {
        if OpSet::all().always & !self.always == 0 {
            return vec!["*"];
        }
        let ops = Op::ALL.iter().filter(|op| self.has(**op)).map(|op| op.word());
        let conditional = self.has_on_condition(Op::Write) || self.has_on_condition(Op::Fallocate);
        let conditions = [(conditional, "grow"), (self.has_on_condition(Op::Setattr), "truncate")];
        ops.chain(conditions.into_iter().filter(|(there, _)| *there).map(|(_, word)| word)).collect()
    }

    /// All words that [`OpSet::parse`] knows.
    pub fn words() -> impl Iterator<Item = &'static str> {
        Op::ALL.iter().map(|op| op.word()).chain(GROUPS.iter().map(|(name, _)| *name))
    }
}

/// The type of a file, in the words of `match.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    File,
    Directory,
    Symlink,
    Fifo,
    Socket,
    BlockDevice,
    CharDevice,
}

impl FileType {
    pub const WORDS: &'static [(&'static str, FileType)] = &[
        ("file", FileType::File),
        ("directory", FileType::Directory),
        ("symlink", FileType::Symlink),
        ("fifo", FileType::Fifo),
        ("socket", FileType::Socket),
        ("block_device", FileType::BlockDevice),
        ("char_device", FileType::CharDevice),
    ];

    pub fn parse(word: &str) -> Option<FileType> {
        Self::WORDS.iter().find(|(name, _)| *name == word).map(|(_, kind)| *kind)
    }

    /// From the type bits of a `st_mode`.
    pub fn of_mode(mode: u32) -> FileType {
        match mode & libc::S_IFMT {
            libc::S_IFDIR => FileType::Directory,
            libc::S_IFLNK => FileType::Symlink,
            libc::S_IFIFO => FileType::Fifo,
            libc::S_IFSOCK => FileType::Socket,
            libc::S_IFBLK => FileType::BlockDevice,
            libc::S_IFCHR => FileType::CharDevice,
            _ => FileType::File,
        }
    }
}

/// Operations whose requests can have a range of bytes: a setattr that changes the size has one, too.
pub const RANGED: OpSet = OpSet::of(&[Op::Read, Op::Write, Op::CopyFileRange, Op::Fallocate, Op::Setattr]);

/// Operations that are direct or buffered.
pub const DIRECT: OpSet = OpSet::of(&[Op::Read, Op::Write, Op::Open, Op::Create]);

/// Operations that change a directory.
pub const NAMES: OpSet =
    OpSet::of(&[Op::Mknod, Op::Mkdir, Op::Unlink, Op::Rmdir, Op::Symlink, Op::Rename, Op::Link, Op::Create]);

const GROUPS: &[(&str, OpSet)] = &[
    ("data", OpSet::of(&[Op::Read, Op::Write, Op::CopyFileRange])),
    (
        "metadata",
        OpSet::of(&[
            Op::Lookup,
            Op::Getattr,
            Op::Setattr,
            Op::Readlink,
            Op::Opendir,
            Op::Readdir,
            Op::Releasedir,
            Op::Statfs,
            Op::Setxattr,
            Op::Getxattr,
            Op::Listxattr,
            Op::Removexattr,
            Op::Access,
        ])
        .with(NAMES),
    ),
    ("sync", OpSet::of(&[Op::Fsync, Op::Fsyncdir, Op::Flush])),
    ("names", NAMES),
    ("grow", OpSet::on_condition(&[Op::Write, Op::CopyFileRange, Op::Fallocate])),
    ("truncate", OpSet::on_condition(&[Op::Setattr])),
    ("*", OpSet::all()),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_parses_and_groups_are_not_empty() {
        for word in OpSet::words() {
            assert!(!OpSet::parse(word).unwrap().is_empty(), "{word}");
        }
        assert_eq!(OpSet::parse("wrtie"), None);
    }

    #[test]
    fn conditions_concern_only_operations_that_can_meet_them() {
        let grow = OpSet::parse("grow").unwrap();
        assert!(grow.may_concern(Op::Write) && !grow.may_concern(Op::Read) && !grow.has(Op::Write));
        let truncate = OpSet::parse("truncate").unwrap();
        assert!(truncate.may_concern(Op::Setattr) && !truncate.may_concern(Op::Write));
    }
}
