//! The delalloc queues of a shard: how an accepted write reaches its owner without a message.
//!
//! Owns: [`DelallocShared`], the part of a shard's data path that any thread may touch (queues, dirty budget), and
//! [`WriteEntry`], a write that holds everything it needs: its bytes, its space, its share of the budget.
//!
//! A thread that writes claims one of [`QUEUES`] bounded lock-free queues for the moment of the push, so each queue
//! has one producer at a time. It draws a number from the shard's counter, pushes, and then publishes the queue's new
//! tail. The shard drains up to the tails published, in the order of the numbers.
//!
//! Invariants:
//! - **Visibility.** A write is acknowledged after it is published. Whoever sends the shard a request afterwards
//!   makes the shard see the tail, and so the write.
//! - **Order.** If one write was acknowledged before another began, it is drained before it, or in the same drain
//!   with the lower number. For that a drain reads the counter first and takes only lower numbers: had it seen a
//!   later write and missed an earlier one in a queue it looked at before, the two would be applied in reverse.
//! - **No stalls.** A producer that is preempted between any two steps holds up its queue's next producer, who takes
//!   another queue, and nobody else: the drain never looks at what is not published.
//! - Whatever an entry holds is given back when it is dropped.
//!
//! Memory ordering: in the module's code, at each atomic, with its partner.
//!
//! Excludes: what becomes of drained entries (`data/apply.rs`).

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use crossbeam_queue::ArrayQueue;

use crate::alloc::{Priority, Reservation, SpaceCounter};
use crate::error::FsError;
use crate::request::{KillPrivileges, WriteSource};
use crate::types::{BLOCK_SIZE, FileOffset, InodeNr};

use super::page::{PAGE_SIZE, PageBytes, page_from, zeroed_page};
use crate::MAX_FILE_SIZE;

use super::NODES_PER_WRITE;

/// Queues of a shard: threads that can push at the same moment.
pub(crate) const QUEUES: usize = 16;

/// Entries that a queue holds.
pub(crate) const QUEUE_SLOTS: usize = 256;

/// Least budget: the longest write still fits while the background task is not at work yet.
const MIN_BUDGET_PAGES: u64 = 4 * MAX_WRITE as u64 / BLOCK_SIZE;

/// Most bytes of one write; larger ones are split.
pub const MAX_WRITE: usize = 1 << 20;

/// An accepted write.
#[derive(Debug)]
pub(crate) struct WriteEntry {
    /// Inode.
    pub(crate) inode: InodeNr,
    /// First byte.
    pub(crate) offset: u64,
    /// Bytes, at least 1.
    pub(crate) length: u64,
    /// The pages that the bytes touch, from the page of `offset` on; outside the bytes they are zero.
    pub(crate) pages: Vec<Box<PageBytes>>,
    /// Where it came from.
    pub(crate) source: WriteSource,
    /// Whether set-uid and set-gid bits fall.
    pub(crate) kill_privileges: KillPrivileges,
    /// Space for its pages and the extent they become.
    pub(crate) space: Reservation,
    /// Its share of the dirty budget: a page each.
    pub(crate) charge: Charge,
}

/// What a write is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WriteParts<'a> {
    /// Inode.
    pub(crate) inode: InodeNr,
    /// First byte.
    pub(crate) offset: FileOffset,
    /// Bytes.
    pub(crate) data: &'a [u8],
    /// Where it came from.
    pub(crate) source: WriteSource,
    /// Whether set-uid and set-gid bits fall.
    pub(crate) kill_privileges: KillPrivileges,
}

/// What stands in the way of a write right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// More than [`MAX_WRITE`] bytes: they are split.
    Length,
    /// The dirty budget is used up: some of it must be written first.
    Budget,
    /// No space can be promised: some may have to be freed first.
    Space,
}

