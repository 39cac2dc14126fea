//! Asynchronous events (§5.2): what the completion of an Asynchronous Event Request says.

use bitfield_struct::bitfield;

use crate::log::LogPageId;
use crate::open_enum::open_enum;

open_enum! {
    /// Asynchronous event type (§5.2.1).
    pub struct AsyncEventType(u8) {
        ERROR = 0, "error status";
        SMART = 1, "SMART / health status";
        NOTICE = 2, "notice";
        IO_COMMAND_SET = 6, "I/O command set specific status";
        VENDOR = 7, "vendor specific";
    }
}

open_enum! {
    /// Event type and information in one number, `type << 8 | information` (§5.2.1).
    pub struct AsyncEventCode(u16) {
        INVALID_DOORBELL_REGISTER = 0x000, "write to invalid doorbell register";
        INVALID_DOORBELL_VALUE = 0x001, "invalid doorbell write value";
        DIAGNOSTIC_FAILURE = 0x002, "diagnostic failure";
        PERSISTENT_INTERNAL_ERROR = 0x003, "persistent internal error";
        TRANSIENT_INTERNAL_ERROR = 0x004, "transient internal error";
        FIRMWARE_LOAD_ERROR = 0x005, "firmware image load error";

        RELIABILITY = 0x100, "NVM subsystem reliability";
        TEMPERATURE = 0x101, "temperature threshold";
        SPARE = 0x102, "spare below threshold";

        NAMESPACE_ATTRIBUTE_CHANGED = 0x200, "namespace attribute changed";
        FIRMWARE_ACTIVATION_STARTING = 0x201, "firmware activation starting";
        TELEMETRY_CHANGED = 0x202, "telemetry log changed";
        ANA_CHANGED = 0x203, "asymmetric namespace access change";
        PREDICTABLE_LATENCY_CHANGED = 0x204, "predictable latency event aggregate log change";
        LBA_STATUS_ALERT = 0x205, "LBA status information alert";
        ENDURANCE_GROUP_CHANGED = 0x206, "endurance group event aggregate log page change";

        RESERVATION_LOG = 0x600, "reservation log page available";
        SANITIZE_COMPLETED = 0x601, "sanitize operation completed";
        SANITIZE_UNEXPECTED_DEALLOCATION = 0x602, "sanitize operation completed with unexpected deallocation";
    }
}

/// Dword 0 of an Asynchronous Event Request's completion (§5.2.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AsyncEvent {
    /// Event type, see [`AsyncEventType`].
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

impl AsyncEvent {
    /// An event of this code that `log_page` describes.
    pub const fn from_code(code: AsyncEventCode, log_page: LogPageId) -> Self {
        Self::new()
            .with_event_type((code.0 >> 8) as u8 & 7)
            .with_information(code.0 as u8)
            .with_log_page(log_page.0)
    }

    /// Type and information in one number.
    pub const fn code(self) -> AsyncEventCode {
        AsyncEventCode((self.event_type() as u16) << 8 | self.information() as u16)
    }

    /// The event's type.
    pub const fn kind(self) -> AsyncEventType {
        AsyncEventType(self.event_type())
    }

    /// The page that describes it.
    pub const fn page(self) -> LogPageId {
        LogPageId(self.log_page())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dword_0_matches_the_figure() {
        let event =
            AsyncEvent::from_code(AsyncEventCode::NAMESPACE_ATTRIBUTE_CHANGED, LogPageId::CHANGED_NAMESPACES);
        assert_eq!(u32::from(event), 0x0004_0002);
        assert_eq!(event.code(), AsyncEventCode::NAMESPACE_ATTRIBUTE_CHANGED);
        assert_eq!((event.kind(), event.page()), (AsyncEventType::NOTICE, LogPageId::CHANGED_NAMESPACES));
        let temperature = AsyncEvent::from_code(AsyncEventCode::TEMPERATURE, LogPageId::SMART);
        assert_eq!(u32::from(temperature), 0x0002_0101);
    }
}
