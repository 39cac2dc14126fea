//! QEMU's monitor protocol, QMP: one command at a time, events passed over.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// How long an answer may take, on the slowest machine.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A connection to a monitor.
pub struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    /// Greets.
    ///
    /// # Errors
    /// It is no monitor.
    pub(super) fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut monitor = Self { reader: BufReader::new(stream) };
        let greeting = monitor.message()?;
        ensure!(greeting.get("QMP").is_some(), "not a monitor's greeting: {greeting}");
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Carries out a command and returns its value.
    ///
    /// # Errors
    /// QEMU refuses it, or does not answer.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.reader.get_mut().write_all(line.as_bytes()).context("writing to QEMU's monitor")?;
        loop {
            let message = self.message().with_context(|| format!("waiting for the answer to {command}"))?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {command} {arguments}: {error}");
            }
            if let Some(value) = message.get("return") {
                return Ok(value.clone());
            }
        }
    }

    /// Carries out a command of the monitor for humans and returns what it prints.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn human(&mut self, line: &str) -> Result<String> {
        let printed = self.execute("human-monitor-command", &json!({ "command-line": line }))?;
        Ok(printed.as_str().unwrap_or_default().to_owned())
    }

    /// Carries out a command of qemu-io on a node of the block layer, such as `break read_aio A`.
    ///
    /// # Errors
    /// QEMU does not answer, or says something.
    pub fn block(&mut self, node: &str, command: &str) -> Result<()> {
        let printed = self.human(&format!("qemu-io {node} \"{command}\""))?;
        ensure!(printed.trim().is_empty(), "qemu-io {node} \"{command}\": {printed}");
        Ok(())
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self.reader.read_line(&mut line).context("reading from QEMU's monitor")?;
        ensure!(length > 0, "QEMU has ended");
        serde_json::from_str(&line).with_context(|| format!("not a message of the monitor: {line}"))
    }
}
