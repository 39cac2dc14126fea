//! Operation slots: the life of every request between the future that asked for it and the device that serves it.
//!
//! | state | event | next | note |
//! |---|---|---|---|
//! | Free | reserve | Reserved | within one call of `Disk` |
//! | Reserved | device takes it | InFlight | |
//! | Reserved | device is full | Queued | keeps the request; first in, first out |
//! | Reserved, Queued | device refuses for good | Done | |
//! | Queued | device takes it | InFlight | |
//! | Queued | future dropped | Free | the device never sees the request |
//! | InFlight | completion | Done | wakes |
//! | InFlight | future dropped | Detached | |
//! | Detached | completion | Free | the buffer goes back to the pool only now |
//! | Done | future polled or dropped | Free | |
//!
//! Any other event is a bug of this crate or of the device's implementation, and panics.
//!
//! Invariants: the generation of a slot changes when it is freed, so a tag names one operation, once. Whoever waits
//! for a slot is served in the order of first polls: the first `n` in line are entitled to the `n` free slots.

use std::collections::VecDeque;
use std::task::{Poll, Waker};

use crate::block::{Completion, IoError, OpTag, Request};
use crate::dma::DmaBuffer;

use super::Outcome;

/// Slots of a device with a short queue; others have twice the depth of their queue.
pub const MIN_OPERATION_SLOTS: usize = 1024;

/// Names one use of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotKey {
    slot: u32,
    generation: u32,
}

impl SlotKey {
    pub(super) fn tag(self) -> OpTag {
        OpTag(u64::from(self.generation) << 32 | u64::from(self.slot))
    }

    fn from_tag(tag: OpTag) -> Self {
        Self { slot: tag.0 as u32, generation: (tag.0 >> 32) as u32 }
    }
}

/// A place in the line for a slot.
#[derive(Debug)]
pub(super) struct Line(u64);

#[derive(Debug)]
enum State {
    Free,
    Reserved,
    Queued(Request),
    InFlight,
    Done(Result<(), IoError>, Option<DmaBuffer>),
    Detached,
}

struct Slot {
    generation: u32,
    state: State,
    waker: Option<Waker>,
}

/// What is left to do, without a borrow of the slots, when an operation has completed.
pub(super) struct Finished {
    waker: Option<Waker>,
    abandoned: Option<DmaBuffer>,
}

impl Finished {
    pub(super) fn settle(self) {
        drop(self.abandoned);
        if let Some(waker) = self.waker {
            waker.wake();
        }
    }
}

/// The slots of one device queue.
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
    queued: VecDeque<u32>,
    line: VecDeque<(u64, Waker)>,
    next_ticket: u64,
}

impl Slots {
    pub(super) fn new(queue_depth: usize) -> Self {
        let count = MIN_OPERATION_SLOTS.max(2 * queue_depth);
        Self {
            slots: (0..count).map(|_| Slot { generation: 0, state: State::Free, waker: None }).collect(),
            free: (0..count as u32).rev().collect(),
            queued: VecDeque::with_capacity(count),
            line: VecDeque::new(),
            next_ticket: 0,
        }
    }

    /// Takes a free slot, unless others wait for one.
    pub(super) fn reserve(&mut self) -> Option<SlotKey> {
        if self.line.len() < self.free.len() { self.take_free() } else { None }
    }

    fn take_free(&mut self) -> Option<SlotKey> {
        let slot = self.free.pop()?;
        let entry = &mut self.slots[slot as usize];
        entry.state = State::Reserved;
        Some(SlotKey { slot, generation: entry.generation })
    }

    /// Joins the line, or takes a slot if the line has reached this place.
    pub(super) fn poll_line(&mut self, line: &mut Option<Line>, waker: &Waker) -> Option<SlotKey> {
        let Some(Line(ticket)) = line else {
            if let Some(key) = self.reserve() {
                return Some(key);
            }
            self.line.push_back((self.next_ticket, waker.clone()));
            *line = Some(Line(self.next_ticket));
            self.next_ticket += 1;
            return None;
        };
        let place = self.place_of(*ticket);
        if place >= self.free.len() {
            self.line[place].1.clone_from(waker);
            return None;
        }
        self.line.remove(place);
        *line = None;
        self.take_free()
    }

    /// Gives up a place in line.
    pub(super) fn leave(&mut self, line: Option<&Line>) {
        if let Some(Line(ticket)) = line {
            let place = self.place_of(*ticket);
            self.line.remove(place);
        }
    }

    /// The last one in line that a free slot is meant for. To be woken after a slot was freed or the line has moved.
    pub(super) fn entitled(&self) -> Option<Waker> {
        let last = self.free.len().min(self.line.len()).checked_sub(1)?;
        Some(self.line[last].1.clone())
    }

