//! What the other end of a vfio-user socket sends: framing, then the bodies whose lengths vary.
//!
//! Checks: a message is never longer than was allowed, brings no more than it says, and the channel ends once its peer has.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vfio_user_protocol::{Channel, HEADER_BYTES, parse_sparse_areas, parse_version};

/// Longest message that is accepted here.
const LIMIT: usize = 4096;
/// Bytes sent at most: what a socket takes while nobody reads.
const SENT: usize = 16 << 10;
/// Far beyond what reading bytes that are there can take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sends the bytes to a channel, and takes its messages until it ends.
pub fn run(data: &[u8]) {
    // As bodies without a frame: few random inputs have the right length in their header.
    let _ = parse_version(data);
    let _ = parse_sparse_areas(data);
    let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
    let Ok(channel) = Channel::new(ours) else { return };
    if theirs.write_all(&data[..data.len().min(SENT)]).is_err() {
        return;
    }
    drop(theirs);
    let mut messages = 0;
    while let Ok(message) = channel.receive(LIMIT, None, Instant::now() + PATIENCE) {
        assert!(message.body.len() + HEADER_BYTES <= LIMIT, "a body of {} bytes", message.body.len());
        let _ = parse_version(&message.body);
        let _ = parse_sparse_areas(&message.body);
        messages += 1;
        assert!(messages <= SENT / HEADER_BYTES, "more messages than bytes");
    }
}
