//! Log pages (§5.14.1).

use bitfield_struct::bitfield;
use bitflags::bitflags;
use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ids::{CommandId, NamespaceId, QueueId};
use crate::opcode::{AdminOpcode, NvmOpcode};
use crate::open_enum::open_enum;
use crate::status::Status;

pub use crate::event::AsyncEvent;

open_enum! {
    /// Log page identifier, LID (§5.14.1).
    pub struct LogPageId(u8) {
        SUPPORTED = 0x00, "Supported Log Pages";
        ERROR = 0x01, "Error Information";
        SMART = 0x02, "SMART / Health Information";
        FIRMWARE_SLOT = 0x03, "Firmware Slot Information";
        CHANGED_NAMESPACES = 0x04, "Changed Namespace List";
        COMMAND_EFFECTS = 0x05, "Commands Supported and Effects";
        DEVICE_SELF_TEST = 0x06, "Device Self-test";
        TELEMETRY_HOST = 0x07, "Telemetry Host-Initiated";
        TELEMETRY_CONTROLLER = 0x08, "Telemetry Controller-Initiated";
        ENDURANCE_GROUP = 0x09, "Endurance Group Information";
        PREDICTABLE_LATENCY_PER_SET = 0x0a, "Predictable Latency Per NVM Set";
        PREDICTABLE_LATENCY_AGGREGATE = 0x0b, "Predictable Latency Event Aggregate";
        ASYMMETRIC_NAMESPACE_ACCESS = 0x0c, "Asymmetric Namespace Access";
        PERSISTENT_EVENT = 0x0d, "Persistent Event Log";
        LBA_STATUS = 0x0e, "LBA Status Information";
        ENDURANCE_GROUP_AGGREGATE = 0x0f, "Endurance Group Event Aggregate";
        FEATURE_EFFECTS = 0x12, "Feature Identifiers Supported and Effects";
        RESERVATION = 0x80, "Reservation Notification";
        SANITIZE = 0x81, "Sanitize Status";
    }
}

/// An entry of the Error Information log page, 64 bytes (§5.14.1.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ErrorEntry {
    /// Unique number of the error; 0 marks an unused entry.
    pub error_count: U64,
    /// Submission queue of the command.
    pub sq_id: U16,
    /// The command.
    pub cid: U16,
    /// Status and phase as in the completion.
    pub status_phase: U16,
    /// Byte (bits 7:0) and bit (10:8) of the command that is at fault; 0xffff if none.
    pub parameter_location: U16,
    /// First logical block that failed.
    pub lba: U64,
    /// Namespace.
    pub nsid: U32,
    /// Vendor specific log page with more, or 0.
    pub vendor_page: u8,
    /// Transport type.
    pub transport: u8,
    /// Reserved.
    pub reserved_30: [u8; 2],
    /// Command specific.
    pub command_specific: U64,
    /// Transport specific.
    pub transport_specific: U16,
    /// Reserved.
    pub reserved_42: [u8; 22],
}

const _: () = {
    assert!(size_of::<ErrorEntry>() == 64);
    assert!(offset_of!(ErrorEntry, nsid) == 24);
    assert!(offset_of!(ErrorEntry, command_specific) == 32);
};

impl ErrorEntry {
    /// [`Self::parameter_location`] where no byte of the command is at fault.
    pub const NO_PARAMETER: u16 = 0xffff;

    /// Whether the entry holds an error.
    pub fn is_used(&self) -> bool {
        self.error_count.get() != 0
    }

    /// The status that the command completed with.
    pub fn status(&self) -> Status {
        Status::from(self.status_phase.get() >> 1)
    }

    /// The command.
    pub fn command_id(&self) -> CommandId {
        CommandId::new(self.cid.get())
    }

    /// Its submission queue.
    pub fn queue_id(&self) -> QueueId {
        QueueId::new(self.sq_id.get())
    }
}

