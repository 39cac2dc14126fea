//! Copy (2.0, *NVM Command Set Specification* §3.2.2): blocks of several source ranges to one destination.
//!
//! All source data is read before the first block is written, so ranges may overlap the destination: the result is what a
//! host with a buffer of its own would get. The limits of Identify Namespace bound the buffer.
//!
//! Source range format 0 only.

use nvme_spec::command::ReadWriteDw12;
use nvme_spec::{StatusCode, SubmissionEntry};

use super::NvmContext;
use crate::controller::Core;
use crate::dma::DmaDirection;
use crate::namespace::{ByteRange, COPY_BLOCKS, COPY_RANGE_BLOCKS, COPY_RANGES_Z};

/// Bytes of a source range entry of format 0.
const ENTRY: usize = 32;
/// Source ranges that fit the limit.
const MAX_ENTRIES: usize = COPY_RANGES_Z as usize + 1;

impl Core {
    /// Copy.
    pub(super) fn copy(
        &self,
        context: &mut NvmContext<'_, '_>,
        entry: &SubmissionEntry,
    ) -> Result<(), StatusCode> {
        let dw12 = entry.cdw12.get();
        let (ranges_z, format) = (dw12 as u8, dw12 >> 8 & 0xf);
        let (prinfo_read, directive, prinfo_write) = (dw12 >> 12 & 0xf, dw12 >> 20 & 0xf, dw12 >> 26 & 0xf);
        if format != 0 || prinfo_read != 0 || prinfo_write != 0 || directive != 0 {
            return Err(StatusCode::INVALID_FIELD);
        }
        context.namespace.check_service()?;
        if ranges_z > COPY_RANGES_Z {
            return Err(StatusCode::COMMAND_SIZE_LIMIT_EXCEEDED);
        }
        let (sources, blocks) = self.source_ranges(context, entry, usize::from(ranges_z) + 1)?;
        let target = context.namespace.range(entry.read_write().slba, blocks)?;
        let when = self.durability(ReadWriteDw12::from(dw12).fua());
        let _writing = self.gate.enter(&context.slot.writing);
        let mut bytes = vec![0; target.len as usize];
        let mut rest = &mut bytes[..];
        for source in sources {
            let (now, later) = rest.split_at_mut(source.len as usize);
            context.namespace.peek(source.offset, now)?;
            rest = later;
        }
        context.namespace.poke(target.offset, &bytes, when)
    }

    /// The checked source ranges and the sum of their blocks.
    fn source_ranges(
        &self,
        context: &mut NvmContext<'_, '_>,
        entry: &SubmissionEntry,
        count: usize,
    ) -> Result<(Vec<ByteRange>, u64), StatusCode> {
        context.data.resolve(entry, (count * ENTRY) as u64, DmaDirection::FromHost)?;
        let mut raw = [0u8; MAX_ENTRIES * ENTRY];
        let raw = &mut raw[..count * ENTRY];
        context.data.payload().cursor().take(raw);
        let mut sources = Vec::with_capacity(count);
        let mut total = 0;
        for range in raw.chunks_exact(ENTRY) {
            let slba = u64::from_le_bytes(range[8..16].try_into().expect("eight bytes"));
            let blocks = u64::from(u16::from_le_bytes([range[16], range[17]])) + 1;
            total += blocks;
            if blocks > u64::from(COPY_RANGE_BLOCKS) || total > u64::from(COPY_BLOCKS) {
                return Err(StatusCode::COMMAND_SIZE_LIMIT_EXCEEDED);
            }
            sources.push(context.namespace.range(slba, blocks)?);
        }
        Ok((sources, total))
    }
}
