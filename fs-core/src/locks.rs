//! Locks of an inode: fair, asynchronous, cancel-safe, local to one reactor.
//!
//! Owns: [`WholeLock`], a reader/writer lock (the inode lock and the mmap lock); [`RangeLock`], the same for byte
//! ranges of a file; their [`Guard`]s; [`LockOrder`], the witness of the order in which one task takes them.
//!
//! | class | order | of |
//! |---|---|---|
//! | [`InodeClass`] | 1 | an inode, against changes of size, names and attributes |
//! | [`MmapClass`] | 2 | an inode, against writes through mappings |
//! | [`RangeClass`] | 3 | a byte range of an inode, against changes of its extents |
//!
//! Invariants:
//! - **Order.** A task takes locks in ascending (class, shard, inode, offset). Whoever waits passes its
//!   [`LockOrder`], which panics when the order is broken; the `try_` forms wait for nothing and need none. The
//!   class is part of a lock's type, so a guard of one class cannot pass for one of another.
//! - **Fairness.** A request waits exactly for the conflicting requests made before it, held or waiting; none is
//!   overtaken by a conflicting later one, so none starves.
//! - **Cancellation.** Dropping an [`Acquire`] at any moment withdraws the request, or gives the lock back if it had
//!   been granted meanwhile.
//! - Guards own their lock (`Rc`): they can be kept in tables, sent down to a completion, and outlive the inode's
//!   place in the inode table.
//!
//! Excludes: locks of other reactors (asked for by message), log space and epochs (no locks in this sense).

use std::marker::PhantomData;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use crate::types::InodeNr;

mod queue;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use queue::CONFLICTS;
use queue::{Ticket, WaitQueue};

/// How a lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Beside other shared holders.
    Shared,
    /// Alone.
    Exclusive,
}

/// A class of locks, with its place in the order.
pub(crate) trait LockClass: 'static {
    /// Position in the order between classes.
    const RANK: u8;
    /// Name for messages.
    const NAME: &'static str;
}

/// The per-inode lock (the VFS's `i_rwsem`).
pub(crate) enum InodeClass {}

/// The per-inode lock against writes through mappings (btrfs's `i_mmap_lock`).
pub(crate) enum MmapClass {}

/// The lock of byte ranges of one inode.
pub(crate) enum RangeClass {}

impl LockClass for InodeClass {
    const RANK: u8 = 1;
    const NAME: &'static str = "inode lock";
}

impl LockClass for MmapClass {
    const RANK: u8 = 2;
    const NAME: &'static str = "mmap lock";
}

impl LockClass for RangeClass {
    const RANK: u8 = 3;
    const NAME: &'static str = "range lock";
}

/// Where a lock stands in the order: class, shard, inode, offset. `derive(Ord)` compares in this sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Position {
    rank: u8,
    shard: u8,
    inode: u64,
    offset: u64,
}

/// The locks one task has waited for since it held none, as far as their order goes.
///
/// Make one where an operation begins, pass it to every waiting acquisition, and drop it with the guards. It is
/// deliberately pessimistic: releasing a lock does not lower it. A copy serves for locks that are released again before
/// the next one is taken.
#[derive(Clone, Debug, Default)]
pub(crate) struct LockOrder {
    last: Option<Position>,
}

impl LockOrder {
    /// The order of a task that holds nothing.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Notes that the lock of class `C` of `inode` is about to be taken, here or by message in another shard.
    ///
    /// # Panics
    /// If the task has already taken one that comes later, or this very one.
    pub(crate) fn enter<C: LockClass>(&mut self, inode: InodeNr, offset: u64) {
        let next = Position { rank: C::RANK, shard: inode.shard().get(), inode: inode.get(), offset };
        if let Some(last) = self.last {
            assert!(
                last < next,
                "lock order broken: {} of inode {inode} at {offset} after {last:?}",
                C::NAME
            );
        }
        self.last = Some(next);
    }
}

/// A reader/writer lock of an inode as a whole. Cloning gives another handle of the same lock.
pub(crate) struct WholeLock<C> {
    inode: InodeNr,
    queue: Rc<WaitQueue>,
    class: PhantomData<C>,
}

impl<C: LockClass> WholeLock<C> {
    /// The free lock of `inode`.
    pub(crate) fn new(inode: InodeNr) -> Self {
        Self { inode, queue: Rc::default(), class: PhantomData }
    }

