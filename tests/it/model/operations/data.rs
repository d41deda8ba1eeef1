//! Contents: reading, writing, their sizes and holes, copies.
//!
//! Runs on the thread of its test.

use super::*;

impl Model {
    pub(super) fn write(&mut self) {
        let who = self.who_has();
        let open = self.fd_for(who, true);
        let (offset, length) = (self.offset(), self.length());
        let (offset, length) = self.align(open, offset, length);
        let skew = self.skew(open);
        let data = Arg::In(self.data(length), skew);
        let strict = self.is_strict(open);
        if strict && open.flags & libc::O_APPEND != 0 {
            return;
        }
        match self.random.below(3) {
            0 if !strict => {
                self.call(who, "write", libc::SYS_write, &[number(open.fd), data, number(length)], Same::All)
            }
            _ => {
                let args = [number(open.fd), data, number(length), number(offset)];
                self.call(who, "pwrite64", libc::SYS_pwrite64, &args, Same::All)
            }
        };
        self.probe(who, open.fd);
    }

    /// Buffers for a vectored call, with the sum of their lengths.
    pub(super) fn vector(&mut self, open: Open, mut buffer: impl FnMut(&mut Model, i64, usize) -> Arg) -> Vec<Arg> {
        let direct = self.is_strict(open);
        (0..self.random.of(&[0, 1, 2, 3, 5]))
            .map(|_| {
                let length = self.random.of(&[0, 1, 100, 511, 512, 4096, 4097, 8192, 20_000]);
                let (length, skew) = (if direct { length & !(PAGE - 1) } else { length }, self.skew(open));
                buffer(self, length, skew)
            })
            .collect()
    }

    pub(super) fn vectored_write(&mut self) {
        let who = self.who_has();
        let open = self.fd_for(who, true);
        let flags = match self.is_strict(open) {
            true if open.flags & libc::O_APPEND != 0 => return,
            true => self.random.of(&[0, libc::RWF_DSYNC, RWF_NOAPPEND]),
            false => self.random.of(&[0, 0, libc::RWF_DSYNC, libc::RWF_SYNC, libc::RWF_APPEND, RWF_NOAPPEND]),
        };
        let parts = self.vector(open, |model, length, skew| Arg::In(model.data(length), skew));
        let offset = self.offset();
        let (offset, _) = self.align(open, offset, 0);
        let count = number(parts.len() as i64);
        let args = [number(open.fd), Arg::Vector(parts), count, number(offset), number(0), number(flags.into())];
        self.call(who, "pwritev2", libc::SYS_pwritev2, &args, Same::All);
        self.probe(who, open.fd);
    }

    pub(super) fn read(&mut self) {
        let who = self.who_has();
        let open = self.fd_for(who, false);
        let (offset, length) = (self.offset(), self.length());
        let (offset, length) = self.align(open, offset, length);
        let skew = self.skew(open);
        let buffer = Arg::Out(length as usize, skew);
        match self.random.below(8) {
            // Past the end a direct read of FUSE looks at the memory before it finds nothing to read.
            0 if !open.direct => {
                let nowhere = [number(open.fd), number(8), number(length), number(offset)];
                self.call(who, "pread64", libc::SYS_pread64, &nowhere, Same::All)
            }
            1 | 2 if !self.is_strict(open) => {
                self.call(who, "read", libc::SYS_read, &[number(open.fd), buffer, number(length)], Same::Data)
            }
            _ => {
                let args = [number(open.fd), buffer, number(length), number(offset)];
                self.call(who, "pread64", libc::SYS_pread64, &args, Same::Data)
            }
        };
    }

    pub(super) fn vectored_read(&mut self) {
        let who = self.who_has();
        let open = self.fd_for(who, false);
        let parts = self.vector(open, |_, length, skew| Arg::Out(length as usize, skew));
        let offset = self.offset();
        let (offset, _) = self.align(open, offset, 0);
        let count = number(parts.len() as i64);
        let args = [number(open.fd), Arg::Vector(parts), count, number(offset), number(0), number(0)];
        self.call(who, "preadv2", libc::SYS_preadv2, &args, Same::Data);
    }

    pub(super) fn truncate(&mut self) {
        let who = self.who_has();
        let size = self.size();
        if self.random.once_in(3) {
            let path = self.path();
            self.call(who, "truncate", libc::SYS_truncate, &[text(&path), number(size)], Same::All);
            self.lstat(who, cwd(), &path);
        } else {
            let open = self.fd_for(who, true);
            self.call(who, "ftruncate", libc::SYS_ftruncate, &[number(open.fd), number(size)], Same::All);
            self.probe(who, open.fd);
        }
    }

