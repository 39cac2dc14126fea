//! The way to the agent in the guest: one step at a time over a virtio port, and lines that the guest sends when it likes over
//! another.
//!
//! Owns: [`Channel`], [`Output`], [`Events`], and base64. The other end is `init.sh`.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long a read waits before the caller looks whether QEMU still lives.
const GLANCE: Duration = Duration::from_millis(200);

/// More than this is not what a step says.
const MAX_OUTPUT: usize = 16 << 20;

/// What a step left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its exit code; 137 if it was given up.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Connection to the agent.
pub(super) struct Channel {
    stream: UnixStream,
    received: Vec<u8>,
    steps: u32,
}

impl Channel {
    pub(super) fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(GLANCE))?;
        Ok(Self { stream, received: Vec::new(), steps: 0 })
    }

    /// Waits until the agent is there.
    pub(super) fn await_agent(&mut self, limit: Duration, alive: &dyn Fn() -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + limit;
        let line = self.line(deadline, alive).context("waiting for the agent in the guest")?;
        ensure!(line == "ready", "the agent says {line:?} instead of ready");
        Ok(())
    }

    /// Has the guest run `script`, which it gives up after `limit`.
    pub(super) fn step(
        &mut self,
        script: &str,
        limit: Duration,
        alive: &dyn Fn() -> Result<()>,
    ) -> Result<Output> {
        self.steps += 1;
        let request = format!("{} {} {}\n", self.steps, limit.as_secs().max(1), base64(script.as_bytes()));
        self.stream.write_all(request.as_bytes()).context("sending a step")?;
        // The guest gives up by itself; this is for a guest that hangs.
        let deadline = Instant::now() + limit * 2 + Duration::from_secs(30);
        let line = self.line(deadline, alive).context("waiting for the end of a step")?;
        let fields: Vec<&str> = line.split(' ').collect();
        let ["done", id, code, out, err] = fields[..] else { bail!("the agent says {line:?}") };
        ensure!(id == self.steps.to_string(), "the agent answers step {id} instead of {}", self.steps);
        let code = code.parse().with_context(|| format!("exit code in {line:?}"))?;
        let mut text = |length: &str| -> Result<String> {
            let length: usize = length.parse().with_context(|| format!("length in {line:?}"))?;
            ensure!(length <= MAX_OUTPUT, "a step's output of {length} bytes");
            self.fill(deadline, alive, |received| received.len() >= length)?;
            let bytes: Vec<u8> = self.received.drain(..length).collect();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        Ok(Output { code, stdout: text(out)?, stderr: text(err)? })
    }

    fn line(&mut self, deadline: Instant, alive: &dyn Fn() -> Result<()>) -> Result<String> {
        self.fill(deadline, alive, |received| received.contains(&b'\n'))?;
        let end = self.received.iter().position(|byte| *byte == b'\n').context("a line")?;
        let line: Vec<u8> = self.received.drain(..=end).collect();
        Ok(String::from_utf8_lossy(&line[..end]).into_owned())
    }

    /// Reads until `enough`.
    fn fill(
        &mut self,
        deadline: Instant,
        alive: &dyn Fn() -> Result<()>,
        enough: impl Fn(&[u8]) -> bool,
    ) -> Result<()> {
        let mut buffer = [0; 16 << 10];
        while !enough(&self.received) {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    alive()?;
                    bail!("the guest's port was closed");
                }
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    alive()?;
                    ensure!(Instant::now() < deadline, "no answer from the guest in time");
                }
                Err(error) => return Err(error).context("reading from the guest"),
            }
        }
        Ok(())
    }
}

/// Lines that the guest has sent over its second port, `/dev/events` there.
#[derive(Clone, Default)]
pub struct Events {
    text: Arc<Mutex<String>>,
}

impl Events {
    /// Collects from `stream` until it ends.
    pub(super) fn collect(mut stream: UnixStream) -> Result<Self> {
        let events = Self::default();
        let text = events.text.clone();
        std::thread::Builder::new().name("events".into()).spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                let shown = String::from_utf8_lossy(&buffer[..count]).into_owned();
                text.lock().unwrap_or_else(PoisonError::into_inner).push_str(&shown);
            }
        })?;
        Ok(events)
    }

    /// The whole lines so far.
    pub fn lines(&self) -> Vec<String> {
        let text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(str::to_owned).collect()
    }
}

/// Base64 with padding (RFC 4648, section 4).
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let shown = digit <= group.len();
            let index = (word >> (18 - 6 * digit)) & 63;
            text.push(if shown { char::from(ALPHABET[index as usize]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    fn alive() -> Result<()> {
        Ok(())
    }

    #[test]
    fn a_step_returns_code_and_both_outputs() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(host).unwrap();
        guest.write_all(b"ready\ndone 1 3 4 6\nout\nerr\nxy").unwrap();
        channel.await_agent(Duration::from_secs(5), &alive).unwrap();
        let output = channel.step("exit 3", Duration::from_secs(1), &alive).unwrap();
        assert_eq!(output, Output { code: 3, stdout: "out\n".into(), stderr: "err\nxy".into() });
        let mut sent = [0; 64];
        let count = guest.read(&mut sent).unwrap();
        assert_eq!(&sent[..count], b"1 1 ZXhpdCAz\n");
    }

    #[test]
    fn an_answer_to_another_step_is_an_error() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(host).unwrap();
        guest.write_all(b"done 7 0 0 0\n").unwrap();
        let error = channel.step("true", Duration::from_secs(1), &alive).unwrap_err().to_string();
        assert!(error.contains("step 7"), "{error}");
    }

    #[test]
    fn a_machine_that_ended_is_noticed_at_once() {
        let (host, _guest) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(host).unwrap();
        let error = channel.step("true", Duration::from_secs(600), &|| bail!("QEMU ended")).unwrap_err();
        assert!(format!("{error:#}").contains("QEMU ended"), "{error:#}");
    }
}