impl WriteParts<'_> {
    /// Pages that the bytes touch.
    pub(crate) fn page_count(&self) -> u64 {
        if self.data.is_empty() {
            return 0;
        }
        let end = self.offset.get() + self.data.len() as u64;
        end.div_ceil(BLOCK_SIZE) - self.offset.get() / BLOCK_SIZE
    }

    /// Checks what can never be right.
    ///
    /// # Errors
    /// [`FsError::FileTooLarge`] if the bytes reach beyond [`MAX_FILE_SIZE`].
    pub(crate) fn check(&self) -> Result<(), FsError> {
        match self.offset.get().checked_add(self.data.len() as u64) {
            Some(end) if end <= MAX_FILE_SIZE => Ok(()),
            _ => Err(FsError::FileTooLarge),
        }
    }

    /// Takes budget and space for the write, or says what is missing.
    pub(crate) fn try_reserve(
        &self,
        budget: &Arc<DirtyBudget>,
        counter: &Arc<SpaceCounter>,
    ) -> Result<(Charge, Reservation), Obstacle> {
        if self.data.len() > MAX_WRITE {
            return Err(Obstacle::Length);
        }
        let pages = self.page_count();
        let charge = budget.charge(pages).ok_or(Obstacle::Budget)?;
        let space = counter.reserve(pages, NODES_PER_WRITE, Priority::Normal).ok_or(Obstacle::Space)?;
        Ok((charge, space))
    }

    /// Copies the bytes into pages and makes an entry of them.
    pub(crate) fn into_entry(self, charge: Charge, space: Reservation) -> WriteEntry {
        WriteEntry {
            inode: self.inode,
            offset: self.offset.get(),
            length: self.data.len() as u64,
            pages: self.copy_pages(),
            source: self.source,
            kill_privileges: self.kill_privileges,
            space,
            charge,
        }
    }

    fn copy_pages(&self) -> Vec<Box<PageBytes>> {
        let mut pages = Vec::with_capacity(usize::try_from(self.page_count()).unwrap_or(0));
        let mut within = usize::try_from(self.offset.get() % BLOCK_SIZE).expect("less than a page");
        let mut rest = self.data;
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(rest.len().min(PAGE_SIZE - within));
            pages.push(match <&PageBytes>::try_from(piece) {
                Ok(whole) => page_from(whole),
                Err(_) => {
                    let mut page = zeroed_page();
                    page[within..within + piece.len()].copy_from_slice(piece);
                    page
                }
            });
            (rest, within) = (behind, 0);
        }
        pages
    }
}

/// How much data may be accepted and not yet on the device, for one shard.
#[derive(Debug)]
pub(crate) struct DirtyBudget {
    used: AtomicU64, // a figure that orders nothing else: relaxed
    limit: u64,
}

impl DirtyBudget {
    /// A budget of `pages` pages, at least [`MIN_BUDGET_PAGES`].
    pub(crate) fn new(pages: u64) -> Arc<Self> {
        Arc::new(Self { used: AtomicU64::new(0), limit: pages.max(MIN_BUDGET_PAGES) })
    }

    /// Takes `pages` from the budget, if they are left.
    pub(crate) fn charge(self: &Arc<Self>, pages: u64) -> Option<Charge> {
        let update = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(pages).filter(|used| *used <= self.limit)
        });
        update.ok().map(|_| Charge { budget: Arc::clone(self), pages })
    }

    /// Takes `pages` whatever the limit: for pages that a truncation or a punch makes dirty.
    pub(crate) fn charge_beyond(self: &Arc<Self>, pages: u64) -> Charge {
        self.used.fetch_add(pages, Ordering::Relaxed);
        Charge { budget: Arc::clone(self), pages }
    }

    /// Pages taken.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Pages beyond which the background task writes back.
    pub(crate) fn background_limit(&self) -> u64 {
        self.limit / 2
    }
}

/// A share of the dirty budget; given back when dropped.
#[derive(Debug)]
pub(crate) struct Charge {
    budget: Arc<DirtyBudget>,
    pages: u64,
}

impl Charge {
    /// Takes `pages` off.
    pub(crate) fn split(&mut self, pages: u64) -> Self {
        self.pages = self.pages.checked_sub(pages).expect("no more is taken off than was charged");
        Self { budget: Arc::clone(&self.budget), pages }
    }

    /// Adds another share of the same budget.
    pub(crate) fn merge(&mut self, mut other: Self) {
        assert!(Arc::ptr_eq(&self.budget, &other.budget), "shares of one budget are merged");
        self.pages += std::mem::take(&mut other.pages);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.pages, Ordering::Relaxed);
    }
}

struct Numbered {
    number: u64,
    entry: WriteEntry,
}

struct Queue {
    slots: ArrayQueue<Numbered>,
    /// Claimed by a producer for one push. Acquired and released by producers among themselves.
    claimed: AtomicBool,
    /// Entries pushed so far. Released after a push, acquired by the drain: what it covers can be popped at once.
    published: AtomicU64,
}

/// The part of a shard's data path that any thread may touch.
pub(crate) struct DelallocShared {
    queues: Vec<Queue>,
    /// The number of the next entry. Drawn with release: whoever reads a number of a later write, with acquire, also
    /// sees the tails of all writes that were acknowledged before that one drew its number.
    next_number: AtomicU64,
    /// Where a thread looks for a free queue first.
    next_queue: AtomicUsize,
    budget: Arc<DirtyBudget>,
    /// Set by whoever wants the background task to look; taken by the task.
    wanted: AtomicBool,
    /// The background task, while it waits.
    waiting: Mutex<Option<Waker>>,
}

