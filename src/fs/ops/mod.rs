//! The operations themselves, on the backing directory.
//!
//! One file for each sort: [`names`] (what changes or reads directories), [`attributes`] (stat, chmod, xattrs, statfs),
//! [`data`] (read, write, allocate, sync), and [`altered`] for what a rule wants done otherwise. All run on the thread
//! that serves the request, take no lock across a system call (but for the undo log of a file, see `durability`), and
//! answer with an errno rather than an error of any other type: the caller is a kernel.

mod altered;
pub mod attributes;
pub mod data;
pub mod names;

use std::io;

use super::call::{Answer, Call, Caller, Reply};
use super::serve::{Core, Performed};
use data::Manner;

/// The errno of an error; what has none is an I/O error. That we have too many files open is not the caller's doing.
pub fn errno(error: &io::Error) -> i32 {
    match error.raw_os_error() {
        Some(libc::EMFILE) => libc::ENFILE,
        errno => errno.unwrap_or(libc::EIO),
    }
}

impl Core {
    /// Does a request. Entries of a directory go into `reply`.
    pub fn perform(&self, caller: &Caller, call: &Call<'_>, reply: &mut Reply) -> Performed {
        self.dispatch(caller, call, false, reply).map_err(|error| errno(&error))
    }

    /// `drop` makes it a request that is acknowledged and can be taken back.
    fn dispatch(&self, caller: &Caller, call: &Call<'_>, drop: bool, reply: &mut Reply) -> io::Result<Answer> {
        match call {
            Call::Lookup { parent, name } => self.lookup(*parent, name),
            Call::Getattr { ino, fh } => self.getattr(*ino, *fh),
            Call::Setattr { ino, fh, changes } => self.setattr(caller, *ino, *fh, changes, drop),
            Call::Readlink { ino } => self.readlink(*ino),
            Call::Mknod { parent, name, mode, umask, rdev } => {
                self.making(caller, call, || self.mknod(caller, *parent, name, *mode, *umask, *rdev))
            }
            Call::Mkdir { parent, name, mode, umask } => {
                self.making(caller, call, || self.mkdir(caller, *parent, name, (*mode, *umask)))
            }
            Call::Unlink { parent, name } => self.unlink(*parent, name),
            Call::Rmdir { parent, name } => self.rmdir(*parent, name),
            Call::Symlink { parent, name, target } => {
                self.making(caller, call, || self.symlink(caller, *parent, name, target))
            }
            Call::Rename { parent, name, to_parent, to_name, flags } => {
                self.rename(*parent, name, *to_parent, to_name, *flags)
            }
            Call::Link { ino, parent, name } => self.link(*ino, *parent, name),
            Call::Open { ino, flags } => self.open(*ino, *flags, reply),
            Call::Create { parent, name, mode, umask, flags } => {
                self.making(caller, call, || self.create(caller, *parent, name, (*mode, *umask), *flags, reply))
            }
            Call::Read { fh, offset, size, flags, .. } => self.read(*fh, *offset, *size, *flags),
            Call::Write { .. } => self.write(caller, call, &if drop { Manner::Lost } else { Manner::Kept }),
            Call::CopyFileRange { .. } => self.copy_file_range(caller, call, drop),
            Call::Fallocate { .. } => self.fallocate(caller, call, drop),
            Call::Flush { fh, .. } => self.flush(*fh),
            Call::Access { .. } => Ok(Answer::Empty),
            Call::Release { fh, .. } => self.release(*fh),
            Call::Fsync { .. } => self.fsync(caller, call, drop),
            Call::Opendir { ino, flags } => self.opendir(*ino, *flags),
            Call::Readdir { fh, offset, .. } => self.readdir(*fh, *offset, reply),
            Call::Readdirplus { fh, offset, .. } => self.readdirplus(*fh, *offset, reply),
            Call::Releasedir { fh, .. } => {
                self.files.close_directory(*fh);
                Ok(Answer::Empty)
            }
            Call::Fsyncdir { fh, datasync, .. } => self.fsyncdir(*fh, *datasync, drop),
            Call::Statfs { .. } => self.statfs(),
            Call::Setxattr { ino, name, value, flags } => self.setxattr(caller, *ino, name, value, *flags),
            Call::Getxattr { ino, name, size } => self.getxattr(*ino, name, *size),
            Call::Listxattr { ino, size } => self.listxattr(caller, *ino, *size),
            Call::Removexattr { ino, name } => self.removexattr(caller, *ino, name),
            Call::Lseek { fh, offset, whence, .. } => self.lseek(*fh, *offset, *whence),
            Call::Ioctl { ino, command, input, output_size, .. } => self.ioctl(*ino, *command, input, *output_size),
        }
    }
}
