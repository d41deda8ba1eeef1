//! A worker: a process of its own that makes the system calls it is told to make, as one identity, inside one tree.
//!
//! The test binary started again, single-minded: it reads questions from its standard input, a socket, and answers each
//! before it reads the next, until the socket is closed. Its root directory is the tree, so that no path leads out of
//! it. It knows nothing of the model. The calls are made raw, on one thread, because glibc adds to some of them.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::tree;
use super::wire::{Answer, Arg, Question};

/// Told to the worker: the directory that becomes its root.
pub const ROOT: &str = "NEMESISFS_MODEL_WORKER_ROOT";

/// What fills a buffer before a call writes to it.
const FILLING: u8 = 0xA5;
const PAGE: usize = 4096;

/// Serves until nobody asks any more.
pub fn serve(root: &str) {
    nix::unistd::chroot(root).expect("a root directory");
    nix::unistd::chdir("/").expect("the root directory");
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().expect("a socket"));
    let mut privileged = true;
    while let Some(question) = Question::receive(&socket) {
        let answer = match question {
            Question::Walk => tree::walk(),
            Question::Call(number, args) => {
                privileged &= number != libc::SYS_setresuid;
                call(number, &args)
            }
        };
        if answer.send(&socket).is_err() {
            break;
        }
    }
    if privileged {
        // Else the directory could not be removed.
        tree::clear_flags();
    }
}

/// Makes one system call.
pub fn call(number: i64, args: &[Arg]) -> Answer {
    let mut buffers = Vec::new();
    let words: Vec<u64> = args.iter().map(|arg| place(arg, &mut buffers)).collect();
    let word = |i: usize| words.get(i).copied().unwrap_or(0);
    // SAFETY: every pointer is to a buffer that lives until its contents are taken below, as long as the call was told.
    // The calls that change memory otherwise are those that map files and write to what they have mapped.
    #[expect(unsafe_code)]
    let result = unsafe { libc::syscall(number, word(0), word(1), word(2), word(3), word(4), word(5)) };
    let result = match result {
        -1 => -i64::from(nix::errno::Errno::last_raw()),
        result => result,
    };
    Answer { result, written: buffers.into_iter().filter(|buffer| buffer.out).map(Buffer::contents).collect() }
}

/// Memory for one argument, so many bytes past the start of a page.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
    out: bool,
}

impl Buffer {
    fn new(length: usize, skew: usize, out: bool) -> Buffer {
        let memory = vec![FILLING; length + skew + PAGE];
        let start = memory.as_ptr().align_offset(PAGE) + skew;
        Buffer { memory, start, length, out }
    }

    fn holding(bytes: &[u8], skew: usize, out: bool) -> Buffer {
        let mut buffer = Buffer::new(bytes.len(), skew, out);
        buffer.memory[buffer.start..][..bytes.len()].copy_from_slice(bytes);
        buffer
    }

    fn address(&mut self) -> u64 {
        self.memory[self.start..].as_mut_ptr() as u64
    }

    fn contents(self) -> Vec<u8> {
        self.memory[self.start..][..self.length].to_vec()
    }
}

/// The word that stands for an argument; its memory is kept in `buffers`.
fn place(arg: &Arg, buffers: &mut Vec<Buffer>) -> u64 {
    let mut buffer = match arg {
        Arg::Number(number) => return *number,
        Arg::In(bytes, skew) => Buffer::holding(bytes, *skew, false),
        Arg::Out(length, skew) => Buffer::new(*length, *skew, true),
        Arg::InOut(bytes) => Buffer::holding(bytes, 0, true),
        Arg::Vector(parts) => Buffer::holding(&vector(parts, buffers), 0, false),
    };
    let address = buffer.address();
    buffers.push(buffer);
    address
}

/// `struct iovec` for each part.
fn vector(parts: &[Arg], buffers: &mut Vec<Buffer>) -> Vec<u8> {
    let mut array = Vec::new();
    for part in parts {
        let length = match part {
            Arg::In(bytes, _) | Arg::InOut(bytes) => bytes.len(),
            Arg::Out(length, _) => *length,
            Arg::Number(_) | Arg::Vector(_) => PAGE,
        };
        array.extend_from_slice(&place(part, buffers).to_ne_bytes());
        array.extend_from_slice(&(length as u64).to_ne_bytes());
    }
    array
}
