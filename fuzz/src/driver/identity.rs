//! What the hostile controller says of itself: sane structures with bytes of the script written over them.
//!
//! Owns: [`Answers`]. A patch may begin to show only at a later reading, so that a controller changes its mind.

use nvme_spec::IDENTIFY_BYTES;
use nvme_spec::identify::{IdentifyController, IdentifyControllerNvm, IdentifyNamespace, Oacs, Oncs};
use zerocopy::{FromZeros, IntoBytes};

use crate::script::Script;

/// Structures that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Controller,
    Namespace,
    NamespaceList,
    Descriptors,
    CommandSet,
    LogPage,
    Feature,
}

const KINDS: [Kind; 7] = [
    Kind::Controller,
    Kind::Namespace,
    Kind::NamespaceList,
    Kind::Descriptors,
    Kind::CommandSet,
    Kind::LogPage,
    Kind::Feature,
];

/// Fields worth aiming at: offset of each in its structure.
const CONTROLLER_FIELDS: [u16; 16] =
    [77, 80, 84, 92, 111, 128, 256, 259, 261, 512, 516, 520, 522, 525, 532, 536];
const NAMESPACE_FIELDS: [u16; 16] = [0, 8, 24, 25, 26, 29, 34, 38, 40, 46, 74, 76, 80, 128, 130, 132];

struct Patch {
    kind: Kind,
    offset: usize,
    bytes: Vec<u8>,
    from_reading: u32,
}

/// Identify data, log pages and feature data.
pub(super) struct Answers {
    patches: Vec<Patch>,
    readings: [u32; KINDS.len()],
}

impl Answers {
    pub(super) fn new(script: &mut Script) -> Self {
        let count = script.byte() % 8;
        let patches = (0..count).map(|_| Self::patch(script)).collect();
        Self { patches, readings: [0; KINDS.len()] }
    }

    fn patch(script: &mut Script) -> Patch {
        let kind = script.pick(&KINDS);
        let aim = script.byte();
        let offset = match kind {
            Kind::Controller if aim < 200 => CONTROLLER_FIELDS[usize::from(aim % 16)],
            Kind::Namespace if aim < 200 => NAMESPACE_FIELDS[usize::from(aim % 16)],
            // Lists and log pages are read from the front.
            _ if aim < 200 => u16::from(aim),
            _ => script.word(),
        };
        let shape = script.byte();
        let bytes = script.bytes(usize::from(shape % 8) + 1);
        Patch {
            kind,
            offset: usize::from(offset) % IDENTIFY_BYTES,
            bytes,
            from_reading: u32::from(shape >> 6),
        }
    }

    /// The structure as of this reading.
    pub(super) fn read(&mut self, kind: Kind, nsid: u32) -> Box<[u8; IDENTIFY_BYTES]> {
        let mut data = Box::new([0; IDENTIFY_BYTES]);
        match kind {
            Kind::Controller => data.copy_from_slice(sane_controller().as_bytes()),
            Kind::Namespace => data.copy_from_slice(sane_namespace().as_bytes()),
            Kind::NamespaceList if nsid == 0 => data[0] = 1,
            Kind::CommandSet => data.copy_from_slice(IdentifyControllerNvm::new_zeroed().as_bytes()),
            Kind::NamespaceList | Kind::Descriptors | Kind::LogPage | Kind::Feature => {}
        }
        let reading = self.readings[kind as usize];
        self.readings[kind as usize] += 1;
        for patch in self.patches.iter().filter(|patch| patch.kind == kind && reading >= patch.from_reading) {
            for (slot, &byte) in data[patch.offset..].iter_mut().zip(&patch.bytes) {
                *slot = byte;
            }
        }
        data
    }
}

fn sane_controller() -> IdentifyController {
    let mut controller = IdentifyController::new_zeroed();
    (controller.sqes, controller.cqes, controller.mdts, controller.vwc) = (0x66, 0x44, 3, 1);
    (controller.aerl_z, controller.lpa, controller.elpe_z, controller.acl_z) = (3, 7, 3, 3);
    controller.nn.set(4);
    controller.oncs.set(
        (Oncs::DATASET_MANAGEMENT
            | Oncs::WRITE_ZEROES
            | Oncs::COMPARE
            | Oncs::VERIFY
            | Oncs::COPY
            | Oncs::FEATURE_SAVE
            | Oncs::TIMESTAMP)
            .bits(),
    );
    controller.oacs.set((Oacs::FORMAT | Oacs::DOORBELL_BUFFER).bits());
    controller.fuses.set(1);
    controller.acwu_z.set(3);
    controller.sgls.set(1);
    controller.oaes.set(0x300);
    controller.crdt[0].set(2);
    controller.sn = *b"hostile-0001        ";
    controller
}

fn sane_namespace() -> IdentifyNamespace {
    let mut namespace = IdentifyNamespace::new_zeroed();
    namespace.nsze.set(256);
    namespace.ncap.set(256);
    namespace.lbaf[0].lbads = 9;
    namespace.lbaf[1].lbads = 12;
    namespace.nlbaf_z = 1;
    namespace.mssrl.set(8);
    namespace.mcl.set(16);
    namespace.msrc_z = 3;
    namespace
}
