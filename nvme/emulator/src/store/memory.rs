//! A namespace in memory: sparse, allocated chunk by chunk at first write.
//!
//! Invariants: a chunk that was never written, or was cleared as a whole, takes no space and reads as zeroes. Each chunk
//! has a lock of its own; there is none over all.
//!
//! Legal crash outcomes: none of its own. It counts as durable for as long as the process lives; put `write_cache` in
//! front to model a device that loses power.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, RwLock};

use super::{Durability, Store, StoreError};
use crate::dma::PayloadCursor;
use crate::locks::{read, write};

/// Bytes of a chunk.
const CHUNK: usize = 64 << 10;
/// Chunks of a span, the unit in which the table of chunks is allocated.
const CHUNKS_PER_SPAN: usize = 1024;

/// Bytes that every store can grow to: a table of 1,024 spans.
const RESERVE: u64 = 64 << 30;

type Chunk = RwLock<Option<Box<[u8]>>>;

/// Sparse memory.
pub(crate) struct MemoryStore {
    spans: Box<[OnceLock<Box<[Chunk]>>]>,
    allocated: AtomicU64,
}

/// One step of a walk: part of a chunk.
struct Step {
    chunk: usize,
    within: usize,
    len: usize,
}

impl MemoryStore {
    /// Room for `bytes` bytes of zeroes, and to grow to [`RESERVE`].
    pub(crate) fn new(bytes: u64) -> Self {
        let spans = bytes.max(RESERVE).div_ceil((CHUNK * CHUNKS_PER_SPAN) as u64);
        Self { spans: (0..spans).map(|_| OnceLock::new()).collect(), allocated: AtomicU64::new(0) }
    }

    /// The chunk if its span was ever written.
    fn existing(&self, chunk: usize) -> Option<&Chunk> {
        Some(&self.spans[chunk / CHUNKS_PER_SPAN].get()?[chunk % CHUNKS_PER_SPAN])
    }

    fn chunk(&self, chunk: usize) -> &Chunk {
        let span = self.spans[chunk / CHUNKS_PER_SPAN]
            .get_or_init(|| (0..CHUNKS_PER_SPAN).map(|_| RwLock::new(None)).collect());
        &span[chunk % CHUNKS_PER_SPAN]
    }

    /// Lets `fill` change part of a chunk, allocating it first if need be.
    fn change(&self, step: &Step, fill: impl FnOnce(&mut [u8])) {
        let mut guard = write(self.chunk(step.chunk));
        let bytes = guard.get_or_insert_with(|| {
            self.allocated.fetch_add(CHUNK as u64, Ordering::Relaxed);
            vec![0; CHUNK].into_boxed_slice()
        });
        fill(&mut bytes[step.within..step.within + step.len]);
    }

    /// Lets `take` see part of a chunk; `None` stands for zeroes.
    fn look(&self, step: &Step, take: impl FnOnce(Option<&[u8]>)) {
        match self.existing(step.chunk) {
            None => take(None),
            Some(chunk) => take(read(chunk).as_ref().map(|b| &b[step.within..step.within + step.len])),
        }
    }
}

/// Splits a range at chunk boundaries.
fn steps(offset: u64, len: u64) -> impl Iterator<Item = Step> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        let within = (at % CHUNK as u64) as usize;
        let len = (CHUNK - within).min((end - at).min(CHUNK as u64) as usize);
        let chunk = (at / CHUNK as u64) as usize;
        at += len as u64;
        (len > 0).then_some(Step { chunk, within, len })
    })
}

impl Store for MemoryStore {
    fn read(&self, offset: u64, len: usize, into: &mut PayloadCursor<'_>) -> Result<(), StoreError> {
        for step in steps(offset, len as u64) {
            self.look(&step, |bytes| match bytes {
                Some(bytes) => into.put(bytes),
                None => into.put_zeroes(step.len),
            });
        }
        Ok(())
    }

    fn write(
        &self,
        offset: u64,
        len: usize,
        from: &mut PayloadCursor<'_>,
        _: Durability,
    ) -> Result<(), StoreError> {
        for step in steps(offset, len as u64) {
            self.change(&step, |bytes| from.take(bytes));
        }
        Ok(())
    }

    fn clear(&self, offset: u64, len: u64, _: Durability) -> Result<(), StoreError> {
        for step in steps(offset, len) {
            let Some(chunk) = self.existing(step.chunk) else { continue };
            let mut guard = write(chunk);
            if step.len < CHUNK {
                if let Some(bytes) = guard.as_mut() {
                    bytes[step.within..step.within + step.len].fill(0);
                }
            } else if guard.take().is_some() {
                self.allocated.fetch_sub(CHUNK as u64, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn allocated(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    fn resize(&self, bytes: u64) -> Result<(), StoreError> {
        let most = (self.spans.len() * CHUNK * CHUNKS_PER_SPAN) as u64;
        if bytes > most { Err(StoreError::NoSpace) } else { Ok(()) }
    }

    fn read_host(&self, offset: u64, mut dst: &mut [u8]) -> Result<(), StoreError> {
        for step in steps(offset, dst.len() as u64) {
            let (now, later) = dst.split_at_mut(step.len);
            self.look(&step, |bytes| match bytes {
                Some(bytes) => now.copy_from_slice(bytes),
                None => now.fill(0),
            });
            dst = later;
        }
        Ok(())
    }

    fn write_host(&self, offset: u64, mut src: &[u8]) -> Result<(), StoreError> {
        for step in steps(offset, src.len() as u64) {
            let (now, later) = src.split_at(step.len);
            self.change(&step, |bytes| bytes.copy_from_slice(now));
            src = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unwritten_space_reads_as_zeroes_and_takes_none() {
        let store = MemoryStore::new(1 << 40);
        let mut bytes = vec![1; 3 * CHUNK];
        store.read_host((1 << 40) - 3 * CHUNK as u64, &mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == 0));
        assert_eq!(store.allocated(), 0);
    }

    #[test]
    fn clearing_whole_chunks_gives_them_back_and_parts_are_zeroed() {
        let store = MemoryStore::new(1 << 24);
        store.write_host(0, &vec![7; 4 * CHUNK]).unwrap();
        assert_eq!(store.allocated(), 4 * CHUNK as u64);
        store.clear(512, 2 * CHUNK as u64, Durability::Cached).unwrap();
        assert_eq!(store.allocated(), 3 * CHUNK as u64);
        let mut bytes = vec![1; 4 * CHUNK];
        store.read_host(0, &mut bytes).unwrap();
        for (i, byte) in bytes.iter().enumerate() {
            assert_eq!(*byte, if (512..512 + 2 * CHUNK).contains(&i) { 0 } else { 7 }, "byte {i}");
        }
    }

    #[test]
    fn size_that_ends_within_a_chunk_is_reachable_to_its_end() {
        let store = MemoryStore::new(CHUNK as u64 + 512);
        store.write_host(CHUNK as u64 - 512, &[9; 1024]).unwrap();
        let mut bytes = [0; 512];
        store.read_host(CHUNK as u64, &mut bytes).unwrap();
        assert_eq!(bytes, [9; 512]);
    }
}
