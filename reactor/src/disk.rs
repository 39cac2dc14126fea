//! The asynchronous face of one device queue: [`Disk`] turns submit and poll into futures.
//!
//! An operation starts when it is asked for, not when its future is first polled, as long as a slot is free: several
//! can be started and then awaited one after the other. Dropping a future detaches the operation; what happens then
//! is in the table of `disk/slots.rs`.
//!
//! Invariants:
//! - no allocation per operation: slots are allocated once, wakers are kept in them;
//! - requests reach the device in the order in which they got a slot;
//! - the buffer of an operation that the device has seen stays in the device's hands or the slot until it answers.
//!
//! Excludes: retries, ordering between operations (a flush covers what has *completed* before it was asked for).

mod slots;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use crate::block::{
    BlockDevice, Completion, Durability, Geometry, IoError, Lba, LbaRange, RejectReason, Rejected, Request,
};
use crate::clock::Instant;
use crate::dma::{DmaBuffer, DmaPool};

pub use slots::MIN_OPERATION_SLOTS;
use slots::{Line, SlotKey, Slots};

/// A handle on this reactor's device queue. Clones share it.
#[derive(Clone)]
pub struct Disk {
    inner: Rc<DiskInner>,
}

struct DiskInner {
    geometry: Geometry,
    pool: DmaPool,
    device: RefCell<Box<dyn BlockDevice>>,
    slots: RefCell<Slots>,
    /// Submitted since the device was last told.
    unrung: Cell<bool>,
}

impl Disk {
    pub(crate) fn new(device: Box<dyn BlockDevice>) -> Self {
        let (geometry, pool) = (device.geometry().clone(), device.pool().clone());
        let slots = RefCell::new(Slots::new(usize::from(geometry.queue_depth)));
        let device = RefCell::new(device);
        Self { inner: Rc::new(DiskInner { geometry, pool, device, slots, unrung: Cell::new(false) }) }
    }

    /// What the device is.
    pub fn geometry(&self) -> &Geometry {
        &self.inner.geometry
    }

    /// Where buffers for this device come from.
    pub fn pool(&self) -> &DmaPool {
        &self.inner.pool
    }

    /// Fills `buffer` from `lba` on.
    pub fn read(&self, lba: Lba, buffer: DmaBuffer) -> Operation {
        Operation(self.start(Request::Read { lba, buffer }))
    }

    /// Writes `buffer` to `lba` on; done when `durability` says.
    pub fn write(&self, lba: Lba, buffer: DmaBuffer, durability: Durability) -> Operation {
        Operation(self.start(Request::Write { lba, buffer, durability }))
    }

    /// Makes every write that has completed before this call durable.
    pub fn flush(&self) -> Command {
        Command(self.start(Request::Flush))
    }

    /// Makes `range` read as zeroes.
    pub fn write_zeroes(&self, range: LbaRange) -> Command {
        Command(self.start(Request::WriteZeroes(range)))
    }

    /// Tells the device that the contents of `range` are no longer needed.
    pub fn deallocate(&self, range: LbaRange) -> Command {
        Command(self.start(Request::Deallocate(range)))
    }

    /// Operations that the device has not answered yet.
    pub fn in_flight(&self) -> usize {
        self.inner.device.borrow().in_flight()
    }

    fn start(&self, request: Request) -> Pending {
        let key = self.inner.slots.borrow_mut().reserve();
        let state = match key {
            Some(key) => {
                self.place(key, request);
                PendingState::Placed(key)
            }
            None => PendingState::Waiting { request, line: None },
        };
        Pending { disk: self.clone(), state }
    }

    /// Gives a request with a reserved slot to the device, or queues it behind those that wait for the device.
    fn place(&self, key: SlotKey, request: Request) {
        let mut slots = self.inner.slots.borrow_mut();
        if slots.has_queued() {
            slots.queue(key, request);
            return;
        }
        match self.inner.device.borrow_mut().submit(key.tag(), request) {
            Ok(()) => {
                slots.launch(key);
                self.inner.unrung.set(true);
            }
            Err(Rejected { request, reason: RejectReason::QueueFull }) => slots.queue(key, request),
            Err(Rejected { request, reason: RejectReason::Error(error) }) => {
                slots.fail_unlaunched(key, error, buffer_of(request));
            }
        }
    }

    /// Takes up to `budget` completions from the device. Returns their number.
    pub(crate) fn process_completions(&self, budget: usize, trace: &mut dyn FnMut(u64)) -> usize {
        let slots = &self.inner.slots;
        self.inner.device.borrow_mut().process_completions(budget, &mut |completion: Completion| {
            trace(completion.tag.0);
            let finished = slots.borrow_mut().complete(completion);
            // Woken, and the abandoned buffer released, after the borrow: both may run foreign code.
            finished.settle();
        })
    }

