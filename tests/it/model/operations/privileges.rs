//! Losing suid, sgid and capabilities: whoever changes a file that has them.
//!
//! Runs on the thread of its test.

use super::*;

impl Model {
    /// A file with suid, sgid and a capability that somebody then changes: the shortest way to lose them.
    pub(super) fn lose_suid(&mut self) {
        let (owner, who) = (self.who(), self.who());
        let direct = self.random.some(&[libc::O_DIRECT], 3);
        let (path, mode) = (self.random.of(FILES), self.random.of(&[0o6777, 0o4777, 0o2777, 0o6767, 0o2676, 0o6766]));
        let flags = libc::O_RDWR | libc::O_NONBLOCK | direct | self.random.some(&[libc::O_TRUNC], 6);
        let create = [cwd(), text(path), number((libc::O_CREAT | libc::O_WRONLY | libc::O_EXCL).into()), number(0o777)];
        let made = self.call(owner, "openat", libc::SYS_openat, &create, Same::All);
        if made >= 0 {
            let data = self.data(3 * PAGE);
            self.call(owner, "write", libc::SYS_write, &[number(made), Arg::In(data, 0), number(3 * PAGE)], Same::All);
            self.call(owner, "fchmod", libc::SYS_fchmod, &[number(made), number(mode)], Same::All);
            self.call(owner, "close", libc::SYS_close, &[number(made)], Same::All);
        } else {
            self.call(owner, "fchmodat", libc::SYS_fchmodat, &[cwd(), text(path), number(mode)], Same::All);
        }
        if self.random.once_in(2) {
            let value: Vec<u8> =
                [0x0200_0001u32, 1 << 10, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
            let set = [text(path), text(b"security.capability"), Arg::In(value, 0), number(20), number(0)];
            self.call(ROOT, "setxattr", libc::SYS_setxattr, &set, Same::All);
        }
        let opened = [cwd(), text(path), number(flags.into())];
        let fd = self.call(who, "openat", libc::SYS_openat, &opened, Same::All);
        self.lstat(who, cwd(), path);
        if fd < 0 {
            return;
        }
        self.keep(who, fd, flags);
        let operation = self.random.of(&[
            Model::write_first as fn(&mut Model, usize, i64),
            Model::truncate_first,
            Model::allocate_first,
            Model::copy_first,
            Model::chown_first,
        ]);
        operation(self, who, fd);
        self.fstat(who, fd);
        let got = [text(path), text(b"security.capability"), Arg::Out(64, 0), number(64)];
        self.call(who, "getxattr", libc::SYS_getxattr, &got, Same::Data);
        if self.open[who].len() > OPEN {
            self.close_one(who);
        }
    }

    pub(super) fn write_first(&mut self, who: usize, fd: i64) {
        let data = self.data(PAGE);
        let args = [number(fd), Arg::In(data, 0), number(PAGE), number(0)];
        self.call(who, "pwrite64", libc::SYS_pwrite64, &args, Same::All);
    }

    pub(super) fn truncate_first(&mut self, who: usize, fd: i64) {
        let size = self.random.of(&[0, 100, 3 * PAGE, 5 * PAGE]);
        self.call(who, "ftruncate", libc::SYS_ftruncate, &[number(fd), number(size)], Same::All);
    }

    pub(super) fn allocate_first(&mut self, who: usize, fd: i64) {
        let mode = self.random.of(&[0, libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE]);
        let mode =
            if self.backing == Backing::Disk { libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE } else { mode };
        let args = [number(fd), number(mode.into()), number(0), number(5 * PAGE)];
        self.call(who, "fallocate", libc::SYS_fallocate, &args, Same::All);
    }

    pub(super) fn copy_first(&mut self, who: usize, fd: i64) {
        let at = |offset: i64| Arg::InOut(offset.to_ne_bytes().to_vec());
        if self.open[who].iter().any(|open| open.fd == fd && self.is_strict(*open)) {
            return;
        }
        let args = [number(fd), at(0), number(fd), at(2 * PAGE), number(PAGE), number(0)];
        self.call(who, "copy_file_range", libc::SYS_copy_file_range, &args, Same::All);
    }

    pub(super) fn chown_first(&mut self, who: usize, fd: i64) {
        let (uid, gid) = self.owner();
        self.call(who, "fchown", libc::SYS_fchown, &[number(fd), number(uid), number(gid)], Same::All);
    }
}
