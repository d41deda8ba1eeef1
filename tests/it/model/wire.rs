//! What the model test and its workers say to each other: system calls to make, and what came of them.
//!
//! Pure: bytes in, bytes out, on whichever thread asks. Each message is a length and so many bytes.

use std::io::{self, Read, Write};

/// An argument of a system call.
#[derive(Clone, Debug)]
pub enum Arg {
    Number(u64),
    /// What the call reads: a pointer to it, so many bytes past the start of a page.
    In(Vec<u8>, usize),
    /// Room for what the call writes: a pointer to so many bytes, so many bytes past the start of a page.
    Out(usize, usize),
    /// What the call reads and writes.
    InOut(Vec<u8>),
    /// An array of `struct iovec` over buffers.
    Vector(Vec<Arg>),
}

/// What a worker is asked.
#[derive(Clone, Debug)]
pub enum Question {
    Call(i64, Vec<Arg>),
    /// Tell the whole tree below the root.
    Walk,
}

/// What it answers: the result (a negative errno if it failed), and what was written to each buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    pub result: i64,
    pub written: Vec<Vec<u8>>,
}

const WALK: i64 = -1;

impl Question {
    pub fn send(&self, to: impl Write) -> io::Result<()> {
        let mut message = Vec::new();
        match self {
            Question::Walk => put(&mut message, WALK as u64),
            Question::Call(number, args) => {
                put(&mut message, *number as u64);
                put_args(&mut message, args);
            }
        }
        send(to, &message)
    }

    /// The next question; `None` when there will be no more.
    pub fn receive(from: impl Read) -> Option<Question> {
        let message = receive(from).ok()?;
        let mut rest = message.as_slice();
        Some(match take(&mut rest) as i64 {
            WALK => Question::Walk,
            number => Question::Call(number, take_args(&mut rest)),
        })
    }
}

impl Answer {
    pub fn send(&self, to: impl Write) -> io::Result<()> {
        let mut message = Vec::new();
        put(&mut message, self.result as u64);
        put(&mut message, self.written.len() as u64);
        self.written.iter().for_each(|bytes| put_bytes(&mut message, bytes));
        send(to, &message)
    }

    pub fn receive(from: impl Read) -> io::Result<Answer> {
        let message = receive(from)?;
        let mut rest = message.as_slice();
        let result = take(&mut rest) as i64;
        let count = take(&mut rest);
        Ok(Answer { result, written: (0..count).map(|_| take_bytes(&mut rest)).collect() })
    }
}

fn send(mut to: impl Write, message: &[u8]) -> io::Result<()> {
    let mut framed = Vec::with_capacity(message.len() + 8);
    put_bytes(&mut framed, message);
    to.write_all(&framed)
}

fn receive(mut from: impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 8];
    from.read_exact(&mut length)?;
    let mut message = vec![0; u64::from_ne_bytes(length) as usize];
    from.read_exact(&mut message)?;
    Ok(message)
}

fn put(message: &mut Vec<u8>, number: u64) {
    message.extend_from_slice(&number.to_ne_bytes());
}

fn put_bytes(message: &mut Vec<u8>, bytes: &[u8]) {
    put(message, bytes.len() as u64);
    message.extend_from_slice(bytes);
}

fn put_args(message: &mut Vec<u8>, args: &[Arg]) {
    put(message, args.len() as u64);
    for arg in args {
        let (kind, number, bytes): (u64, u64, &[u8]) = match arg {
            Arg::Number(number) => (0, *number, &[]),
            Arg::In(bytes, skew) => (1, *skew as u64, bytes),
            Arg::Out(length, skew) => (2, *skew as u64, &(*length as u64).to_ne_bytes()),
            Arg::InOut(bytes) => (3, 0, bytes),
            Arg::Vector(_) => (4, 0, &[]),
        };
        put(message, kind);
        put(message, number);
        put_bytes(message, bytes);
        if let Arg::Vector(parts) = arg {
            put_args(message, parts);
        }
    }
}

fn take(rest: &mut &[u8]) -> u64 {
    let (number, tail) = rest.split_first_chunk().expect("a number");
    *rest = tail;
    u64::from_ne_bytes(*number)
}

fn take_bytes(rest: &mut &[u8]) -> Vec<u8> {
    let length = take(rest) as usize;
    let (bytes, tail) = rest.split_at(length);
    *rest = tail;
    bytes.to_vec()
}

fn take_args(rest: &mut &[u8]) -> Vec<Arg> {
    let count = take(rest);
    (0..count).map(|_| take_arg(rest)).collect()
}

fn take_arg(rest: &mut &[u8]) -> Arg {
    let (kind, number) = (take(rest), take(rest));
    let bytes = take_bytes(rest);
    match kind {
        0 => Arg::Number(number),
        1 => Arg::In(bytes, number as usize),
        2 => Arg::Out(take(&mut bytes.as_slice()) as usize, number as usize),
        3 => Arg::InOut(bytes),
        _ => Arg::Vector(take_args(rest)),
    }
}