    /// Gives queued requests to the device until it is full. Returns how many it took.
    pub(crate) fn pump(&self) -> usize {
        let mut taken = 0;
        loop {
            let Some((key, request)) = self.inner.slots.borrow_mut().pop_queued() else { return taken };
            let answer = self.inner.device.borrow_mut().submit(key.tag(), request);
            let mut slots = self.inner.slots.borrow_mut();
            match answer {
                Ok(()) => {
                    slots.launch(key);
                    self.inner.unrung.set(true);
                }
                Err(Rejected { request, reason: RejectReason::QueueFull }) => {
                    slots.requeue_first(key, request);
                    return taken;
                }
                Err(Rejected { request, reason: RejectReason::Error(error) }) => {
                    let waker = slots.fail_unlaunched(key, error, buffer_of(request));
                    drop(slots);
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                }
            }
            taken += 1;
        }
    }

    /// Tells the device of everything submitted since the last call.
    pub(crate) fn ring(&self) {
        if self.inner.unrung.replace(false) {
            self.inner.device.borrow_mut().ring();
        }
    }

    pub(crate) fn next_event(&self) -> Option<Instant> {
        self.inner.device.borrow().next_event()
    }

    pub(crate) fn device(&self) -> &RefCell<Box<dyn BlockDevice>> {
        &self.inner.device
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("name", &self.inner.geometry.name).finish_non_exhaustive()
    }
}

fn buffer_of(request: Request) -> Option<DmaBuffer> {
    match request {
        Request::Read { buffer, .. } | Request::Write { buffer, .. } => Some(buffer),
        Request::Flush | Request::WriteZeroes(_) | Request::Deallocate(_) => None,
    }
}

/// An operation on its way, whatever its kind.
struct Pending {
    disk: Disk,
    state: PendingState,
}

enum PendingState {
    /// Every slot was taken. In line from the first poll on, so that a future that is never polled holds up nobody.
    Waiting {
        request: Request,
        line: Option<Line>,
    },
    Placed(SlotKey),
    Finished,
}

type Outcome = (Result<(), IoError>, Option<DmaBuffer>);

impl Pending {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Outcome> {
        if let PendingState::Waiting { line, .. } = &mut self.state {
            let key = self.disk.inner.slots.borrow_mut().poll_line(line, cx.waker());
            let Some(key) = key else { return Poll::Pending };
            if let PendingState::Waiting { request, .. } =
                std::mem::replace(&mut self.state, PendingState::Placed(key))
            {
                self.disk.place(key, request);
            }
        }
        match self.state {
            PendingState::Placed(key) => {
                let (outcome, next) = {
                    let mut slots = self.disk.inner.slots.borrow_mut();
                    match slots.poll(key, cx.waker()) {
                        Poll::Ready(outcome) => (outcome, slots.entitled()),
                        Poll::Pending => return Poll::Pending,
                    }
                };
                self.state = PendingState::Finished;
                if let Some(waker) = next {
                    waker.wake();
                }
                Poll::Ready(outcome)
            }
            PendingState::Waiting { .. } => unreachable!("placed above"),
            PendingState::Finished => panic!("a finished operation was polled again"),
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let (abandoned, next) = {
            let mut slots = self.disk.inner.slots.borrow_mut();
            let abandoned = match &self.state {
                PendingState::Placed(key) => slots.detach(*key),
                PendingState::Waiting { line, .. } => {
                    slots.leave(line.as_ref());
                    None
                }
                PendingState::Finished => return,
            };
            (abandoned, slots.entitled())
        };
        drop(abandoned);
        if let Some(waker) = next {
            waker.wake();
        }
    }
}

/// A read or write on its way; yields the result and the buffer.
///
/// Dropped before the device has seen it, the operation does not happen. Dropped later, it takes its course and the
/// buffer returns to the pool when the device has answered.
#[must_use = "the result of the operation, and its buffer, come from awaiting it"]
pub struct Operation(Pending);

impl Future for Operation {
    type Output = (Result<(), IoError>, DmaBuffer);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(cx).map(|(result, buffer)| {
            (result, buffer.expect("a block device gives the buffer back with the completion"))
        })
    }
}

/// A request without data on its way; dropped, it takes its course unless the device has not seen it.
#[must_use = "the result of the request comes from awaiting it"]
pub struct Command(Pending);

impl Future for Command {
    type Output = Result<(), IoError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(cx).map(|(result, _)| result)
    }
}

#[cfg(test)]
mod tests;
