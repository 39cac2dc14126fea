//! The daemon's side of the control socket.
//!
//! Owns: [`ControlServer`], a thread that accepts clients and one thread for each of them. They sleep while nobody
//! asks. Clients are not trusted: lines are bounded, silence is bounded, their number is bounded, and only the
//! daemon's own user (and root) may connect at all.
//!
//! | limit | is | when it is reached |
//! |---|---|---|
//! | [`CLIENT_LIMIT`] | clients at once | the next is told so and closed |
//! | [`REQUEST_LIMIT`] | bytes of a line | an error, then the end of the connection |
//! | [`PATIENCE`] | silence, or an answer not taken | the end of the connection |

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use super::protocol::{Command, ControlAnswer, Progress, REQUEST_LIMIT};
use crate::failure::{During, Failure};
use crate::signals::Alarm;

/// Clients served at once.
pub const CLIENT_LIMIT: usize = 16;

/// How long a client may keep silent, or leave an answer lying.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What the daemon does for a client. Called on the client's own thread, where it may wait.
pub trait Handler: Send + Sync + 'static {
    /// Carries out a command. What takes long tells `progress` now and then, and ends early if that fails: nobody is
    /// there any more.
    ///
    /// # Errors
    /// What to tell the client.
    fn handle(&self, command: Command, progress: Tell<'_>) -> Result<Value, String>;
}

/// Tells a client how far its command is; fails once it has gone.
pub type Tell<'a> = &'a mut dyn FnMut(Progress) -> io::Result<()>;

/// A listening control socket. Dropping it ends all conversations and removes the socket.
pub struct ControlServer {
    stop: Arc<Alarm>,
    thread: Option<JoinHandle<()>>,
    paths: Vec<PathBuf>,
}

impl ControlServer {
    /// Listens at `socket`. If that is not the place where clients look, `link` is made to lead them there.
    ///
    /// # Errors
    /// Another daemon listens there, the path is taken by something else, or the system's.
    pub fn start(socket: &Path, link: Option<&Path>, handler: Arc<dyn Handler>) -> Result<Self, Failure> {
        let shown = socket.display();
        clear(socket)?;
        let listener =
            UnixListener::bind(socket).during(format_args!("cannot make the control socket {shown}"))?;
        let mut paths = vec![socket.to_path_buf()];
        fs::set_permissions(socket, fs::Permissions::from_mode(0o600))
            .during(format_args!("cannot protect the control socket {shown}"))?;
        if let Some(link) = link {
            // Only a daemon that died can have left something there.
            let _absent = fs::remove_file(link);
            let target = fs::canonicalize(socket).during(format_args!("cannot find {shown}"))?;
            std::os::unix::fs::symlink(target, link)
                .during(format_args!("cannot make the link {}", link.display()))?;
            paths.push(link.to_path_buf());
        }
        let stop = Arc::new(Alarm::new().during("cannot create an eventfd")?);
        let alarm = stop.clone();
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || accept(&listener, &alarm, &handler))
            .during("cannot start the control thread")?;
        Ok(Self { stop, thread: Some(thread), paths })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        for path in &self.paths {
            let _gone = fs::remove_file(path);
        }
        self.stop.raise();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Makes way for a socket: one that nobody listens to is removed.
fn clear(socket: &Path) -> Result<(), Failure> {
    let shown = socket.display();
    let Ok(metadata) = fs::symlink_metadata(socket) else {
        return Ok(());
    };
    if metadata.file_type().is_socket() && UnixStream::connect(socket).is_ok() {
        return Err(Failure::new(format!("another daemon listens at {shown}"))
            .remedy("give another place with --socket PATH"));
    }
    if !metadata.file_type().is_socket() && !metadata.file_type().is_symlink() {
        return Err(Failure::new(format!("{shown} exists and is not a socket"))
            .remedy("remove it, or give another place with --socket PATH"));
    }
    fs::remove_file(socket).during(format_args!("cannot remove the old socket {shown}"))
}

struct Client {
    stream: UnixStream,
    thread: JoinHandle<()>,
}

fn accept(listener: &UnixListener, stop: &Alarm, handler: &Arc<dyn Handler>) {
    let clients: Mutex<Vec<Client>> = Mutex::new(Vec::new());
    loop {
        let mut descriptors =
            [PollFd::new(stop.as_fd(), PollFlags::POLLIN), PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut descriptors, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "the control socket stops listening");
                break;
            }
        }
        if stop.is_raised() {
            break;
        }
        if descriptors[1].any() != Some(true) {
            continue;
        }
        match listener.accept() {
            Ok((stream, _address)) => admit(stream, &clients, handler),
            Err(error) => tracing::warn!(%error, "a control client could not connect"),
        }
    }
    let mut clients = clients.into_inner().unwrap_or_else(PoisonError::into_inner);
    for client in &clients {
        let _gone = client.stream.shutdown(std::net::Shutdown::Both);
    }
    for client in clients.drain(..) {
        let _panicked = client.thread.join();
    }
}

fn admit(mut stream: UnixStream, clients: &Mutex<Vec<Client>>, handler: &Arc<dyn Handler>) {
    let mut clients = clients.lock().unwrap_or_else(PoisonError::into_inner);
    clients.retain(|client| !client.thread.is_finished());
    let prepared =
        stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
    if let Err(error) = prepared {
        tracing::warn!(%error, "a control client could not be admitted");
        return;
    }
    if clients.len() >= CLIENT_LIMIT {
        let error = format!("{CLIENT_LIMIT} clients are connected already; try again later");
        let _gone = answer(&mut stream, Err(error));
        return;
    }
    let handler = handler.clone();
    let started = stream.try_clone().and_then(|own| {
        std::thread::Builder::new().name("control-client".into()).spawn(move || converse(own, &*handler))
    });
    match started {
        Ok(thread) => clients.push(Client { stream, thread }),
        Err(error) => tracing::warn!(%error, "a control client could not be served"),
    }
}

/// Answers a client's requests until it leaves, errs or, if the stream has a time limit, keeps silent for too long.
pub fn converse(stream: UnixStream, handler: &dyn Handler) {
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(REQUEST_LIMIT).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            let _gone =
                answer(&mut writer, Err(format!("a request is one line of at most {REQUEST_LIMIT} bytes")));
            return;
        }
        let outcome = match Command::parse(&line) {
            Ok(command) => {
                handler.handle(command, &mut |progress| send(&mut writer, &ControlAnswer::progress(progress)))
            }
            Err(error) => {
                let _gone = answer(&mut writer, Err(error));
                return;
            }
        };
        if answer(&mut writer, outcome).is_err() {
            return;
        }
    }
}

fn answer(stream: &mut UnixStream, outcome: Result<Value, String>) -> io::Result<()> {
    send(stream, &ControlAnswer::new(outcome))
}

fn send(stream: &mut UnixStream, answer: &ControlAnswer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}