    /// Waits for the lock beside other readers.
    pub(crate) fn shared(&self, order: &mut LockOrder) -> Acquire<C> {
        order.enter::<C>(self.inode, 0);
        Acquire::new(&self.queue, 0..u64::MAX, Mode::Shared)
    }

    /// Waits for the lock alone.
    pub(crate) fn exclusive(&self, order: &mut LockOrder) -> Acquire<C> {
        order.enter::<C>(self.inode, 0);
        Acquire::new(&self.queue, 0..u64::MAX, Mode::Exclusive)
    }

    /// Takes the lock in `mode` if nobody has to be waited for.
    pub(crate) fn try_lock(&self, mode: Mode) -> Option<Guard<C>> {
        Guard::take_now(&self.queue, 0..u64::MAX, mode)
    }

    /// Whether nobody holds the lock or waits for it.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_idle()
    }
}

/// A lock of byte ranges of an inode.
pub(crate) struct RangeLock {
    inode: InodeNr,
    queue: Rc<WaitQueue>,
}

impl RangeLock {
    /// The free lock of `inode`.
    pub(crate) fn new(inode: InodeNr) -> Self {
        Self { inode, queue: Rc::default() }
    }

    /// Waits for the bytes of `range` beside other readers.
    pub(crate) fn shared(&self, range: Range<u64>, order: &mut LockOrder) -> Acquire<RangeClass> {
        order.enter::<RangeClass>(self.inode, range.start);
        Acquire::new(&self.queue, range, Mode::Shared)
    }

    /// Waits for the bytes of `range` alone.
    pub(crate) fn exclusive(&self, range: Range<u64>, order: &mut LockOrder) -> Acquire<RangeClass> {
        order.enter::<RangeClass>(self.inode, range.start);
        Acquire::new(&self.queue, range, Mode::Exclusive)
    }

    /// Takes the bytes of `range` in `mode` if nobody has to be waited for.
    pub(crate) fn try_lock(&self, range: Range<u64>, mode: Mode) -> Option<Guard<RangeClass>> {
        Guard::take_now(&self.queue, range, mode)
    }

    /// Whether nobody holds a range or waits for one.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_idle()
    }
}

/// A request for a lock: a future of its [`Guard`]. The request is made, and its place in the queue taken, when this
/// is created, not when it is first polled.
#[must_use = "the lock is given back at once if this is dropped"]
pub(crate) struct Acquire<C> {
    queue: Rc<WaitQueue>,
    ticket: Option<Ticket>,
    class: PhantomData<C>,
}

impl<C: LockClass> Acquire<C> {
    fn new(queue: &Rc<WaitQueue>, range: Range<u64>, mode: Mode) -> Self {
        let ticket = queue.request(range, mode);
        Self { queue: Rc::clone(queue), ticket: Some(ticket), class: PhantomData }
    }
}

impl<C> Unpin for Acquire<C> {}

impl<C: LockClass> Future for Acquire<C> {
    type Output = Guard<C>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Guard<C>> {
        let ticket = self.ticket.expect("a lock request was polled after it was granted");
        if !self.queue.poll(ticket, context.waker()) {
            return Poll::Pending;
        }
        self.ticket = None;
        Poll::Ready(Guard { queue: Rc::clone(&self.queue), ticket, class: PhantomData })
    }
}

impl<C> Drop for Acquire<C> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.queue.withdraw(ticket);
        }
    }
}

/// A held lock; dropping it gives it back.
#[must_use = "the lock is given back when the guard is dropped"]
pub(crate) struct Guard<C> {
    queue: Rc<WaitQueue>,
    ticket: Ticket,
    class: PhantomData<C>,
}

/// A held inode lock.
pub(crate) type InodeGuard = Guard<InodeClass>;
/// A held byte range.
pub(crate) type RangeGuard = Guard<RangeClass>;

impl<C: LockClass> Guard<C> {
    fn take_now(queue: &Rc<WaitQueue>, range: Range<u64>, mode: Mode) -> Option<Self> {
        let ticket = queue.request_now(range, mode)?;
        Some(Self { queue: Rc::clone(queue), ticket, class: PhantomData })
    }

    /// Goes on holding the lock beside other readers.
    pub(crate) fn downgrade(&self) {
        self.queue.downgrade(self.ticket);
    }
}

impl<C> Drop for Guard<C> {
    fn drop(&mut self) {
        self.queue.withdraw(self.ticket);
    }
}
