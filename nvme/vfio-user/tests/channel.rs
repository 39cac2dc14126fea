//! The channel against peers that break every rule.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use vfio_user_protocol::{Channel, ChannelError, Command, HEADER_BYTES, MAX_DESCRIPTORS, Reply};

fn pair() -> (Channel, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Channel::new(ours).unwrap(), theirs)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn header(size: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[2] = 4;
    bytes[4..8].copy_from_slice(&size.to_le_bytes());
    bytes
}

#[test]
fn message_arrives_with_body_and_descriptors() {
    let (client, theirs) = pair();
    let server = Channel::new(theirs).unwrap();
    let file = tempfile_like();
    client.send_command((7, Command::DMA_MAP, 0), &[b"abc", b"def"], &[file.as_fd()], soon()).unwrap();
    let message = server.receive(4096, None, soon()).unwrap();
    assert_eq!((message.header.id, message.header.command), (7, Command::DMA_MAP));
    assert!(message.header.wants_reply());
    assert_eq!((message.body.as_slice(), message.fds.len()), (b"abcdef".as_slice(), 1));
    server.send_reply(&message.header, &Reply::Failed(Errno::EEXIST), soon()).unwrap();
    let reply = client.receive(4096, None, soon()).unwrap();
    assert!(reply.header.is_reply() && reply.header.failed());
    assert_eq!((reply.header.id, reply.header.error), (7, Errno::EEXIST as u32));
}

fn tempfile_like() -> std::fs::File {
    std::fs::File::open("/dev/null").unwrap()
}

#[test]
fn impossible_sizes_are_refused_before_anything_is_allocated() {
    for size in [0, 15, 4097, u32::MAX] {
        let (channel, mut peer) = pair();
        peer.write_all(&header(size)).unwrap();
        let error = channel.receive(4096, None, soon()).unwrap_err();
        assert!(matches!(error, ChannelError::Size { size: found, limit: 4096 } if found == size), "{error}");
    }
}

#[test]
fn end_in_the_middle_is_an_end() {
    for bytes in [0, 5, HEADER_BYTES, HEADER_BYTES + 3] {
        let (channel, mut peer) = pair();
        let whole = [header(32).as_slice(), &[0; 16]].concat();
        peer.write_all(&whole[..bytes]).unwrap();
        drop(peer);
        assert!(matches!(channel.receive(4096, None, soon()), Err(ChannelError::Closed)), "{bytes}");
    }
}

#[test]
fn silence_and_trickling_both_end_at_the_deadline() {
    let (channel, peer) = pair();
    let short = || Instant::now() + Duration::from_millis(30);
    assert!(matches!(channel.receive(4096, None, short()), Err(ChannelError::TimedOut(_))));
    assert!(matches!(channel.wait_readable(None, Some(short())), Err(ChannelError::TimedOut(_))));
    let trickle = std::thread::spawn(move || {
        let mut peer = peer;
        for byte in header(4000).into_iter().chain(std::iter::repeat(0)) {
            if peer.write_all(&[byte]).is_err() {
                return;
            }
        }
    });
    assert!(matches!(channel.receive(65_536, None, short()), Ok(_) | Err(ChannelError::TimedOut(_))));
    drop(channel);
    trickle.join().unwrap();
}

#[test]
fn peer_that_does_not_read_ends_the_sending() {
    let (channel, _peer) = pair();
    let body = vec![0; 1 << 20];
    let end = Instant::now() + Duration::from_millis(30);
    let result =
        (0..100).try_for_each(|_| channel.send_command((1, Command::REGION_WRITE, 0), &[&body], &[], end));
    // In the middle of a message, or between two.
    assert!(matches!(result, Err(ChannelError::TimedOut(_) | ChannelError::Torn)), "{result:?}");
}

#[test]
fn stop_descriptor_ends_a_wait() {
    let (channel, _peer) = pair();
    let (stop, mut stopper) = UnixStream::pair().unwrap();
    stopper.write_all(b"x").unwrap();
    assert!(matches!(channel.receive(4096, Some(stop.as_fd()), soon()), Err(ChannelError::Stopped)));
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// What fits into the buffer is installed even if not all does; it must be closed again.
#[test]
fn too_many_descriptors_are_an_error_and_none_stays() {
    let file = tempfile_like();
    let before = open_descriptors();
    for _ in 0..200 {
        let (channel, peer) = pair();
        // Sent by hand, since the channel refuses to.
        let fds: Vec<BorrowedFd<'_>> = vec![file.as_fd(); MAX_DESCRIPTORS + 40];
        let mut space = vec![std::mem::MaybeUninit::uninit(); 1024];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
        let bytes = header(16);
        let part = [rustix::io::IoSlice::new(&bytes)];
        rustix::net::sendmsg(&peer, &part, &mut control, rustix::net::SendFlags::empty()).unwrap();
        assert!(matches!(channel.receive(4096, None, soon()), Err(ChannelError::Descriptors)));
    }
    // Other tests of this process open some at the same time.
    assert!(open_descriptors() < before + 100);
}

#[test]
fn shut_down_is_seen_by_both() {
    let (channel, mut peer) = pair();
    channel.shut_down();
    assert!(matches!(channel.receive(4096, None, soon()), Err(ChannelError::Closed)));
    let sent = channel.send_command((1, Command::VERSION, 0), &[], &[], soon());
    assert!(matches!(sent, Err(ChannelError::Closed)));
    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0);
}