bitflags! {
    /// Critical warnings of the SMART / Health log page (§5.14.1.2).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CriticalWarning: u8 {
        /// Available spare below its threshold.
        const SPARE = 1 << 0;
        /// Temperature beyond a threshold.
        const TEMPERATURE = 1 << 1;
        /// Reliability degraded.
        const RELIABILITY = 1 << 2;
        /// Medium is read-only.
        const READ_ONLY = 1 << 3;
        /// Backup of the volatile memory failed.
        const BACKUP = 1 << 4;
        /// Persistent memory region read-only or unreliable.
        const PMR = 1 << 5;
        const _ = !0;
    }
}

/// SMART / Health Information log page, 512 bytes (§5.14.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SmartLog {
    /// Critical warnings, see [`CriticalWarning`].
    pub critical_warning: u8,
    /// Composite temperature in kelvins.
    pub temperature: U16,
    /// Available spare in percent.
    pub available_spare: u8,
    /// Available spare threshold in percent.
    pub spare_threshold: u8,
    /// Percentage of the endurance used; may exceed 100.
    pub percentage_used: u8,
    /// Endurance group critical warnings.
    pub endurance_warning: u8,
    /// Reserved.
    pub reserved_7: [u8; 25],
    /// Data read, in units of 1,000 × 512 bytes, rounded up.
    pub data_units_read: U128,
    /// Data written, in units of 1,000 × 512 bytes, rounded up.
    pub data_units_written: U128,
    /// Read commands.
    pub host_reads: U128,
    /// Write commands.
    pub host_writes: U128,
    /// Minutes the controller was busy.
    pub busy_minutes: U128,
    /// Power cycles.
    pub power_cycles: U128,
    /// Power-on hours.
    pub power_on_hours: U128,
    /// Shutdowns without notification.
    pub unsafe_shutdowns: U128,
    /// Media and data integrity errors.
    pub media_errors: U128,
    /// Entries ever written to the error log.
    pub error_entries: U128,
    /// Minutes above the warning temperature.
    pub warning_temperature_minutes: U32,
    /// Minutes above the critical temperature.
    pub critical_temperature_minutes: U32,
    /// Temperature sensors 1 to 8 in kelvins; 0 if absent.
    pub temperature_sensors: [U16; 8],
    /// Transitions to thermal management temperature 1.
    pub thermal_1_count: U32,
    /// Transitions to thermal management temperature 2.
    pub thermal_2_count: U32,
    /// Seconds at thermal management temperature 1.
    pub thermal_1_seconds: U32,
    /// Seconds at thermal management temperature 2.
    pub thermal_2_seconds: U32,
    /// Reserved.
    pub reserved_232: [u8; 280],
}

const _: () = {
    assert!(size_of::<SmartLog>() == 512);
    assert!(offset_of!(SmartLog, data_units_read) == 32);
    assert!(offset_of!(SmartLog, error_entries) == 176);
    assert!(offset_of!(SmartLog, temperature_sensors) == 200);
};

/// Firmware Slot Information log page, 512 bytes (§5.14.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FirmwareSlotLog {
    /// Active firmware: bits 2:0 the running slot, bits 6:4 the slot of the next reset.
    pub afi: u8,
    /// Reserved.
    pub reserved_1: [u8; 7],
    /// Revisions in slots 1 to 7; zeroes where a slot is empty.
    pub revisions: [[u8; 8]; 7],
    /// Reserved.
    pub reserved_64: [u8; 448],
}

const _: () = assert!(size_of::<FirmwareSlotLog>() == 512);

impl FirmwareSlotLog {
    /// The slot that the running firmware was loaded from.
    pub fn active_slot(&self) -> u8 {
        self.afi & 7
    }

    /// The slot that is activated at the next controller level reset; 0 if none is.
    pub fn next_slot(&self) -> u8 {
        self.afi >> 4 & 7
    }
}

/// Bytes of the Changed Namespace List log page (§5.14.1.4).
pub const CHANGED_NAMESPACES_BYTES: usize = 4096;

/// Changed Namespace List log page: identifiers in ascending order, zero-filled. A first entry of 0xffffffff says that more
/// changed than fit (§5.14.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ChangedNamespaces {
    /// The identifiers.
    pub ids: [U32; 1024],
}