/// The drain's own state; one for each [`DelallocShared`].
#[derive(Default)]
pub(crate) struct DrainState {
    taken: [u64; QUEUES],
    /// Entries popped whose number turned out to be too high for the drain that popped them.
    kept: [Option<Numbered>; QUEUES],
}

thread_local! {
    /// The queue that this thread used last: coming back to it keeps its memory in this core's cache.
    static LAST_QUEUE: std::cell::Cell<Option<usize>> = const { std::cell::Cell::new(None) };
}

impl DelallocShared {
    /// Empty queues with a budget of `dirty_pages` pages.
    pub(crate) fn new(dirty_pages: u64) -> Arc<Self> {
        let queue = || Queue {
            slots: ArrayQueue::new(QUEUE_SLOTS),
            claimed: AtomicBool::new(false),
            published: AtomicU64::new(0),
        };
        Arc::new(Self {
            queues: std::iter::repeat_with(queue).take(QUEUES).collect(),
            next_number: AtomicU64::new(0),
            next_queue: AtomicUsize::new(0),
            budget: DirtyBudget::new(dirty_pages),
            wanted: AtomicBool::new(false),
            waiting: Mutex::new(None),
        })
    }

    /// The shard's dirty budget.
    pub(crate) fn budget(&self) -> &Arc<DirtyBudget> {
        &self.budget
    }

    /// Data accepted and not yet on the device, in bytes.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.budget.used() * BLOCK_SIZE
    }

    /// Accepts a write on whatever thread: once this returns `Ok`, with the bytes accepted, every later request sees
    /// it.
    ///
    /// # Errors
    /// Gives the entry back if the queues are full or claimed.
    pub(crate) fn accept(&self, entry: WriteEntry) -> Result<u32, Box<WriteEntry>> {
        let first =
            LAST_QUEUE.get().unwrap_or_else(|| self.next_queue.fetch_add(1, Ordering::Relaxed) % QUEUES);
        let length = u32::try_from(entry.length).expect("a write has at most MAX_WRITE bytes");
        for index in (first..QUEUES).chain(0..first) {
            let queue = &self.queues[index];
            if queue.claimed.swap(true, Ordering::Acquire) {
                continue;
            }
            let room = !queue.slots.is_full();
            if room {
                // AcqRel: see `next_number`.
                let number = self.next_number.fetch_add(1, Ordering::AcqRel);
                let pushed = queue.slots.push(Numbered { number, entry });
                assert!(pushed.is_ok(), "only the claimant pushes, and there was room");
                queue.published.fetch_add(1, Ordering::Release); // pairs with the drain
                queue.claimed.store(false, Ordering::Release);
                LAST_QUEUE.set(Some(index));
                if self.budget.used() > self.budget.background_limit() {
                    self.wake_background();
                }
                return Ok(length);
            }
            queue.claimed.store(false, Ordering::Release);
        }
        Err(Box::new(entry))
    }

    /// Lets the background task look what there is to do. Cheap if it was told already.
    pub(crate) fn wake_background(&self) {
        // AcqRel: pairs with itself in `background_work`, so a task that registers its waker after this swap sees it.
        if self.wanted.swap(true, Ordering::AcqRel) {
            return;
        }
        let waker = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits until somebody wants the background task to look.
    pub(crate) async fn background_work(&self) {
        poll_fn(|context| {
            *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(context.waker().clone());
            // After the waker is in place: whoever set the flag before found none, or will find it.
            if self.wanted.swap(false, Ordering::AcqRel) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Whether nothing waits to be drained, as far as this thread can see.
    pub(crate) fn is_drained(&self, state: &DrainState) -> bool {
        self.queues
            .iter()
            .zip(&state.taken)
            .zip(&state.kept)
            .all(|((queue, taken), kept)| kept.is_none() && queue.published.load(Ordering::Acquire) == *taken)
    }

    /// Takes every write that was acknowledged before this call, in the order of their numbers.
    pub(crate) fn drain(&self, state: &mut DrainState) -> Vec<WriteEntry> {
        let limit = self.next_number.load(Ordering::Acquire); // before any tail is read: see the module's text
        let mut taken = Vec::new();
        for (index, queue) in self.queues.iter().enumerate() {
            if let Some(kept) = state.kept[index].take_if(|kept| kept.number < limit) {
                taken.push(kept);
            }
            let tail = queue.published.load(Ordering::Acquire); // pairs with accept
            while state.kept[index].is_none() && state.taken[index] < tail {
                let numbered = queue.slots.pop().expect("what is published can be popped");
                state.taken[index] += 1;
                if numbered.number < limit {
                    taken.push(numbered);
                } else {
                    state.kept[index] = Some(numbered);
                }
            }
        }
        taken.sort_unstable_by_key(|numbered| numbered.number);
        taken.into_iter().map(|numbered| numbered.entry).collect()
    }
}

#[cfg(test)]
mod tests;
