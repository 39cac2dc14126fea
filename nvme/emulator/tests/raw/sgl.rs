//! Scatter gather lists: every kind of descriptor, and every way to get one wrong.

use nvme_emulator::{ControllerConfig, MappedRegion, SglSupport};
use nvme_spec::command::ForceUnitAccess;
use nvme_spec::identify::{Cns, IdentifyController};
use nvme_spec::{NamespaceId, StatusCode, SubmissionEntry};
use vm_memory::Bytes;
use zerocopy::FromBytes;

use crate::initiator::{Buffer, Host, NS1, Pair, bytes, memory_config, pattern};

const BLOCK: u8 = 0x00;
const BUCKET: u8 = 0x10;
const SEGMENT: u8 = 0x20;
const LAST: u8 = 0x30;

/// A descriptor as the specification lays it out.
fn descriptor(identifier: u8, address: u64, len: u32) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&address.to_le_bytes());
    raw[8..12].copy_from_slice(&len.to_le_bytes());
    raw[15] = identifier;
    raw
}

fn with_sgl(mut entry: SubmissionEntry, first: [u8; 16]) -> SubmissionEntry {
    entry.flags.set_psdt(1);
    entry.prp1.set(u64::from_le_bytes(first[..8].try_into().unwrap()));
    entry.prp2.set(u64::from_le_bytes(first[8..].try_into().unwrap()));
    entry
}

fn read(blocks: u16) -> SubmissionEntry {
    SubmissionEntry::read(NS1, 0, blocks - 1)
}

fn write(blocks: u16) -> SubmissionEntry {
    SubmissionEntry::write(NS1, 0, blocks - 1, ForceUnitAccess::No)
}

fn put_list(region: &MappedRegion, at: u64, list: &[[u8; 16]]) {
    for (i, raw) in list.iter().enumerate() {
        region.slice().write_slice(raw, at as usize + i * 16).unwrap();
    }
}

/// A namespace whose first 16 blocks hold a pattern.
fn filled(support: SglSupport) -> (Host, Pair, Vec<u8>) {
    let mut host = Host::new(ControllerConfig { sgls: support, ..memory_config(1 << 20, 512) });
    let mut io = host.io_pair(1, 16);
    let data = pattern(4, 16 * 512);
    io.ok(Buffer::filled(&host, &data).attach(write(16)));
    (host, io, data)
}

#[test]
fn support_is_reported() {
    for (support, field) in [(SglSupport::Absent, 0), (SglSupport::Byte, 1), (SglSupport::Dword, 2)] {
        let (mut host, ..) = filled(support);
        let data = host.admin_data(SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE));
        let data = IdentifyController::read_from_bytes(&data).unwrap();
        assert_eq!(data.sgls.get() & 3, field);
    }
}

#[test]
fn single_block_at_any_byte_carries_reads_and_writes() {
    let (host, mut io, data) = filled(SglSupport::Byte);
    let region = host.map(16 << 10);
    io.ok(with_sgl(read(16), descriptor(BLOCK, region.iova() + 13, 8192)));
    assert!(bytes(region.slice())[13..][..8192] == data);
    let other = pattern(5, 8192);
    region.slice().write_slice(&other, 7).unwrap();
    let mut command = with_sgl(write(16), descriptor(BLOCK, region.iova() + 7, 8192));
    command.flags.set_psdt(2);
    io.ok(command);
    let target = Buffer::new(&host, 8192);
    io.ok(target.attach(read(16)));
    assert!(target.bytes() == other);
}

#[test]
fn chained_segments_gather_and_buckets_swallow() {
    let (host, mut io, data) = filled(SglSupport::Byte);
    let region = host.map(64 << 10);
    let iova = region.iova();
    let list = 32 << 10;
    // 8192 bytes: 100 here, none there, 3000 dropped, then in the last segment 5000 and 92.
    put_list(
        &region,
        list,
        &[
            descriptor(BLOCK, iova + 1, 100),
            descriptor(BLOCK, iova + 200, 0),
            descriptor(BUCKET, 0, 3000),
            descriptor(LAST, iova + list + 4096, 32),
        ],
    );
    put_list(
        &region,
        list + 4096,
        &[descriptor(BLOCK, iova + 1000, 5000), descriptor(BLOCK, iova + 9000, 92)],
    );
    io.ok(with_sgl(read(16), descriptor(SEGMENT, iova + list, 64)));
    let got = bytes(region.slice());
    assert!(got[1..101] == data[..100] && got[101..1000].iter().all(|b| *b == 0));
    assert!(got[1000..6000] == data[3100..8100] && got[9000..9092] == data[8100..]);
    assert_eq!(host.ctrl.memory().fault_count(), 0);
}

#[test]
fn bucket_longer_than_any_buffer_of_the_controller_is_served() {
    let (_host, mut io, _) = filled(SglSupport::Byte);
    io.ok(with_sgl(read(1024), descriptor(BUCKET, 0, 1024 * 512)));
}

