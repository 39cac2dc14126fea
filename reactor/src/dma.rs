//! Memory that a device may read and write: regions, the pool that cuts them into buffers, and the owned buffer.
//!
//! A transport (or a test, with [`HeapRegion`]) provides a [`DmaRegion`]: page-aligned memory that is mapped for the
//! device while the region lives. A [`DmaPool`] belongs to one reactor's queue and hands out [`DmaBuffer`]s, each
//! contiguous for the device.
//!
//! Invariants:
//! - a buffer has one owner; the pages behind it serve nobody else until it is dropped;
//! - the region outlives every buffer (buffers hold the pool, the pool holds the region);
//! - nobody forms a `&` or `&mut` to the memory: every access is a copy through a volatile slice;
//! - waiters are served in order of arrival: a small request does not overtake a large one, and
//!   [`DmaPool::try_alloc`] gives way to everybody in line;
//! - [quarantined](DmaBuffer::quarantine) pages are never handed out again.
//!
//! *Memory ordering*: copies here are plain memory accesses. Publishing them to a device (doorbell) and acquiring a
//! device's writes (completion) is the business of the queue that owns the doorbell.
//!
//! Excludes: mapping at IOVAs (transports), what travels in the buffers.

mod buddy;
#[cfg(not(loom))]
mod cells;
#[cfg(loom)]
mod modelled;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{MmapRegion, VolatileSlice};

use buddy::{Buddy, MAX_ORDER};
#[cfg(not(loom))]
pub use cells::{DeviceWord, DmaCells};
#[cfg(loom)]
pub use modelled::{DeviceWord, DmaCells, ModelledRegion};

/// Bytes of the allocation unit.
pub const PAGE_SIZE: usize = 4096;

/// Buffer lengths are multiples of this: the smallest logical block of any device.
pub const LENGTH_UNIT: usize = 512;

/// Largest buffer a pool hands out, in bytes: 2 MiB.
pub const MAX_BUFFER: usize = PAGE_SIZE << MAX_ORDER;

/// Memory a device can reach, mapped while the value lives.
pub trait DmaRegion: Send + Sync {
    /// The whole region; page aligned, a multiple of the page size long.
    fn slice(&self) -> VolatileSlice<'_>;

    /// The device's address of the first byte; the region is contiguous from there. Page aligned.
    fn iova(&self) -> u64;

    /// The mapping that the region is a part of, and the offset of its first byte there.
    fn mapping(&self) -> (Arc<MmapRegion>, usize);

    /// The words themselves, of a region in a model.
    #[cfg(loom)]
    fn words(&self) -> Arc<[DeviceWord]> {
        panic!("only a ModelledRegion can be model-checked")
    }
}

/// Anonymous memory for simulated devices and tests. Its IOVAs are made up, never repeat within the process, and no
/// real device can reach them.
#[derive(Debug)]
pub struct HeapRegion {
    mapping: Arc<MmapRegion>,
    iova: u64,
}

impl HeapRegion {
    /// A zeroed region of `bytes`, rounded up to whole pages.
    ///
    /// # Errors
    /// What mmap says; `InvalidInput` for no bytes.
    pub fn new(bytes: usize) -> io::Result<Arc<Self>> {
        /// First made-up address: above 4 GiB, so that a truncation to 32 bits is noticed.
        static NEXT_IOVA: AtomicU64 = AtomicU64::new(1 << 32);
        if bytes == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a DMA region needs at least one byte"));
        }
        let bytes = bytes.next_multiple_of(PAGE_SIZE);
        let mapping = Arc::new(MmapRegion::new(bytes).map_err(io::Error::other)?);
        // Relaxed: the counter publishes nothing, only uniqueness matters. One page of gap catches overruns.
        let iova = NEXT_IOVA.fetch_add((bytes + PAGE_SIZE) as u64, Ordering::Relaxed);
        Ok(Arc::new(Self { mapping, iova }))
    }
}

