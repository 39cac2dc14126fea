//! One connection to a server: commands and their replies, and the end of it.
//!
//! Owns: the pairing of replies with commands, the deadline of each, and the state *gone*, which is final.
//!
//! Invariants:
//! - one command is outstanding at a time (posted writes apart, which have no reply);
//! - a reply is taken only if its identifier and command are those of the command, its size is what the command's reply
//!   can have, and it brings no descriptors where none belong; anything else makes the server gone;
//! - messages that nobody asked for are bounded for each command.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use thiserror::Error;
use vfio_user_protocol::{
    Capabilities, Channel, ChannelError, Command, Header, MAX_DATA, MAX_DESCRIPTORS, MAX_MESSAGE, Message,
    RegionAccess, Reply, parse_version, type_and_flags, version_body,
};
use zerocopy::{FromBytes, IntoBytes};

use super::VfioUserError;

/// Messages that nobody asked for, while one reply is waited for.
const MAX_STRAYS: usize = 16;
/// Identifier of writes that want no reply. A server that replies nevertheless is forgiven.
const POSTED_ID: u16 = u16::MAX;

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The server says so. The connection lives.
    #[error("the server refuses {command}: {errno}")]
    Refused {
        /// The command.
        command: Command,
        /// Its reason.
        errno: Errno,
    },
    /// The connection is over.
    #[error("the connection to the server is lost: {0}")]
    Gone(String),
}

/// Where a posted write goes, and the four bytes of it.
type Posted = (u32, u64, [u8; 4]);

