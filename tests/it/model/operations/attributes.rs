//! Attributes: owners, modes, times, extended attributes and lists, flags.
//!
//! Runs on the thread of its test.

use super::*;

impl Model {
    pub(super) fn chmod(&mut self) {
        let who = self.who();
        let mode = self.mode();
        if self.random.once_in(4) {
            let open = self.fd(who);
            self.call(who, "fchmod", libc::SYS_fchmod, &[number(open.fd), number(mode)], Same::All);
            self.fstat(who, open.fd);
        } else {
            let (directory, path) = (self.directory(who), self.path());
            self.call(who, "fchmodat", libc::SYS_fchmodat, &[directory.clone(), text(&path), number(mode)], Same::All);
            self.lstat(who, directory, &path);
        }
    }

    pub(super) fn chown(&mut self) {
        let who = self.who();
        let (uid, gid) = self.owner();
        if self.random.once_in(4) {
            let open = self.fd(who);
            let args = [number(open.fd), number(uid), number(gid)];
            self.call(who, "fchown", libc::SYS_fchown, &args, Same::All);
            self.fstat(who, open.fd);
        } else {
            let flags = self.random.of(&[0, libc::AT_SYMLINK_NOFOLLOW]);
            let (directory, path) = (self.directory(who), self.path());
            let args = [directory.clone(), text(&path), number(uid), number(gid), number(flags.into())];
            self.call(who, "fchownat", libc::SYS_fchownat, &args, Same::All);
            self.lstat(who, directory, &path);
        }
    }

    pub(super) fn times(&mut self) {
        let who = self.who();
        let (atime, mtime) = (self.one_time(), self.one_time());
        let sets = atime[8..] != libc::UTIME_OMIT.to_ne_bytes();
        let times = match self.random.once_in(6) {
            true => number(0),
            false => Arg::In([atime, mtime].concat(), 0),
        };
        let (directory, path, flags) = match self.random.once_in(4) {
            true => (number(self.fd(who).fd), Vec::new(), libc::AT_EMPTY_PATH),
            false => (self.directory(who), self.path(), self.random.of(&[0, libc::AT_SYMLINK_NOFOLLOW])),
        };
        let args = [directory.clone(), text(&path), times, number(flags.into())];
        if self.call(who, "utimensat", libc::SYS_utimensat, &args, Same::All) == 0 && sets {
            self.access_time(who, directory, &path, flags);
        }
    }

    /// Reading changes access times, now and then: they are compared only where they were just set.
    pub(super) fn access_time(&mut self, who: usize, directory: Arg, path: &[u8], flags: i32) {
        let mask = libc::STATX_BASIC_STATS;
        let args = [directory, text(path), number(flags.into()), number(mask.into()), Arg::Out(Status::SIZE, 0)];
        let answers = self.sides.call_each(who, "statx", libc::SYS_statx, [&args, &args], Same::Status);
        let told = answers.map(|answer| match answer.result {
            0 => tree::time(Status::read(&answer.written[0]).atime),
            error => error.to_string(),
        });
        if told[BARE] != told[MOUNT] {
            self.sides.fail(&format!("access times differ: {told:?}"));
        }
    }

    pub(super) fn one_time(&mut self) -> Vec<u8> {
        let seconds: i64 = self.random.of(&[
            0,
            1,
            -1,
            -2,
            1_000_000_000,
            i32::MAX.into(),
            i32::MIN.into(),
            1 << 31,
            1 << 32,
            15_032_385_535,
            15_032_385_536,
            i64::MAX,
            i64::MIN,
        ]);
        let nanoseconds: i64 = self.random.of(&[0, 1, 500_000_000, 999_999_999, libc::UTIME_NOW, libc::UTIME_OMIT]);
        let nanoseconds = if self.random.once_in(25) { 1_000_000_000 } else { nanoseconds };
        [seconds.to_ne_bytes(), nanoseconds.to_ne_bytes()].concat()
    }

    pub(super) fn attribute_name(&mut self) -> Vec<u8> {
        match self.random.below(24) {
            0 => b"".to_vec(),
            1 => b"user.".to_vec(),
            2 => b"nonsense".to_vec(),
            3 => b"what.ever".to_vec(),
            4 => [b"user.".to_vec(), vec![b'x'; 250]].concat(),
            5 => [b"user.".to_vec(), vec![b'x'; 251]].concat(),
            6 => b"system.other".to_vec(),
            7 => b"security.capability".to_vec(),
            8 => ACCESS_ACL.to_vec(),
            9 => DEFAULT_ACL.to_vec(),
            10 => b"trusted.".to_vec(),
            11..14 => b"trusted.t".to_vec(),
            14 => b"security.model".to_vec(),
            15..20 => b"user.b".to_vec(),
            _ => b"user.a".to_vec(),
        }
    }

