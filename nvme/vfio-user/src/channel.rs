//! A connection that carries messages with their descriptors.
//!
//! Owns: framing, deadlines, ownership of descriptors that arrive.
//!
//! Invariants:
//! - no call waits longer than its deadline, whatever the peer does: trickling bytes does not extend it;
//! - nothing larger than the caller's limit is read or allocated;
//! - at most [`MAX_DESCRIPTORS`] descriptors are taken with a message; more end the connection and none leaks;
//! - after an error of receiving, or any of sending but [`ChannelError::TimedOut`], the stream's framing is lost: close
//!   it.
//!
//! Excludes: pairing of replies with commands, which is the caller's, who knows what is outstanding.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::io::{IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg,
    socket_with,
};
use thiserror::Error;
use zerocopy::{FromZeros, IntoBytes};

use crate::wire::{Command, HEADER_BYTES, RawHeader, type_and_flags};

/// Descriptors that a message may carry.
pub const MAX_DESCRIPTORS: usize = 16;

/// Between two attempts to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(5);

/// Why a message could not be sent or received.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The other side has closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// The deadline passed.
    #[error("the other side did not {0} in time")]
    TimedOut(&'static str),
    /// The deadline passed in the middle of sending: the framing is lost.
    #[error("the other side took a part of a message, and not the rest in time")]
    Torn,
    /// The caller's own stop descriptor became readable.
    #[error("stopped")]
    Stopped,
    /// A size that cannot be, or that nobody here allocates.
    #[error("a message of {size} bytes was announced; it can have {HEADER_BYTES} to {limit}")]
    Size {
        /// Bytes announced.
        size: u32,
        /// Largest size taken.
        limit: usize,
    },
    /// More descriptors than any message has.
    #[error("a message came with more than {MAX_DESCRIPTORS} descriptors")]
    Descriptors,
    /// The system.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
}

/// A header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Chosen by the sender of the command.
    pub id: u16,
    /// What is asked or answered.
    pub command: Command,
    /// [`type_and_flags`].
    pub flags: u32,
    /// errno of a failed command.
    pub error: u32,
}

impl Header {
    /// Whether it is a command; else it is a reply, or nonsense.
    pub fn is_command(&self) -> bool {
        self.flags & type_and_flags::TYPE_MASK == type_and_flags::COMMAND
    }

    /// Whether it is a reply.
    pub fn is_reply(&self) -> bool {
        self.flags & type_and_flags::TYPE_MASK == type_and_flags::REPLY
    }

    /// Whether its sender wants a reply.
    pub fn wants_reply(&self) -> bool {
        self.is_command() && self.flags & type_and_flags::NO_REPLY == 0
    }

    /// Whether the command failed.
    pub fn failed(&self) -> bool {
        self.flags & type_and_flags::ERROR != 0
    }
}

/// A message that arrived.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows the header.
    pub body: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// An answer to a command.
#[derive(Debug)]
pub enum Reply<'a> {
    /// It worked.
    Done {
        /// Body.
        body: &'a [u8],
        /// Descriptors.
        fds: &'a [BorrowedFd<'a>],
    },
    /// It failed.
    Failed(Errno),
}