    fn place_of(&self, ticket: u64) -> usize {
        self.line
            .binary_search_by_key(&ticket, |(ticket, _)| *ticket)
            .expect("a ticket is in line until it is served")
    }

    pub(super) fn has_queued(&self) -> bool {
        !self.queued.is_empty()
    }

    /// The device is full: keeps the request for later.
    pub(super) fn queue(&mut self, key: SlotKey, request: Request) {
        self.queued.push_back(key.slot);
        self.set(key, State::Queued(request));
    }

    /// The device was full after all: the request is the next one again.
    pub(super) fn requeue_first(&mut self, key: SlotKey, request: Request) {
        self.queued.push_front(key.slot);
        self.set(key, State::Queued(request));
    }

    /// The next request for the device; its slot is reserved until the caller says what became of it.
    pub(super) fn pop_queued(&mut self) -> Option<(SlotKey, Request)> {
        let slot = self.queued.pop_front()?;
        let entry = &mut self.slots[slot as usize];
        match std::mem::replace(&mut entry.state, State::Reserved) {
            State::Queued(request) => Some((SlotKey { slot, generation: entry.generation }, request)),
            other => unreachable!("slot {slot} is in the queue but {other:?}"),
        }
    }

    /// The device has taken the request.
    pub(super) fn launch(&mut self, key: SlotKey) {
        self.set(key, State::InFlight);
    }

    /// The device has refused the request for good. Returns whom to wake.
    pub(super) fn fail_unlaunched(
        &mut self,
        key: SlotKey,
        error: IoError,
        buffer: Option<DmaBuffer>,
    ) -> Option<Waker> {
        self.set(key, State::Done(Err(error), buffer));
        self.slots[key.slot as usize].waker.take()
    }

    fn set(&mut self, key: SlotKey, state: State) {
        let entry = &mut self.slots[key.slot as usize];
        assert!(
            entry.generation == key.generation && matches!(entry.state, State::Reserved),
            "slot {key:?} is {:?}, not reserved",
            entry.state
        );
        entry.state = state;
    }

    /// The device has answered.
    ///
    /// # Panics
    /// If the tag names no operation in flight: the device's implementation must vet what the hardware says.
    pub(super) fn complete(&mut self, completion: Completion) -> Finished {
        let key = SlotKey::from_tag(completion.tag);
        let entry = self.slots.get_mut(key.slot as usize).filter(|entry| entry.generation == key.generation);
        let Some(entry) = entry else { panic!("completion of an operation that does not exist: {key:?}") };
        match entry.state {
            State::InFlight => {
                entry.state = State::Done(completion.result, completion.buffer);
                Finished { waker: entry.waker.take(), abandoned: None }
            }
            State::Detached => {
                self.release(key);
                Finished { waker: self.entitled(), abandoned: completion.buffer }
            }
            ref other => panic!("completion of operation {key:?}, which is {other:?}"),
        }
    }

    /// The outcome, if there is one; frees the slot. The caller wakes the [`entitled`](Self::entitled).
    pub(super) fn poll(&mut self, key: SlotKey, waker: &Waker) -> Poll<Outcome> {
        let entry = self.live(key);
        if !matches!(entry.state, State::Done(..)) {
            match &mut entry.waker {
                Some(listed) => listed.clone_from(waker),
                none => *none = Some(waker.clone()),
            }
            return Poll::Pending;
        }
        match self.release(key) {
            State::Done(result, buffer) => Poll::Ready((result, buffer)),
            other => unreachable!("checked above: {other:?}"),
        }
    }

    /// The future is gone. Returns a buffer to release, if the device does not hold it.
    pub(super) fn detach(&mut self, key: SlotKey) -> Option<DmaBuffer> {
        let entry = self.live(key);
        entry.waker = None;
        match &entry.state {
            State::InFlight => {
                entry.state = State::Detached;
                None
            }
            State::Queued(_) => {
                self.queued.retain(|&slot| slot != key.slot);
                match self.release(key) {
                    State::Queued(request) => super::buffer_of(request),
                    other => unreachable!("checked above: {other:?}"),
                }
            }
            State::Done(..) => match self.release(key) {
                State::Done(_, buffer) => buffer,
                other => unreachable!("checked above: {other:?}"),
            },
            other @ (State::Free | State::Reserved | State::Detached) => {
                unreachable!("operation {key:?} of a living future is {other:?}")
            }
        }
    }

    fn live(&mut self, key: SlotKey) -> &mut Slot {
        let entry = &mut self.slots[key.slot as usize];
        assert_eq!(entry.generation, key.generation, "a future outlived its slot");
        entry
    }

    fn release(&mut self, key: SlotKey) -> State {
        let entry = &mut self.slots[key.slot as usize];
        entry.generation = entry.generation.wrapping_add(1);
        entry.waker = None;
        self.free.push(key.slot);
        std::mem::replace(&mut entry.state, State::Free)
    }
}
