//! Features: identifiers, selectors and the values carried in dword 11 and in the completion's dword 0 (§5.21).

use bitfield_struct::bitfield;

use crate::open_enum::open_enum;

open_enum! {
    /// Feature identifier, FID (§5.21.1).
    pub struct FeatureId(u8) {
        ARBITRATION = 0x01, "Arbitration";
        POWER_MANAGEMENT = 0x02, "Power Management";
        LBA_RANGE_TYPE = 0x03, "LBA Range Type";
        TEMPERATURE_THRESHOLD = 0x04, "Temperature Threshold";
        ERROR_RECOVERY = 0x05, "Error Recovery";
        VOLATILE_WRITE_CACHE = 0x06, "Volatile Write Cache";
        NUMBER_OF_QUEUES = 0x07, "Number of Queues";
        INTERRUPT_COALESCING = 0x08, "Interrupt Coalescing";
        INTERRUPT_VECTOR_CONFIGURATION = 0x09, "Interrupt Vector Configuration";
        WRITE_ATOMICITY_NORMAL = 0x0a, "Write Atomicity Normal";
        ASYNC_EVENT_CONFIGURATION = 0x0b, "Asynchronous Event Configuration";
        AUTONOMOUS_POWER_STATE_TRANSITION = 0x0c, "Autonomous Power State Transition";
        HOST_MEMORY_BUFFER = 0x0d, "Host Memory Buffer";
        TIMESTAMP = 0x0e, "Timestamp";
        KEEP_ALIVE_TIMER = 0x0f, "Keep Alive Timer";
        HOST_CONTROLLED_THERMAL_MANAGEMENT = 0x10, "Host Controlled Thermal Management";
        NON_OPERATIONAL_POWER_STATE = 0x11, "Non-Operational Power State Config";
        HOST_BEHAVIOR_SUPPORT = 0x16, "Host Behavior Support";
        SOFTWARE_PROGRESS_MARKER = 0x80, "Software Progress Marker";
    }
}

open_enum! {
    /// Which value Get Features asks for, SEL (§5.13).
    pub struct FeatureSelect(u8) {
        CURRENT = 0, "current";
        DEFAULT = 1, "default";
        SAVED = 2, "saved";
        SUPPORTED_CAPABILITIES = 3, "supported capabilities";
    }
}

/// Supported capabilities, as Get Features returns them for [`FeatureSelect::SUPPORTED_CAPABILITIES`] (§5.13).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct FeatureCapabilities {
    /// The value can be saved across resets.
    pub saveable: bool,
    /// The value belongs to a namespace.
    pub namespace_specific: bool,
    /// The value can be changed.
    pub changeable: bool,
    #[bits(29)]
    __: u32,
}

/// Number of Queues (§5.21.1.7): asked for in dword 11, granted in the completion's dword 0. The admin queue is not
/// counted.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct NumberOfQueues {
    /// I/O submission queues, less one; 0xffff is invalid.
    pub submission_z: u16,
    /// I/O completion queues, less one; 0xffff is invalid.
    pub completion_z: u16,
}

/// Volatile Write Cache (§5.21.1.6).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct VolatileWriteCache {
    /// The cache is enabled.
    pub wce: bool,
    #[bits(31)]
    __: u32,
}

/// Arbitration (§5.21.1.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Arbitration {
    /// Arbitration burst: `1 << ab` commands, 7 is no limit.
    #[bits(3)]
    pub ab: u8,
    #[bits(5)]
    __: u8,
    /// Low priority weight, less one.
    pub lpw_z: u8,
    /// Medium priority weight, less one.
    pub mpw_z: u8,
    /// High priority weight, less one.
    pub hpw_z: u8,
}

/// Interrupt Coalescing (§5.21.1.8).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct InterruptCoalescing {
    /// Aggregation threshold in entries, less one.
    pub threshold_z: u8,
    /// Aggregation time in units of 100 µs.
    pub time: u8,
    __: u16,
}

/// Interrupt Vector Configuration (§5.21.1.9).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct InterruptVectorConfiguration {
    /// Interrupt vector.
    pub vector: u16,
    /// Coalescing disabled for the vector.
    pub coalescing_disable: bool,
    #[bits(15)]
    __: u16,
}

/// Asynchronous Event Configuration (§5.21.1.11).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AsyncEventConfiguration {
    /// SMART / health critical warnings to report, as in the log page's byte 0.
    pub smart: u8,
    /// Namespace attribute notices.
    pub namespace_attributes: bool,
    /// Firmware activation notices.
    pub firmware_activation: bool,
    #[bits(22)]
    __: u32,
}
