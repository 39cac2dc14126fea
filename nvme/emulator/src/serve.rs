//! The controller served to other processes over vfio-user.
//!
//! Owns: [`Server`], its socket in the file system, and the turn of clients. A client is served until it leaves, breaks the
//! protocol, or the server is stopped; then the controller is reset and the next one has its turn.
//!
//! ```text
//!  client ── messages ──► session ──► registers, configuration space, interrupts, DMA mappings
//!         ── stores ────► doorbell page ──► poller ──► controller.doorbell
//!         ◄── eventfds ── notifier ◄── vectors
//! ```
//!
//! Invariants:
//! - whatever a client sends, the worst that happens is the end of its session;
//! - between two clients no memory is mapped, no interrupt connected, and the controller is disabled;
//! - the socket is removed when the server goes, if it is still the server's.
//!
//! Excludes: the protocol's messages (`vfio-user-protocol`), commands. What a client's own memory contains is the
//! client's business, but see [`ClientMemory`].

mod config_space;
mod doorbells;
mod memory;
mod notifier;
mod pace;
mod session;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nvme_spec::registers::{self, Cc, Csts};
use vfio_user_protocol::Channel;

use crate::controller::EmulatedController;
use crate::interrupt::VectorMask;
use session::Session;

/// How long the controller may take to become quiet between two clients.
const QUIET_TIMEOUT: Duration = Duration::from_secs(10);
const QUIET_POLL: Duration = Duration::from_micros(200);

/// Which memory of clients is mapped.
///
/// A file that shrinks, or whose pages cannot be had, raises SIGBUS in who touches its mapping. That is caught: what vanished
/// reads as ones. A sealed memfd cannot shrink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientMemory {
    /// Any that comes; what can be sealed is sealed. For clients that are trusted that far.
    #[default]
    Any,
    /// Only what is sealed against shrinking, or can be; nothing on huge pages, which may be short.
    Sealed,
}

/// How a controller is served.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// Which memory of clients is mapped.
    pub memory: ClientMemory,
    /// How long a client may take for its first message, to finish one that it began, or to take a reply.
    pub message_timeout: Duration,
    /// How long the doorbell page is watched without pause after the last doorbell. On a core that others want too, it is
    /// not.
    pub spin: Duration,
    /// The pause between two looks at the doorbell page once nothing happens; doubled up to `longest_pause` as long as nothing
    /// does.
    pub shortest_pause: Duration,
    /// What a client waits at most for its first command after a while.
    pub longest_pause: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            memory: ClientMemory::Any,
            message_timeout: Duration::from_secs(10),
            spin: Duration::from_micros(200),
            shortest_pause: Duration::from_micros(50),
            longest_pause: Duration::from_millis(3),
        }
    }
}

/// Why a controller cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Another server is there.
    #[error("{} is served by another process; stop it first, or choose another path", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{} exists and is not a socket; choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system.
    #[error("cannot {what} {}: {source}", path.display())]
    System {
        /// What was tried.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// A controller behind a socket.
pub struct Server {
    controller: Arc<EmulatedController>,
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket, to remove no other.
    identity: (u64, u64),
    options: ServerOptions,
}

impl Server {
    /// Binds `path`. A socket that nobody serves any more is replaced.
    ///
    /// # Errors
    /// Somebody serves it, something else is there, or the system refuses.
    pub fn bind(
        controller: Arc<EmulatedController>,
        path: &Path,
        options: ServerOptions,
    ) -> Result<Self, ServeError> {
        let system = |what| {
            let path = path.to_owned();
            move |source| ServeError::System { what, path, source }
        };
        remove_dead_socket(path)?;
        let listener = UnixListener::bind(path).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => ServeError::InUse { path: path.to_owned() },
            _ => system("listen on")(source),
        })?;
        listener.set_nonblocking(true).map_err(system("listen on"))?;
        let metadata = fs::symlink_metadata(path).map_err(system("look at"))?;
        let identity = (metadata.dev(), metadata.ino());
        Ok(Self { controller, listener, path: path.to_owned(), identity, options })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves one client after the other until `stop` is readable.
    ///
    /// # Errors
    /// The socket fails. What clients do wrong is logged.
    pub fn run(&self, stop: BorrowedFd<'_>) -> Result<(), ServeError> {
        let failed = |source| ServeError::System { what: "listen on", path: self.path.clone(), source };
        loop {
            let mut watched =
                [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN), PollFd::new(stop, PollFlags::POLLIN)];
            match poll(&mut watched, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
            if watched[1].any() == Some(true) {
                return Ok(());
            }
            match self.listener.accept() {
                Ok((stream, _)) => self.serve(stream, stop),
                Err(error) if is_passing(&error) => {}
                // Out of descriptors, say: it may pass, but must not spin.
                Err(error) => {
                    tracing::warn!(path = %self.path.display(), %error, "cannot accept a client");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn serve(&self, stream: UnixStream, stop: BorrowedFd<'_>) {
        let path = self.path.display();
        tracing::info!(%path, "client connected");
        let end = Channel::new(stream)
            .map_err(session::SessionEnd::from)
            .and_then(|channel| Session::new(&self.controller, channel, self.options))
            .map(|session| session.run(stop));
        match end {
            Ok(session::SessionEnd::Left | session::SessionEnd::Stopped) => {
                tracing::info!(%path, "client left");
            }
            Ok(end) | Err(end) => tracing::warn!(%path, "client dropped: {end}"),
        }
        disconnect_interrupts(&self.controller);
        if !reset(&self.controller) {
            tracing::error!(%path, "the controller does not become quiet");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
}

/// Removes a socket at `path` that nobody listens on.
fn remove_dead_socket(path: &Path) -> Result<(), ServeError> {
    let system = |what, source| ServeError::System { what, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system("look at", error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ServeError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match Channel::connect(path, Instant::now() + Duration::from_secs(1)) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| system("remove the dead socket", error))
        }
        // Even if it is too busy to take a connection.
        Ok(_) | Err(_) => Err(ServeError::InUse { path: path.to_owned() }),
    }
}

/// Disables the controller and gives the registers that a host sets their first values. `false` if it stays ready.
fn reset(controller: &EmulatedController) -> bool {
    controller.write32(registers::CC, Cc::new().into());
    let deadline = Instant::now() + QUIET_TIMEOUT;
    // Removed (all ones) is quiet.
    while Csts::from(controller.read32(registers::CSTS)).rdy()
        && controller.read32(registers::CSTS) != u32::MAX
    {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(QUIET_POLL);
    }
    controller.write32(registers::AQA, 0);
    controller.write64(registers::ASQ, 0);
    controller.write64(registers::ACQ, 0);
    controller.write32(registers::INTMC, u32::MAX);
    true
}

fn disconnect_interrupts(controller: &EmulatedController) {
    for vector in 0..controller.interrupt_vectors() {
        // Both fail for vectors that do not exist only.
        let _ = controller.clear_interrupt(vector);
        let _ = controller.mask_interrupt(vector, VectorMask::Unmasked);
    }
}
