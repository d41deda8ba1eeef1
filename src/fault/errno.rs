//! Error numbers by name.
//!
//! Pure data: any thread, no locks. A rule may name any errno that the kernel lets a FUSE server answer: 1 to 511,
//! and never `ENOSYS`, which the kernel takes as "this server will never do it" and remembers for the whole mount.

/// The largest number the kernel accepts in a reply; it rejects the whole reply above, and the caller hangs.
const LARGEST: i32 = 511;

macro_rules! errnos {
    ($($name:ident)+) => {
        const NAMED: &[(&str, i32)] = &[$((stringify!($name), libc::$name)),+];
    };
}

errnos! {
    EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EAGAIN ENOMEM EACCES EFAULT ENOTBLK EBUSY EEXIST
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
pub fn names() -> impl Iterator<Item = &'static str> {
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
}
