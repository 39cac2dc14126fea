//! Verify and copy.

use nvme_emulator::ControllerConfig;
use nvme_spec::command::ForceUnitAccess;
use nvme_spec::identify::{Cns, IdentifyController, IdentifyNamespace, Oncs};
use nvme_spec::{NamespaceId, NvmOpcode, StatusCode, SubmissionEntry};
use vm_memory::Bytes;
use zerocopy::FromBytes;

use crate::initiator::{Buffer, Host, NS1, Pair, memory_config, pattern};

fn filled(blocks: u16) -> (Host, Pair, Vec<u8>) {
    let mut host = Host::new(memory_config(16 << 20, 512));
    let mut io = host.io_pair(1, 16);
    let data = pattern(8, usize::from(blocks) * 512);
    let write = SubmissionEntry::write(NS1, 0, blocks - 1, ForceUnitAccess::No);
    io.ok(Buffer::filled(&host, &data).attach(write));
    (host, io, data)
}

fn read_back(host: &Host, io: &mut Pair, slba: u64, blocks: u16) -> Vec<u8> {
    let target = Buffer::new(host, usize::from(blocks) * 512);
    io.ok(target.attach(SubmissionEntry::read(NS1, slba, blocks - 1)));
    target.bytes()
}

/// A copy of `sources` (first block, blocks) to `target`.
fn copy(host: &Host, sources: &[(u64, u16)], target: u64) -> (Buffer, SubmissionEntry) {
    let list = Buffer::new(host, 8192);
    for (i, (slba, blocks)) in sources.iter().enumerate() {
        list.region.slice().write_obj(*slba, i * 32 + 8).unwrap();
        list.region.slice().write_obj(blocks - 1, i * 32 + 16).unwrap();
    }
    let mut entry = SubmissionEntry { opcode: NvmOpcode::COPY.0, ..SubmissionEntry::flush(NS1) };
    entry.cdw10.set(target as u32);
    entry.cdw11.set((target >> 32) as u32);
    entry.cdw12.set(sources.len() as u32 - 1);
    let entry = list.attach(entry);
    (list, entry)
}

#[test]
fn verify_checks_the_range_and_transfers_nothing() {
    let mut host = Host::new(ControllerConfig { mdts: 1, ..memory_config(16 << 20, 512) });
    let mut io = host.io_pair(1, 16);
    let verify = |slba, blocks_z| SubmissionEntry {
        opcode: NvmOpcode::VERIFY.0,
        ..SubmissionEntry::read(NS1, slba, blocks_z)
    };
    io.ok(verify(0, 999)); // beyond MDTS, without any data pointer
    assert_eq!(io.status(verify(32768, 0)), StatusCode::LBA_OUT_OF_RANGE);
    let mut protected = verify(0, 0);
    protected.cdw12.set(1 << 29);
    assert_eq!(io.status(protected), StatusCode::INVALID_FIELD);
    assert_eq!(host.ctrl.memory().fault_count(), 0);
}

#[test]
fn copy_gathers_its_sources_in_their_order() {
    let (host, mut io, data) = filled(64);
    let block = |i: usize| &data[i * 512..][..512];
    let (_list, command) = copy(&host, &[(10, 2), (3, 1), (10, 1)], 1000);
    io.ok(command);
    let expected = [block(10), block(11), block(3), block(10)].concat();
    assert!(read_back(&host, &mut io, 1000, 4) == expected);
    // With FUA nothing of it may be lost, and sources that overlap the target are read before it is written.
    let (_list, mut command) = copy(&host, &[(0, 8), (0, 8)], 4);
    command.cdw12.set(command.cdw12.get() | 1 << 30);
    io.ok(command);
    let expected = [&data[..8 * 512], &data[..8 * 512]].concat();
    assert!(read_back(&host, &mut io, 4, 16) == expected);
}

#[test]
fn copies_beyond_the_limits_or_the_namespace_are_refused() {
    let (mut host, mut io, _) = filled(8);
    let data = host.admin_data(SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE));
    let controller = IdentifyController::read_from_bytes(&data).unwrap();
    assert!(controller.oncs().contains(Oncs::COPY | Oncs::VERIFY) && controller.cdfs.get() == 1);
    let data = host.admin_data(SubmissionEntry::identify(Cns::NAMESPACE, NS1));
    let limits = IdentifyNamespace::read_from_bytes(&data).unwrap();
    let (single, total, count) = (limits.mssrl.get(), limits.mcl.get(), usize::from(limits.msrc_z) + 1);
    let full = (total / u32::from(single)) as usize;
    let cases = [
        (vec![(0, single)], 0, StatusCode::SUCCESS),
        (vec![(0, single + 1)], 0, StatusCode::COMMAND_SIZE_LIMIT_EXCEEDED),
        (vec![(0, single); full], 8192, StatusCode::SUCCESS),
        (vec![(0, single); full + 1], 8192, StatusCode::COMMAND_SIZE_LIMIT_EXCEEDED),
        (vec![(0, 1); count], 0, StatusCode::SUCCESS),
        (vec![(0, 1); count + 1], 0, StatusCode::COMMAND_SIZE_LIMIT_EXCEEDED),
        (vec![(32768, 1)], 0, StatusCode::LBA_OUT_OF_RANGE),
        (vec![(u64::MAX, 2)], 0, StatusCode::LBA_OUT_OF_RANGE),
        (vec![(0, 2)], 32767, StatusCode::LBA_OUT_OF_RANGE),
    ];
    for (sources, target, status) in cases {
        let (_list, command) = copy(&host, &sources, target);
        assert_eq!(io.status(command), status, "{} of {:?} to {target}", sources.len(), sources[0]);
    }
    for bits in [1 << 8, 1 << 12, 1 << 20, 1 << 26] {
        let (_list, mut command) = copy(&host, &[(0, 1)], 9);
        command.cdw12.set(command.cdw12.get() | bits);
        assert_eq!(io.status(command), StatusCode::INVALID_FIELD, "{bits:#x}");
    }
}
