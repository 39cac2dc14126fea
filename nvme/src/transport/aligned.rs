//! DMA memory for controllers whose memory pages are larger than the transports' alignment of 4 KiB (CAP.MPSMIN > 0).
//!
//! Invariants: what is returned begins a memory page of the controller and is contiguous for it.

use std::sync::Arc;

use reactor::dma::{DmaRegion, PAGE_SIZE};
use vm_memory::{MmapRegion, VolatileSlice};

use super::{Transport, TransportError};

/// A part of a larger region that begins where it should.
struct Aligned {
    region: Arc<dyn DmaRegion>,
    offset: usize,
    bytes: usize,
}

impl DmaRegion for Aligned {
    fn slice(&self) -> VolatileSlice<'_> {
        self.region.slice().subslice(self.offset, self.bytes).expect("checked when the part was made")
    }

    fn iova(&self) -> u64 {
        self.region.iova() + self.offset as u64
    }

    fn mapping(&self) -> (Arc<MmapRegion>, usize) {
        let (mapping, start) = self.region.mapping();
        (mapping, start + self.offset)
    }
}

/// Zeroed memory as [`Transport::allocate`] gives it, at a multiple of `alignment`, a power of two.
///
/// # Errors
/// There is none.
pub(crate) fn allocate(
    transport: &dyn Transport,
    bytes: usize,
    alignment: usize,
) -> Result<Arc<dyn DmaRegion>, TransportError> {
    if alignment <= PAGE_SIZE {
        return transport.allocate(bytes);
    }
    let too_large = || TransportError::Memory { bytes, reason: "the size overflows".to_owned() };
    let rounded = bytes.checked_next_multiple_of(PAGE_SIZE).ok_or_else(too_large)?;
    let region = transport.allocate(rounded.checked_add(alignment - PAGE_SIZE).ok_or_else(too_large)?)?;
    let offset = (region.iova().wrapping_neg() & (alignment as u64 - 1)) as usize;
    if region.slice().subslice(offset, rounded).is_err() {
        let reason = "the transport's memory does not begin a page".to_owned();
        return Err(TransportError::Memory { bytes, reason });
    }
    Ok(Arc::new(Aligned { region, offset, bytes: rounded }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::fake::{Fake, Script};
    use vm_memory::Bytes;

    #[test]
    fn memory_begins_a_page_of_any_size_and_holds_what_was_asked_for() {
        let fake = Fake::new(Script::default());
        for alignment in [4096, 8192, 16384, 65536] {
            for bytes in [1, 4096, 5000, 65536, 100_000] {
                let region = allocate(&*fake, bytes, alignment).unwrap();
                assert_eq!(region.iova() % alignment as u64, 0);
                assert!(region.slice().len() >= bytes);
                let end = region.slice().len() - 1;
                region.slice().write_slice(&[7], end).unwrap();
                assert_eq!(fake.read(region.iova() + end as u64, 1), [7], "the same memory for the device");
            }
        }
        assert!(allocate(&*fake, usize::MAX, 65536).is_err());
    }
}
