//! Fault rules that act on data: on its way, and on the medium.

use nvme_emulator::{
    CommandMatch, ControllerConfig, CutPolicy, DmaDirection, Effect, FaultRule, Times, WriteCache,
};
use nvme_spec::command::{DeallocateZeroes, ForceUnitAccess};
use nvme_spec::identify::Cns;
use nvme_spec::{AdminOpcode, NamespaceId, NvmOpcode, StatusCode, SubmissionEntry};

use crate::faults::host;
use crate::initiator::{Buffer, Host, NS1, Pair, memory_config, pattern};

fn read(slba: u64, blocks: u16) -> SubmissionEntry {
    SubmissionEntry::read(NS1, slba, blocks - 1)
}

fn write(slba: u64, blocks: u16) -> SubmissionEntry {
    SubmissionEntry::write(NS1, slba, blocks - 1, ForceUnitAccess::No)
}

fn on_read(effect: Effect) -> FaultRule {
    FaultRule::new(CommandMatch::io(NvmOpcode::READ), effect)
}

fn on_write(effect: Effect) -> FaultRule {
    FaultRule::new(CommandMatch::io(NvmOpcode::WRITE), effect)
}

/// Reads `blocks` blocks of 512 bytes into a buffer full of 0xee.
fn contents(host: &Host, io: &mut Pair, slba: u64, blocks: u16) -> Vec<u8> {
    let target = Buffer::filled(host, &vec![0xee; usize::from(blocks) * 512]);
    io.ok(target.attach(read(slba, blocks)));
    target.bytes()
}

/// Writes a pattern of `blocks` blocks; returns it.
fn fill(host: &Host, io: &mut Pair, seed: u64, slba: u64, blocks: u16) -> Vec<u8> {
    let data = pattern(seed, usize::from(blocks) * 512);
    io.ok(Buffer::filled(host, &data).attach(write(slba, blocks)));
    data
}

#[test]
fn short_and_absent_transfers_of_a_read_leave_the_rest_of_the_buffer() {
    let (host, mut io) = host();
    let data = fill(&host, &mut io, 1, 0, 24);
    host.ctrl.faults().add(on_read(Effect::ShortTransfer { bytes: 5000 }));
    let seen = contents(&host, &mut io, 0, 24);
    assert!(seen[..5000] == data[..5000] && seen[5000..].iter().all(|b| *b == 0xee));
    host.ctrl.faults().add(on_read(Effect::NoTransfer));
    assert_eq!(contents(&host, &mut io, 0, 24), vec![0xee; 24 * 512]);
    assert!(contents(&host, &mut io, 0, 24) == data);
    assert_eq!(host.ctrl.memory().fault_count(), 0);
}

#[test]
fn short_and_absent_transfers_of_a_write_store_zeroes() {
    let (host, mut io) = host();
    fill(&host, &mut io, 1, 0, 4);
    host.ctrl.faults().add(on_write(Effect::ShortTransfer { bytes: 700 }));
    let data = fill(&host, &mut io, 2, 0, 4);
    let seen = contents(&host, &mut io, 0, 4);
    assert!(seen[..700] == data[..700] && seen[700..].iter().all(|b| *b == 0));
    host.ctrl.faults().add(on_write(Effect::NoTransfer));
    fill(&host, &mut io, 3, 0, 4);
    assert_eq!(contents(&host, &mut io, 0, 4), vec![0; 2048]);
}

#[test]
fn misplaced_transfer_lands_elsewhere_in_mapped_memory() {
    let (host, mut io) = host();
    let data = fill(&host, &mut io, 1, 0, 2);
    let region = host.map(16 << 10);
    host.ctrl.faults().add(on_read(Effect::MisplacedTransfer { iova_delta: -4096 }));
    let mut command = read(0, 2);
    command.prp1.set(region.iova() + 8192);
    io.ok(command);
    let seen = crate::initiator::bytes(region.slice());
    assert!(seen[4096..4096 + 1024] == data && seen[8192..].iter().all(|b| *b == 0));
    assert_eq!(host.ctrl.memory().fault_count(), 0);
    // Outside of it, it is a fault that the host is not told of.
    host.ctrl.faults().add(on_read(Effect::MisplacedTransfer { iova_delta: -(1 << 20) }));
    io.ok(command);
    let faults = host.ctrl.memory().faults();
    assert_eq!((faults.len(), faults[0].iova), (1, region.iova() + 8192 - (1 << 20)));
}