const _: () = assert!(size_of::<ChangedNamespaces>() == CHANGED_NAMESPACES_BYTES);

impl ChangedNamespaces {
    /// More changed than the list holds: everything is to be looked at anew.
    pub fn overflowed(&self) -> bool {
        self.ids[0].get() == u32::MAX
    }

    /// The namespaces listed; none if the list overflowed. Their order is as the controller gave it.
    pub fn iter(&self) -> impl Iterator<Item = NamespaceId> + '_ {
        let ids = self.ids.iter().map(|id| id.get());
        ids.take_while(|&id| id != 0 && id != u32::MAX).map(NamespaceId::new)
    }
}

/// What a command does beyond its own data: an entry of the Commands Supported and Effects log page (§5.14.1.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CommandEffects {
    /// The command is supported.
    pub supported: bool,
    /// It may change logical blocks' contents.
    pub content_change: bool,
    /// It may change a namespace's capability.
    pub namespace_capability_change: bool,
    /// It may change the number or capability of namespaces.
    pub namespace_inventory_change: bool,
    /// It may change the controller's capability.
    pub controller_capability_change: bool,
    #[bits(11)]
    __: u16,
    /// What else may be submitted meanwhile: 0 anything, 1 nothing to the namespace, 2 nothing.
    #[bits(3)]
    pub submission_restriction: u8,
    /// It takes a UUID index.
    pub uuid_selection: bool,
    /// Scope (2.0): bit 0 namespace, 1 controller, 2 NVM set, 3 endurance group, 4 domain, 5 subsystem.
    #[bits(12)]
    pub scope: u16,
}

/// Commands Supported and Effects log page, 4096 bytes (§5.14.1.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CommandEffectsLog {
    /// Admin commands, by opcode.
    pub admin: [U32; 256],
    /// I/O commands, by opcode.
    pub io: [U32; 256],
    /// Reserved.
    pub reserved_2048: [u8; 2048],
}

const _: () = {
    assert!(size_of::<CommandEffectsLog>() == 4096);
    assert!(offset_of!(CommandEffectsLog, io) == 1024);
};

impl CommandEffectsLog {
    /// What an admin command does.
    pub fn admin(&self, opcode: AdminOpcode) -> CommandEffects {
        self.admin[usize::from(opcode.0)].get().into()
    }

    /// What an I/O command does.
    pub fn io(&self, opcode: NvmOpcode) -> CommandEffects {
        self.io[usize::from(opcode.0)].get().into()
    }
}

/// Supported Log Pages log page, 1024 bytes (2.0 §5.16.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SupportedLogPages {
    /// By identifier: bit 0 supported, bit 1 index offsets supported.
    pub pages: [U32; 256],
}

const _: () = assert!(size_of::<SupportedLogPages>() == 1024);

impl SupportedLogPages {
    /// Whether a page can be read.
    pub fn contains(&self, page: LogPageId) -> bool {
        self.pages[usize::from(page.0)].get() & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn an_overflowed_list_names_nothing() {
        let mut list = ChangedNamespaces::new_zeroed();
        list.ids[0].set(3);
        list.ids[1].set(9);
        assert!(!list.overflowed());
        assert!(list.iter().eq([NamespaceId::new(3), NamespaceId::new(9)]));
        list.ids[0].set(u32::MAX);
        assert!(list.overflowed());
        assert_eq!(list.iter().count(), 0);
    }

    #[test]
    fn effects_are_found_by_opcode() {
        let mut log = CommandEffectsLog::new_zeroed();
        let format = CommandEffects::new().with_supported(true).with_content_change(true);
        log.admin[0x80].set(format.with_submission_restriction(1).into());
        assert_eq!(log.admin[0x80].get(), 3 | 1 << 16);
        assert!(log.admin(AdminOpcode::FORMAT_NVM).supported());
        assert!(!log.io(NvmOpcode::READ).supported());
        assert_eq!(u32::from(CommandEffects::new().with_scope(1)), 1 << 20);
    }
}
