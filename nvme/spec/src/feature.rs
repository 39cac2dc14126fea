//! Features: identifiers, selectors and the values carried in dword 11 and in the completion's dword 0 (§5.21).

use bitfield_struct::bitfield;
use core::mem::size_of;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

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
        READ_RECOVERY_LEVEL = 0x12, "Read Recovery Level Config";
        PREDICTABLE_LATENCY_CONFIG = 0x13, "Predictable Latency Mode Config";
        PREDICTABLE_LATENCY_WINDOW = 0x14, "Predictable Latency Mode Window";
        LBA_STATUS_ATTRIBUTES = 0x15, "LBA Status Information Attributes";
        HOST_BEHAVIOR_SUPPORT = 0x16, "Host Behavior Support";
        SANITIZE_CONFIG = 0x17, "Sanitize Config";
        ENDURANCE_GROUP_EVENT = 0x18, "Endurance Group Event Configuration";
        SOFTWARE_PROGRESS_MARKER = 0x80, "Software Progress Marker";
        HOST_IDENTIFIER = 0x81, "Host Identifier";
        RESERVATION_NOTIFICATION_MASK = 0x82, "Reservation Notification Mask";
        RESERVATION_PERSISTENCE = 0x83, "Reservation Persistence";
        NAMESPACE_WRITE_PROTECTION = 0x84, "Namespace Write Protection Config";
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
    /// Telemetry log notices.
    pub telemetry: bool,
    /// Asymmetric namespace access change notices.
    pub ana_change: bool,
    /// Predictable latency event aggregate log change notices.
    pub predictable_latency: bool,
    /// LBA status information notices.
    pub lba_status: bool,
    /// Endurance group event aggregate log change notices.
    pub endurance_group: bool,
    #[bits(17)]
    __: u32,
}

/// Power Management (§5.21.1.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct PowerManagement {
    /// Power state.
    #[bits(5)]
    pub ps: u8,
    /// Workload hint.
    #[bits(3)]
    pub wh: u8,
    #[bits(24)]
    __: u32,
}

open_enum! {
    /// Which temperature a threshold is for, TMPSEL (§5.21.1.4).
    pub struct TemperatureSelect(u8) {
        COMPOSITE = 0x0, "composite temperature";
        ALL = 0xf, "all sensors";
    }
}

impl TemperatureSelect {
    /// Temperature sensor 1 to 8.
    pub const fn sensor(number: u8) -> Self {
        Self(number & 0xf)
    }
}

open_enum! {
    /// Which threshold of a temperature, THSEL (§5.21.1.4).
    pub struct ThresholdSelect(u8) {
        OVER = 0, "over temperature";
        UNDER = 1, "under temperature";
    }
}

/// Temperature Threshold (§5.21.1.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct TemperatureThreshold {
    /// Threshold in kelvins.
    pub kelvin: u16,
    /// The temperature, see [`TemperatureSelect`].
    #[bits(4)]
    pub tmpsel: u8,
    /// The threshold, see [`ThresholdSelect`].
    #[bits(2)]
    pub thsel: u8,
    #[bits(10)]
    __: u16,
}

/// Error Recovery, of a namespace (§5.21.1.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ErrorRecovery {
    /// Time limited error recovery in units of 100 ms; 0 is no limit.
    pub tler: u16,
    /// Reads of deallocated or unwritten blocks are errors.
    pub dulbe: bool,
    #[bits(15)]
    __: u16,
}

/// Write Atomicity Normal (§5.21.1.10).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WriteAtomicity {
    /// The host does without AWUN and NAWUN; only what holds at a power failure counts.
    pub disable_normal: bool,
    #[bits(31)]
    __: u32,
}

/// Autonomous Power State Transition; the table is the command's data (§5.21.1.12).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AutonomousPowerState {
    /// Enabled.
    pub enable: bool,
    #[bits(31)]
    __: u32,
}

/// An entry of the autonomous power state transition table, one for each power state (§5.21.1.12).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PowerStateTransition {
    #[bits(3)]
    __: u8,
    /// State to go to.
    #[bits(5)]
    pub state: u8,
    /// Idle time in milliseconds; 0 disables the transition.
    #[bits(24)]
    pub idle_ms: u32,
    __: u32,
}

/// Host Memory Buffer, dword 11 (§5.21.1.13).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct HostMemoryBuffer {
    /// The controller may use the buffer.
    pub enable: bool,
    /// The buffer is the one of before, with its contents.
    pub memory_return: bool,
    #[bits(30)]
    __: u32,
}

/// Timestamp, the data of the feature, 8 bytes (§5.21.1.14).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Timestamp {
    /// Milliseconds since 1970 began, 48 bits, least significant byte first.
    pub milliseconds: [u8; 6],
    /// Bit 0: the clock may have stopped. Bits 3:1, origin: 0 the last reset, 1 Set Features.
    pub attributes: u8,
    /// Reserved.
    pub reserved_7: u8,
}

