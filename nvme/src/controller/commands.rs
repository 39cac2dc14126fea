//! Admin commands for whoever holds a controller: log pages and identify data. Features and formats are next door.
//!
//! Owns: [`CommandError`] and these methods of [`Controller`]. Each blocks until the controller has
//! answered, after a reset that is under way.
//!
//! Invariants:
//! - data moves through the admin queue's own page of 4 KiB, in as many commands as that takes, so no limit of the
//!   controller (MDTS) is ever met and no memory of a caller is given to it;
//! - log pages are read without acknowledging the events behind them: that is the keeper's.
//!
//! Excludes: commands that give the controller memory to keep (host memory buffer), or take it from its owner (queue
//! numbers).

use nvme_spec::command::GetLogPage;
use nvme_spec::identify::{Cns, Lpa, NamespaceIdType, namespace_descriptors};
use nvme_spec::log::{
    ChangedNamespaces, CommandEffectsLog, ErrorEntry, FirmwareSlotLog, LogPageId, SmartLog,
};
use nvme_spec::registers::Version;
use nvme_spec::{IDENTIFY_BYTES, NamespaceId, SubmissionEntry};
use thiserror::Error;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::Controller;
use crate::admin::{AdminError, AdminQueue};
use crate::handshake::Link;
use crate::identity::ControllerInfo;

/// Bytes of a log page that are read at once.
pub(super) const PIECE: usize = IDENTIFY_BYTES;

