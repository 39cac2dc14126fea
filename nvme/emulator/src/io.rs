//! The NVM command set (§6): read, write, flush, write zeroes, dataset management, compare, verify; in submodules copy
//! and fused compare-and-write.
//!
//! Invariants: a command is checked completely before it touches data or store; no allocation for reads and writes
//! once a queue has seen its largest transfer; whoever changes a store has entered the gate (`gate`).
//!
//! Excludes: metadata and protection information (refused).

mod copy;
mod fused;

use nvme_spec::command::{DSM_MAX_RANGES, DsmRange, ReadWrite};
use nvme_spec::identify::Oncs;
use nvme_spec::{NamespaceId, NvmOpcode, StatusCode, SubmissionEntry};
use zerocopy::FromBytes;

use crate::controller::{Core, Outcome};
use crate::data_pointer::DataPath;
use crate::dma::DmaDirection;
use crate::namespace::{ByteRange, Namespace};
use crate::queue::{SubmissionQueue, SubmissionSlot, bump};
use crate::store::{Durability, SECTOR};

pub(crate) use fused::{ACWU_Z, FUSE_FIRST, FUSE_SECOND};

/// Bytes compared at a time.
const COMPARE_PIECE: usize = 4096;
/// Bytes verified at a time.
const VERIFY_PIECE: usize = 64 << 10;

