//! One connection to QEMU's qtest socket: a line for each command, a line for each answer, in order.
//!
//! Owns: the pairing of answers with commands, the deadline of each, the doorbells that wait to be sent, and the state
//! *gone*, which is final.
//!
//! Invariants:
//! - answers come in the order of commands: first those of posted writes, then that of the command waited for;
//! - a line is at most [`MAX_LINE`] bytes; anything else, or anything unknown, makes QEMU gone;
//! - at most [`MAX_POSTED`] answers are outstanding, so that QEMU never stops because nobody reads them;
//! - [`post`](Connection::post) does not wait: what the socket does not take stays in `waiting`, one value for each
//!   doorbell, and goes out before anything that is sent later.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use thiserror::Error;

use super::QtestError;

/// Longest answer; the longest that is expected has 22 bytes.
const MAX_LINE: usize = 256;
/// Posted writes whose answers were not read yet.
const MAX_POSTED: usize = 128;
/// Posted writes after which answers are read.
const READ_ANSWERS_AFTER: usize = 32;
/// Bytes of one read of the socket.
const CHUNK: usize = 4096;

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RequestError {
    /// QEMU says so. The connection lives.
    #[error("QEMU answers `{command}` with `{answer}`")]
    Refused {
        /// The command.
        command: String,
        /// The answer.
        answer: String,
    },
    /// The connection is over.
    #[error("the connection to QEMU is lost: {0}")]
    Gone(String),
}

/// What goes over the socket.
struct Port {
    stream: UnixStream,
    /// Bytes of commands that were begun.
    outgoing: Vec<u8>,
    /// Bytes of answers without their end.
    incoming: Vec<u8>,
    /// Answers to posted writes that are still to come.
    posted: usize,
}

/// A connection.
pub(super) struct Connection {
    name: String,
    timeout: Duration,
    port: Mutex<Port>,
    /// Doorbells that were rung and not sent: address and latest value. Taken alone or after `port`.
    waiting: Mutex<Vec<(u64, u32)>>,
    gone: AtomicBool,
    ended_by_peer: AtomicBool,
    /// Why; set once, before `gone`.
    reason: Mutex<Option<String>>,
    /// A second descriptor of the socket, to shut it down while somebody waits for an answer.
    stream: UnixStream,
    /// Written to once QEMU counts as gone.
    gone_event: EventFd,
    /// Readable once either side has shut the socket down, or `gone_event` is.
    removal: Epoll,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Connects to the socket at `path`.
    pub(super) fn open(name: String, path: &Path, timeout: Duration) -> Result<Arc<Self>, QtestError> {
        let refused = |source| QtestError::Connect { path: path.to_owned(), source };
        let stream = UnixStream::connect(path).map_err(refused)?;
        Self::on(name, stream, timeout).map(Arc::new).map_err(refused)
    }

