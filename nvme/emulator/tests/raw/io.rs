//! I/O commands through registers and queues alone: data paths, limits, every error status.

use crate::initiator::{Buffer, Host, NS1, PAGE, memory_config, pattern, threaded};
use nvme_emulator::{ControllerConfig, FusedOperations, Mode, NamespaceConfig, SglSupport, WriteCache};
use nvme_spec::command::{DeallocateZeroes, DsmRange, ForceUnitAccess};
use nvme_spec::identify::Oncs;
use nvme_spec::{NamespaceId, NvmOpcode, StatusCode, SubmissionEntry};
use vm_memory::Bytes;
use zerocopy::IntoBytes;

fn write(slba: u64, blocks: u64) -> SubmissionEntry {
    SubmissionEntry::write(NS1, slba, (blocks - 1) as u16, ForceUnitAccess::No)
}

fn read(slba: u64, blocks: u64) -> SubmissionEntry {
    SubmissionEntry::read(NS1, slba, (blocks - 1) as u16)
}

fn compare(slba: u64, blocks: u64) -> SubmissionEntry {
    SubmissionEntry { opcode: NvmOpcode::COMPARE.0, ..read(slba, blocks) }
}

#[test]
fn what_is_written_is_read_back_in_every_mode_and_block_size() {
    for mode in [Mode::Inline, Mode::Stepped, threaded(1), threaded(2)] {
        for lba in [512u32, 1024, 2048, 4096] {
            let mut host = Host::new(ControllerConfig { mode, ..memory_config(16 << 20, lba) });
            let mut io = host.io_pair(1, 16);
            for (i, len) in [lba as usize, 4096, 8192, 12288, 1 << 20].into_iter().enumerate() {
                let data = pattern(i as u64, len);
                let blocks = (len / lba as usize) as u64;
                let source = Buffer::filled(&host, &data);
                io.ok(source.attach(write(7, blocks)));
                let target = Buffer::new(&host, len);
                io.ok(target.attach(read(7, blocks)));
                assert!(target.bytes() == data, "{mode:?}, blocks of {lba}, {len} bytes");
            }
            assert_eq!(host.ctrl.memory().fault_count(), 0);
        }
    }
}

#[test]
fn transfers_without_limit_use_chained_lists() {
    let mut host = Host::new(ControllerConfig { mdts: 0, ..memory_config(64 << 20, 4096) });
    let mut io = host.io_pair(1, 16);
    let data = pattern(3, 2100 * 4096);
    let source = Buffer::filled(&host, &data);
    io.ok(source.attach(write(0, 2100)));
    let target = Buffer::new(&host, data.len());
    io.ok(target.attach(read(0, 2100)));
    assert!(target.bytes() == data);
}

#[test]
fn first_page_may_begin_at_any_dword() {
    let mut host = Host::new(memory_config(16 << 20, 512));
    let mut io = host.io_pair(1, 16);
    let data = pattern(5, 4096);
    let region = host.map(3 * 4096);
    for offset in [4u64, 512, 1000, 4092] {
        region.slice().write_slice(&data, offset as usize).unwrap();
        let mut command = write(0, 8);
        command.prp1.set(region.iova() + offset);
        command.prp2.set(region.iova() + PAGE);
        io.ok(command);
        let target = Buffer::new(&host, 4096);
        io.ok(target.attach(read(0, 8)));
        assert!(target.bytes() == data, "offset {offset}");
    }
}

#[test]
fn prp_offsets_that_the_specification_forbids_are_refused() {
    let mut host = Host::new(memory_config(16 << 20, 512));
    let mut io = host.io_pair(1, 16);
    let region = host.map(8 * 4096);
    let iova = region.iova();
    let with = |prp1: u64, prp2: u64, blocks: u64| {
        let mut command = read(0, blocks);
        command.prp1.set(prp1);
        command.prp2.set(prp2);
        command
    };
    // Not a dword; second page with an offset; list not at a qword; entry in a list with an offset.
    let bad = [with(iova + 1, 0, 1), with(iova, iova + PAGE + 512, 16), with(iova, iova + 4, 24)];
    for command in bad {
        assert_eq!(io.status(command), StatusCode::PRP_OFFSET_INVALID);
    }
    region.slice().write_obj(iova + 4 * PAGE, 7 * 4096).unwrap();
    region.slice().write_obj(iova + 5 * PAGE + 8, 7 * 4096 + 8).unwrap();
    assert_eq!(io.status(with(iova, iova + 7 * PAGE, 24)), StatusCode::PRP_OFFSET_INVALID);
    region.slice().write_obj(iova + 5 * PAGE, 7 * 4096 + 8).unwrap();
    io.ok(with(iova, iova + 7 * PAGE, 24));
    // A list that begins in the last slot of its page is all chain; the next list must begin its page.
    region.slice().write_obj(iova + 6 * PAGE, 7 * 4096 + 4088).unwrap();
    region.slice().write_obj(iova + 4 * PAGE, 6 * 4096).unwrap();
    region.slice().write_obj(iova + 5 * PAGE, 6 * 4096 + 8).unwrap();
    io.ok(with(iova, iova + 7 * PAGE + 4088, 24));
    region.slice().write_obj(iova + 6 * PAGE + 16, 7 * 4096 + 4088).unwrap();
    assert_eq!(io.status(with(iova, iova + 7 * PAGE + 4088, 24)), StatusCode::PRP_OFFSET_INVALID);
    assert_eq!(host.ctrl.memory().fault_count(), 0);
}