#[test]
fn bucket_in_a_source_is_ignored() {
    let (host, mut io, _) = filled(SglSupport::Byte);
    let region = host.map(8192);
    let iova = region.iova();
    put_list(&region, 4096, &[descriptor(BUCKET, 0, 77), descriptor(BLOCK, iova, 512)]);
    io.ok(with_sgl(write(1), descriptor(LAST, iova + 4096, 32)));
}

#[test]
fn malformed_lists_get_the_statuses_of_the_specification() {
    let (host, mut io, _) = filled(SglSupport::Byte);
    let region = host.map(16 << 10);
    let iova = region.iova();
    let at = 8 << 10;
    let one = descriptor(BLOCK, iova, 512);
    let direct = [
        (descriptor(BLOCK, iova, 511), StatusCode::DATA_SGL_LENGTH_INVALID),
        (descriptor(BLOCK, iova, 513), StatusCode::DATA_SGL_LENGTH_INVALID),
        (descriptor(BLOCK, iova, 0), StatusCode::DATA_SGL_LENGTH_INVALID),
        (descriptor(BLOCK, iova, u32::MAX), StatusCode::DATA_SGL_LENGTH_INVALID),
        (descriptor(0x01, iova, 512), StatusCode::SGL_TYPE_INVALID),
        (descriptor(0x40, iova, 512), StatusCode::SGL_TYPE_INVALID),
        (descriptor(0xf0, iova, 512), StatusCode::SGL_TYPE_INVALID),
        (descriptor(SEGMENT, iova + at, 0), StatusCode::INVALID_SGL_SEGMENT),
        (descriptor(LAST, iova + at, 0), StatusCode::INVALID_SGL_SEGMENT),
        (descriptor(LAST, iova + at, 24), StatusCode::INVALID_SGL_SEGMENT),
        (descriptor(LAST, iova + at + 4, 16), StatusCode::INVALID_SGL_SEGMENT),
    ];
    for (first, status) in direct {
        assert_eq!(io.status(with_sgl(read(1), first)), status, "{first:x?}");
    }
    let listed: [(u8, &[[u8; 16]], StatusCode); 6] = [
        (LAST, &[one, descriptor(LAST, iova, 16)], StatusCode::INVALID_SGL_SEGMENT),
        (LAST, &[one, descriptor(SEGMENT, iova, 16)], StatusCode::INVALID_SGL_SEGMENT),
        (SEGMENT, &[one], StatusCode::INVALID_SGL_SEGMENT),
        (SEGMENT, &[descriptor(LAST, iova, 16), one], StatusCode::INVALID_SGL_COUNT),
        (LAST, &[one, descriptor(0x50, iova, 16)], StatusCode::SGL_TYPE_INVALID),
        (LAST, &[one, one], StatusCode::DATA_SGL_LENGTH_INVALID),
    ];
    for (kind, list, status) in listed {
        put_list(&region, at, list);
        let first = descriptor(kind, iova + at, list.len() as u32 * 16);
        assert_eq!(io.status(with_sgl(read(1), first)), status, "{list:x?}");
    }
    assert_eq!(host.ctrl.memory().fault_count(), 0);
    let nowhere = descriptor(BLOCK, iova + (16 << 10), 512);
    assert_eq!(io.status(with_sgl(read(1), nowhere)), StatusCode::DATA_TRANSFER_ERROR);
    let nowhere = descriptor(LAST, iova + (16 << 10), 16);
    assert_eq!(io.status(with_sgl(read(1), nowhere)), StatusCode::DATA_TRANSFER_ERROR);
}

#[test]
fn lists_without_an_end_end() {
    let (host, mut io, _) = filled(SglSupport::Byte);
    let region = host.map(4096);
    let iova = region.iova();
    // A segment that names itself, with nothing but empty blocks.
    put_list(&region, 0, &[descriptor(BLOCK, iova, 0), descriptor(SEGMENT, iova, 32)]);
    let circle = descriptor(SEGMENT, iova, 32);
    assert_eq!(io.status(with_sgl(read(1), circle)), StatusCode::INVALID_SGL_COUNT);
    let huge = descriptor(LAST, iova, u32::MAX - 15);
    assert_eq!(io.status(with_sgl(read(1), huge)), StatusCode::INVALID_SGL_COUNT);
}

#[test]
fn granularity_is_enforced_where_it_is_reported() {
    let (host, mut io, _) = filled(SglSupport::Dword);
    let region = host.map(8192);
    let iova = region.iova();
    io.ok(with_sgl(read(1), descriptor(BLOCK, iova + 4, 512)));
    for bad in [descriptor(BLOCK, iova + 2, 512), descriptor(BLOCK, iova, 510)] {
        assert_eq!(io.status(with_sgl(read(1), bad)), StatusCode::SGL_GRANULARITY_INVALID);
    }
}

#[test]
fn admin_commands_use_prps() {
    let (mut host, ..) = filled(SglSupport::Byte);
    let region = host.map(4096);
    let identify = SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE);
    let command = with_sgl(identify, descriptor(BLOCK, region.iova(), 4096));
    assert_eq!(host.admin.status(command), StatusCode::INVALID_FIELD);
}