/// Why an admin command on behalf of a caller failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CommandError {
    /// The controller refused it, or failed.
    #[error("{0}")]
    Admin(#[from] AdminError),
    /// The controller says that it lacks what this takes.
    #[error("the controller does not support {0}")]
    Unsupported(&'static str),
    /// The caller asked for something that cannot be.
    #[error("{0}")]
    Argument(&'static str),
}

/// An identifier of a namespace (§5.15.2.4).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NamespaceUid {
    /// IEEE extended unique identifier.
    Eui64([u8; 8]),
    /// Namespace globally unique identifier.
    Nguid([u8; 16]),
    /// UUID.
    Uuid([u8; 16]),
    /// I/O command set; 0 is NVM (2.0).
    CommandSet(u8),
    /// Something else, or of a length that it should not have.
    Other(NamespaceIdType, Vec<u8>),
}

/// Log pages.
impl Controller {
    /// Fills `data` from `offset` bytes into a log page on (§5.14). Events that the page describes stay pending.
    ///
    /// # Errors
    /// `offset` or length is not a multiple of 4; `offset` or length beyond 4 KiB needs extended data, which the controller
    /// lacks (LPA); the controller refused the command, or failed.
    pub fn read_log(
        &self,
        page: LogPageId,
        nsid: NamespaceId,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), CommandError> {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return Err(CommandError::Argument("log pages are read in units of 4 bytes"));
        }
        if offset.checked_add(data.len() as u64).is_none() {
            return Err(CommandError::Argument("the range of the log page wraps around"));
        }
        let extended = self.info().raw.lpa().contains(Lpa::EXTENDED_DATA);
        if !extended && (offset > 0 || data.len() > PIECE) {
            return Err(CommandError::Unsupported("offsets in log pages (LPA)"));
        }
        let mut at = offset;
        for piece in data.chunks_mut(PIECE) {
            let request = GetLogPage {
                lid: page,
                dwords_z: (piece.len() / 4 - 1) as u32,
                offset: at,
                retain_event: true,
            };
            let read = self.shared.command(|queue, link| {
                queue.execute_with_data(link, SubmissionEntry::get_log_page(nsid, request))?;
                Ok(queue.copy_data::<[u8; PIECE]>())
            })?;
            piece.copy_from_slice(&read[..piece.len()]);
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn read_log_as<T: FromBytes + IntoBytes>(&self, page: LogPageId) -> Result<Box<T>, CommandError> {
        let mut value = Box::new(T::new_zeroed());
        self.read_log(page, NamespaceId::BROADCAST, 0, value.as_mut().as_mut_bytes())?;
        Ok(value)
    }

    /// The errors that the controller remembers, newest first (§5.14.1.1). As many as a command can fetch, if the
    /// controller lacks extended log data.
    ///
    /// # Errors
    /// As [`read_log`](Self::read_log).
    pub fn error_log(&self) -> Result<Vec<ErrorEntry>, CommandError> {
        let extended = self.info().raw.lpa().contains(Lpa::EXTENDED_DATA);
        let most = if extended { usize::MAX } else { PIECE / size_of::<ErrorEntry>() };
        let mut entries = vec![ErrorEntry::default(); (usize::from(self.info().raw.elpe_z) + 1).min(most)];
        self.read_log(LogPageId::ERROR, NamespaceId::BROADCAST, 0, entries.as_mut_bytes())?;
        entries.retain(ErrorEntry::is_used);
        Ok(entries)
    }

    /// The SMART / Health log page of one namespace (§5.14.1.2).
    ///
    /// # Errors
    /// The controller keeps none for namespaces (LPA); otherwise as [`read_log`](Self::read_log).
    pub fn namespace_smart_log(&self, nsid: NamespaceId) -> Result<Box<SmartLog>, CommandError> {
        if !self.info().raw.lpa().contains(Lpa::SMART_PER_NAMESPACE) {
            return Err(CommandError::Unsupported("health logs of namespaces (LPA)"));
        }
        let mut log = Box::new(SmartLog::new_zeroed());
        self.read_log(LogPageId::SMART, nsid, 0, log.as_mut().as_mut_bytes())?;
        Ok(log)
    }

    /// What is in the firmware slots (§5.14.1.3).
    ///
    /// # Errors
    /// As [`read_log`](Self::read_log).
    pub fn firmware_log(&self) -> Result<Box<FirmwareSlotLog>, CommandError> {
        self.read_log_as(LogPageId::FIRMWARE_SLOT)
    }

    /// Namespaces that changed since the keeper last took note (§5.14.1.4): mostly none, since it takes note at once.
    ///
    /// # Errors
    /// As [`read_log`](Self::read_log).
    pub fn changed_namespaces(&self) -> Result<Box<ChangedNamespaces>, CommandError> {
        self.read_log_as(LogPageId::CHANGED_NAMESPACES)
    }

    /// The commands that the controller knows, and what they do (§5.14.1.5).
    ///
    /// # Errors
    /// The controller does not tell (LPA); otherwise as [`read_log`](Self::read_log).
    pub fn command_effects(&self) -> Result<Box<CommandEffectsLog>, CommandError> {
        if !self.info().raw.lpa().contains(Lpa::COMMAND_EFFECTS) {
            return Err(CommandError::Unsupported("the commands supported and effects log (LPA)"));
        }
        self.read_log_as(LogPageId::COMMAND_EFFECTS)
    }
}

/// Identify.
impl Controller {
    /// An Identify data structure as the controller gives it (§5.15).
    ///
    /// # Errors
    /// The controller refused the command, or failed.
    pub fn identify(&self, cns: Cns, nsid: NamespaceId) -> Result<Box<[u8; IDENTIFY_BYTES]>, CommandError> {
        Ok(self.shared.command(|queue, link| {
            queue.execute_with_data(link, SubmissionEntry::identify(cns, nsid))?;
            Ok(queue.copy_data())
        })?)
    }

    /// The identifiers of a namespace (§5.15.2.4). What the controller leaves out, or says wrongly, is left out.
    ///
    /// # Errors
    /// The controller refused the command (before 1.3 they all do), or failed.
    pub fn namespace_uids(&self, nsid: NamespaceId) -> Result<Vec<NamespaceUid>, CommandError> {
        let list = self.identify(Cns::NAMESPACE_DESCRIPTORS, nsid)?;
        Ok(namespace_descriptors(&list[..]).map(|(kind, id)| namespace_uid(kind, id)).collect())
    }
}

fn namespace_uid(kind: NamespaceIdType, id: &[u8]) -> NamespaceUid {
    let known = match kind {
        NamespaceIdType::EUI64 => id.try_into().ok().map(NamespaceUid::Eui64),
        NamespaceIdType::NGUID => id.try_into().ok().map(NamespaceUid::Nguid),
        NamespaceIdType::UUID => id.try_into().ok().map(NamespaceUid::Uuid),
        NamespaceIdType::CSI => match id {
            &[command_set] => Some(NamespaceUid::CommandSet(command_set)),
            _ => None,
        },
        _ => None,
    };
    known.unwrap_or_else(|| NamespaceUid::Other(kind, id.to_vec()))
}

/// Limits of the NVM command set's own commands (2.0), where the controller tells them.
pub(crate) fn command_set_limits(
    link: &Link,
    admin: &mut AdminQueue,
    info: &mut ControllerInfo,
) -> Result<(), AdminError> {
    if info.version < Version::V2_0 {
        return Ok(());
    }
    let entry = SubmissionEntry::identify_command_set(Cns::CONTROLLER_COMMAND_SET, NamespaceId::NONE, 0);
    match admin.execute_with_data(link, entry) {
        Ok(_) => {
            info.apply_limits(&admin.copy_data());
            Ok(())
        }
        // Controllers with no other command set need not know it (2.0 §5.17.2).
        Err(AdminError::Status { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