#[test]
fn transfer_outside_the_mappings_is_recorded_and_succeeds() {
    let (host, mut io) = host();
    fill(&host, &mut io, 1, 0, 2);
    host.ctrl.faults().add(on_read(Effect::OutsideMapping));
    assert_eq!(contents(&host, &mut io, 0, 2), vec![0xee; 1024]);
    host.ctrl.faults().add(on_write(Effect::OutsideMapping));
    fill(&host, &mut io, 2, 0, 2);
    assert_eq!(contents(&host, &mut io, 0, 2), vec![0; 1024], "zeroes are stored");
    let faults = host.ctrl.memory().faults();
    let directions: Vec<_> = faults.iter().map(|fault| fault.direction).collect();
    assert_eq!(directions, [DmaDirection::ToHost, DmaDirection::FromHost]);
}

#[test]
fn corrupted_bit_is_returned_once_or_stored_for_good() {
    let (host, mut io) = host();
    let mut data = fill(&host, &mut io, 1, 0, 2);
    host.ctrl.faults().add(on_read(Effect::CorruptData { byte: 600, bit: 3 }));
    data[600] ^= 8;
    assert!(contents(&host, &mut io, 0, 2) == data);
    data[600] ^= 8;
    assert!(contents(&host, &mut io, 0, 2) == data);
    host.ctrl.faults().add(on_write(Effect::CorruptData { byte: 1, bit: 7 }));
    let mut data = fill(&host, &mut io, 2, 0, 2);
    data[1] ^= 0x80;
    for _ in 0..2 {
        assert!(contents(&host, &mut io, 0, 2) == data);
    }
}

#[test]
fn patched_identify_data_is_as_hostile_as_the_rule() {
    let (mut host, _io) = host();
    let plan = host.ctrl.faults();
    let on = CommandMatch::admin(AdminOpcode::IDENTIFY).selecting(Cns::NAMESPACE.0);
    plan.add(FaultRule::new(on.clone(), Effect::PatchData { offset: 0, bytes: vec![0xff; 8] }));
    plan.add(FaultRule::new(on, Effect::PatchData { offset: 4094, bytes: vec![1, 2, 3, 4] }));
    let controller = host.admin_data(SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE));
    assert_ne!(controller[..8], [0xff; 8]);
    let namespace = host.admin_data(SubmissionEntry::identify(Cns::NAMESPACE, NS1));
    assert_eq!((&namespace[..8], &namespace[4094..]), (&[0xff; 8][..], &[1, 2][..]));
    assert_ne!(namespace[8..16], [0xff; 8]);
}

#[test]
fn lost_write_succeeds_and_leaves_what_was_there() {
    let (host, mut io) = host();
    let data = fill(&host, &mut io, 1, 0, 4);
    host.ctrl.faults().add(on_write(Effect::LoseWrite));
    fill(&host, &mut io, 2, 0, 4);
    assert!(contents(&host, &mut io, 0, 4) == data);
    let zeroes = CommandMatch::io(NvmOpcode::WRITE_ZEROES);
    host.ctrl.faults().add(FaultRule::new(zeroes, Effect::LoseWrite));
    io.ok(SubmissionEntry::write_zeroes(NS1, 0, 3, DeallocateZeroes::No));
    assert!(contents(&host, &mut io, 0, 4) == data);
}

#[test]
fn torn_write_stores_its_first_sectors() {
    let mut host = Host::new(memory_config(1 << 20, 4096));
    let mut io = host.io_pair(1, 16);
    let (old, new) = (pattern(1, 3 * 4096), pattern(2, 3 * 4096));
    let target = Buffer::new(&host, 3 * 4096);
    for sectors in [0, 1, 8, 11, 23, 24, 99] {
        io.ok(Buffer::filled(&host, &old).attach(write(4, 3)));
        host.ctrl.faults().add(on_write(Effect::TearWrite { sectors }));
        io.ok(Buffer::filled(&host, &new).attach(write(4, 3)));
        io.ok(target.attach(read(4, 3)));
        let at = (sectors as usize * 512).min(3 * 4096);
        assert!(target.bytes()[..at] == new[..at] && target.bytes()[at..] == old[at..], "{sectors}");
    }
}