/// One end of a connection.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Channel {
    /// A channel over a connected socket.
    ///
    /// # Errors
    /// The socket cannot be set to not block.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream })
    }

    /// Connects to the socket at `path`. A server that does not accept for the moment is waited for until `deadline`.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::TimedOut`] if the server does not accept.
    pub fn connect(path: &Path, deadline: Instant) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => return Self::new(UnixStream::from(socket)),
                Err(rustix::io::Errno::INTR) => {}
                // The line of those who wait to be accepted is full; the socket says nothing when that changes.
                Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => {
                    std::thread::sleep(CONNECT_PAUSE);
                }
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Ends the connection for both sides; both see it closed.
    pub fn shut_down(&self) {
        // Fails if it has ended already.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Sends a command with `flags` added to its type.
    ///
    /// # Errors
    /// [`ChannelError`]; then a part may have been sent.
    pub fn send_command(
        &self,
        (id, command, flags): (u16, Command, u32),
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), ChannelError> {
        let header = Header { id, command, flags: type_and_flags::COMMAND | flags, error: 0 };
        self.send(header, body, fds, deadline)
    }

    /// Answers a command.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn send_reply(&self, to: &Header, reply: &Reply<'_>, deadline: Instant) -> Result<(), ChannelError> {
        let header = Header { flags: type_and_flags::REPLY, error: 0, ..*to };
        match reply {
            Reply::Done { body, fds } => self.send(header, &[body], fds, deadline),
            Reply::Failed(errno) => {
                let flags = header.flags | type_and_flags::ERROR;
                self.send(Header { flags, error: *errno as u32, ..header }, &[], &[], deadline)
            }
        }
    }

    fn send(
        &self,
        header: Header,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), ChannelError> {
        let size = HEADER_BYTES + body.iter().map(|part| part.len()).sum::<usize>();
        let raw = RawHeader {
            id: header.id.into(),
            command: header.command.0.into(),
            size: (size as u32).into(),
            flags: header.flags.into(),
            error: header.error.into(),
        };
        // One buffer, so that a short send is continued simply. Messages are short.
        let mut bytes = Vec::with_capacity(size);
        bytes.extend_from_slice(raw.as_bytes());
        body.iter().for_each(|part| bytes.extend_from_slice(part));
        let mut sent = 0;
        while sent < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(ChannelError::Descriptors);
            }
            let part = [IoSlice::new(&bytes[sent..])];
            match sendmsg(&self.stream, &part, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => sent += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    let waited = self.wait(PollFlags::POLLOUT, None, Some(deadline), "take a message");
                    waited.map_err(|error| match error {
                        ChannelError::TimedOut(_) if sent > 0 => ChannelError::Torn,
                        other => other,
                    })?;
                }
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(ChannelError::Closed);
                }
                Err(errno) => return Err(ChannelError::Io(errno.into())),
            }
        }
        Ok(())
    }

    /// Waits until something arrives (or the connection ends), for ever if there is no deadline, or until `stop` becomes
    /// readable.
    ///
    /// # Errors
    /// [`ChannelError::TimedOut`], [`ChannelError::Stopped`], or the system's.
    pub fn wait_readable(
        &self,
        stop: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> Result<(), ChannelError> {
        self.wait(PollFlags::POLLIN, stop, deadline, "answer")
    }

    /// Receives a message of at most `limit` bytes. A `stop` descriptor that becomes readable ends the wait.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn receive(
        &self,
        limit: usize,
        stop: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<Message, ChannelError> {
        let mut fds = Vec::new();
        let mut raw = RawHeader::new_zeroed();
        self.fill(raw.as_mut_bytes(), &mut fds, stop, deadline)?;
        let size = raw.size.get();
        if (size as usize) < HEADER_BYTES || size as usize > limit {
            return Err(ChannelError::Size { size, limit });
        }
        let mut body = vec![0; size as usize - HEADER_BYTES];
        self.fill(&mut body, &mut fds, stop, deadline)?;
        let header = Header {
            id: raw.id.get(),
            command: Command(raw.command.get()),
            flags: raw.flags.get(),
            error: raw.error.get(),
        };
        Ok(Message { header, body, fds })
    }

    /// Reads exactly as many bytes as `buffer` has.
    fn fill(
        &self,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        stop: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<(), ChannelError> {
        let mut filled = 0;
        while filled < buffer.len() {
            // Room for one more than is allowed, so that too many are seen. What does not fit the kernel drops and
            // flags; what fits is owned, and closed with `fds`.
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS + 1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut part = [IoSliceMut::new(&mut buffer[filled..])];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match recvmsg(&self.stream, &mut part, &mut control, flags) {
                Ok(received) => {
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(arrived) = message {
                            fds.extend(arrived);
                        }
                    }
                    if fds.len() > MAX_DESCRIPTORS || received.flags.contains(ReturnFlags::CTRUNC) {
                        return Err(ChannelError::Descriptors);
                    }
                    if received.bytes == 0 {
                        return Err(ChannelError::Closed);
                    }
                    filled += received.bytes;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    self.wait(PollFlags::POLLIN, stop, Some(deadline), "finish a message")?;
                }
                Err(rustix::io::Errno::CONNRESET) => return Err(ChannelError::Closed),
                Err(errno) => return Err(ChannelError::Io(errno.into())),
            }
            // A peer that sends a byte at a time never makes us wait in `wait`.
            if filled < buffer.len() && Instant::now() >= deadline {
                return Err(ChannelError::TimedOut("finish a message"));
            }
        }
        Ok(())
    }

    fn wait(
        &self,
        what: PollFlags,
        stop: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
        verb: &'static str,
    ) -> Result<(), ChannelError> {
        loop {
            let timeout = match deadline {
                None => PollTimeout::NONE,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(ChannelError::TimedOut(verb));
                    }
                    // Rounded up, so that the last round does not spin.
                    PollTimeout::from(left.as_millis().saturating_add(1).min(60_000) as u16)
                }
            };
            let own = PollFd::new(self.stream.as_fd(), what);
            let mut watched = match stop {
                Some(stop) => vec![own, PollFd::new(stop, PollFlags::POLLIN)],
                None => vec![own],
            };
            match poll(&mut watched, timeout) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(ChannelError::Io(errno.into())),
            }
            let ready = |entry: &PollFd<'_>| entry.revents().is_some_and(|events| !events.is_empty());
            if watched.get(1).is_some_and(ready) {
                return Err(ChannelError::Stopped);
            }
            if ready(&watched[0]) {
                return Ok(());
            }
        }
    }
}