impl DmaRegion for HeapRegion {
    fn slice(&self) -> VolatileSlice<'_> {
        self.mapping.as_volatile_slice()
    }

    fn iova(&self) -> u64 {
        self.iova
    }

    fn mapping(&self) -> (Arc<MmapRegion>, usize) {
        (Arc::clone(&self.mapping), 0)
    }
}

/// Why a buffer cannot be had, now or ever.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The length is zero or not a multiple of 512.
    #[error("DMA buffer length must be a positive multiple of {LENGTH_UNIT}, not {bytes}")]
    InvalidLength {
        /// Bytes asked for.
        bytes: usize,
    },
    /// Larger than the pool's largest block, even with all its memory free.
    #[error("DMA buffer of {bytes} bytes is larger than the pool can ever give ({limit} bytes)")]
    TooLarge {
        /// Bytes asked for.
        bytes: usize,
        /// Bytes of the largest possible buffer.
        limit: usize,
    },
}

/// One reactor's supply of DMA buffers: a buddy allocator over a region. Clones share the supply.
#[derive(Clone)]
pub struct DmaPool {
    inner: Rc<PoolInner>,
}

struct PoolInner {
    region: Arc<dyn DmaRegion>,
    iova: u64,
    state: RefCell<PoolState>,
}

struct PoolState {
    buddy: Buddy,
    /// Largest order that can ever be given; `None` when everything is quarantined.
    largest: Option<u8>,
    waiters: VecDeque<Waiter>,
    next_ticket: u64,
}

struct Waiter {
    ticket: u64,
    bytes: usize,
    waker: Waker,
    /// Set when the line reached this waiter; it stays listed until it looks or goes away.
    grant: Option<Grant>,
}

enum Grant {
    Block { page: u32, order: u8 },
    Never(PoolError),
}

impl DmaPool {
    /// A pool over the whole of `region`.
    ///
    /// # Panics
    /// If the region is shorter than a page or its address is not page aligned: a bug of the transport.
    pub fn new(region: Arc<dyn DmaRegion>) -> DmaPool {
        let (pages, iova) = (region.slice().len() / PAGE_SIZE, region.iova());
        assert!(pages > 0, "a DMA region has at least one page");
        assert!(iova.is_multiple_of(PAGE_SIZE as u64), "a DMA region starts at a page");
        let buddy = Buddy::new(pages);
        let largest = buddy.largest_possible_order();
        let state = PoolState { buddy, largest, waiters: VecDeque::new(), next_ticket: 0 };
        DmaPool { inner: Rc::new(PoolInner { region, iova, state: RefCell::new(state) }) }
    }

    /// A buffer of `bytes`, contiguous for the device, contents unspecified; `None` if there is no room now, if
    /// others wait in line, or if it is [too large](PoolError::TooLarge) ever to be given.
    ///
    /// # Panics
    /// If `bytes` is zero or not a multiple of 512.
    pub fn try_alloc(&self, bytes: usize) -> Option<DmaBuffer> {
        assert!(bytes > 0 && bytes.is_multiple_of(LENGTH_UNIT), "invalid DMA buffer length {bytes}");
        let mut state = self.inner.state.borrow_mut();
        if !state.waiters.is_empty() {
            return None;
        }
        let order = order_of(bytes)?;
        let page = state.buddy.allocate(order)?;
        drop(state);
        Some(self.buffer(page, order, bytes))
    }

    /// A buffer of `bytes`, contiguous for the device, contents unspecified; waits in line for room.
    ///
    /// # Errors
    /// The length is invalid, or larger than the pool can ever give.
    pub fn alloc(&self, bytes: usize) -> Alloc {
        Alloc { pool: self.clone(), bytes, ticket: None }
    }

    /// Bytes the pool hands out when everything is free.
    pub fn capacity(&self) -> usize {
        self.inner.state.borrow().buddy.usable_pages() * PAGE_SIZE
    }

    /// Bytes free now, not necessarily contiguous.
    pub fn available(&self) -> usize {
        self.inner.state.borrow().buddy.free_pages() * PAGE_SIZE
    }