/// A connection.
pub(super) struct Connection {
    name: String,
    channel: Channel,
    timeout: Duration,
    /// Held from a command to its reply. Identifier of the last one.
    exchange: Mutex<u16>,
    /// Held while a message is sent. Taken after `exchange`, or alone. Posted writes that found the socket full, one for each
    /// place, the latest: they go out before anything else does.
    sending: Mutex<Vec<Posted>>,
    gone: AtomicBool,
    /// The other side closed the connection before this one did.
    ended_by_server: AtomicBool,
    /// Why; set once, before `gone`.
    reason: Mutex<Option<String>>,
    /// Readable once the socket has been shut down by either side.
    removal: Epoll,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("name", &self.name)
            .field("gone", &self.gone)
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Connects and agrees on a version.
    pub(super) fn open(path: &Path, timeout: Duration) -> Result<Arc<Self>, VfioUserError> {
        let refused = |source| VfioUserError::Connect { path: path.to_owned(), source };
        let channel = Channel::connect(path, Instant::now() + timeout).map_err(refused)?;
        let removal = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|errno| refused(errno.into()))?;
        // Only the end of the connection; arriving data is no event.
        removal
            .add(&channel, EpollEvent::new(EpollFlags::EPOLLRDHUP, 0))
            .map_err(|errno| refused(errno.into()))?;
        let connection = Arc::new(Self {
            name: format!("vfio-user:{}", path.display()),
            channel,
            timeout,
            exchange: Mutex::new(0),
            sending: Mutex::default(),
            gone: AtomicBool::new(false),
            ended_by_server: AtomicBool::new(false),
            reason: Mutex::new(None),
            removal,
        });
        let ours = Capabilities { max_msg_fds: MAX_DESCRIPTORS as u64, max_data_xfer_size: MAX_DATA as u64 };
        let reply = connection
            .request(Command::VERSION, &[&version_body(ours)], &[])
            .map_err(|source| VfioUserError::Request { path: path.to_owned(), source })?;
        parse_version(&reply.body)
            .map_err(|source| VfioUserError::Version { path: path.to_owned(), source })?;
        Ok(connection)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn removal_event(&self) -> BorrowedFd<'_> {
        self.removal.0.as_fd()
    }

    /// Whether the other side has closed the connection: the server has died, or has given up on us.
    pub(super) fn server_is_gone(&self) -> bool {
        if self.gone.load(Ordering::Acquire) {
            // Otherwise we have closed it, and nothing is known about the other side.
            return self.ended_by_server.load(Ordering::Acquire);
        }
        let mut watched = [PollFd::new(self.removal_event(), PollFlags::POLLIN)];
        poll(&mut watched, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Ends the connection without complaint.
    pub(super) fn close(&self) {
        lock(&self.reason).get_or_insert_with(|| "closed".to_owned());
        self.gone.store(true, Ordering::Release);
        self.channel.shut_down();
    }

    /// Counts the server as gone, for ever.
    pub(super) fn fail(&self, why: &str) -> RequestError {
        let reason = lock(&self.reason).get_or_insert_with(|| why.to_owned()).clone();
        if !self.gone.swap(true, Ordering::AcqRel) {
            tracing::warn!(device = self.name, why, "the server counts as removed");
        }
        self.channel.shut_down();
        RequestError::Gone(reason)
    }

    /// Sends a command and waits for its reply. Descriptors in the reply are an error.
    pub(super) fn request(
        &self,
        command: Command,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, RequestError> {
        let reply = self.request_with_fds(command, body, fds)?;
        if reply.fds.is_empty() {
            return Ok(reply);
        }
        Err(self.fail(&format!("its reply to {command} brought {} descriptors", reply.fds.len())))
    }

    /// Sends a command and waits for its reply.
    pub(super) fn request_with_fds(
        &self,
        command: Command,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, RequestError> {
        let mut last_id = lock(&self.exchange);
        if self.gone.load(Ordering::Acquire) {
            return Err(RequestError::Gone(lock(&self.reason).clone().unwrap_or_default()));
        }
        *last_id = if *last_id >= POSTED_ID - 1 { 0 } else { *last_id + 1 };
        let deadline = Instant::now() + self.timeout;
        let sent = {
            let mut unsent = lock(&self.sending);
            // What was posted before goes before: a doorbell must not follow a reset.
            self.send_posted(&mut unsent, deadline)
                .and_then(|()| self.channel.send_command((*last_id, command, 0), body, fds, deadline))
        };
        sent.map_err(|error| self.broken(command, &error))?;
        let reply = self.await_reply(*last_id, command, deadline)?;
        if !reply.header.failed() {
            return Ok(reply);
        }
        Err(RequestError::Refused { command, errno: super::errno(reply.header.error) })
    }

    fn broken(&self, command: Command, error: &ChannelError) -> RequestError {
        if matches!(error, ChannelError::Closed) && !self.gone.load(Ordering::Acquire) {
            self.ended_by_server.store(true, Ordering::Release);
        }
        self.fail(&format!("{command}: {error}"))
    }

    fn await_reply(&self, id: u16, command: Command, deadline: Instant) -> Result<Message, RequestError> {
        for _ in 0..=MAX_STRAYS {
            let message = self
                .channel
                .receive(MAX_MESSAGE, None, deadline)
                .map_err(|error| self.broken(command, &error))?;
            let header = message.header;
            if header.is_command() {
                self.decline(&header, deadline)?;
            } else if !header.is_reply() {
                return Err(
                    self.fail(&format!("it sent a message of unknown type, flags {:#x}", header.flags))
                );
            } else if header.id == id && header.command == command {
                return Ok(message);
            } else if header.id != POSTED_ID {
                let (found, of) = (header.id, header.command);
                return Err(self.fail(&format!("reply {found} to {of} came for command {id}, {command}")));
            }
        }
        Err(self.fail(&format!(
            "it sent {MAX_STRAYS} messages that nobody asked for instead of a reply to {command}"
        )))
    }

    /// Answers a command of the server: there is none that is followed here.
    fn decline(&self, header: &Header, deadline: Instant) -> Result<(), RequestError> {
        if !header.wants_reply() {
            return Ok(());
        }
        let _alone = lock(&self.sending);
        let sent = self.channel.send_reply(header, &Reply::Failed(Errno::ENOTSUP), deadline);
        sent.map_err(|error| self.broken(header.command, &error))
    }

    /// The structure that a reply must begin with; its rest.
    pub(super) fn parse<T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable>(
        &self,
        reply: &Message,
    ) -> Result<T, RequestError> {
        T::read_from_prefix(&reply.body).map(|(value, _)| value).map_err(|_| {
            let (command, bytes) = (reply.header.command, reply.body.len());
            self.fail(&format!("its reply to {command} has {bytes} bytes, which is too short"))
        })
    }

    pub(super) fn region_read(&self, region: u32, offset: u64, bytes: &mut [u8]) -> Result<(), RequestError> {
        let access = access(region, offset, bytes.len());
        let reply = self.request(Command::REGION_READ, &[access.as_bytes()], &[])?;
        let echoed: RegionAccess = self.parse(&reply)?;
        let data = &reply.body[size_of::<RegionAccess>()..];
        if echoed.count.get() as usize != bytes.len() || data.len() != bytes.len() {
            let (found, wanted) = (data.len(), bytes.len());
            return Err(self.fail(&format!("it answered a load of {wanted} bytes with {found}")));
        }
        bytes.copy_from_slice(data);
        Ok(())
    }

    pub(super) fn region_write(&self, region: u32, offset: u64, bytes: &[u8]) -> Result<(), RequestError> {
        let access = access(region, offset, bytes.len());
        self.request(Command::REGION_WRITE, &[access.as_bytes(), bytes], &[]).map(drop)
    }

    /// Sends a write whose reply nobody waits for. What the server has no room for waits in line.
    pub(super) fn post_write(&self, region: u32, offset: u64, bytes: [u8; 4]) {
        if self.gone.load(Ordering::Acquire) {
            return;
        }
        let mut unsent = lock(&self.sending);
        // A later value of the same place takes the earlier one's place in line.
        unsent.retain(|&(other_region, other_offset, _)| (other_region, other_offset) != (region, offset));
        unsent.push((region, offset, bytes));
        match self.send_posted(&mut unsent, Instant::now()) {
            Ok(()) => {}
            Err(ChannelError::TimedOut(_)) => {
                tracing::debug!(device = self.name, offset, "the server does not read: a doorbell waits");
            }
            Err(error) => {
                drop(unsent);
                drop(self.broken(Command::REGION_WRITE, &error));
            }
        }
    }

    /// Sends what is in line, as far as the socket takes it before the deadline.
    fn send_posted(&self, unsent: &mut Vec<Posted>, deadline: Instant) -> Result<(), ChannelError> {
        while let Some(&(region, offset, bytes)) = unsent.first() {
            let header = (POSTED_ID, Command::REGION_WRITE, type_and_flags::NO_REPLY);
            let access = access(region, offset, bytes.len());
            self.channel.send_command(header, &[access.as_bytes(), &bytes], &[], deadline)?;
            unsent.remove(0);
        }
        Ok(())
    }
}

fn access(region: u32, offset: u64, count: usize) -> RegionAccess {
    RegionAccess { offset: offset.into(), region: region.into(), count: (count as u32).into() }
}
