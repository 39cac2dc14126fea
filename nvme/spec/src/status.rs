//! Completion status: type, code, and the flags that steer a retry (§4.6.1).

use bitfield_struct::bitfield;
use core::fmt;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::open_enum::open_enum;

open_enum! {
    /// Status code type, SCT (§4.6.1.1).
    pub struct StatusType(u8) {
        GENERIC = 0, "generic command status";
        COMMAND_SPECIFIC = 1, "command specific status";
        MEDIA = 2, "media and data integrity error";
        PATH = 3, "path related status";
        VENDOR = 7, "vendor specific";
    }
}

open_enum! {
    /// Status code type and status code in one number, `SCT << 8 | SC`; zero is success (§4.6.1.2).
    pub struct StatusCode(u16) {
        SUCCESS = 0x000, "successful completion";
        INVALID_OPCODE = 0x001, "invalid command opcode";
        INVALID_FIELD = 0x002, "invalid field in command";
        COMMAND_ID_CONFLICT = 0x003, "command ID conflict";
        DATA_TRANSFER_ERROR = 0x004, "data transfer error";
        ABORTED_POWER_LOSS = 0x005, "commands aborted due to power loss notification";
        INTERNAL_ERROR = 0x006, "internal error";
        ABORT_REQUESTED = 0x007, "command abort requested";
        ABORTED_SQ_DELETION = 0x008, "command aborted due to SQ deletion";
        ABORTED_FAILED_FUSED = 0x009, "command aborted due to failed fused command";
        ABORTED_MISSING_FUSED = 0x00a, "command aborted due to missing fused command";
        INVALID_NAMESPACE_OR_FORMAT = 0x00b, "invalid namespace or format";
        COMMAND_SEQUENCE_ERROR = 0x00c, "command sequence error";
        INVALID_SGL_SEGMENT = 0x00d, "invalid SGL segment descriptor";
        INVALID_SGL_COUNT = 0x00e, "invalid number of SGL descriptors";
        DATA_SGL_LENGTH_INVALID = 0x00f, "data SGL length invalid";
        METADATA_SGL_LENGTH_INVALID = 0x010, "metadata SGL length invalid";
        SGL_TYPE_INVALID = 0x011, "SGL descriptor type invalid";
        INVALID_USE_OF_CMB = 0x012, "invalid use of controller memory buffer";
        PRP_OFFSET_INVALID = 0x013, "PRP offset invalid";
        ATOMIC_WRITE_UNIT_EXCEEDED = 0x014, "atomic write unit exceeded";
        OPERATION_DENIED = 0x015, "operation denied";
        SGL_OFFSET_INVALID = 0x016, "SGL offset invalid";
        HOST_ID_INCONSISTENT = 0x018, "host identifier inconsistent format";
        KEEP_ALIVE_EXPIRED = 0x019, "keep alive timer expired";
        KEEP_ALIVE_INVALID = 0x01a, "keep alive timeout invalid";
        ABORTED_PREEMPT = 0x01b, "command aborted due to preempt and abort";
        SANITIZE_FAILED = 0x01c, "sanitize failed";
        SANITIZE_IN_PROGRESS = 0x01d, "sanitize in progress";
        SGL_GRANULARITY_INVALID = 0x01e, "SGL data block granularity invalid";
        NOT_SUPPORTED_IN_CMB = 0x01f, "command not supported for queue in CMB";
        NAMESPACE_WRITE_PROTECTED = 0x020, "namespace is write protected";
        COMMAND_INTERRUPTED = 0x021, "command interrupted";
        TRANSIENT_TRANSPORT_ERROR = 0x022, "transient transport error";
        LBA_OUT_OF_RANGE = 0x080, "LBA out of range";
        CAPACITY_EXCEEDED = 0x081, "capacity exceeded";
        NAMESPACE_NOT_READY = 0x082, "namespace not ready";
        RESERVATION_CONFLICT = 0x083, "reservation conflict";
        FORMAT_IN_PROGRESS = 0x084, "format in progress";

        COMPLETION_QUEUE_INVALID = 0x100, "completion queue invalid";
        INVALID_QUEUE_ID = 0x101, "invalid queue identifier";
        INVALID_QUEUE_SIZE = 0x102, "invalid queue size";
        ABORT_LIMIT_EXCEEDED = 0x103, "abort command limit exceeded";
        AER_LIMIT_EXCEEDED = 0x105, "asynchronous event request limit exceeded";
        INVALID_FIRMWARE_SLOT = 0x106, "invalid firmware slot";
        INVALID_FIRMWARE_IMAGE = 0x107, "invalid firmware image";
        INVALID_INTERRUPT_VECTOR = 0x108, "invalid interrupt vector";
        INVALID_LOG_PAGE = 0x109, "invalid log page";
        INVALID_FORMAT = 0x10a, "invalid format";
        FIRMWARE_NEEDS_CONVENTIONAL_RESET = 0x10b, "firmware activation requires conventional reset";
        INVALID_QUEUE_DELETION = 0x10c, "invalid queue deletion";
        FEATURE_NOT_SAVEABLE = 0x10d, "feature identifier not saveable";
        FEATURE_NOT_CHANGEABLE = 0x10e, "feature not changeable";
        FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10f, "feature not namespace specific";
        FIRMWARE_NEEDS_SUBSYSTEM_RESET = 0x110, "firmware activation requires NVM subsystem reset";
        FIRMWARE_NEEDS_CONTROLLER_RESET = 0x111, "firmware activation requires controller level reset";
        FIRMWARE_MAX_TIME_VIOLATION = 0x112, "firmware activation requires maximum time violation";
        FIRMWARE_PROHIBITED = 0x113, "firmware activation prohibited";
        OVERLAPPING_RANGE = 0x114, "overlapping range";
        NAMESPACE_INSUFFICIENT_CAPACITY = 0x115, "namespace insufficient capacity";
        NAMESPACE_ID_UNAVAILABLE = 0x116, "namespace identifier unavailable";
        NAMESPACE_ALREADY_ATTACHED = 0x118, "namespace already attached";
        NAMESPACE_IS_PRIVATE = 0x119, "namespace is private";
        NAMESPACE_NOT_ATTACHED = 0x11a, "namespace not attached";
        THIN_PROVISIONING_UNSUPPORTED = 0x11b, "thin provisioning not supported";
        CONTROLLER_LIST_INVALID = 0x11c, "controller list invalid";
        SELF_TEST_IN_PROGRESS = 0x11d, "device self-test in progress";
        CONFLICTING_ATTRIBUTES = 0x180, "conflicting attributes";
        INVALID_PROTECTION_INFORMATION = 0x181, "invalid protection information";
        WRITE_TO_READ_ONLY_RANGE = 0x182, "attempted write to read only range";
        COMMAND_SIZE_LIMIT_EXCEEDED = 0x183, "command size limit exceeded";

        WRITE_FAULT = 0x280, "write fault";
        UNRECOVERED_READ_ERROR = 0x281, "unrecovered read error";
        GUARD_CHECK_ERROR = 0x282, "end-to-end guard check error";
        APPLICATION_TAG_CHECK_ERROR = 0x283, "end-to-end application tag check error";
        REFERENCE_TAG_CHECK_ERROR = 0x284, "end-to-end reference tag check error";
        COMPARE_FAILURE = 0x285, "compare failure";
        ACCESS_DENIED = 0x286, "access denied";
        DEALLOCATED_BLOCK = 0x287, "deallocated or unwritten logical block";

        INTERNAL_PATH_ERROR = 0x300, "internal path error";
        ANA_PERSISTENT_LOSS = 0x301, "asymmetric access persistent loss";
        ANA_INACCESSIBLE = 0x302, "asymmetric access inaccessible";
        ANA_TRANSITION = 0x303, "asymmetric access transition";
        CONTROLLER_PATHING_ERROR = 0x360, "controller pathing error";
        HOST_PATHING_ERROR = 0x370, "host pathing error";
        ABORTED_BY_HOST = 0x371, "command aborted by host";
    }
}