    fn buffer(&self, page: u32, order: u8, bytes: usize) -> DmaBuffer {
        DmaBuffer { pool: Rc::clone(&self.inner), page, order, len: bytes as u32 }
    }
}

impl fmt::Debug for DmaPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaPool")
            .field("capacity", &self.capacity())
            .field("available", &self.available())
            .finish()
    }
}

impl PoolInner {
    /// Serves the line as far as memory reaches. Wakers run after the borrow has ended.
    fn serve_waiters(&self) {
        loop {
            let waker = self.state.borrow_mut().grant_next();
            match waker {
                Some(waker) => waker.wake(),
                None => return,
            }
        }
    }
}

impl PoolState {
    fn check(&self, bytes: usize) -> Result<u8, PoolError> {
        if bytes == 0 || !bytes.is_multiple_of(LENGTH_UNIT) {
            return Err(PoolError::InvalidLength { bytes });
        }
        match (order_of(bytes), self.largest) {
            (Some(order), Some(largest)) if order <= largest => Ok(order),
            (_, largest) => {
                Err(PoolError::TooLarge { bytes, limit: largest.map_or(0, |order| PAGE_SIZE << order) })
            }
        }
    }

    /// Decides the first undecided waiter, if memory allows, and returns its waker.
    fn grant_next(&mut self) -> Option<Waker> {
        let index = self.waiters.iter().position(|waiter| waiter.grant.is_none())?;
        let grant = match self.check(self.waiters[index].bytes) {
            Ok(order) => Grant::Block { page: self.buddy.allocate(order)?, order },
            Err(error) => Grant::Never(error),
        };
        let waiter = &mut self.waiters[index];
        waiter.grant = Some(grant);
        Some(waiter.waker.clone())
    }
}

/// The order of the smallest block that holds `bytes`; `None` beyond the largest order.
fn order_of(bytes: usize) -> Option<u8> {
    let order = bytes.div_ceil(PAGE_SIZE).next_power_of_two().trailing_zeros();
    u8::try_from(order).ok().filter(|&order| order <= MAX_ORDER)
}

/// Future of [`DmaPool::alloc`]. Dropping it leaves the line.
#[must_use = "futures do nothing unless awaited"]
pub struct Alloc {
    pool: DmaPool,
    bytes: usize,
    /// Place in line, once there is one.
    ticket: Option<u64>,
}

impl Future for Alloc {
    type Output = Result<DmaBuffer, PoolError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let bytes = self.bytes;
        let mut state = self.pool.inner.state.borrow_mut();
        if let Some(ticket) = self.ticket {
            let index = state.position(ticket).expect("a waiter is listed until it has looked");
            if state.waiters[index].grant.is_none() {
                state.waiters[index].waker.clone_from(cx.waker());
                return Poll::Pending;
            }
            let waiter = state.waiters.remove(index).expect("position() is in range");
            drop(state);
            self.ticket = None;
            return Poll::Ready(match waiter.grant.expect("checked above") {
                Grant::Block { page, order } => Ok(self.pool.buffer(page, order, bytes)),
                Grant::Never(error) => Err(error),
            });
        }
        let order = match state.check(bytes) {
            Ok(order) => order,
            Err(error) => return Poll::Ready(Err(error)),
        };
        if state.waiters.is_empty()
            && let Some(page) = state.buddy.allocate(order)
        {
            drop(state);
            return Poll::Ready(Ok(self.pool.buffer(page, order, bytes)));
        }
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.waiters.push_back(Waiter { ticket, bytes, waker: cx.waker().clone(), grant: None });
        drop(state);
        self.ticket = Some(ticket);
        Poll::Pending
    }
}

impl PoolState {
    fn position(&self, ticket: u64) -> Option<usize> {
        self.waiters.binary_search_by_key(&ticket, |waiter| waiter.ticket).ok()
    }
}

impl Drop for Alloc {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut state = self.pool.inner.state.borrow_mut();
        let index = state.position(ticket).expect("a waiter is listed until it has looked");
        let waiter = state.waiters.remove(index);
        if let Some(Waiter { grant: Some(Grant::Block { page, order }), .. }) = waiter {
            state.buddy.release(page, order);
        }
        drop(state);
        // Also without a grant: this waiter may have been the one that held up smaller requests behind it.
        self.pool.inner.serve_waiters();
    }
}

