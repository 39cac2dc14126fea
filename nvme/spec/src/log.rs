//! Log pages (§5.14.1) and asynchronous events (§5.2).

use bitfield_struct::bitfield;
use bitflags::bitflags;
use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::open_enum::open_enum;

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
        PERSISTENT_EVENT = 0x0d, "Persistent Event Log";
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

/// Bytes of the Changed Namespace List log page: 1,024 identifiers in ascending order, zero-filled. A first entry of
/// 0xffffffff says that more changed than fit (§5.14.1.4).
pub const CHANGED_NAMESPACES_BYTES: usize = 4096;

/// Dword 0 of an Asynchronous Event Request's completion (§5.2.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AsyncEvent {
    /// Event type: 0 error, 1 SMART / health, 2 notice, 6 I/O command set, 7 vendor.
    #[bits(3)]
    pub event_type: u8,
    #[bits(5)]
    __: u8,
    /// Event information.
    pub information: u8,
    /// Log page that describes the event; reading it re-arms the event.
    pub log_page: u8,
    __: u8,
}
