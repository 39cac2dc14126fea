//! Format NVM (§5.23) and Doorbell Buffer Config (§5.7): builders and views of their dwords.

use bitfield_struct::bitfield;
use zerocopy::little_endian::U32;

use crate::command::SubmissionEntry;
use crate::ids::NamespaceId;
use crate::opcode::AdminOpcode;
use crate::open_enum::open_enum;

open_enum! {
    /// Secure erase settings, SES (§5.23).
    pub struct SecureErase(u8) {
        NONE = 0, "no secure erase";
        USER_DATA = 1, "user data erase";
        CRYPTOGRAPHIC = 2, "cryptographic erase";
    }
}

/// Dword 10 of Format NVM (§5.23; the upper format bits are of 2.0).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct FormatDw10 {
    /// LBA format index, low four bits.
    #[bits(4)]
    pub lbaf_low: u8,
    /// Metadata is transferred at the end of the data.
    pub mset: bool,
    /// Protection information type: 0 none.
    #[bits(3)]
    pub pi: u8,
    /// Protection information is in the first bytes of the metadata.
    pub pil: bool,
    /// Secure erase settings, see [`SecureErase`].
    #[bits(3)]
    pub ses: u8,
    /// LBA format index, upper two bits.
    #[bits(2)]
    pub lbaf_high: u8,
    #[bits(18)]
    __: u32,
}

impl FormatDw10 {
    /// The LBA format index, 0 to 63.
    pub fn format_index(self) -> u8 {
        self.lbaf_low() | self.lbaf_high() << 4
    }

    /// With this LBA format index; bits above the sixth are dropped.
    #[must_use]
    pub fn with_format_index(self, index: u8) -> Self {
        self.with_lbaf_low(index & 0xf).with_lbaf_high(index >> 4 & 3)
    }
}

impl SubmissionEntry {
    /// Format NVM (§5.23). It destroys all data of the namespace, or of all of them.
    pub fn format_nvm(nsid: NamespaceId, dw10: FormatDw10) -> Self {
        let mut entry =
            Self { opcode: AdminOpcode::FORMAT_NVM.0, nsid: U32::new(nsid.get()), ..Self::default() };
        entry.cdw10.set(dw10.into());
        entry
    }

    /// What Format NVM asks for.
    pub fn format_view(&self) -> FormatDw10 {
        self.cdw10.get().into()
    }

    /// Doorbell Buffer Config: addresses of the shadow doorbell and the event index buffer, a memory page each (§5.7).
    pub fn doorbell_buffer_config(shadow: u64, event_index: u64) -> Self {
        let mut entry = Self { opcode: AdminOpcode::DOORBELL_BUFFER_CONFIG.0, ..Self::default() };
        entry.prp1.set(shadow);
        entry.prp2.set(event_index);
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dword_10_of_format_matches_the_figure() {
        let dw10 = FormatDw10::new().with_format_index(0x25).with_ses(SecureErase::CRYPTOGRAPHIC.0);
        assert_eq!(u32::from(dw10), 5 | 2 << 9 | 2 << 12);
        let entry = SubmissionEntry::format_nvm(NamespaceId::new(4), dw10.with_pi(7).with_pil(true));
        assert_eq!(entry.cdw10.get(), 5 | 7 << 5 | 1 << 8 | 2 << 9 | 2 << 12);
        assert_eq!((entry.format_view().format_index(), entry.namespace_id().get()), (0x25, 4));
    }

    #[test]
    fn doorbell_buffers_are_the_two_prps() {
        let entry = SubmissionEntry::doorbell_buffer_config(0x1000, 0x2000);
        assert_eq!((entry.opcode, entry.prp1.get(), entry.prp2.get()), (0x7c, 0x1000, 0x2000));
    }
}
