//! Format NVM.
//!
//! Owns: [`FormatError`], [`FormatOptions`], `Controller::format_nvm`.
//!
//! Invariants:
//! - a namespace is formatted only while no queue is open on it, and none can be opened meanwhile;
//! - a format may take an hour: nobody holds the admin queue meanwhile, so that the keeper goes on (events, aborts, resets).
//!
//! Excludes: metadata and end-to-end protection.

use std::sync::MutexGuard;
use std::time::Duration;

use nvme_spec::format::{FormatDw10, SecureErase};
use nvme_spec::identify::{Fna, Oacs};
use nvme_spec::{CommandId, NamespaceId, QueueId, SubmissionEntry};
use thiserror::Error;

use super::commands::CommandError;
use super::{Admin, Controller, Shared};
use crate::admin::{AdminError, STATUS_INTERVAL, timeout_fault};
use crate::bring_up::Problem;
use crate::fault::{Fault, Pulse};
use crate::handshake::Backoff;
use crate::identity::{MAX_LBA_SHIFT, MIN_LBA_SHIFT, NamespaceProblem};

/// Time that a format is given unless the options say otherwise: large media are overwritten.
pub const FORMAT_TIMEOUT: Duration = Duration::from_secs(3600);

/// Why a namespace was not formatted, or is not known to have been.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The command, or the look at the namespace after it.
    #[error("{0}")]
    Command(#[from] CommandError),
    /// There is no such namespace.
    #[error("there is no namespace {0}")]
    NoSuchNamespace(u32),
    /// A queue is open on a namespace that the format would touch.
    #[error("namespace {0} is in use: close its queues first")]
    InUse(u32),
    /// One is being formatted already.
    #[error("namespace {0} is being formatted: wait for the end of that")]
    Formatting(u32),
    /// The namespace has no such LBA format.
    #[error("namespace {nsid} has no LBA format {index} (it has {formats})")]
    NoSuchFormat {
        /// The namespace.
        nsid: u32,
        /// The format asked for.
        index: u8,
        /// Formats that there are, counted from 0.
        formats: usize,
    },
    /// This driver could not use the namespace afterwards.
    #[error("with LBA format {index} it could not be used: {problem}")]
    UselessFormat {
        /// The format asked for.
        index: u8,
        /// Why.
        problem: NamespaceProblem,
    },
    /// The format was done, but the namespaces could not be read again.
    #[error("formatted, but the namespaces cannot be read again: {0}")]
    Rescan(String),
}

impl From<AdminError> for FormatError {
    fn from(error: AdminError) -> Self {
        FormatError::Command(error.into())
    }
}

/// How to format a namespace (NVMe 1.4 §5.23). Always without metadata and end-to-end protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatOptions {
    /// Index into the namespace's LBA formats.
    pub lba_format: u8,
    /// What is done about the old data beyond making it unreadable.
    pub secure_erase: SecureErase,
    /// Time that the controller is given. A controller that takes longer is reset.
    pub timeout: Duration,
}

impl Default for FormatOptions {
    fn default() -> Self {
        Self { lba_format: 0, secure_erase: SecureErase::NONE, timeout: FORMAT_TIMEOUT }
    }
}