#[test]
fn memory_that_is_not_mapped_is_not_touched() {
    let mut host = Host::new(memory_config(16 << 20, 4096));
    let mut io = host.io_pair(1, 16);
    let region = host.map(4096);
    let mut command = read(0, 2);
    command.prp1.set(region.iova());
    command.prp2.set(region.iova() + PAGE); // past the end
    assert_eq!(io.status(command), StatusCode::DATA_TRANSFER_ERROR);
    let gone = host.map(4096);
    let iova = gone.iova();
    drop(gone);
    let mut command = write(0, 1);
    command.prp1.set(iova);
    assert_eq!(io.status(command), StatusCode::DATA_TRANSFER_ERROR);
    let faults = host.ctrl.memory().faults();
    assert_eq!(faults.len(), 2);
    assert_eq!((faults[0].iova, faults[0].len), (region.iova() + PAGE, 4096));
    assert_eq!(faults[1].iova, iova);
    assert_eq!(host.ctrl.counters().dma_faults, 2);
    // The failed write left nothing behind, and the queue goes on.
    let target = Buffer::new(&host, 4096);
    io.ok(target.attach(read(0, 1)));
    assert!(target.bytes().iter().all(|b| *b == 0));
}

#[test]
fn ranges_beyond_the_namespace_are_refused() {
    let mut host = Host::new(memory_config(100 * 512, 512));
    let mut io = host.io_pair(1, 16);
    let buffer = Buffer::new(&host, 4096);
    io.ok(buffer.attach(read(92, 8)));
    for (slba, blocks) in [(93, 8), (100, 1), (u64::MAX, 1), (u64::MAX - 6, 8), (1 << 63, 2)] {
        for command in [read(slba, blocks), write(slba, blocks), compare(slba, blocks)] {
            assert_eq!(io.status(buffer.attach(command)), StatusCode::LBA_OUT_OF_RANGE, "{slba}+{blocks}");
        }
        let zeroes = SubmissionEntry::write_zeroes(NS1, slba, (blocks - 1) as u16, DeallocateZeroes::No);
        assert_eq!(io.status(zeroes), StatusCode::LBA_OUT_OF_RANGE);
    }
}

#[test]
fn transfers_beyond_mdts_are_refused_but_write_zeroes_is_no_transfer() {
    let mut host = Host::new(ControllerConfig { mdts: 1, ..memory_config(16 << 20, 4096) });
    let mut io = host.io_pair(1, 16);
    let buffer = Buffer::new(&host, 3 * 4096);
    io.ok(buffer.attach(write(0, 2)));
    for command in [read(0, 3), write(0, 3), compare(0, 3)] {
        assert_eq!(io.status(buffer.attach(command)), StatusCode::INVALID_FIELD);
    }
    io.ok(SubmissionEntry::write_zeroes(NS1, 0, 999, DeallocateZeroes::No));
}

