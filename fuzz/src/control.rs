//! What comes out of a control socket: requests at the daemon, and answers at the command line.
//!
//! Checks: a daemon answers each request that it carries out, ends the conversation at the first that it does not understand, says
//! so, and says nothing else; a command that was understood is asked for again by its own request.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pollux::control::protocol::{Command, ControlAnswer, Progress, REQUEST_LIMIT, VERSION};
use pollux::control::server::{Handler, Tell, converse};
use serde_json::{Value, json};

/// Bytes sent at most: a socket takes them, and the answers to them, while nobody reads.
const SENT: usize = 5 << 10;
/// Commands that may say how far they are: a socket takes few small messages.
const TALKATIVE: usize = 16;
/// Far beyond what reading bytes that are there can take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon that does nothing, and counts how often.
#[derive(Default)]
struct Idle {
    handled: AtomicUsize,
}

impl Handler for Idle {
    fn handle(&self, command: Command, progress: Tell<'_>) -> Result<Value, String> {
        // One thread: nothing is ordered by this.
        let before = self.handled.fetch_add(1, Ordering::Relaxed);
        let line = serde_json::to_vec(&command.request()).expect("requests are plain data");
        assert_eq!(Command::parse(&line), Ok(command), "a command is asked for by its own request");
        match command {
            Command::Scrub if before < TALKATIVE => {
                progress(Progress { done: 1, total: 2 }).map_err(|error| error.to_string())?;
                Ok(json!({ "blocks": 2 }))
            }
            Command::Shrink(bytes) => Err(format!("{bytes} bytes are too few")),
            _ => Ok(json!(command.name())),
        }
    }
}

/// Sends the bytes to a daemon, and takes its answers; then takes the bytes for answers.
pub fn run(data: &[u8]) {
    let sent = &data[..data.len().min(SENT)];
    for line in sent.split(|byte| *byte == b'\n') {
        let _ = Command::parse(line);
        if let Ok(answer) = serde_json::from_slice::<ControlAnswer>(line) {
            let again = serde_json::to_vec(&answer).expect("answers are plain data");
            let again: ControlAnswer =
                serde_json::from_slice(&again).expect("an answer that was written here");
            // Numbers with a fraction may lose their last digit.
            assert_eq!(
                (again.version, again.progress, &again.error),
                (answer.version, answer.progress, &answer.error)
            );
        }
    }
    let daemon = Idle::default();
    let Ok(answers) = conversation(sent, &daemon) else { return };
    judge(sent, &answers, daemon.handled.into_inner());
}

/// All that a daemon answers to bytes after which nothing comes.
fn conversation(sent: &[u8], daemon: &Idle) -> io::Result<Vec<u8>> {
    let (ours, mut theirs) = UnixStream::pair()?;
    for stream in [&ours, &theirs] {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
    }
    theirs.write_all(sent)?;
    theirs.shutdown(Shutdown::Write)?;
    converse(ours, daemon);
    let mut answers = Vec::new();
    // A daemon that hangs up on what it has not read resets the connection, after its answers.
    let _reset = theirs.read_to_end(&mut answers);
    Ok(answers)
}

fn judge(sent: &[u8], answers: &[u8], handled: usize) {
    let lines: Vec<&[u8]> = answers.split_inclusive(|byte| *byte == b'\n').collect();
    let answers: Vec<ControlAnswer> = lines
        .iter()
        .map(|line| serde_json::from_slice(line).expect("each line of the daemon is an answer"))
        .collect();
    let (mut expected, mut understood, mut ended) = (0, 0, false);
    for line in sent.split_inclusive(|byte| *byte == b'\n') {
        let whole = line.ends_with(b"\n") && line.len() as u64 <= REQUEST_LIMIT;
        expected += 1;
        match Command::parse(line) {
            Ok(command) if whole => {
                // A scrub says once how far it is.
                expected += usize::from(command == Command::Scrub && understood < TALKATIVE);
                understood += 1;
            }
            _ => {
                ended = true;
                break;
            }
        }
    }
    assert_eq!(handled, understood, "commands carried out");
    assert_eq!(answers.len(), expected, "answers");
    for answer in &answers {
        let parts = [answer.result.is_some(), answer.progress.is_some(), answer.error.is_some()];
        assert_eq!(
            parts.into_iter().filter(|there| *there).count(),
            1,
            "one thing is said at a time: {answer:?}"
        );
        assert_eq!(answer.version, VERSION);
    }
    assert!(!ended || answers.last().is_some_and(|answer| answer.error.is_some()), "the end has a reason");
}
