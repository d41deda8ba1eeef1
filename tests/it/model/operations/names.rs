//! Names: links, directories, what is in them.
//!
//! Runs on the thread of its test.

use super::*;

impl Model {
    pub(super) fn rename(&mut self) {
        let who = self.who();
        let (from, to) = (self.path(), self.path());
        let flags = self.random.of(&[0, 0, 0, 0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE, RENAME_BOTH]);
        let (directory, to_directory) = (self.directory(who), self.directory(who));
        let args = [directory.clone(), text(&from), to_directory.clone(), text(&to), number(flags.into())];
        let made = self.call(who, "renameat2", libc::SYS_renameat2, &args, Same::All);
        self.note_made(&to, made);
        self.lstat(who, directory, &from);
        self.lstat(who, to_directory, &to);
    }

    pub(super) fn link(&mut self) {
        let who = self.who();
        let to = self.path();
        let to_directory = self.directory(who);
        let (directory, from, flags) = match self.random.once_in(5) {
            true => (number(self.fd(who).fd), Vec::new(), libc::AT_EMPTY_PATH),
            false => (self.directory(who), self.path(), self.random.of(&[0, 0, libc::AT_SYMLINK_FOLLOW])),
        };
        let args = [directory, text(&from), to_directory.clone(), text(&to), number(flags.into())];
        let made = self.call(who, "linkat", libc::SYS_linkat, &args, Same::All);
        self.note_made(&to, made);
        self.lstat(who, to_directory, &to);
    }

    pub(super) fn symlink(&mut self) {
        let who = self.who();
        let target = match self.random.below(8) {
            0 => [b"p/".repeat(600), b"a".to_vec()].concat(),
            1 => vec![b't'; 4095],
            2 => b"\xff\xfe".to_vec(),
            3 => b"".to_vec(),
            _ => self.path(),
        };
        let (directory, path) = (self.directory(who), self.path());
        let args = [text(&target), directory.clone(), text(&path)];
        let made = self.call(who, "symlinkat", libc::SYS_symlinkat, &args, Same::All);
        self.note_made(&path, made);
        self.lstat(who, directory, &path);
    }

    pub(super) fn readlink(&mut self) {
        let who = self.who();
        let (directory, path) = (self.directory(who), self.path());
        let size = self.random.of(&[0, 1, 3, 100, 5000]);
        let args = [directory, text(&path), Arg::Out(size, 0), number(size as i64)];
        self.call(who, "readlinkat", libc::SYS_readlinkat, &args, Same::Data);
    }

    pub(super) fn unlink(&mut self) {
        self.remove(0);
    }

    pub(super) fn rmdir(&mut self) {
        self.remove(libc::AT_REMOVEDIR);
    }

    pub(super) fn remove(&mut self, flags: i32) {
        let who = self.who();
        let (directory, path) = (self.directory(who), self.path());
        let args = [directory, text(&path), number(flags.into())];
        self.call(who, "unlinkat", libc::SYS_unlinkat, &args, Same::All);
    }

    pub(super) fn mkdir(&mut self) {
        let who = self.who();
        let (directory, mut path, mode) = (self.directory(who), self.path(), self.mode());
        if self.random.once_in(2) {
            path = self.random.of(DIRECTORIES).to_vec();
        }
        let args = [directory.clone(), text(&path), number(mode)];
        let made = self.call(who, "mkdirat", libc::SYS_mkdirat, &args, Same::All);
        self.note_made(&path, made);
        self.lstat(who, directory, &path);
    }

    pub(super) fn mknod(&mut self) {
        let who = self.who();
        let (directory, path, mode) = (self.directory(who), self.path(), self.mode());
        let kind = self.random.of(&[libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR, libc::S_IFBLK, libc::S_IFREG, 0]);
        // The null device, or devices that are not there.
        let device = match kind {
            libc::S_IFCHR => self.random.of(&[libc::makedev(1, 3), libc::makedev(240, 70_000)]),
            libc::S_IFBLK => libc::makedev(240, 1),
            _ => 0,
        };
        let args = [directory.clone(), text(&path), number(mode | i64::from(kind)), number(device as i64)];
        let made = self.call(who, "mknodat", libc::SYS_mknodat, &args, Same::All);
        self.note_made(&path, made);
        self.lstat(who, directory, &path);
    }

    /// Directories whose names take more than a path may have, and work in the lowest.
    pub(super) fn deep(&mut self) {
        let who = self.who();
        let name = vec![b'L'; 250];
        for _ in 0..self.random.of(&[1, 3, 18]) {
            self.call(who, "mkdirat", libc::SYS_mkdirat, &[cwd(), text(&name), number(0o777)], Same::All);
            if self.call(who, "chdir", libc::SYS_chdir, &[text(&name)], Same::All) < 0 {
                break;
            }
        }
    }

    pub(super) fn chdir(&mut self) {
        let who = self.who();
        match self.random.below(4) {
            0 => {
                let open = self.fd(who);
                self.call(who, "fchdir", libc::SYS_fchdir, &[number(open.fd)], Same::All);
            }
            1 => {
                let path = self.path();
                self.call(who, "chdir", libc::SYS_chdir, &[text(&path)], Same::All);
            }
            _ => {
                self.call(who, "chdir", libc::SYS_chdir, &[text(b"/")], Same::All);
            }
        }
    }

    pub(super) fn getcwd(&mut self) {
        let who = self.who();
        self.call(who, "getcwd", libc::SYS_getcwd, &[Arg::Out(8000, 0), number(8000)], Same::Data);
    }

    pub(super) fn list(&mut self) {
        let who = self.who();
        let path = if self.random.once_in(2) { self.path() } else { b".".to_vec() };
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let fd = self.call(who, "openat", libc::SYS_openat, &[cwd(), text(&path), number(flags.into())], Same::All);
        if fd < 0 {
            return;
        }
        let size = self.random.of(&[300, 4096, 32_768]);
        let listed = self.list_from(who, fd, size);
        if !listed.is_empty() && self.random.once_in(2) {
            let at = self.random.below(listed.len());
            let args = [number(fd), number(listed[at].next as i64), number(libc::SEEK_SET.into())];
            self.call(who, "lseek", libc::SYS_lseek, &args, Same::All);
            self.list_from(who, fd, size);
        }
        self.call(who, "close", libc::SYS_close, &[number(fd)], Same::All);
    }

    /// All that is left of a directory. In how many pieces it comes is not compared.
    pub(super) fn list_from(&mut self, who: usize, fd: i64, size: usize) -> Vec<Listed> {
        let mut listed = [Vec::new(), Vec::new()];
        let mut error = [0, 0];
        loop {
            let args = [number(fd), Arg::Out(size, 0), number(size as i64)];
            let answers = self.sides.both(who, "getdents64", libc::SYS_getdents64, [&args, &args]);
            for side in [BARE, MOUNT] {
                let answer = &answers[side];
                error[side] = answer.result.min(0);
                listed[side].extend(tree::entries(&answer.written[0][..answer.result.max(0) as usize]));
            }
            if answers.iter().all(|answer| answer.result <= 0) {
                break;
            }
        }
        // What a number is, the tree is compared for.
        listed.iter_mut().flatten().for_each(|entry| entry.ino = 0);
        if listed[BARE] != listed[MOUNT] || error[BARE] != error[MOUNT] {
            self.sides.fail(&format!("listings of {fd} differ, errors {error:?}:\n{listed:#?}"));
        }
        std::mem::take(&mut listed[BARE])
    }
}