const _: () = assert!(size_of::<Timestamp>() == 8);

impl Timestamp {
    /// This many milliseconds; what 48 bits do not hold is dropped.
    pub fn from_millis(milliseconds: u64) -> Self {
        let [a, b, c, d, e, f, _, _] = milliseconds.to_le_bytes();
        Self { milliseconds: [a, b, c, d, e, f], attributes: 0, reserved_7: 0 }
    }

    /// Milliseconds since the origin.
    pub fn as_millis(&self) -> u64 {
        let [a, b, c, d, e, f] = self.milliseconds;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }

    /// Whether a host set it since the last reset.
    pub fn is_set_by_host(&self) -> bool {
        self.attributes >> 1 & 7 == 1
    }
}

/// Host Controlled Thermal Management, in kelvins; 0 disables (§5.21.1.16).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ThermalManagement {
    /// Heavy throttling begins here.
    pub temperature_2: u16,
    /// Light throttling begins here.
    pub temperature_1: u16,
}

/// Non-Operational Power State Config (§5.21.1.17).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct NonOperationalPower {
    /// The controller may exceed the state's power for background work.
    pub permissive: bool,
    #[bits(31)]
    __: u32,
}

/// Host Behavior Support, the data of the feature, 512 bytes (§5.21.1.22).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HostBehavior {
    /// 1: the host understands Command Interrupted and retry delays.
    pub acre: u8,
    /// 1: the host understands extended telemetry (2.0).
    pub etdas: u8,
    /// 1: the host understands LBA formats beyond the sixteenth (2.0).
    pub lbafee: u8,
    /// Reserved.
    pub reserved_3: [u8; 509],
}

const _: () = assert!(size_of::<HostBehavior>() == 512);

/// Software Progress Marker (§5.21.1.25).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct SoftwareProgress {
    /// Pre-boot software load count.
    pub load_count: u8,
    #[bits(24)]
    __: u32,
}

/// Host Identifier, dword 11; the identifier is the command's data (§5.21.1.26).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct HostIdentifier {
    /// The identifier has 16 bytes, else 8.
    pub extended: bool,
    #[bits(31)]
    __: u32,
}

open_enum! {
    /// Write protection of a namespace (§5.21.1.29).
    pub struct WriteProtection(u8) {
        NONE = 0, "no write protect";
        WRITE_PROTECT = 1, "write protect";
        UNTIL_POWER_CYCLE = 2, "write protect until power cycle";
        PERMANENT = 3, "permanent write protect";
    }
}

impl FeatureId {
    /// Bytes of data that Get and Set Features transfer for this feature beside the dwords (§5.21.1). Host Identifier
    /// is counted with its extended size. LBA Range Type has 64 entries of 64 bytes.
    pub const fn data_bytes(self) -> usize {
        match self {
            Self::LBA_RANGE_TYPE => 4096,
            Self::AUTONOMOUS_POWER_STATE_TRANSITION => 256,
            Self::TIMESTAMP => 8,
            Self::PREDICTABLE_LATENCY_CONFIG | Self::HOST_BEHAVIOR_SUPPORT => 512,
            Self::HOST_IDENTIFIER => 16,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_match_the_figures() {
        let over = TemperatureThreshold::new().with_kelvin(353).with_tmpsel(TemperatureSelect::sensor(2).0);
        assert_eq!(u32::from(over.with_thsel(ThresholdSelect::UNDER.0)), 353 | 2 << 16 | 1 << 20);
        let events = AsyncEventConfiguration::new().with_smart(0x1f).with_namespace_attributes(true);
        assert_eq!(u32::from(events.with_endurance_group(true)), 0x1f | 1 << 8 | 1 << 14);
        assert_eq!(u32::from(ErrorRecovery::new().with_tler(5).with_dulbe(true)), 5 | 1 << 16);
        assert_eq!(u32::from(PowerManagement::new().with_ps(3).with_wh(1)), 3 | 1 << 5);
        assert_eq!(u64::from(PowerStateTransition::new().with_state(4).with_idle_ms(100)), 4 << 3 | 100 << 8);
    }

    #[test]
    fn a_timestamp_keeps_48_bits() {
        let stamp = Timestamp::from_millis(0x1234_5678_9abc_def0);
        assert_eq!(stamp.as_millis(), 0x5678_9abc_def0);
        assert_eq!(stamp.as_bytes(), [0xf0, 0xde, 0xbc, 0x9a, 0x78, 0x56, 0, 0]);
        assert!(!stamp.is_set_by_host());
        assert!(Timestamp { attributes: 2, ..stamp }.is_set_by_host());
    }
}