/// An owned piece of DMA memory, contiguous for the device. Goes back to its pool when dropped.
pub struct DmaBuffer {
    pool: Rc<PoolInner>,
    page: u32,
    order: u8,
    len: u32,
}

impl DmaBuffer {
    /// Bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Always `false`: buffers have at least 512 bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device's address of the first byte; page aligned.
    #[inline]
    pub fn iova(&self) -> u64 {
        self.pool.iova + self.start() as u64
    }

    /// Copies `dst.len()` bytes from `offset` on.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn read_at(&self, offset: usize, dst: &mut [u8]) {
        let copied = self.window(offset, dst.len()).copy_to(dst);
        debug_assert_eq!(copied, dst.len());
    }

    /// Copies `src` into the buffer from `offset` on.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn write_at(&mut self, offset: usize, src: &[u8]) {
        self.window(offset, src.len()).copy_from(src);
    }

    /// Sets `len` bytes from `offset` on to `byte`.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn fill(&mut self, offset: usize, len: usize, byte: u8) {
        /// Bytes set by one copy.
        const STRIDE: usize = 1024;
        let pattern = [byte; STRIDE];
        let window = self.window(offset, len);
        let mut done = 0;
        while done < len {
            let step = STRIDE.min(len - done);
            window.offset(done).expect("done < len").copy_from(&pattern[..step]);
            done += step;
        }
    }

    /// Keeps the first `len` bytes; whole pages behind them go back to the pool. Never waits and never fails: to give a
    /// buffer back and ask for a shorter one would mean to stand in line again.
    ///
    /// # Panics
    /// If `len` is zero, not a multiple of 512, or more than there is.
    pub fn shorten(&mut self, len: usize) {
        assert!(
            len > 0 && len.is_multiple_of(LENGTH_UNIT) && len <= self.len(),
            "a DMA buffer of {} bytes cannot be shortened to {len}",
            self.len
        );
        let order = order_of(len).unwrap_or(self.order).min(self.order);
        let mut state = self.pool.state.borrow_mut();
        state.buddy.shorten(self.page, self.order, order);
        let line = order < self.order && !state.waiters.is_empty();
        drop(state);
        (self.order, self.len) = (order, len as u32);
        if line {
            self.pool.serve_waiters();
        }
    }

    /// Takes the pages out of use until the pool is gone: for a buffer that a device might still write although its
    /// operation has ended.
    pub fn quarantine(self) {
        {
            let mut state = self.pool.state.borrow_mut();
            state.buddy.retire(self.page, self.order);
            state.largest = state.buddy.largest_possible_order();
        }
        // Somebody in line may have become impossible to serve.
        self.pool.serve_waiters();
        // `drop` sees the retired pages through the order.
        let mut this = self;
        this.order = RETIRED;
    }

    #[inline]
    fn start(&self) -> usize {
        self.page as usize * PAGE_SIZE
    }

    fn window(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len()),
            "access to {len} bytes at {offset} of a DMA buffer of {} bytes",
            self.len
        );
        self.pool
            .region
            .slice()
            .subslice(self.start() + offset, len)
            .expect("a buffer lies inside its region")
    }
}

/// Order of a buffer whose pages were quarantined: nothing to give back.
const RETIRED: u8 = u8::MAX;

impl Drop for DmaBuffer {
    fn drop(&mut self) {
        if self.order != RETIRED {
            let mut state = self.pool.state.borrow_mut();
            state.buddy.release(self.page, self.order);
            let line = !state.waiters.is_empty();
            drop(state);
            if line {
                self.pool.serve_waiters();
            }
        }
    }
}

impl fmt::Debug for DmaBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaBuffer")
            .field("iova", &format_args!("{:#x}", self.iova()))
            .field("len", &self.len)
            .finish()
    }
}

#[cfg(test)]
mod tests;
