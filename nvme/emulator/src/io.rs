//! The NVM command set (§6): read, write, flush, write zeroes, dataset management, compare.
//!
//! Invariants: a command is checked completely before it touches data or store; no allocation for reads and writes
//! once a queue has seen its largest transfer.
//!
//! Excludes: fused operations, SGLs, metadata and protection information (refused as invalid fields).

use nvme_spec::command::{DSM_MAX_RANGES, DsmRange, ReadWrite};
use nvme_spec::identify::Oncs;
use nvme_spec::{NamespaceId, NvmOpcode, StatusCode, SubmissionEntry};
use zerocopy::FromBytes;

use crate::controller::{Core, Outcome};
use crate::dma::{DmaDirection, DmaView, Payload, SegmentList};
use crate::namespace::{ByteRange, Namespace};
use crate::prp::{self, PrpPointer};
use crate::queue::{SubmissionQueue, SubmissionSlot, bump};
use crate::store::{Durability, SECTOR};

/// Bytes compared at a time.
const COMPARE_PIECE: usize = 4096;

impl Core {
    /// Executes one I/O command.
    #[inline]
    pub(crate) fn execute_io(
        &self,
        slot: &SubmissionSlot,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
    ) -> Result<Outcome, StatusCode> {
        let opcode = NvmOpcode(entry.opcode);
        self.check_supported(opcode)?;
        if entry.flags.fuse() != 0 || entry.flags.psdt() != 0 {
            return Err(StatusCode::INVALID_FIELD);
        }
        if opcode == NvmOpcode::FLUSH && entry.namespace_id() == NamespaceId::BROADCAST {
            return self.namespaces.iter().try_for_each(Namespace::flush).map(|()| Outcome::Done(0));
        }
        let namespace = self.namespace(entry.namespace_id())?;
        match opcode {
            NvmOpcode::READ => self.read(namespace, slot, queue, entry),
            NvmOpcode::WRITE => self.write(namespace, slot, queue, entry),
            NvmOpcode::FLUSH => namespace.flush(),
            NvmOpcode::WRITE_ZEROES => self.write_zeroes(namespace, entry),
            NvmOpcode::DATASET_MANAGEMENT => deallocate(namespace, queue, entry, self.durability(false)),
            NvmOpcode::COMPARE => self.compare(namespace, queue, entry),
            _ => Err(StatusCode::INVALID_OPCODE),
        }
        .map(|()| Outcome::Done(0))
    }

    /// Optional commands are unknown unless offered; the opcode is looked at before anything else.
    fn check_supported(&self, opcode: NvmOpcode) -> Result<(), StatusCode> {
        let supported = match opcode {
            NvmOpcode::READ | NvmOpcode::WRITE | NvmOpcode::FLUSH => true,
            NvmOpcode::WRITE_ZEROES => self.config.oncs.contains(Oncs::WRITE_ZEROES),
            NvmOpcode::DATASET_MANAGEMENT => self.config.oncs.contains(Oncs::DATASET_MANAGEMENT),
            NvmOpcode::COMPARE => self.config.oncs.contains(Oncs::COMPARE),
            _ => false,
        };
        if supported { Ok(()) } else { Err(StatusCode::INVALID_OPCODE) }
    }

    /// Checks a transfer's size and range (§5.15.2.2 MDTS, §6.1.5).
    #[inline]
    fn transfer_range(&self, namespace: &Namespace, command: ReadWrite) -> Result<ByteRange, StatusCode> {
        if command.dw12.prinfo() != 0 {
            return Err(StatusCode::INVALID_FIELD);
        }
        let blocks = u64::from(command.dw12.blocks_z()) + 1;
        self.check_mdts(namespace.bytes_of(blocks))?;
        namespace.range(command.slba, blocks)
    }

    /// Refuses transfers beyond MDTS.
    #[inline]
    pub(crate) fn check_mdts(&self, bytes: u64) -> Result<(), StatusCode> {
        if self.config.mdts != 0 && bytes > 4096 << self.config.mdts {
            return Err(StatusCode::INVALID_FIELD);
        }
        Ok(())
    }

    fn durability(&self, fua: bool) -> Durability {
        if fua || !self.cache_enabled.load(std::sync::atomic::Ordering::Relaxed) {
            Durability::Durable
        } else {
            Durability::Cached
        }
    }

