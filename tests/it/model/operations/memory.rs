//! Mappings, and locks.
//!
//! Runs on the thread of its test.

use super::*;

impl Model {
    pub(super) fn map(&mut self) {
        let who = self.who_has();
        if self.mapped.len() >= MAPPED {
            let at = self.random.below(self.mapped.len());
            self.unmap(at);
        }
        let open = self.fd_for(who, true);
        let (offset, length) = (self.random.below(12) as i64 * PAGE, (1 + self.random.below(4)) as i64 * PAGE);
        let writable = !self.random.once_in(4);
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let private = self.backing != Backing::Memory && self.random.once_in(4);
        let kind = if private { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let args = [
            number(0),
            number(length),
            number(protection.into()),
            number(kind.into()),
            number(open.fd),
            number(offset),
        ];
        let at = self.sides.call_each(who, "mmap", libc::SYS_mmap, [&args, &args], Same::Success).map(|at| at.result);
        if at[BARE] > 0 {
            let duplicate = [number(open.fd), number(libc::F_DUPFD.into()), number(100)];
            let fd = self.call(who, "fcntl", libc::SYS_fcntl, &duplicate, Same::All);
            self.mapped.push(Mapping { who, fd, offset, at: at.map(|at| at as u64), length, writable });
        }
    }

    pub(super) fn unmap(&mut self, at: usize) {
        let mapping = self.mapped.remove(at);
        self.msync(&mapping);
        self.on_mapping(&mapping, "munmap", libc::SYS_munmap, &[]);
        self.call(mapping.who, "close", libc::SYS_close, &[number(mapping.fd)], Same::All);
    }

    pub(super) fn msync(&mut self, mapping: &Mapping) {
        self.on_mapping(mapping, "msync", libc::SYS_msync, &[number(libc::MS_SYNC.into())]);
    }

    pub(super) fn on_mapping(&mut self, mapping: &Mapping, name: &str, call: i64, more: &[Arg]) {
        let args = mapping.at.map(|at| [&[Arg::Number(at), number(mapping.length)], more].concat());
        self.sides.call_each(mapping.who, name, call, [&args[BARE], &args[MOUNT]], Same::All);
    }

    /// A store and loads through a mapping; the kernel does them as a page fault would.
    pub(super) fn use_mapping(&mut self) {
        if self.mapped.is_empty() {
            return self.map();
        }
        let at = self.random.below(self.mapped.len());
        let mapping = self.mapped[at];
        let start = self.random.below(mapping.length as usize) as i64;
        let mut length = 1 + self.random.below((mapping.length - start) as usize) as i64;
        if mapping.writable && self.random.once_in(2) {
            if self.backing == Backing::Memory {
                length = length.min(self.size_of(&mapping) - start);
            }
            if length <= 0 {
                return;
            }
            let data = self.data(length);
            self.transfer(&mapping, start, "store", libc::SYS_process_vm_writev, Arg::In(data, 0), length);
            if self.random.once_in(2) {
                self.coherence(mapping.who);
            }
            // A hole that was stored to is a hole until then.
            self.msync(&mapping);
            if self.backing == Backing::Memory {
                // A second store to a page does not change the time on tmpfs, which never protects it again.
                self.unmap(at);
            }
        } else if self.backing != Backing::Memory {
            // A load from a hole of a file on tmpfs fills it; through the mount, the daemon reads it and does not.
            let buffer = Arg::Out(length as usize, 0);
            self.transfer(&mapping, start, "load", libc::SYS_process_vm_readv, buffer, length);
        }
    }

    /// How much of the file there is from where the mapping begins.
    fn size_of(&mut self, mapping: &Mapping) -> i64 {
        let status = self.statx(mapping.who, number(mapping.fd), b"", libc::AT_EMPTY_PATH);
        status.map_or(0, |status| status.size as i64 - mapping.offset)
    }

    /// Somebody reads what may just have been stored.
    pub(super) fn coherence(&mut self, who: usize) {
        let open = self.fd_for(who, false);
        let (offset, length) = (self.near(), 8 * PAGE);
        let (offset, length) = self.align(open, offset, length);
        let args = [number(open.fd), Arg::Out(length as usize, 0), number(length), number(offset)];
        self.call(who, "pread64", libc::SYS_pread64, &args, Same::Data);
    }

    pub(super) fn transfer(&mut self, mapping: &Mapping, start: i64, name: &str, call: i64, buffer: Arg, length: i64) {
        let pids = self.sides.pids(mapping.who);
        let args = [BARE, MOUNT].map(|side| {
            let at = mapping.at[side] + start as u64;
            let remote = [at.to_ne_bytes(), length.to_ne_bytes()].concat();
            let local = Arg::Vector(vec![buffer.clone()]);
            vec![number(pids[side].into()), local, number(1), Arg::In(remote, 0), number(1), number(0)]
        });
        self.sides.call_each(mapping.who, name, call, [&args[BARE], &args[MOUNT]], Same::Data);
    }

    pub(super) fn lock(&mut self) {
        let who = self.who_has();
        let open = self.fd(who);
        if self.random.once_in(3) {
            let how = self.random.of(&[libc::LOCK_SH, libc::LOCK_EX, libc::LOCK_UN]) | libc::LOCK_NB;
            self.call(who, "flock", libc::SYS_flock, &[number(open.fd), number(how.into())], Same::All);
            return;
        }
        let kind = self.random.of(&[libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK]) as i16;
        let whence = self.random.of(&[libc::SEEK_SET, libc::SEEK_CUR, libc::SEEK_END]) as i16;
        let (start, length) = (self.random.below(20) as i64, self.random.below(20) as i64);
        let mut lock = vec![0u8; 32];
        lock[0..2].copy_from_slice(&kind.to_ne_bytes());
        lock[2..4].copy_from_slice(&whence.to_ne_bytes());
        lock[8..16].copy_from_slice(&start.to_ne_bytes());
        lock[16..24].copy_from_slice(&length.to_ne_bytes());
        let how = self.random.of(&[libc::F_SETLK, libc::F_GETLK, libc::F_OFD_SETLK, libc::F_OFD_GETLK]);
        let args = [number(open.fd), number(how.into()), Arg::InOut(lock)];
        self.call(who, "fcntl", libc::SYS_fcntl, &args, Same::Lock);
    }
}
