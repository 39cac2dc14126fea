//! Brings a controller up by hand and identifies it: the register handshake and one admin command, without a driver.
//!
//! `cargo run -p nvme-emulator --example bring_up`

use std::sync::atomic::Ordering;

use nvme_emulator::{ControllerConfig, EmulatedController, NamespaceConfig};
use nvme_spec::identify::{Cns, IdentifyController};
use nvme_spec::registers::{self, Aqa, Cc, Csts, Doorbell, doorbell_offset};
use nvme_spec::{CompletionEntry, NamespaceId, QueueId, SubmissionEntry};
use vm_memory::Bytes;
use zerocopy::{FromBytes, IntoBytes};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let controller =
        EmulatedController::new(ControllerConfig::with_namespace(NamespaceConfig::memory(1 << 30)))?;
    // Memory for both rings and the answer: the controller reaches nothing else.
    let memory = controller.memory().map(3 * 4096)?;
    let (sq, cq, answer) = (memory.iova(), memory.iova() + 4096, memory.iova() + 8192);

    controller.write32(registers::AQA, Aqa::new().with_asqs_z(15).with_acqs_z(15).into());
    controller.write64(registers::ASQ, sq);
    controller.write64(registers::ACQ, cq);
    controller.write32(registers::CC, Cc::new().with_en(true).with_iosqes(6).with_iocqes(4).into());
    let csts = Csts::from(controller.read32(registers::CSTS));
    println!("enabled: {csts:?}");

    let mut identify = SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE);
    identify.prp1.set(answer);
    memory.slice().write_slice(identify.as_bytes(), 0)?;
    // Inline, the command is executed before this returns.
    controller.doorbell(doorbell_offset(0, QueueId::ADMIN, Doorbell::SubmissionTail), 1);

    let phase: u32 = memory.slice().load(4096 + 12, Ordering::Acquire)?;
    assert!(phase & 1 << 16 != 0, "no completion");
    let mut entry = [0; 16];
    memory.slice().read_slice(&mut entry, 4096)?;
    let entry = CompletionEntry::read_from_bytes(&entry).map_err(|e| e.to_string())?;
    println!("identify: {}", entry.status());
    let mut data = vec![0; 4096];
    memory.slice().read_slice(&mut data, 8192)?;
    let data = IdentifyController::read_from_bytes(&data).map_err(|e| e.to_string())?;
    println!("{} ({} bytes)", String::from_utf8_lossy(&data.mn).trim(), data.tnvmcap.get());
    Ok(())
}