#[test]
fn malformed_commands_get_the_statuses_of_the_specification() {
    let config = ControllerConfig {
        namespaces: vec![
            NamespaceConfig::memory(1 << 20),
            NamespaceConfig::memory(1 << 20).with_nsid(3).with_lba_size(512),
        ],
        sgls: SglSupport::Absent,
        fused: FusedOperations::Absent,
        ..ControllerConfig::default()
    };
    let mut host = Host::new(config);
    let mut io = host.io_pair(1, 16);
    let buffer = Buffer::new(&host, 4096);
    let good = buffer.attach(read(0, 1));
    io.ok(good);
    for psdt in [1, 3] {
        let mut sgl = good;
        sgl.flags.set_psdt(psdt);
        assert_eq!(io.status(sgl), StatusCode::INVALID_FIELD);
    }
    for fuse in [1, 2, 3] {
        let mut fused = good;
        fused.flags.set_fuse(fuse);
        assert_eq!(io.status(fused), StatusCode::INVALID_FIELD);
    }
    let mut protected = good;
    protected.cdw12.set(protected.cdw12.get() | 1 << 29);
    assert_eq!(io.status(protected), StatusCode::INVALID_FIELD);
    for (nsid, code) in [
        (0, StatusCode::INVALID_NAMESPACE_OR_FORMAT),
        (2, StatusCode::INVALID_FIELD),
        (4, StatusCode::INVALID_NAMESPACE_OR_FORMAT),
        (u32::MAX, StatusCode::INVALID_NAMESPACE_OR_FORMAT),
    ] {
        let mut command = good;
        command.nsid.set(nsid);
        assert_eq!(io.status(command), code, "namespace {nsid}");
    }
    for opcode in [0x04, 0x0d, 0x11, 0x7f, 0xff] {
        let done = io.run(SubmissionEntry { opcode, ..good });
        assert_eq!(done.status().code(), StatusCode::INVALID_OPCODE);
        assert!(done.status().dnr());
    }
    io.ok(SubmissionEntry::flush(NamespaceId::BROADCAST));
}

#[test]
fn commands_that_are_not_offered_are_invalid_opcodes() {
    let mut host = Host::new(ControllerConfig { oncs: Oncs::empty(), ..memory_config(1 << 20, 4096) });
    let mut io = host.io_pair(1, 16);
    let buffer = Buffer::new(&host, 4096);
    for command in [
        SubmissionEntry::write_zeroes(NS1, 0, 0, DeallocateZeroes::No),
        SubmissionEntry::deallocate(NS1, 0),
        compare(0, 1),
        SubmissionEntry { opcode: NvmOpcode::VERIFY.0, ..read(0, 1) },
        SubmissionEntry { opcode: NvmOpcode::COPY.0, ..read(0, 1) },
    ] {
        assert_eq!(io.status(buffer.attach(command)), StatusCode::INVALID_OPCODE);
    }
}

#[test]
fn write_zeroes_and_deallocate_clear_exactly_their_ranges() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(1, 16);
    let data = pattern(1, 64 * 512);
    let source = Buffer::filled(&host, &data);
    io.ok(source.attach(write(0, 64)));
    io.ok(SubmissionEntry::write_zeroes(NS1, 3, 4, DeallocateZeroes::Yes));
    let ranges = [(10u64, 1u32), (20, 0), (30, 8)];
    let list = Buffer::new(&host, 4096);
    for (i, (slba, blocks)) in ranges.into_iter().enumerate() {
        let mut range = DsmRange::default();
        range.slba.set(slba);
        range.blocks.set(blocks);
        list.region.slice().write_slice(range.as_bytes(), i * 16).unwrap();
    }
    let mut advice_only = SubmissionEntry::deallocate(NS1, 2);
    advice_only.cdw11.set(0);
    io.ok(list.attach(advice_only));
    io.ok(list.attach(SubmissionEntry::deallocate(NS1, 2)));
    let target = Buffer::new(&host, 64 * 512);
    io.ok(target.attach(read(0, 64)));
    for (block, bytes) in target.bytes().chunks(512).enumerate() {
        let cleared = (3..8).contains(&block) || block == 10 || (30..38).contains(&block);
        let expected = if cleared { &[0; 512][..] } else { &data[block * 512..][..512] };
        assert!(bytes == expected, "block {block}");
    }
}

#[test]
fn one_bad_range_refuses_the_whole_deallocation() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(1, 16);
    let data = pattern(1, 512);
    io.ok(Buffer::filled(&host, &data).attach(write(0, 1)));
    let list = Buffer::new(&host, 4096);
    for (i, slba) in [0u64, 2048].into_iter().enumerate() {
        let mut range = DsmRange::default();
        range.slba.set(slba);
        range.blocks.set(1);
        list.region.slice().write_slice(range.as_bytes(), i * 16).unwrap();
    }
    assert_eq!(io.status(list.attach(SubmissionEntry::deallocate(NS1, 1))), StatusCode::LBA_OUT_OF_RANGE);
    let target = Buffer::new(&host, 512);
    io.ok(target.attach(read(0, 1)));
    assert!(target.bytes() == data);
}

