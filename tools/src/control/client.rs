//! The command line's side of the control socket.
//!
//! Owns: [`ask`], one request and its answer, and [`ask_and_watch`], the same with progress.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::protocol::{ANSWER_LIMIT, Command, ControlAnswer, Progress};
use crate::failure::{During, Failure};

/// How long an answer may take: a sync of much data on a slow device takes its time.
const PATIENCE: Duration = Duration::from_secs(600);

/// Asks the daemon that listens at `socket`.
///
/// # Errors
/// Nobody listens there, the daemon could not do it, or what answers is no daemon of ours.
pub fn ask(socket: &Path, command: Command) -> Result<Value, Failure> {
    ask_and_watch(socket, command, &mut |_| ())
}

/// As [`ask`], and shows `watch` how far it is.
///
/// # Errors
/// As there.
pub fn ask_and_watch(
    socket: &Path,
    command: Command,
    watch: &mut dyn FnMut(Progress),
) -> Result<Value, Failure> {
    let shown = socket.display();
    let mut stream = UnixStream::connect(socket).map_err(|error| {
        let failure = Failure::new(format!("cannot reach the daemon at {shown}: {error}"));
        match error.kind() {
            io::ErrorKind::PermissionDenied => failure.remedy("it runs for another user: try as root"),
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
                failure.remedy("it has ended; start it again: pollux up")
            }
            _ => failure,
        }
    })?;
    let talking = || format!("cannot talk to the daemon at {shown}");
    stream.set_read_timeout(Some(PATIENCE)).during(talking())?;
    stream.set_write_timeout(Some(PATIENCE)).during(talking())?;
    let mut line = serde_json::to_vec(&command.request()).during(talking())?;
    line.push(b'\n');
    stream.write_all(&line).during(talking())?;
    let mut reader = BufReader::new(stream);
    let answer = loop {
        let mut line = Vec::new();
        let read = (&mut reader).take(ANSWER_LIMIT).read_until(b'\n', &mut line).during(talking())?;
        if read == 0 {
            return Err(Failure::new(format!("the daemon at {shown} ended before it answered")));
        }
        let answer: ControlAnswer = serde_json::from_slice(&line)
            .during(format_args!("{shown} does not speak the control protocol"))?;
        match answer.progress {
            Some(progress) => watch(progress),
            None => break answer,
        }
    };
    match (answer.result, answer.error) {
        (_, Some(error)) => {
            Err(Failure::new(format!("the daemon at {shown} could not {}: {error}", command.name())))
        }
        (Some(result), None) => Ok(result),
        (None, None) => Err(Failure::new(format!("the daemon at {shown} gave an empty answer"))),
    }
}