    pub(super) fn fallocate(&mut self) {
        let who = self.who_has();
        let open = self.fd_for(who, true);
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        let mode = self.random.of(&[0, KEEP, PUNCH | KEEP, PUNCH | KEEP, ZERO, ZERO | KEEP, PUNCH, UNSHARE, 0x4000]);
        let (offset, length) = (self.near(), self.length());
        let length = if self.random.once_in(20) { -1 } else { length };
        let mode = match self.backing {
            // Who refuses a size beyond the limit, and whether suid is left then, differs.
            _ if IDENTITIES[who].largest_file.is_some() => PUNCH | KEEP,
            Backing::Preallocating => mode,
            Backing::Disk => mode | PUNCH | KEEP,
            // tmpfs refuses to zero, but on FUSE a capability is gone by then.
            Backing::Memory => mode & !ZERO,
        };
        let args = [number(open.fd), number(mode.into()), number(offset), number(length)];
        self.call(who, "fallocate", libc::SYS_fallocate, &args, Same::All);
        self.probe(who, open.fd);
    }

    pub(super) fn seek(&mut self) {
        let who = self.who_has();
        let open = self.fd_for(who, false);
        let whence = self.random.of(&[
            libc::SEEK_SET,
            libc::SEEK_CUR,
            libc::SEEK_END,
            libc::SEEK_DATA,
            libc::SEEK_DATA,
            libc::SEEK_HOLE,
            libc::SEEK_HOLE,
            9,
        ]);
        let maps = whence == libc::SEEK_DATA || whence == libc::SEEK_HOLE;
        let whence = if open.kind == libc::S_IFDIR || maps && self.backing == Backing::Preallocating {
            libc::SEEK_SET
        } else {
            whence
        };
        let offset = self.offset();
        let args = [number(open.fd), number(offset), number(whence.into())];
        self.call(who, "lseek", libc::SYS_lseek, &args, Same::All);
    }

    pub(super) fn copy(&mut self) {
        let who = self.who_has();
        let (from, to) = (self.fd_for(who, false), self.fd_for(who, true));
        if self.is_strict(from) || self.is_strict(to) {
            return;
        }
        let (offset, to_offset, length) = (self.near(), self.near(), self.length());
        let at = |offset: i64| Arg::InOut(offset.to_ne_bytes().to_vec());
        let flags = if self.random.once_in(20) { 1 } else { 0 };
        let args = [number(from.fd), at(offset), number(to.fd), at(to_offset), number(length), number(flags)];
        self.call(who, "copy_file_range", libc::SYS_copy_file_range, &args, Same::All);
        self.probe(who, to.fd);
    }

    pub(super) fn sendfile(&mut self) {
        let who = self.who_has();
        let (from, to) = (self.fd_for(who, false), self.fd_for(who, true));
        // Pages are passed on, not copied: from a file to itself anything may come of it.
        if self.is_strict(from) || self.is_strict(to) || from.ino == to.ino {
            return;
        }
        let (offset, length) = (self.near(), self.length());
        let at = Arg::InOut(offset.to_ne_bytes().to_vec());
        let args = [number(to.fd), number(from.fd), at, number(length)];
        self.call(who, "sendfile", libc::SYS_sendfile, &args, Same::All);
        self.probe(who, to.fd);
    }

    pub(super) fn sync(&mut self) {
        let who = self.who_has();
        let open = self.fd(who);
        let (name, call) = self.random.of(&[("fsync", libc::SYS_fsync), ("fdatasync", libc::SYS_fdatasync)]);
        self.call(who, name, call, &[number(open.fd)], Same::All);
    }

    pub(super) fn advise(&mut self) {
        let who = self.who_has();
        let open = self.fd(who);
        let advice = self.random.below(7) as i64;
        let args = [number(open.fd), number(0), number(0), number(advice)];
        self.call(who, "fadvise64", libc::SYS_fadvise64, &args, Same::All);
    }

    /// Direct I/O that is not aligned, on a new file that is all data and has nothing to lose.
    pub(super) fn refused(&mut self) {
        let who = self.who();
        let (name, mode) = (text(b"direct"), number(0o600));
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        let made = [cwd(), name.clone(), number(flags.into()), mode];
        let cached = self.call(who, "openat", libc::SYS_openat, &made, Same::All);
        if cached < 0 {
            return;
        }
        let data = Arg::In(self.data(4 * PAGE), 0);
        self.call(who, "write", libc::SYS_write, &[number(cached), data, number(4 * PAGE)], Same::All);
        let opened = [cwd(), name.clone(), number((libc::O_RDWR | libc::O_DIRECT).into())];
        let direct = self.call(who, "openat", libc::SYS_openat, &opened, Same::All);
        for _ in 0..4 {
            let (offset, length) = (self.random.of(&[0, 1, 512, PAGE]), self.random.of(&[1, 511, 512, 1024, PAGE]));
            let buffer = Arg::Out(length as usize, 0);
            let args = [number(direct), buffer, number(length), number(offset)];
            self.call(who, "pread64", libc::SYS_pread64, &args, Same::Data);
            let data = Arg::In(self.data(length), 0);
            let args = [number(direct), data, number(length), number(offset)];
            self.call(who, "pwrite64", libc::SYS_pwrite64, &args, Same::All);
            self.fstat(who, direct);
        }
        self.call(who, "close", libc::SYS_close, &[number(direct)], Same::All);
        self.call(who, "close", libc::SYS_close, &[number(cached)], Same::All);
        self.call(who, "unlinkat", libc::SYS_unlinkat, &[cwd(), name, number(0)], Same::All);
    }
}
