//! A namespace in memory: sparse, its space taken chunk by chunk at first write.
//!
//! Invariants:
//! - a chunk that was never written, or was cleared as a whole, takes no space and reads as zeroes;
//! - what is within one chunk is read and written as a whole, so that no block is seen half written (NVMe 1.4 §6.4);
//! - a reader writes nothing that another core reads: cores that only read do not slow each other down.
//!
//! *Memory ordering*: each chunk has a sequence lock. A writer makes the sequence odd, changes the bytes, makes it even and larger.
//! A reader copies in between two looks at the sequence, and copies again if it changed or was odd. The bytes are copied as
//! volatile memory, by both.
//!
//! Legal crash outcomes: none of its own. It counts as durable for as long as the process lives; put `write_cache` in
//! front to model a device that loses power.

use std::fs::File;
use std::hint::spin_loop;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::{Durability, Store, StoreError};
use crate::dma::{PayloadCursor, ZEROES};

/// Bytes of a chunk.
const CHUNK: usize = 64 << 10;
/// Chunks of a span, the unit in which memory is mapped.
const CHUNKS_PER_SPAN: usize = 1024;
/// Bytes of a span.
const SPAN: usize = CHUNK * CHUNKS_PER_SPAN;

/// Bytes that every store can grow to: a table of 1,024 spans.
const RESERVE: u64 = 64 << 30;
/// Copies that a reader makes in vain, because of writers, before it keeps them out.
const HOPEFUL_READS: u32 = 8;
/// Looks at a locked chunk before its holder is given the processor.
const SPINS: u32 = 100;

/// Bit of a chunk's state: somebody changes it.
const LOCKED: u64 = 1;
/// Bit of a chunk's state: it has space, and its bytes are what was written.
const PRESENT: u64 = 2;
/// What each change adds to a chunk's state.
const CHANGE: u64 = 4;

/// A chunk's sequence lock: [`LOCKED`], [`PRESENT`], and above them the number of changes. Alone in its cache line: what lies
/// beside it may be another core's.
#[derive(Default)]
#[repr(align(128))]
struct ChunkState(AtomicU64);

/// The right to change a chunk; ends with [`Self::unlock`].
struct Held<'a> {
    chunk: &'a ChunkState,
    /// The state before.
    before: u64,
}

impl ChunkState {
    /// Keeps all others out.
    fn lock(&self) -> Held<'_> {
        let mut looks = 0;
        loop {
            let before = self.0.load(Ordering::Relaxed);
            // Acquire: pairs with the release in `unlock`.
            if before & LOCKED == 0
                && self
                    .0
                    .compare_exchange_weak(before, before | LOCKED, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                // Release: the odd sequence before the bytes. Pairs with the fence in `read`.
                fence(Ordering::Release);
                return Held { chunk: self, before };
            }
            wait(&mut looks);
        }
    }

    /// Lets `copy` read the chunk, again and again until nobody changed it meanwhile. `copy` is told whether it is present.
    #[inline]
    fn read(&self, mut copy: impl FnMut(bool)) {
        let mut looks = 0;
        for _ in 0..HOPEFUL_READS {
            let before = loop {
                // Acquire: the bytes after the sequence. Pairs with the release in `unlock`.
                let state = self.0.load(Ordering::Acquire);
                if state & LOCKED == 0 {
                    break state;
                }
                wait(&mut looks);
            };
            copy(before & PRESENT != 0);
            // Acquire: the bytes before the second look. Pairs with the fence in `lock`.
            fence(Ordering::Acquire);
            if self.0.load(Ordering::Relaxed) == before {
                return;
            }
        }
        let held = self.lock();
        copy(held.is_present());
        let present = held.before & PRESENT;
        held.unlock(present);
    }
}

impl Held<'_> {
    fn is_present(&self) -> bool {
        self.before & PRESENT != 0
    }

    /// Lets the others in. `present` is [`PRESENT`] or 0.
    fn unlock(self, present: u64) {
        let changes = (self.before & !(LOCKED | PRESENT)).wrapping_add(CHANGE);
        // Release: the bytes before the even sequence. Pairs with the acquires in `lock` and `read`.
        self.chunk.0.store(changes | present, Ordering::Release);
    }
}

/// Waits for somebody who holds a chunk, for as long as a copy of it takes, or longer if it is not running.
#[cold]
fn wait(looks: &mut u32) {
    *looks += 1;
    if looks.is_multiple_of(SPINS) { std::thread::yield_now() } else { spin_loop() }
}