/// What a command of the NVM command set is executed with.
pub(crate) struct NvmContext<'a, 'q> {
    pub(crate) namespace: &'a Namespace,
    pub(crate) slot: &'a SubmissionSlot,
    pub(crate) data: &'a mut DataPath<'q>,
}

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
        if entry.flags.fuse() != 0 {
            return self.execute_fused(slot, queue, entry);
        }
        let (namespaces, mut data) = queue.split(&self.namespaces, self.config.sgls);
        data.check_kind(entry)?;
        if opcode == NvmOpcode::FLUSH && entry.namespace_id() == NamespaceId::BROADCAST {
            return namespaces.iter().try_for_each(Namespace::flush).map(|()| Outcome::Done(0));
        }
        let namespace = &**namespaces.find(entry.namespace_id())?;
        let context = &mut NvmContext { namespace, slot, data: &mut data };
        match opcode {
            NvmOpcode::READ => self.read(context, entry),
            NvmOpcode::WRITE => self.write(context, entry),
            NvmOpcode::FLUSH => namespace.flush(),
            NvmOpcode::WRITE_ZEROES => self.write_zeroes(context, entry),
            NvmOpcode::DATASET_MANAGEMENT => self.deallocate(context, entry),
            NvmOpcode::COMPARE => self.compare(context, entry),
            NvmOpcode::VERIFY => verify(namespace, entry),
            NvmOpcode::COPY => self.copy(context, entry),
            _ => Err(StatusCode::INVALID_OPCODE),
        }
        .map(|()| Outcome::Done(0))
    }

    /// Optional commands are unknown unless offered; the opcode is looked at before anything else.
    pub(crate) fn check_supported(&self, opcode: NvmOpcode) -> Result<(), StatusCode> {
        let needs = match opcode {
            NvmOpcode::READ | NvmOpcode::WRITE | NvmOpcode::FLUSH => Oncs::empty(),
            NvmOpcode::WRITE_ZEROES => Oncs::WRITE_ZEROES,
            NvmOpcode::DATASET_MANAGEMENT => Oncs::DATASET_MANAGEMENT,
            NvmOpcode::COMPARE => Oncs::COMPARE,
            NvmOpcode::VERIFY => Oncs::VERIFY,
            NvmOpcode::COPY => Oncs::COPY,
            _ => return Err(StatusCode::INVALID_OPCODE),
        };
        if self.config.oncs.contains(needs) { Ok(()) } else { Err(StatusCode::INVALID_OPCODE) }
    }

    /// Checks a transfer's size and range (§5.15.2.2 MDTS, §6.1.5).
    #[inline]
    fn transfer_range(&self, namespace: &Namespace, command: ReadWrite) -> Result<ByteRange, StatusCode> {
        let blocks = u64::from(command.dw12.blocks_z()) + 1;
        self.check_mdts(namespace.bytes_of(blocks))?;
        block_range(namespace, command)
    }

    /// Refuses transfers beyond MDTS, which counts in pages of CAP.MPSMIN.
    #[inline]
    pub(crate) fn check_mdts(&self, bytes: u64) -> Result<(), StatusCode> {
        let (mdts, mpsmin) = (self.config.mdts, self.config.mpsmin);
        if mdts != 0 && bytes > 4096 << (mdts + mpsmin) {
            return Err(StatusCode::INVALID_FIELD);
        }
        Ok(())
    }

    pub(crate) fn durability(&self, fua: bool) -> Durability {
        if fua || !self.cache_enabled.load(std::sync::atomic::Ordering::Relaxed) {
            Durability::Durable
        } else {
            Durability::Cached
        }
    }

    #[inline]
    fn read(&self, context: &mut NvmContext<'_, '_>, entry: &SubmissionEntry) -> Result<(), StatusCode> {
        let command = entry.read_write();
        let range = self.transfer_range(context.namespace, command)?;
        context.data.resolve(entry, range.len, DmaDirection::ToHost)?;
        if command.dw12.fua() {
            context.namespace.flush()?; // what is returned must be durable (§6.9)
        }
        context.namespace.read(range, context.data.payload())?;
        bump(&context.slot.stats.reads, 1);
        bump(&context.slot.stats.sectors_read, range.len / SECTOR);
        Ok(())
    }

    #[inline]
    fn write(&self, context: &mut NvmContext<'_, '_>, entry: &SubmissionEntry) -> Result<(), StatusCode> {
        let _writing = self.gate.enter(&context.slot.writing);
        self.write_ungated(context, entry)
    }

    /// A write by whoever has entered the gate, or closed it.
    #[inline]
    fn write_ungated(
        &self,
        context: &mut NvmContext<'_, '_>,
        entry: &SubmissionEntry,
    ) -> Result<(), StatusCode> {
        let command = entry.read_write();
        let range = self.transfer_range(context.namespace, command)?;
        if command.dw12.dtype() != 0 {
            return Err(StatusCode::INVALID_FIELD); // no directives
        }
        context.data.resolve(entry, range.len, DmaDirection::FromHost)?;
        context.namespace.write(range, context.data.payload(), self.durability(command.dw12.fua()))?;
        bump(&context.slot.stats.writes, 1);
        bump(&context.slot.stats.sectors_written, range.len / SECTOR);
        Ok(())
    }

    /// Write Zeroes (§6.16). The space is given back whether or not DEAC asks for it: an image is thin in any case.
    fn write_zeroes(
        &self,
        context: &mut NvmContext<'_, '_>,
        entry: &SubmissionEntry,
    ) -> Result<(), StatusCode> {
        let command = entry.read_write();
        let range = block_range(context.namespace, command)?;
        let _writing = self.gate.enter(&context.slot.writing);
        context.namespace.clear(range, self.durability(command.dw12.fua()))
    }

    fn compare(&self, context: &mut NvmContext<'_, '_>, entry: &SubmissionEntry) -> Result<(), StatusCode> {
        let command = entry.read_write();
        let namespace = context.namespace;
        let range = self.transfer_range(namespace, command)?;
        context.data.resolve(entry, range.len, DmaDirection::FromHost)?;
        if command.dw12.fua() {
            namespace.flush()?;
        }
        let mut cursor = context.data.payload().cursor();
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

    /// Dataset Management (§6.7): all ranges are checked before the first is acted on.
    fn deallocate(
        &self,
        context: &mut NvmContext<'_, '_>,
        entry: &SubmissionEntry,
    ) -> Result<(), StatusCode> {
        const RANGE_BYTES: usize = size_of::<DsmRange>();
        let namespace = context.namespace;
        namespace.check_service()?;
        let count = usize::from(entry.dsm_ranges_z()) + 1;
        context.data.resolve(entry, (count * RANGE_BYTES) as u64, DmaDirection::FromHost)?;
        let mut bytes = [0u8; DSM_MAX_RANGES * RANGE_BYTES];
        let bytes = &mut bytes[..count * RANGE_BYTES];
        let payload = context.data.payload();
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
            let _writing = self.gate.enter(&context.slot.writing);
            for range in ranges() {
                namespace.clear(range?, self.durability(false))?;
            }
        }
        Ok(())
    }
}

/// The blocks of a command that has the fields of a read, checked.
#[inline]
fn block_range(namespace: &Namespace, command: ReadWrite) -> Result<ByteRange, StatusCode> {
    namespace.check_service()?;
    if command.dw12.prinfo() != 0 {
        return Err(StatusCode::INVALID_FIELD);
    }
    namespace.range(command.slba, u64::from(command.dw12.blocks_z()) + 1)
}

/// Verify (§6.14): the blocks can be read. Nothing is transferred, so MDTS does not limit it.
fn verify(namespace: &Namespace, entry: &SubmissionEntry) -> Result<(), StatusCode> {
    let range = block_range(namespace, entry.read_write())?;
    let mut bytes = vec![0; VERIFY_PIECE.min(range.len as usize)];
    let (mut at, end) = (range.offset, range.offset + range.len);
    while at < end {
        let piece = (end - at).min(VERIFY_PIECE as u64);
        namespace.peek(at, &mut bytes[..piece as usize])?;
        at += piece;
    }
    Ok(())
}