impl StatusCode {
    /// Joins a status code type (its low three bits) and a status code.
    pub const fn from_parts(status_type: StatusType, code: u8) -> Self {
        Self(((status_type.0 as u16 & 7) << 8) | code as u16)
    }

    /// The status code type.
    pub const fn status_type(self) -> StatusType {
        StatusType((self.0 >> 8) as u8 & 7)
    }

    /// The status code within its type.
    pub const fn code(self) -> u8 {
        self.0 as u8
    }
}

/// The status field of a completion: 15 bits, without the phase tag (§4.6.1).
#[bitfield(u16, debug = false)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Status {
    /// Status code, SC.
    #[bits(8)]
    pub sc: u8,
    /// Status code type, SCT.
    #[bits(3)]
    pub sct: u8,
    /// Command retry delay, CRD: 0 none, else the delay CRDT1 to CRDT3 of Identify Controller.
    #[bits(2)]
    pub crd: u8,
    /// More information is in the Error Information log page.
    pub more: bool,
    /// Do not retry: the same command would fail again.
    pub dnr: bool,
    #[bits(1)]
    __: u8,
}

impl Status {
    /// Successful completion.
    pub const SUCCESS: Self = Self::new();

    /// A status of this code, with no flag set.
    pub const fn from_code(code: StatusCode) -> Self {
        Self::new().with_sc(code.code()).with_sct(code.status_type().0)
    }

    /// Type and code in one number.
    pub const fn code(self) -> StatusCode {
        StatusCode::from_parts(StatusType(self.sct()), self.sc())
    }

    /// Whether the command completed successfully.
    pub const fn is_success(self) -> bool {
        self.sc() == 0 && self.sct() == 0
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.code();
        match code.name() {
            Some(name) => write!(f, "{name} (status {:#05x}", code.0)?,
            None => write!(f, "{} {:#04x} (status {:#05x}", code.status_type(), code.code(), code.0)?,
        }
        if self.dnr() {
            f.write_str(", do not retry")?;
        }
        if self.crd() != 0 {
            write!(f, ", retry delay {}", self.crd())?;
        }
        if self.more() {
            f.write_str(", more in the error log")?;
        }
        f.write_str(")")
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Status({self})")
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn bit_positions_are_those_of_figure_121() {
        let status = Status::from_code(StatusCode::UNRECOVERED_READ_ERROR).with_dnr(true).with_crd(2);
        assert_eq!(u16::from(status), 0x4000 | 2 << 11 | 0x281);
        assert_eq!(status.code(), StatusCode::UNRECOVERED_READ_ERROR);
        assert!(!status.is_success());
        assert!(Status::SUCCESS.is_success());
    }

    #[test]
    fn display_names_known_and_unknown_codes() {
        let known = Status::from_code(StatusCode::LBA_OUT_OF_RANGE).with_dnr(true);
        assert_eq!(known.to_string(), "LBA out of range (status 0x080, do not retry)");
        let unknown = Status::from_code(StatusCode::from_parts(StatusType::VENDOR, 0xfe));
        assert_eq!(unknown.to_string(), "vendor specific 0xfe (status 0x7fe)");
    }
}