    #[inline]
    fn read(
        &self,
        namespace: &Namespace,
        slot: &SubmissionSlot,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
    ) -> Result<(), StatusCode> {
        let command = entry.read_write();
        let range = self.transfer_range(namespace, command)?;
        resolve(queue, entry, range.len, DmaDirection::ToHost)?;
        if command.dw12.fua() {
            namespace.flush()?; // what is returned must be durable (§6.9)
        }
        namespace.read(range, Payload::new(&queue.view, &queue.segments))?;
        bump(&slot.stats.reads, 1);
        bump(&slot.stats.sectors_read, range.len / SECTOR);
        Ok(())
    }

    #[inline]
    fn write(
        &self,
        namespace: &Namespace,
        slot: &SubmissionSlot,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
    ) -> Result<(), StatusCode> {
        let command = entry.read_write();
        let range = self.transfer_range(namespace, command)?;
        if command.dw12.dtype() != 0 {
            return Err(StatusCode::INVALID_FIELD); // no directives
        }
        resolve(queue, entry, range.len, DmaDirection::FromHost)?;
        let payload = Payload::new(&queue.view, &queue.segments);
        namespace.write(range, payload, self.durability(command.dw12.fua()))?;
        bump(&slot.stats.writes, 1);
        bump(&slot.stats.sectors_written, range.len / SECTOR);
        Ok(())
    }

    /// Write Zeroes (§6.16). The space is given back whether or not DEAC asks for it: an image is thin in any case.
    fn write_zeroes(&self, namespace: &Namespace, entry: &SubmissionEntry) -> Result<(), StatusCode> {
        let command = entry.read_write();
        if command.dw12.prinfo() != 0 {
            return Err(StatusCode::INVALID_FIELD);
        }
        let range = namespace.range(command.slba, u64::from(command.dw12.blocks_z()) + 1)?;
        namespace.clear(range, self.durability(command.dw12.fua()))
    }

    fn compare(
        &self,
        namespace: &Namespace,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
    ) -> Result<(), StatusCode> {
        let command = entry.read_write();
        let range = self.transfer_range(namespace, command)?;
        resolve(queue, entry, range.len, DmaDirection::FromHost)?;
        if command.dw12.fua() {
            namespace.flush()?;
        }
        let mut cursor = Payload::new(&queue.view, &queue.segments).cursor();
        let mut stored = [0u8; COMPARE_PIECE];
        let mut at = range.offset;
        let end = range.offset + range.len;
        while at < end {
            let piece = &mut stored[..(end - at).min(COMPARE_PIECE as u64) as usize];
            namespace.peek(at, piece)?;
            if !cursor.matches(piece) {
                return Err(StatusCode::COMPARE_FAILURE);
            }
            at += piece.len() as u64;
        }
        Ok(())
    }
}

/// Resolves the data pointer into the queue's segment list.
#[inline]
pub(crate) fn resolve(
    queue: &mut SubmissionQueue,
    entry: &SubmissionEntry,
    len: u64,
    direction: DmaDirection,
) -> Result<(), StatusCode> {
    let pointer = PrpPointer { prp1: entry.prp1.get(), prp2: entry.prp2.get(), page_shift: queue.page_shift };
    let walk = |view: &mut DmaView, list: &mut SegmentList| prp::walk(pointer, len, direction, view, list);
    match &mut queue.diversion {
        None => walk(&mut queue.view, &mut queue.segments),
        Some(diversion) => diversion.resolve(len, direction, &mut queue.view, &mut queue.segments, walk),
    }
}

/// Dataset Management (§6.7): all ranges are checked before the first is acted on.
fn deallocate(
    namespace: &Namespace,
    queue: &mut SubmissionQueue,
    entry: &SubmissionEntry,
    when: Durability,
) -> Result<(), StatusCode> {
    const RANGE_BYTES: usize = size_of::<DsmRange>();
    let count = usize::from(entry.dsm_ranges_z()) + 1;
    resolve(queue, entry, (count * RANGE_BYTES) as u64, DmaDirection::FromHost)?;
    let mut bytes = [0u8; DSM_MAX_RANGES * RANGE_BYTES];
    let bytes = &mut bytes[..count * RANGE_BYTES];
    let payload = Payload::new(&queue.view, &queue.segments);
    debug_assert_eq!(payload.len(), bytes.len());
    payload.cursor().take(bytes);
    let ranges = || {
        bytes.chunks_exact(RANGE_BYTES).map(|raw| {
            let range = DsmRange::read_from_bytes(raw).expect("chunks are the size of a range");
            namespace.range(range.slba.get(), u64::from(range.blocks.get()))
        })
    };
    for range in ranges() {
        range?;
    }
    if entry.dsm().ad() {
        for range in ranges() {
            namespace.clear(range?, when)?;
        }
    }
    Ok(())
}