#[test]
fn misdirected_write_lands_elsewhere() {
    let (host, mut io) = host();
    let old = fill(&host, &mut io, 1, 10, 2);
    host.ctrl.faults().add(on_write(Effect::MisdirectWrite { lba_delta: 100 }));
    let new = fill(&host, &mut io, 2, 10, 2);
    assert!(contents(&host, &mut io, 10, 2) == old && contents(&host, &mut io, 110, 2) == new);
    host.ctrl.faults().add(on_write(Effect::MisdirectWrite { lba_delta: -11 }));
    let source = Buffer::filled(&host, &new);
    assert_eq!(io.status(source.attach(write(10, 2))), StatusCode::LBA_OUT_OF_RANGE);
}

#[test]
fn stale_read_returns_what_the_last_write_replaced() {
    let (host, mut io) = host();
    let untouched = fill(&host, &mut io, 1, 0, 8);
    let plan = host.ctrl.faults();
    let id = plan.add(on_read(Effect::StaleRead).times(Times::Forever));
    assert!(contents(&host, &mut io, 0, 8) == untouched, "nothing was written since the rule was added");
    let second = fill(&host, &mut io, 2, 2, 3);
    let mut expected = untouched.clone();
    assert!(contents(&host, &mut io, 0, 8) == expected);
    fill(&host, &mut io, 3, 2, 2);
    expected[1024..2048].copy_from_slice(&second[..1024]);
    assert!(contents(&host, &mut io, 0, 8) == expected, "one write behind, block by block");
    io.ok(SubmissionEntry::write_zeroes(NS1, 7, 0, DeallocateZeroes::No));
    assert!(contents(&host, &mut io, 0, 8) == expected);
    plan.remove(id);
    assert_eq!(contents(&host, &mut io, 7, 1), [0; 512]);
}

#[test]
fn lying_flush_leaves_the_cache_as_it_was() {
    let config = ControllerConfig { write_cache: WriteCache::MODELLED, ..memory_config(1 << 20, 512) };
    let mut host = Host::new(config);
    let mut io = host.io_pair(1, 16);
    fill(&host, &mut io, 1, 0, 1);
    let lie = |on| FaultRule::new(on, Effect::LyingFlush);
    host.ctrl.faults().add(lie(CommandMatch::io(NvmOpcode::FLUSH)));
    io.ok(SubmissionEntry::flush(NS1));
    assert_eq!(host.ctrl.unflushed_writes(), 1);
    host.ctrl.faults().add(lie(CommandMatch::io(NvmOpcode::WRITE)));
    let fua = || SubmissionEntry::write(NS1, 1, 0, ForceUnitAccess::Yes);
    io.ok(Buffer::filled(&host, &[1; 512]).attach(fua()));
    assert_eq!(host.ctrl.unflushed_writes(), 2);
    assert_eq!(host.ctrl.power_cut(CutPolicy::DropAll).dropped, 2);
}

/// The checks of a command come first: a rule for its data does not turn a bad command into a good one.
#[test]
fn command_that_fails_transfers_nothing_whatever_the_rule() {
    let (host, mut io) = host();
    let rule = on_read(Effect::PatchData { offset: 0, bytes: vec![9; 16] }).times(Times::Forever);
    host.ctrl.faults().add(rule);
    let target = Buffer::filled(&host, &[0xee; 512]);
    assert_eq!(io.status(target.attach(read(1 << 40, 1))), StatusCode::LBA_OUT_OF_RANGE);
    let mut unmapped = read(0, 1);
    unmapped.prp1.set(0x5000);
    assert_eq!(io.status(unmapped), StatusCode::DATA_TRANSFER_ERROR);
    assert_eq!(target.bytes(), [0xee; 512]);
}
