//! Error numbers: by name, and which of them an operation can give.
//!
//! Pure data: any thread, no locks. A rule may name any errno that the kernel lets a FUSE server answer: 1 to 511,
//! and never `ENOSYS`, which the kernel takes as "this server will never do it" and remembers for the whole mount.
//! What an operation can give is what its page in the Linux man-pages (section 2) lists, and what the block layer and
//! the filesystems hand up from a device, whatever the operation.

use super::op::Op;

/// The largest number the kernel accepts in a reply; it rejects the whole reply above, and the caller hangs.
const LARGEST: i32 = 511;

macro_rules! errnos {
    ($($name:ident)+) => {
        const NAMED: &[(&str, i32)] = &[$((stringify!($name), libc::$name)),+];
    };
}

errnos! {
    EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EAGAIN EWOULDBLOCK ENOMEM EACCES EFAULT ENOTBLK EBUSY EEXIST
    EXDEV ENODEV ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG ENOSPC ESPIPE EROFS EMLINK EPIPE EDOM
    ERANGE EDEADLK ENAMETOOLONG ENOLCK ENOSYS ENOTEMPTY ELOOP ENODATA ETIME ENOSR EREMOTE ENOLINK EPROTO EBADMSG
    EOVERFLOW EILSEQ EUSERS ENOTSUP EOPNOTSUPP ENETDOWN ECONNABORTED ECONNRESET ENOBUFS ETIMEDOUT EHOSTDOWN
    EALREADY EINPROGRESS ESTALE EUCLEAN EREMOTEIO EDQUOT ENOMEDIUM EMEDIUMTYPE ECANCELED ENOKEY
}

/// The name of an error number, where it has one.
pub fn name(errno: i32) -> Option<&'static str> {
    NAMED.iter().find(|(_, n)| *n == errno).map(|(name, _)| *name)
}

/// All names, for suggestions.
pub fn names() -> impl Iterator<Item = &'static str> + Clone {
    NAMED.iter().map(|(name, _)| *name)
}

/// Why an errno is refused.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    Unknown,
    /// `ENOSYS` makes the kernel stop asking for good.
    Sticky,
    /// The kernel rejects numbers outside 1 to 511 and leaves the caller hanging.
    OutOfRange,
}

/// Reads a name (`EIO`) or a number (`5`).
///
/// # Errors
/// Why it cannot be told to a program.
pub fn parse(word: &str) -> Result<i32, Refused> {
    let number = match word.parse::<i32>() {
        Ok(number) => number,
        Err(_) => NAMED.iter().find(|(name, _)| *name == word).ok_or(Refused::Unknown)?.1,
    };
    match number {
        libc::ENOSYS => Err(Refused::Sticky),
        1..=LARGEST => Ok(number),
        _ => Err(Refused::OutOfRange),
    }
}

use libc::{
    E2BIG, EACCES, EAGAIN, EBADF, EBADMSG, EBUSY, EDQUOT, EEXIST, EFAULT, EFBIG, EILSEQ, EINTR, EINVAL, EIO, EISDIR,
    ELOOP, EMFILE, EMLINK, ENAMETOOLONG, ENFILE, ENODATA, ENODEV, ENOENT, ENOLINK, ENOMEM, ENOSPC, ENOTDIR, ENOTEMPTY,
    ENOTSUP, ENOTTY, ENXIO, EOVERFLOW, EPERM, ERANGE, EREMOTEIO, EROFS, ESPIPE, ESTALE, ETIMEDOUT, ETXTBSY, EUCLEAN,
    EXDEV,
};

/// What a device or a damaged filesystem can make of any operation: the kernel's table of block errors
/// (`block/blk-core.c`, `blk_errors`), and what ext4, xfs and btrfs say of damage.
const OF_DEVICES: &[i32] = &[
    EIO, ENOMEM, EAGAIN, EINTR, ETIMEDOUT, ENOLINK, EREMOTEIO, ENODATA, EILSEQ, ENODEV, ENXIO, EUCLEAN, EBADMSG, ESTALE,
];

/// Errors that say that the call was wrong, or that concern other files than those of a database. `any` leaves them out.
const OF_CALLERS: &[i32] = &[
    EBADF,
    EFAULT,
    EINVAL,
    ELOOP,
    ENAMETOOLONG,
    ENOTDIR,
    EISDIR,
    EEXIST,
    ENOENT,
    ENOTEMPTY,
    EXDEV,
    E2BIG,
    ERANGE,
    EOVERFLOW,
    EAGAIN,
    ETXTBSY,
    ESPIPE,
    ENOTTY,
    ENOTSUP,
    ENODATA,
    ENXIO,
    ENODEV,
];