    pub(super) fn setxattr(&mut self) {
        let name = self.attribute_name();
        let length = self.random.of(&[0, 1, 10, 100, 2000, 4000, 65_536, 65_537]);
        let value = self.data(length);
        self.set_attribute(&name, value);
    }

    pub(super) fn set_attribute(&mut self, name: &[u8], value: Vec<u8>) {
        let who = self.who();
        let flags = self.random.of(&[0, 0, 0, 1, 2, 3, 8]);
        let length = value.len() as i64;
        let value = [Arg::In(value, 0), number(length), number(flags)];
        let (how, call, file) = self.file_of_attribute(who, SET);
        self.call(who, how, call, &[vec![file.clone(), text(name)], value.to_vec()].concat(), Same::All);
        if let Arg::In(path, _) = file {
            self.lstat(who, cwd(), &path[..path.len() - 1]);
        }
    }

    /// The file of a call on extended attributes: by path, by path of the symlink itself, or open.
    pub(super) fn file_of_attribute(
        &mut self,
        who: usize,
        calls: [(&'static str, i64); 3],
    ) -> (&'static str, i64, Arg) {
        let form = self.random.of(&[0, 0, 1, 2]);
        let file = match form {
            2 => number(self.fd(who).fd),
            _ => text(&self.path()),
        };
        (calls[form].0, calls[form].1, file)
    }

    /// A capability as setcap writes it.
    pub(super) fn capability(&mut self) {
        let revision = self.random.of(&[0x0200_0000u32, 0x0200_0001, 0x0300_0001, 0x0900_0000]);
        let mut value: Vec<u8> = [revision, 1 << 10, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        if revision >> 24 == 3 {
            value.extend_from_slice(&0u32.to_le_bytes());
        }
        self.set_attribute(b"security.capability", value);
    }

    /// An access control list in the form that the kernel takes.
    pub(super) fn acl(&mut self) {
        const UNDEFINED: u32 = u32::MAX;
        let mut entry = |tag: u16, id: u32| {
            let permissions = self.random.below(8) as u16;
            [tag.to_le_bytes(), permissions.to_le_bytes()].concat().into_iter().chain(id.to_le_bytes()).collect()
        };
        let (owner, group): (Vec<u8>, Vec<u8>) = (entry(0x01, UNDEFINED), entry(0x04, UNDEFINED));
        let (user, other_user) = (entry(0x02, 1001), entry(0x02, 65534));
        let (named, mask, other) = (entry(0x08, 12), entry(0x10, UNDEFINED), entry(0x20, UNDEFINED));
        let parts: Vec<Vec<u8>> = match self.random.below(7) {
            0 | 1 => vec![owner, group, other],
            2 => vec![owner, user, group, mask, other],
            3 => vec![owner, user, other_user, group, named, mask, other],
            4 => vec![owner, group, named, mask, other],
            5 => vec![owner, user, group, other],
            _ => vec![group, other],
        };
        let version = if self.random.once_in(20) { 1u32 } else { 2 };
        let value = [version.to_le_bytes().to_vec(), parts.concat()].concat();
        let value = if self.random.once_in(15) { version.to_le_bytes().to_vec() } else { value };
        let name = self.random.of(&[ACCESS_ACL, ACCESS_ACL, DEFAULT_ACL]);
        self.set_attribute(name, value);
    }

    pub(super) fn getxattr(&mut self) {
        let who = self.who();
        let name = self.attribute_name();
        let size = self.random.of(&[0, 1, 20, 4096, 65_536]);
        let (how, call, file) = self.file_of_attribute(who, GET);
        let args = [file, text(&name), Arg::Out(size, 0), number(size as i64)];
        self.call(who, how, call, &args, if size == 0 { Same::Result } else { Same::Data });
    }

    pub(super) fn listxattr(&mut self) {
        let who = self.who();
        let size = self.random.of(&[0, 5, 1000, 65_536]);
        let (how, call, file) = self.file_of_attribute(who, LIST);
        let args = [file, Arg::Out(size, 0), number(size as i64)];
        self.call(who, how, call, &args, if size == 0 { Same::Result } else { Same::Data });
    }

    pub(super) fn removexattr(&mut self) {
        let who = self.who();
        let name = self.attribute_name();
        let (how, call, file) = self.file_of_attribute(who, REMOVE);
        self.call(who, how, call, &[file, text(&name)], Same::All);
    }

    pub(super) fn access(&mut self) {
        let who = self.who();
        let (directory, path) = (self.directory(who), self.path());
        let mask = self.random.below(8) as i64;
        let flags = self.random.of(&[0, libc::AT_EACCESS, libc::AT_SYMLINK_NOFOLLOW]);
        let args = [directory, text(&path), number(mask), number(flags.into())];
        self.call(who, "faccessat2", libc::SYS_faccessat2, &args, Same::All);
    }

    pub(super) fn statfs(&mut self) {
        let who = self.who();
        let path = self.path();
        let args = [text(&path), Arg::Out(120, 0)];
        let answers = self.sides.call_each(who, "statfs", libc::SYS_statfs, [&args, &args], Same::Result);
        // f_bsize, f_blocks, f_files, f_namelen, f_frsize: what is free changes by the minute.
        let told = answers.map(|answer| [8, 16, 40, 64, 72].map(|at| answer.written[0][at..at + 8].to_vec()));
        if told[BARE] != told[MOUNT] {
            self.sides.fail(&format!("statfs differs: {told:?}"));
        }
    }

    pub(super) fn stat(&mut self) {
        let who = self.who();
        if self.random.once_in(3) {
            let open = self.fd(who);
            return self.fstat(who, open.fd);
        }
        let (directory, path) = (self.directory(who), self.path());
        let flags = self.random.of(&[0, 0, libc::AT_SYMLINK_NOFOLLOW, libc::AT_STATX_FORCE_SYNC]);
        self.statx(who, directory, &path, flags);
    }

    pub(super) fn umask(&mut self) {
        let who = self.who();
        let mask = self.random.of(&[0, 0o022, 0o077, 0o002, 0o777, 0o137]);
        self.call(who, "umask", libc::SYS_umask, &[number(mask)], Same::All);
    }

    /// What chattr sets.
    pub(super) fn file_flags(&mut self) {
        let who = self.random.of(&[ROOT, ROOT, 2, 3]);
        let open = self.fd(who);
        // Of other files the kernel asks on FUSE for the owner first.
        if open.kind != libc::S_IFREG && open.kind != libc::S_IFDIR {
            return;
        }
        if self.random.once_in(3) {
            let args = [number(open.fd), Arg::Number(FS_IOC_GETFLAGS), Arg::Out(8, 0)];
            self.call(who, "FS_IOC_GETFLAGS", libc::SYS_ioctl, &args, Same::All);
            return;
        }
        // Immutable, append-only, no dump, no access times, synchronous; and none.
        let flags = self.random.of(&[0x10, 0x20, 0x40, 0x80, 0x08, 0u64]);
        if flags & LOCKED != 0 {
            // Before a write the kernel on FUSE asks to remove it, and cannot say that it is for a write.
            let capability = [number(open.fd), text(b"security.capability")];
            self.call(ROOT, "fremovexattr", libc::SYS_fremovexattr, &capability, Same::All);
        }
        self.set_file_flags(who, open, flags);
        if flags & LOCKED != 0 {
            for _ in 0..self.random.below(8) {
                self.step_unlocked();
            }
            self.set_file_flags(who, open, 0);
        }
    }

    /// An operation while something cannot be changed. Not rename: over a directory, two errors are right.
    pub(super) fn step_unlocked(&mut self) {
        let operation = self.random.of(&[
            Model::write as fn(&mut Model),
            Model::truncate,
            Model::unlink,
            Model::link,
            Model::chmod,
            Model::chown,
            Model::times,
            Model::setxattr,
            Model::mkdir,
        ]);
        operation(self);
    }

    pub(super) fn set_file_flags(&mut self, who: usize, open: Open, flags: u64) {
        let args = [
            number(open.fd),
            Arg::Number(FS_IOC_SETFLAGS),
            Arg::In((flags | self.kept_flags()).to_ne_bytes().to_vec(), 0),
        ];
        self.call(who, "FS_IOC_SETFLAGS", libc::SYS_ioctl, &args, Same::All);
    }

    /// `FS_EXTENT_FL`, which ext4 does not let go.
    pub(super) fn kept_flags(&self) -> u64 {
        if self.backing == Backing::Memory { 0 } else { 0x80000 }
    }

    pub(super) fn open_flags(&mut self) {
        let who = self.who_has();
        if self.open[who].is_empty() {
            return;
        }
        let at = self.random.below(self.open[who].len());
        let open = self.open[who][at];
        let got = self.call(who, "fcntl", libc::SYS_fcntl, &[number(open.fd), number(libc::F_GETFL.into())], Same::All);
        let changed = self.random.some(&[libc::O_APPEND, libc::O_DIRECT, libc::O_NOATIME], 3) | libc::O_NONBLOCK;
        let args = [number(open.fd), number(libc::F_SETFL.into()), number(changed.into())];
        if got >= 0 && self.call(who, "fcntl", libc::SYS_fcntl, &args, Same::All) == 0 {
            const CHANGEABLE: i32 = libc::O_APPEND | libc::O_DIRECT | libc::O_NOATIME;
            self.open[who][at].flags = open.flags & !CHANGEABLE | changed;
            self.open[who][at].direct |= changed & libc::O_DIRECT != 0;
        }
    }
}
