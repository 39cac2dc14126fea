//! From a controller in any state to one that is enabled and identified: the first time, and after each reset.
//!
//! Owns: [`BringUpError`], the order of the steps, and what is asked of a controller beside the handshake.
//!
//! Invariants: when bring-up fails, the controller was proven to have let go of the memory that it was given, or that memory
//! is never released.
//!
//! Excludes: the register handshake itself (`handshake`), I/O queues.

use nvme_spec::feature::{AsyncEventConfiguration, FeatureId, NumberOfQueues};
use nvme_spec::identify::{Cns, IdentifyNamespace, Oacs, Oaes};
use nvme_spec::registers::{self, Cap, Doorbell, doorbell_offset};
use nvme_spec::{AdminOpcode, IDENTIFY_BYTES, NamespaceId, QueueId, SubmissionEntry};
use thiserror::Error;
use zerocopy::FromZeros;

use crate::admin::{AdminError, AdminQueue};
use crate::controller::{ControllerOptions, DEFAULT_QUEUES, MAX_NAMESPACES, command_set_limits};
use crate::handshake::{HandshakeError, Link};
use crate::identity::{
    ControllerInfo, IdentityError, Namespace, NamespaceEntry, NamespaceProblem, check_command_set,
    check_namespace_list,
};
use crate::shadow::ShadowMemory;
use crate::transport::TransportError;

/// Asynchronous events that the driver wants: every critical warning, namespace and firmware notices (§5.21.1.11).
const WANTED_WARNINGS: u8 = 0x1f;

/// Why a controller could not be brought up.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BringUpError {
    /// Registers.
    #[error("{device}: {source}")]
    Handshake {
        /// Device name.
        device: String,
        /// What went wrong.
        source: HandshakeError,
    },
    /// DMA memory.
    #[error("{device}: {source}")]
    Transport {
        /// Device name.
        device: String,
        /// What went wrong.
        source: TransportError,
    },
    /// Admin commands.
    #[error("{device}: {source}")]
    Admin {
        /// Device name.
        device: String,
        /// What went wrong.
        source: AdminError,
    },
    /// No thread for the controller's keeper.
    #[error("{device}: cannot start a thread: {reason}")]
    Keeper {
        /// Device name.
        device: String,
        /// The system's words.
        reason: String,
    },
    /// Identify data.
    #[error("{device}: {source}")]
    Identity {
        /// Device name.
        device: String,
        /// What went wrong.
        source: IdentityError,
    },
}

pub(crate) enum Problem {
    Handshake(HandshakeError),
    Transport(TransportError),
    Admin(AdminError),
    Identity(IdentityError),
}

impl Problem {
    pub(crate) fn named(self, device: String) -> BringUpError {
        match self {
            Problem::Handshake(source) => BringUpError::Handshake { device, source },
            Problem::Transport(source) => BringUpError::Transport { device, source },
            Problem::Admin(source) => BringUpError::Admin { device, source },
            Problem::Identity(source) => BringUpError::Identity { device, source },
        }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Problem::Handshake(source) => source.fmt(f),
            Problem::Transport(source) => source.fmt(f),
            Problem::Admin(source) => source.fmt(f),
            Problem::Identity(source) => source.fmt(f),
        }
    }
}

macro_rules! problem_from {
    ($($Variant:ident($Error:ty)),*) => {
        $(impl From<$Error> for Problem {
            fn from(error: $Error) -> Self {
                Problem::$Variant(error)
            }
        })*
    };
}
problem_from!(
    Handshake(HandshakeError),
    Transport(TransportError),
    Admin(AdminError),
    Identity(IdentityError)
);

/// What bring-up comes to.
pub(crate) struct Found {
    pub(crate) admin: AdminQueue,
    pub(crate) info: ControllerInfo,
    pub(crate) namespaces: Vec<NamespaceEntry>,
    pub(crate) granted: u16,
    pub(crate) shadow: Option<ShadowMemory>,
}