/// The page of an operation in section 2, without what is only of pipes, sockets and terminals.
const fn page(op: Op) -> &'static [i32] {
    const PATH: &[i32] = &[EACCES, EFAULT, ELOOP, ENAMETOOLONG, ENOENT, ENOMEM, ENOTDIR, EBADF, EINVAL, EOVERFLOW, EIO];
    match op {
        Op::Lookup | Op::Getattr | Op::Opendir => &[
            EACCES,
            EBADF,
            EFAULT,
            ELOOP,
            ENAMETOOLONG,
            ENOENT,
            ENOMEM,
            ENOTDIR,
            EOVERFLOW,
            EINVAL,
            EIO,
            EMFILE,
            ENFILE,
        ],
        // truncate(2), chmod(2), chown(2), utimensat(2).
        Op::Setattr => &[
            EACCES,
            EFAULT,
            EFBIG,
            EINTR,
            EINVAL,
            EIO,
            EISDIR,
            ELOOP,
            ENAMETOOLONG,
            ENOENT,
            ENOTDIR,
            EPERM,
            EROFS,
            ETXTBSY,
            EBADF,
            ENOMEM,
            EDQUOT,
            ENOSPC,
        ],
        Op::Readlink | Op::Access => {
            &[EACCES, EFAULT, EINVAL, EIO, ELOOP, ENAMETOOLONG, ENOENT, ENOMEM, ENOTDIR, EPERM, EROFS, ETXTBSY]
        }
        Op::Mknod | Op::Mkdir | Op::Symlink => &[
            EACCES,
            EBADF,
            EDQUOT,
            EEXIST,
            EFAULT,
            EINVAL,
            EIO,
            ELOOP,
            EMLINK,
            ENAMETOOLONG,
            ENOENT,
            ENOMEM,
            ENOSPC,
            ENOTDIR,
            EPERM,
            EROFS,
        ],
        Op::Unlink | Op::Rmdir => &[
            EACCES,
            EBUSY,
            EFAULT,
            EINVAL,
            EIO,
            EISDIR,
            ELOOP,
            ENAMETOOLONG,
            ENOENT,
            ENOMEM,
            ENOTDIR,
            ENOTEMPTY,
            EPERM,
            EROFS,
        ],
        Op::Rename | Op::Link => &[
            EACCES,
            EBUSY,
            EDQUOT,
            EEXIST,
            EFAULT,
            EINVAL,
            EIO,
            EISDIR,
            ELOOP,
            EMLINK,
            ENAMETOOLONG,
            ENOENT,
            ENOMEM,
            ENOSPC,
            ENOTDIR,
            ENOTEMPTY,
            EPERM,
            EROFS,
            EXDEV,
        ],
        Op::Open | Op::Create => &[
            EACCES,
            EBUSY,
            EDQUOT,
            EEXIST,
            EFAULT,
            EFBIG,
            EINTR,
            EINVAL,
            EIO,
            EISDIR,
            ELOOP,
            EMFILE,
            ENAMETOOLONG,
            ENFILE,
            ENODEV,
            ENOENT,
            ENOMEM,
            ENOSPC,
            ENOTDIR,
            ENXIO,
            EOVERFLOW,
            EPERM,
            EROFS,
            ETXTBSY,
            ENOTSUP,
        ],
        Op::Read => &[EAGAIN, EBADF, EFAULT, EINTR, EINVAL, EIO, EISDIR],
        Op::Write => &[EAGAIN, EBADF, EDQUOT, EFAULT, EFBIG, EINTR, EINVAL, EIO, ENOSPC, EPERM],
        Op::CopyFileRange => {
            &[EBADF, EFBIG, EINVAL, EIO, EISDIR, ENOMEM, ENOSPC, ENOTSUP, EOVERFLOW, EPERM, ETXTBSY, EXDEV, EDQUOT]
        }
        Op::Fallocate => {
            &[EBADF, EFBIG, EINTR, EINVAL, EIO, ENODEV, ENOSPC, ENOTSUP, EPERM, ESPIPE, ETXTBSY, EDQUOT, EROFS]
        }
        // close(2).
        Op::Flush | Op::Release | Op::Releasedir => &[EBADF, EINTR, EIO, ENOSPC, EDQUOT],
        Op::Fsync | Op::Fsyncdir => &[EBADF, EINTR, EIO, ENOSPC, EROFS, EINVAL, EDQUOT],
        Op::Readdir => &[EBADF, EFAULT, EINVAL, ENOENT, ENOTDIR, EIO],
        Op::Statfs => PATH,
        Op::Setxattr | Op::Removexattr => {
            &[EDQUOT, EEXIST, ENODATA, ENOSPC, ENOTSUP, EPERM, ERANGE, EACCES, EIO, ENOMEM, EROFS, E2BIG]
        }
        Op::Getxattr | Op::Listxattr => &[E2BIG, ENODATA, ENOTSUP, ERANGE, EACCES, EIO, ENOMEM],
        Op::Lseek => &[EBADF, EINVAL, ENXIO, EOVERFLOW, ESPIPE, EIO],
        Op::Ioctl => &[EBADF, EFAULT, EINVAL, ENOTTY, EIO, ENOSPC, EPERM],
    }
}

/// Can the operation give this error on real storage?
pub fn is_possible(op: Op, errno: i32) -> bool {
    // A filesystem that has met an error may have made itself read-only.
    let read_only = errno == EROFS && !matches!(op, Op::Read | Op::Readdir | Op::Getattr | Op::Lookup | Op::Statfs);
    page(op).contains(&errno) || OF_DEVICES.contains(&errno) || read_only
}

/// What `any` picks among: errors on the operation's page that are no fault of the caller's. Never empty.
pub fn any(op: Op) -> impl Iterator<Item = i32> + Clone {
    page(op).iter().copied().filter(|errno| !OF_CALLERS.contains(errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_read_and_poison_is_refused() {
        assert_eq!(parse("EIO"), Ok(5));
        assert_eq!(parse("28"), Ok(libc::ENOSPC));
        assert_eq!(parse("ENOSYS"), Err(Refused::Sticky));
        assert_eq!(parse("38"), Err(Refused::Sticky));
        assert_eq!(parse("512"), Err(Refused::OutOfRange));
        assert_eq!(parse("0"), Err(Refused::OutOfRange));
        assert_eq!(parse("EOI"), Err(Refused::Unknown));
    }

    #[test]
    fn each_operation_has_errors_of_its_own_and_eio_among_them() {
        for op in Op::ALL {
            assert!(any(*op).any(|errno| errno == EIO), "{op}");
            assert!(any(*op).all(|errno| name(errno).is_some()), "{op}");
        }
        assert!(is_possible(Op::Write, ENOSPC) && !is_possible(Op::Read, ENOSPC) && !is_possible(Op::Write, ENOENT));
    }
}
