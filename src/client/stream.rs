//! Cuts a stream of events into JSON objects, be it server-sent events or one object a line.
//!
//! Thread: the caller's. Locks: none. Must never: keep more than one unfinished event.

use serde_json::Value;

/// Collects bytes as they arrive and gives whole events.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The line that has no end yet.
    line: Vec<u8>,
    /// The `data` lines of the event that has no end yet.
    data: String,
    server_sent: bool,
}

impl Decoder {
    /// A decoder for what `content_type` announces.
    pub fn new(content_type: &str) -> Self {
        Decoder { server_sent: content_type.starts_with("text/event-stream"), ..Decoder::default() }
    }

    /// Takes a piece and gives each event that ended in it.
    pub fn feed(&mut self, piece: &[u8]) -> Vec<Value> {
        let mut events = Vec::new();
        for &byte in piece {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
            events.extend(self.take(line.trim_end_matches('\r')));
        }
        events
    }

    /// Comments keep a connection alive and say nothing; fields other than `data` repeat what the object says.
    fn take(&mut self, line: &str) -> Option<Value> {
        if !self.server_sent {
            return serde_json::from_str(line).ok();
        }
        if line.is_empty() {
            return serde_json::from_str(&std::mem::take(&mut self.data)).ok();
        }
        if let Some(data) = line.strip_prefix("data:") {
            self.data.push_str(data.strip_prefix(' ').unwrap_or(data));
            self.data.push('\n');
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn server_sent_events_are_read_whatever_the_pieces() {
        let text = ": alive\n\nid: b-1\r\nevent: rule\r\ndata: {\"event\":\ndata: \"rule\"}\r\n\r\ndata: {\"n\":1}\n\n";
        for size in 1..text.len() {
            let mut decoder = Decoder::new("text/event-stream; charset=utf-8");
            let events: Vec<Value> = text.as_bytes().chunks(size).flat_map(|piece| decoder.feed(piece)).collect();
            assert_eq!(events, [json!({"event": "rule"}), json!({"n": 1})], "pieces of {size}");
        }
    }

    #[test]
    fn lines_are_read_and_empty_ones_and_comments_passed_over() {
        let mut decoder = Decoder::new("application/x-ndjson");
        assert_eq!(decoder.feed(b"{\"n\":1}\n\n: alive\n{\"n\""), [json!({"n": 1})]);
        assert_eq!(decoder.feed(b":2}\n"), [json!({"n": 2})]);
    }
}