/// Brings a controller up for the first time.
pub(crate) fn run(link: &Link, options: &ControllerOptions) -> Result<Found, Problem> {
    let (cap, version) = link.capabilities()?;
    link.disable(cap)?;
    let mut admin = AdminQueue::new(link, cap)?;
    let mut shadow = None;
    // The smallest page that the controller offers: DMA memory is contiguous anyway, and data starts on any of them.
    let page_shift = 12 + cap.mpsmin();
    let mut steps = || -> Result<_, Problem> {
        link.enable(cap, page_shift, admin.addresses())?;
        let raw = admin.identify_controller(link)?;
        let mut info = ControllerInfo::check(cap, version, 1 << page_shift, raw)?;
        command_set_limits(link, &mut admin, &mut info)?;
        let namespaces = list_namespaces(link, &mut admin, &info)?;
        if info.raw.oacs().contains(Oacs::DOORBELL_BUFFER) {
            shadow = Some(ShadowMemory::new(&*link.transport, info.page_size as usize)?);
        }
        let granted = set_up(link, &mut admin, &info, options, shadow.as_ref())?;
        Ok((info, namespaces, granted))
    };
    match steps() {
        Ok((info, namespaces, granted)) => Ok(Found { admin, info, namespaces, granted, shadow }),
        Err(problem) => {
            // The admin queue's memory is about to go: the controller must have let go of it.
            let stopped = link.disable(cap);
            if !matches!(stopped, Ok(()) | Err(HandshakeError::Removed { .. }))
                && link.transport.revoke_dma().is_err()
            {
                admin.leak();
                std::mem::forget(shadow);
            }
            Err(problem)
        }
    }
}

/// What every bring-up asks of an enabled controller, in this order. Returns the I/O queue pairs that can be used.
pub(crate) fn set_up(
    link: &Link,
    admin: &mut AdminQueue,
    info: &ControllerInfo,
    options: &ControllerOptions,
    shadow: Option<&ShadowMemory>,
) -> Result<u16, Problem> {
    let mut queues = request_queues(link, admin, info.cap, options)?;
    if let Some(shadow) = shadow {
        let (values, events) = shadow.addresses();
        let mut entry =
            SubmissionEntry { opcode: AdminOpcode::DOORBELL_BUFFER_CONFIG.0, ..SubmissionEntry::default() };
        entry.prp1.set(values);
        entry.prp2.set(events);
        admin.execute(link, entry)?;
        queues = queues.min(shadow.queues(info.cap.dstrd()));
    }
    if info.raw.crdt.iter().any(|delay| delay.get() != 0) {
        optional(admin.enable_retry_delays(link))?;
    }
    let oaes = info.raw.oaes();
    let wanted = AsyncEventConfiguration::new()
        .with_smart(WANTED_WARNINGS)
        .with_namespace_attributes(oaes.contains(Oaes::NAMESPACE_ATTRIBUTE))
        .with_firmware_activation(oaes.contains(Oaes::FIRMWARE_ACTIVATION));
    let entry = SubmissionEntry::set_features(FeatureId::ASYNC_EVENT_CONFIGURATION, wanted.into());
    optional(admin.execute(link, entry))?;
    admin.arm_events(info.raw.aerl_z);
    Ok(queues)
}

/// A refusal is put up with, a failure is not.
fn optional(outcome: Result<u32, AdminError>) -> Result<(), AdminError> {
    match outcome {
        Ok(_) => Ok(()),
        Err(AdminError::Status { opcode, status }) => {
            tracing::debug!(%opcode, %status, "the controller does without");
            Ok(())
        }
        Err(failed) => Err(failed),
    }
}