/// Format.
impl Controller {
    /// Formats a namespace. **This destroys all data on it**, and on every other namespace where the controller formats or
    /// erases only all at once (FNA, NVMe 1.4 §5.23). Reads the namespaces again afterwards. Meanwhile everybody else goes on,
    /// but for queues on a namespace that is touched, which cannot be opened.
    ///
    /// # Errors
    /// Nothing was done if the controller lacks the command or the erase, the namespace or format does not exist, the driver
    /// could not use the namespace afterwards, or a queue is open on a namespace that would be touched. Otherwise what
    /// is left of the data is unknown.
    pub fn format_nvm(&self, nsid: NamespaceId, options: &FormatOptions) -> Result<(), FormatError> {
        let info = self.info();
        let fna = info.raw.fna();
        if !info.raw.oacs().contains(Oacs::FORMAT) {
            return Err(CommandError::Unsupported("Format NVM (OACS)").into());
        }
        match options.secure_erase {
            SecureErase::NONE | SecureErase::USER_DATA => {}
            SecureErase::CRYPTOGRAPHIC if fna.contains(Fna::CRYPTOGRAPHIC_ERASE) => {}
            SecureErase::CRYPTOGRAPHIC => {
                return Err(CommandError::Unsupported("cryptographic erase (FNA)").into());
            }
            _ => return Err(CommandError::Argument("unknown secure erase setting").into()),
        }
        let touches_all = fna.contains(Fna::FORMAT_ALL)
            || options.secure_erase != SecureErase::NONE && fna.contains(Fna::ERASE_ALL);
        let shared = &self.shared;
        let mut admin = shared.lock_running();
        shared.check_format(nsid, options.lba_format)?;
        if let Some(Formatting { nsid, .. }) = admin.formatting {
            return Err(FormatError::Formatting(nsid.get()));
        }
        let formatting = Formatting { nsid, touches_all };
        let user = admin.users.values().find(|&&user| formatting.touches(user));
        if let Some(user) = user {
            return Err(FormatError::InUse(user.get()));
        }
        let dw10 = FormatDw10::new().with_format_index(options.lba_format).with_ses(options.secure_erase.0);
        let entry = SubmissionEntry::format_nvm(nsid, dw10);
        tracing::warn!(device = %shared.name, %nsid, format = options.lba_format, "formatting");
        let pulse = shared.link.health.pulse();
        let command = shared.report(admin.queue.begin(&shared.link, entry))?;
        admin.formatting = Some(formatting);
        drop(admin);
        let (mut admin, outcome) = shared.await_long(pulse, command, entry.opcode, options.timeout);
        admin.formatting = None;
        // Whatever came of it: what is known of the namespaces may be wrong now.
        let rescanned = match &outcome {
            Err(AdminError::Failed(_)) => Ok(()),
            _ => shared.rescan(&mut admin),
        };
        outcome?;
        rescanned.map_err(|problem| {
            let text = problem.to_string();
            if let Problem::Admin(AdminError::Failed(fault)) = problem {
                shared.fail(fault);
            }
            FormatError::Rescan(text)
        })
    }
}

/// A format under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Formatting {
    nsid: NamespaceId,
    touches_all: bool,
}

impl Formatting {
    pub(super) fn touches(self, nsid: NamespaceId) -> bool {
        self.touches_all || self.nsid == nsid
    }
}

impl Shared {
    /// Waits for the command of [`AdminQueue::begin`](crate::admin::AdminQueue::begin), which was sent at `pulse`, and lets others
    /// use the admin queue meanwhile. What ends the controller or makes a reset necessary is reported; a reset that came in between
    /// has ended the command.
    fn await_long(
        &self,
        pulse: Pulse,
        command: CommandId,
        opcode: u8,
        timeout: Duration,
    ) -> (MutexGuard<'_, Admin>, Result<u32, AdminError>) {
        let link = &self.link;
        let start = link.timing.now();
        let mut next_look = start + STATUS_INTERVAL;
        let mut backoff = Backoff::new();
        loop {
            let mut admin = self.lock_admin();
            if link.health.pulse() != pulse {
                let fault = link.health.cause().unwrap_or(Fault::ShutDown);
                return (admin, Err(AdminError::Failed(fault)));
            }
            let now = link.timing.now();
            let mut outcome = admin.queue.finished(opcode);
            if outcome.is_none() && now >= start + timeout {
                let fault = timeout_fault(link, QueueId::ADMIN, command, opcode, timeout);
                outcome = Some(Err(AdminError::Failed(fault)));
            } else if outcome.is_none() && now >= next_look {
                next_look = now + STATUS_INTERVAL;
                outcome = link.check_status().err().map(|fault| Err(AdminError::Failed(fault)));
            }
            if let Some(outcome) = outcome {
                return (admin, self.report(outcome));
            }
            drop(admin);
            backoff.wait(&*link.timing);
        }
    }

    fn check_format(&self, nsid: NamespaceId, index: u8) -> Result<(), FormatError> {
        let namespaces = self.namespaces();
        let entry = namespaces.iter().find(|entry| entry.nsid == nsid);
        let entry = entry.ok_or(FormatError::NoSuchNamespace(nsid.get()))?;
        let formats = entry.raw.formats();
        let format = formats.get(usize::from(index)).ok_or(FormatError::NoSuchFormat {
            nsid: nsid.get(),
            index,
            formats: formats.len(),
        })?;
        let useless = |problem| Err(FormatError::UselessFormat { index, problem });
        if !(MIN_LBA_SHIFT..=MAX_LBA_SHIFT).contains(&format.lbads) {
            return useless(NamespaceProblem::BlockSize(format.lbads));
        }
        if format.ms.get() != 0 {
            return useless(NamespaceProblem::Metadata(format.ms.get()));
        }
        Ok(())
    }
}