    /// A connection on a socket that is connected.
    pub(super) fn on(name: String, stream: UnixStream, timeout: Duration) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let gone_event = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let removal = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        // Only the end of the connection; arriving answers are no event.
        removal.add(&stream, EpollEvent::new(EpollFlags::EPOLLRDHUP, 0))?;
        removal.add(&gone_event, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
        let port =
            Port { stream: stream.try_clone()?, outgoing: Vec::new(), incoming: Vec::new(), posted: 0 };
        Ok(Self {
            name,
            timeout,
            port: Mutex::new(port),
            waiting: Mutex::default(),
            gone: AtomicBool::new(false),
            ended_by_peer: AtomicBool::new(false),
            reason: Mutex::default(),
            stream,
            gone_event,
            removal,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn removal_event(&self) -> BorrowedFd<'_> {
        self.removal.0.as_fd()
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Whether QEMU closed the connection, which it does by ending.
    pub(super) fn peer_has_ended(&self) -> bool {
        if self.is_gone() {
            return self.ended_by_peer.load(Ordering::Acquire);
        }
        let mut watched = [PollFd::new(self.stream.as_fd(), PollFlags::POLLHUP)];
        poll(&mut watched, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Ends the connection without complaint.
    pub(super) fn close(&self) {
        lock(&self.reason).get_or_insert_with(|| "closed".to_owned());
        self.gone.store(true, Ordering::Release);
        // Fails if it is shut down already.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Counts QEMU, or its function, as gone, for ever.
    pub(super) fn fail(&self, why: &str) -> RequestError {
        let reason = lock(&self.reason).get_or_insert_with(|| why.to_owned()).clone();
        if !self.gone.swap(true, Ordering::AcqRel) {
            tracing::warn!(device = self.name, why, "QEMU counts as removed");
        }
        // Cannot overflow: it is written to a few times at most.
        let _ = self.gone_event.write(1);
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        RequestError::Gone(reason)
    }

    /// Tells whoever watches that the function has gone, while the connection stays.
    pub(super) fn tell_of_removal(&self) {
        let _ = self.gone_event.write(1);
    }

    /// Reads memory or a port: `readl`, `readq`, `inl`.
    pub(super) fn read(&self, operation: &str, address: u64) -> Result<u64, RequestError> {
        let command = format!("{operation} {address:#x}");
        let answer = self.request(&command)?;
        let value = answer.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
        value.ok_or_else(|| self.fail(&format!("`{command}` was answered with the value `{answer}`")))
    }

    /// Writes to memory or a port: `writel`, `writeq`, `outl`, `outw`.
    pub(super) fn write(&self, operation: &str, address: u64, value: u64) -> Result<(), RequestError> {
        self.request(&format!("{operation} {address:#x} {value:#x}")).map(drop)
    }

    /// Writes 32 bits that nobody waits for.
    pub(super) fn post(&self, address: u64, value: u32) {
        if self.is_gone() {
            return;
        }
        {
            let mut waiting = lock(&self.waiting);
            // A later value of the same doorbell takes the earlier one's place in line.
            waiting.retain(|&(other, _)| other != address);
            waiting.push((address, value));
        }
        self.send_waiting();
    }

    /// Whether doorbells wait to be sent.
    pub(super) fn has_waiting(&self) -> bool {
        !lock(&self.waiting).is_empty() && !self.is_gone()
    }

    /// Sends what waits, as far as that goes without waiting. If somebody else has the socket, it is theirs to send.
    pub(super) fn send_waiting(&self) {
        while self.has_waiting() {
            let Ok(mut port) = self.port.try_lock() else { return };
            let sent = self.advance(&mut port);
            drop(port);
            match sent {
                // Something may have been left here while the lock was held.
                Ok(true) => {}
                // The socket is full: the watcher comes back to it.
                Ok(false) => return,
                Err(_) => return,
            }
        }
    }

    /// Sends a command and waits for the answer; returns what follows its `OK`.
    fn request(&self, command: &str) -> Result<String, RequestError> {
        let answer = self.exchange(&mut lock(&self.port), command);
        // Doorbells that came meanwhile.
        self.send_waiting();
        let answer = answer?;
        if let Some(value) = answer.strip_prefix("OK") {
            return Ok(value.trim_start().to_owned());
        }
        Err(RequestError::Refused { command: command.to_owned(), answer })
    }

    fn exchange(&self, port: &mut Port, command: &str) -> Result<String, RequestError> {
        if self.is_gone() {
            return Err(RequestError::Gone(lock(&self.reason).clone().unwrap_or_default()));
        }
        let deadline = Instant::now() + self.timeout;
        // Doorbells go first: one must not follow a reset that it preceded.
        while !self.advance(port)? {
            self.wait(port, PollFlags::POLLIN | PollFlags::POLLOUT, deadline, command)?;
        }
        port.outgoing.extend_from_slice(command.as_bytes());
        port.outgoing.push(b'\n');
        while !self.flush(port)? {
            self.wait(port, PollFlags::POLLIN | PollFlags::POLLOUT, deadline, command)?;
            self.receive(port)?;
        }
        loop {
            while let Some(line) = self.next_line(port)? {
                if let Some(answer) = self.sort(port, line)? {
                    return Ok(answer);
                }
            }
            self.wait(port, PollFlags::POLLIN, deadline, command)?;
            self.receive(port)?;
        }
    }

    /// Sends waiting doorbells. `false`: not all of them, since the socket or the line of answers is full.
    fn advance(&self, port: &mut Port) -> Result<bool, RequestError> {
        loop {
            if port.posted >= READ_ANSWERS_AFTER {
                self.receive(port)?;
                while port.posted > 0
                    && let Some(line) = self.next_line(port)?
                {
                    self.sort(port, line)?;
                }
            }
            if !self.flush(port)? || port.posted >= MAX_POSTED {
                return Ok(false);
            }
            let batch: Vec<(u64, u32)> = {
                let mut waiting = lock(&self.waiting);
                let room = waiting.len().min(MAX_POSTED - port.posted);
                waiting.drain(..room).collect()
            };
            if batch.is_empty() {
                return Ok(true);
            }
            for (address, value) in batch {
                port.outgoing.extend_from_slice(format!("writel {address:#x} {value:#x}\n").as_bytes());
                port.posted += 1;
            }
        }
    }

    /// Sends what was begun. `false`: the socket is full.
    fn flush(&self, port: &mut Port) -> Result<bool, RequestError> {
        while !port.outgoing.is_empty() {
            match port.stream.write(&port.outgoing) {
                Ok(sent) => drop(port.outgoing.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.ended(&error.to_string())),
            }
        }
        Ok(true)
    }

    /// Takes what has arrived.
    fn receive(&self, port: &mut Port) -> Result<(), RequestError> {
        let mut chunk = [0; CHUNK];
        match port.stream.read(&mut chunk) {
            Ok(0) => Err(self.ended("QEMU has ended")),
            Ok(bytes) => {
                port.incoming.extend_from_slice(&chunk[..bytes]);
                Ok(())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(())
            }
            Err(error) => Err(self.ended(&error.to_string())),
        }
    }

    fn ended(&self, why: &str) -> RequestError {
        if !self.is_gone() {
            self.ended_by_peer.store(true, Ordering::Release);
        }
        self.fail(why)
    }

    fn next_line(&self, port: &mut Port) -> Result<Option<String>, RequestError> {
        let end = port.incoming.iter().position(|&byte| byte == b'\n');
        if end.unwrap_or(port.incoming.len()) > MAX_LINE {
            return Err(self.fail(&format!("an answer of more than {MAX_LINE} bytes")));
        }
        let Some(end) = end else { return Ok(None) };
        let line: Vec<u8> = port.incoming.drain(..=end).collect();
        Ok(Some(String::from_utf8_lossy(&line[..end]).trim_end().to_owned()))
    }

    /// The answer of a command that somebody waits for, or `None`: of a posted write, or no answer at all.
    fn sort(&self, port: &mut Port, line: String) -> Result<Option<String>, RequestError> {
        if line.starts_with("IRQ ") {
            return Ok(None);
        }
        let known = ["OK", "ERR", "FAIL"].iter().any(|word| line.starts_with(word));
        if !known {
            let start: String = line.chars().take(40).collect();
            return Err(
                self.fail(&format!("`{start}` is no answer of qtest; is the socket QEMU's `-qtest`?"))
            );
        }
        if port.posted > 0 {
            port.posted -= 1;
            return Ok(None);
        }
        Ok(Some(line))
    }

    fn wait(
        &self,
        port: &Port,
        events: PollFlags,
        deadline: Instant,
        command: &str,
    ) -> Result<(), RequestError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let late = || self.fail(&format!("no answer to `{command}` within {:?}", self.timeout));
        if left.is_zero() {
            return Err(late());
        }
        let left = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let mut watched = [PollFd::new(port.stream.as_fd(), events)];
        match poll(&mut watched, left) {
            Ok(0) => Err(late()),
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(self.fail(&errno.to_string())),
        }
    }
}