/// The active namespaces, each with its Identify data.
pub(crate) fn list_namespaces(
    link: &Link,
    admin: &mut AdminQueue,
    info: &ControllerInfo,
) -> Result<Vec<NamespaceEntry>, Problem> {
    let mut namespaces = Vec::new();
    for nsid in active_namespaces(link, admin, info)? {
        let command_set = command_set(link, admin, info, nsid)?;
        let raw = match admin.identify_namespace(link, nsid) {
            Ok(raw) => raw,
            // A namespace without blocks has none of this to tell (2.0 §5.17.2.1).
            Err(AdminError::Status { .. }) if command_set.is_err() => {
                Box::new(IdentifyNamespace::new_zeroed())
            }
            Err(error) => return Err(error.into()),
        };
        let checked = command_set.and_then(|()| Namespace::check(nsid, &raw, info.max_transfer));
        namespaces.push(NamespaceEntry { nsid, raw, checked });
    }
    Ok(namespaces)
}

/// Whether a namespace is of the NVM command set. Controllers that know no other are not asked: some older ones answer badly.
fn command_set(
    link: &Link,
    admin: &mut AdminQueue,
    info: &ControllerInfo,
    nsid: NamespaceId,
) -> Result<Result<(), NamespaceProblem>, AdminError> {
    if info.cap.css() & Cap::CSS_SEVERAL == 0 {
        return Ok(Ok(()));
    }
    let entry = SubmissionEntry::identify(Cns::NAMESPACE_DESCRIPTORS, nsid);
    match admin.execute_with_data(link, entry) {
        Ok(_) => Ok(check_command_set(&admin.copy_data::<[u8; IDENTIFY_BYTES]>()[..])),
        Err(AdminError::Status { status, .. }) => {
            tracing::debug!(%nsid, %status, "the controller names no command set: taken for NVM");
            Ok(Ok(()))
        }
        Err(error) => Err(error),
    }
}

fn active_namespaces(
    link: &Link,
    admin: &mut AdminQueue,
    info: &ControllerInfo,
) -> Result<Vec<NamespaceId>, Problem> {
    let mut all: Vec<NamespaceId> = Vec::new();
    loop {
        let after = all.last().map_or(NamespaceId::NONE, |last| *last);
        // Identifiers above 0xfffffffd cannot be asked for (§5.15.2.3).
        if after.get() >= 0xffff_fffe {
            return Ok(all);
        }
        let page = admin.active_namespaces(link, after)?;
        let ids = page.ids.iter().map(|id| id.get());
        let found = check_namespace_list(ids, after.get(), info.nn)?;
        let last_page = found.len() < page.ids.len();
        all.extend(found);
        if all.len() > MAX_NAMESPACES {
            return Err(IdentityError::TooManyNamespaces(MAX_NAMESPACES).into());
        }
        if last_page {
            return Ok(all);
        }
    }
}

fn request_queues(
    link: &Link,
    admin: &mut AdminQueue,
    cap: Cap,
    options: &ControllerOptions,
) -> Result<u16, Problem> {
    let wanted = options.queues.unwrap_or(DEFAULT_QUEUES).clamp(1, u16::MAX - 1);
    let asked = NumberOfQueues::new().with_submission_z(wanted - 1).with_completion_z(wanted - 1);
    let entry = SubmissionEntry::set_features(FeatureId::NUMBER_OF_QUEUES, asked.into());
    let granted = NumberOfQueues::from(admin.execute(link, entry)?);
    let queues = u32::from(granted.submission_z().min(granted.completion_z())) + 1;
    // A controller may grant more than asked for; what was not asked for is not used.
    let queues = queues.min(u32::from(wanted)) as u16;
    Ok(queues.min(queues_with_doorbells(link.transport.bar_bytes(), cap.dstrd())))
}

/// Queue pairs whose doorbells lie within BAR0.
fn queues_with_doorbells(bar_bytes: u64, dstrd: u8) -> u16 {
    let end = |queue: u16| doorbell_offset(dstrd, QueueId::new(queue), Doorbell::CompletionHead) + 4;
    let room = bar_bytes.saturating_sub(registers::DOORBELL_BASE) / (2 * (4 << dstrd));
    let queues = room.saturating_sub(1).min(u64::from(u16::MAX - 1)) as u16;
    debug_assert!(queues == 0 || end(queues) <= bar_bytes);
    queues
}