/// Mapped memory and the states of its chunks.
struct Span {
    bytes: MmapRegion,
    chunks: Box<[ChunkState]>,
}

/// Sparse memory.
pub(crate) struct MemoryStore {
    /// Where the bytes are; nobody else has it.
    file: Arc<File>,
    spans: Box<[OnceLock<Span>]>,
    allocated: AtomicU64,
}

/// One step of a walk: part of a chunk.
#[derive(Clone, Copy)]
struct Step {
    chunk: usize,
    within: usize,
    len: usize,
}

impl Span {
    fn chunk(&self, step: Step) -> &ChunkState {
        &self.chunks[step.chunk % CHUNKS_PER_SPAN]
    }

    /// The bytes of a step.
    fn slice(&self, step: Step) -> VolatileSlice<'_> {
        let at = step.chunk % CHUNKS_PER_SPAN * CHUNK + step.within;
        self.bytes.get_slice(at, step.len).expect("a step lies within its chunk, and that within its span")
    }
}

impl MemoryStore {
    /// Room for `bytes` bytes of zeroes, and to grow to [`RESERVE`].
    pub(crate) fn new(bytes: u64) -> io::Result<Self> {
        let spans = bytes.max(RESERVE).div_ceil(SPAN as u64);
        let file = File::from(memfd_create("pollux-namespace", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(spans * SPAN as u64)?;
        Ok(Self {
            file: Arc::new(file),
            spans: (0..spans).map(|_| OnceLock::new()).collect(),
            allocated: AtomicU64::new(0),
        })
    }

    /// The span of a chunk if it was ever written.
    fn existing(&self, chunk: usize) -> Option<&Span> {
        self.spans[chunk / CHUNKS_PER_SPAN].get()
    }

    fn span(&self, chunk: usize) -> Result<&Span, StoreError> {
        let place = &self.spans[chunk / CHUNKS_PER_SPAN];
        if let Some(span) = place.get() {
            return Ok(span);
        }
        let start = (chunk / CHUNKS_PER_SPAN * SPAN) as u64;
        let bytes = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&self.file), start), SPAN)
            .map_err(|_| StoreError::NoSpace)?;
        let chunks = (0..CHUNKS_PER_SPAN).map(|_| ChunkState::default()).collect();
        // If somebody else was faster, this mapping of the same bytes goes.
        Ok(place.get_or_init(|| Span { bytes, chunks }))
    }

    /// Lets `fill` change part of a chunk, giving it space first if need be.
    fn change(&self, step: Step, fill: impl FnOnce(VolatileSlice<'_>)) -> Result<(), StoreError> {
        let span = self.span(step.chunk)?;
        let held = span.chunk(step).lock();
        if !held.is_present() {
            // A chunk that is not present is a hole: zeroes.
            self.allocated.fetch_add(CHUNK as u64, Ordering::Relaxed);
        }
        fill(span.slice(step));
        held.unlock(PRESENT);
        Ok(())
    }

    /// Lets `take` see part of a chunk, more than once if it is being changed; `None` stands for zeroes.
    fn look(&self, step: Step, mut take: impl FnMut(Option<VolatileSlice<'_>>)) {
        match self.existing(step.chunk) {
            None => take(None),
            Some(span) => span.chunk(step).read(|present| take(present.then(|| span.slice(step)))),
        }
    }

    /// Clears part of a chunk, or all of it, which gives its space back.
    fn clear_step(&self, span: &Span, step: Step) -> Result<(), StoreError> {
        let held = span.chunk(step).lock();
        if !held.is_present() {
            held.unlock(0);
            return Ok(());
        }
        if step.len < CHUNK {
            fill_with_zeroes(&span.slice(step));
            held.unlock(PRESENT);
            return Ok(());
        }
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let punched = fallocate(&*self.file, hole, (step.chunk * CHUNK) as libc::off_t, CHUNK as libc::off_t);
        held.unlock(if punched.is_ok() { 0 } else { PRESENT });
        punched.map_err(|errno| StoreError::Write(errno.into()))?;
        self.allocated.fetch_sub(CHUNK as u64, Ordering::Relaxed);
        Ok(())
    }
}

fn fill_with_zeroes(slice: &VolatileSlice<'_>) {
    let mut at = 0;
    while at < slice.len() {
        let rest = slice.offset(at).expect("below the length");
        at += rest.len().min(ZEROES.len());
        rest.copy_from(&ZEROES[..rest.len().min(ZEROES.len())]);
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
            let mut after = *into;
            self.look(step, |bytes| {
                // Each time from the same place on.
                after = *into;
                match bytes {
                    Some(bytes) => after.put_volatile(&bytes),
                    None => after.put_zeroes(step.len),
                }
            });
            *into = after;
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
            self.change(step, |bytes| from.take_volatile(&bytes))?;
        }
        Ok(())
    }

    fn clear(&self, offset: u64, len: u64, _: Durability) -> Result<(), StoreError> {
        for step in steps(offset, len) {
            if let Some(span) = self.existing(step.chunk) {
                self.clear_step(span, step)?;
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
        let most = (self.spans.len() * SPAN) as u64;
        if bytes > most { Err(StoreError::NoSpace) } else { Ok(()) }
    }

    fn read_host(&self, offset: u64, mut dst: &mut [u8]) -> Result<(), StoreError> {
        for step in steps(offset, dst.len() as u64) {
            let (now, later) = dst.split_at_mut(step.len);
            self.look(step, |bytes| match bytes {
                Some(bytes) => {
                    bytes.copy_to(now);
                }
                None => now.fill(0),
            });
            dst = later;
        }
        Ok(())
    }

    fn write_host(&self, offset: u64, mut src: &[u8]) -> Result<(), StoreError> {
        for step in steps(offset, src.len() as u64) {
            let (now, later) = src.split_at(step.len);
            self.change(step, |bytes| bytes.copy_from(now))?;
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
        let store = MemoryStore::new(1 << 40).unwrap();
        let mut bytes = vec![1; 3 * CHUNK];
        store.read_host((1 << 40) - 3 * CHUNK as u64, &mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == 0));
        assert_eq!(store.allocated(), 0);
    }

    #[test]
    fn clearing_whole_chunks_gives_them_back_and_parts_are_zeroed() {
        let store = MemoryStore::new(1 << 24).unwrap();
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
        let store = MemoryStore::new(CHUNK as u64 + 512).unwrap();
        store.write_host(CHUNK as u64 - 512, &[9; 1024]).unwrap();
        let mut bytes = [0; 512];
        store.read_host(CHUNK as u64, &mut bytes).unwrap();
        assert_eq!(bytes, [9; 512]);
    }

    #[test]
    fn cleared_chunks_give_their_pages_back_to_the_system() {
        use std::os::unix::fs::MetadataExt;
        let store = MemoryStore::new(1 << 24).unwrap();
        let used = || store.file.metadata().unwrap().blocks() * 512;
        assert_eq!(used(), 0);
        store.write_host(0, &vec![7; 4 * CHUNK]).unwrap();
        assert_eq!(used(), 4 * CHUNK as u64);
        store.clear(0, 3 * CHUNK as u64, Durability::Cached).unwrap();
        assert_eq!(used(), CHUNK as u64);
    }

    /// Two writers and two readers of the same bytes: whoever reads sees one write, never parts of two.
    #[test]
    fn a_block_is_never_seen_half_written() {
        const READS: usize = 2_000;
        let store = MemoryStore::new(1 << 24).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for writer in 0..2u8 {
                let (store, stop) = (&store, &stop);
                scope.spawn(move || {
                    let mut value = writer;
                    while !stop.load(Ordering::Relaxed) {
                        value = value.wrapping_add(2);
                        store.write_host(CHUNK as u64, &[value; CHUNK]).unwrap();
                        if value < 4 {
                            store.clear(CHUNK as u64, CHUNK as u64, Durability::Cached).unwrap();
                        }
                    }
                });
            }
            let reader = || {
                let mut block = vec![0; CHUNK];
                let torn = (0..READS).find(|_| {
                    store.read_host(CHUNK as u64, &mut block).unwrap();
                    block.iter().any(|byte| *byte != block[0])
                });
                stop.store(torn.is_some(), Ordering::Relaxed);
                torn
            };
            let readers = [scope.spawn(reader), scope.spawn(reader)];
            let torn = readers.map(|reader| reader.join().unwrap());
            stop.store(true, Ordering::Relaxed);
            assert_eq!(torn, [None, None], "a read saw parts of two writes");
        });
    }
}
