//! What the controller can do, as log pages: Commands Supported and Effects (§5.14.1.5), Supported Log Pages (2.0
//! §5.16.1.1).

use nvme_spec::log::{CommandEffects, CommandEffectsLog, LogPageId, SupportedLogPages};
use nvme_spec::{AdminOpcode, NvmOpcode};
use zerocopy::{FromZeros, IntoBytes};

use crate::config::ShadowDoorbells;
use crate::controller::Core;

/// The log pages there are.
const PAGES: [LogPageId; 6] = [
    LogPageId::SUPPORTED,
    LogPageId::ERROR,
    LogPageId::SMART,
    LogPageId::FIRMWARE_SLOT,
    LogPageId::CHANGED_NAMESPACES,
    LogPageId::COMMAND_EFFECTS,
];

impl Core {
    /// Whether an admin command is served.
    pub(super) fn supports_admin(&self, opcode: AdminOpcode) -> bool {
        match opcode {
            AdminOpcode::DELETE_IO_SQ
            | AdminOpcode::CREATE_IO_SQ
            | AdminOpcode::GET_LOG_PAGE
            | AdminOpcode::DELETE_IO_CQ
            | AdminOpcode::CREATE_IO_CQ
            | AdminOpcode::IDENTIFY
            | AdminOpcode::ABORT
            | AdminOpcode::SET_FEATURES
            | AdminOpcode::GET_FEATURES
            | AdminOpcode::ASYNC_EVENT_REQUEST
            | AdminOpcode::KEEP_ALIVE
            | AdminOpcode::FORMAT_NVM => true,
            AdminOpcode::DOORBELL_BUFFER_CONFIG => self.config.shadow_doorbells == ShadowDoorbells::Offered,
            _ => false,
        }
    }

    pub(super) fn command_effects_log(&self) -> Vec<u8> {
        let mut page = CommandEffectsLog::new_zeroed();
        for opcode in 0..=u8::MAX {
            let slot = usize::from(opcode);
            if self.supports_admin(AdminOpcode(opcode)) {
                page.admin[slot].set(admin_effects(AdminOpcode(opcode)).into());
            }
            if self.check_supported(NvmOpcode(opcode)).is_ok() {
                page.io[slot].set(io_effects(NvmOpcode(opcode)).into());
            }
        }
        page.as_bytes().to_vec()
    }
}

fn admin_effects(opcode: AdminOpcode) -> CommandEffects {
    let effects = CommandEffects::new().with_supported(true);
    match opcode {
        AdminOpcode::FORMAT_NVM => effects
            .with_content_change(true)
            .with_namespace_capability_change(true)
            .with_submission_restriction(1),
        _ => effects,
    }
}

fn io_effects(opcode: NvmOpcode) -> CommandEffects {
    let changes = matches!(
        opcode,
        NvmOpcode::WRITE | NvmOpcode::WRITE_ZEROES | NvmOpcode::DATASET_MANAGEMENT | NvmOpcode::COPY
    );
    CommandEffects::new().with_supported(true).with_content_change(changes)
}

pub(super) fn supported_pages_log() -> Vec<u8> {
    let mut log = SupportedLogPages::new_zeroed();
    for page in PAGES {
        log.pages[usize::from(page.0)].set(1);
    }
    log.as_bytes().to_vec()
}