#[test]
fn compare_tells_equal_from_different() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(1, 16);
    let mut data = pattern(9, 20 * 512);
    io.ok(Buffer::filled(&host, &data).attach(write(5, 20)));
    io.ok(Buffer::filled(&host, &data).attach(compare(5, 20)));
    data[20 * 512 - 1] ^= 1;
    let done = io.run(Buffer::filled(&host, &data).attach(compare(5, 20)));
    assert_eq!(done.status().code(), StatusCode::COMPARE_FAILURE);
}

#[test]
fn without_a_write_cache_nothing_is_ever_unflushed() {
    for cache in [WriteCache::Absent, WriteCache::Host] {
        let mut host = Host::new(ControllerConfig { write_cache: cache, ..memory_config(1 << 20, 512) });
        let mut io = host.io_pair(1, 16);
        io.ok(Buffer::filled(&host, &pattern(1, 512)).attach(write(0, 1)));
        assert_eq!(host.ctrl.unflushed_writes(), 0);
        io.ok(SubmissionEntry::flush(NS1));
    }
}

#[test]
fn smallest_memory_page_is_the_unit_of_mdts_and_smaller_ones_are_refused() {
    let config = ControllerConfig { mpsmin: 2, mdts: 1, ..memory_config(16 << 20, 4096) };
    let ctrl = nvme_emulator::EmulatedController::new(config).unwrap();
    let cap = nvme_spec::registers::Cap::from(ctrl.read64(nvme_spec::registers::CAP));
    assert_eq!((cap.mpsmin(), cap.mpsmax()), (2, 4));
    let admin = crate::initiator::Pair::new(&ctrl, 0, 0, 32, 32);
    ctrl.write32(nvme_spec::registers::AQA, 31 | 31 << 16);
    ctrl.write64(nvme_spec::registers::ASQ, admin.sq.iova());
    ctrl.write64(nvme_spec::registers::ACQ, admin.cq.iova());
    for (mps, good) in [(0, false), (1, false), (2, true), (5, false)] {
        ctrl.write32(nvme_spec::registers::CC, crate::initiator::cc().with_mps(mps).into());
        let csts = nvme_spec::registers::Csts::from(ctrl.read32(nvme_spec::registers::CSTS));
        assert_eq!((csts.rdy(), csts.cfs()), (good, !good), "{mps}");
        ctrl.write32(nvme_spec::registers::CC, 0);
    }
    ctrl.write32(nvme_spec::registers::CC, crate::initiator::cc().with_mps(2).into());
    let mut host = Host { ctrl, admin };
    let mut io = host.io_pair(1, 16);
    let region = host.map(64 << 10);
    let mut command = read(0, 8); // 32 KiB: two pages of 16 KiB
    command.prp1.set(region.iova());
    command.prp2.set(region.iova() + (16 << 10));
    io.ok(command);
    command.cdw12.set(8);
    assert_eq!(io.status(command), StatusCode::INVALID_FIELD);
}

#[test]
fn larger_memory_pages_change_the_prp_rules() {
    let ctrl = nvme_emulator::EmulatedController::new(memory_config(16 << 20, 4096)).unwrap();
    let mut host = Host::enabled(ctrl);
    // Enabled again with pages of 16 KiB.
    let cc16 = crate::initiator::cc().with_mps(2);
    host.ctrl.write32(nvme_spec::registers::CC, 0);
    host.admin = crate::initiator::Pair::new(&host.ctrl, 0, 0, 32, 32);
    host.ctrl.write64(nvme_spec::registers::ASQ, host.admin.sq.iova());
    host.ctrl.write64(nvme_spec::registers::ACQ, host.admin.cq.iova());
    host.ctrl.write32(nvme_spec::registers::CC, cc16.into());
    assert!(host.csts().rdy());
    let mut io = host.io_pair(1, 16);
    let region = host.map(64 << 10);
    let data = pattern(2, 32 << 10);
    region.slice().write_slice(&data, 0).unwrap();
    let mut command = write(0, 8);
    command.prp1.set(region.iova());
    command.prp2.set(region.iova() + (16 << 10));
    io.ok(command);
    command.prp2.set(region.iova() + PAGE); // aligned to 4 KiB, not to the page
    assert_eq!(io.status(command), StatusCode::PRP_OFFSET_INVALID);
    let target = Buffer::new(&host, 4096);
    io.ok(target.attach(read(7, 1)));
    assert!(target.bytes() == data[7 * 4096..]);
}
