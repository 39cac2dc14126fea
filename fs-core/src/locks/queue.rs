//! The wait queue behind every lock of an inode: requests for ranges, in the order in which they were made.
//!
//! Each request counts its *blockers*: the conflicting requests before it that are still in the queue, held or
//! waiting. It is granted when there are none. A request that leaves lowers the count of those behind it that it
//! conflicted with; so a change costs one pass over the queue, and fairness needs no further rule.
//!
//! Invariant: `blockers` of a request equals the number of conflicting requests before it in `requests`.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::task::Waker;

use super::Mode;

/// Names a request in its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

struct Request {
    ticket: Ticket,
    range: Range<u64>,
    mode: Mode,
    blockers: u32,
    waker: Option<Waker>,
}

impl Request {
    fn conflicts(&self, range: &Range<u64>, mode: Mode) -> bool {
        (self.mode == Mode::Exclusive || mode == Mode::Exclusive)
            && self.range.start < range.end
            && range.start < self.range.end
    }
}

#[derive(Default)]
struct State {
    next: u64,
    /// In ascending order of tickets.
    requests: VecDeque<Request>,
}

impl State {
    fn index(&self, ticket: Ticket) -> usize {
        self.requests
            .binary_search_by_key(&ticket, |request| request.ticket)
            .expect("a ticket stays in the queue until its owner withdraws it")
    }

    /// Takes one blocker from every request behind `index` that `lifted` says was held up, and returns the wakers
    /// of those that are free now.
    fn lift(&mut self, from: usize, lifted: impl Fn(&Request) -> bool) -> Vec<Waker> {
        let mut wakers = Vec::new();
        for request in self.requests.range_mut(from..) {
            if lifted(request) {
                request.blockers -= 1;
                if request.blockers == 0 {
                    wakers.extend(request.waker.take());
                }
            }
        }
        wakers
    }
}

#[cfg(test)]
thread_local! {
    /// Requests of this thread that had to wait for another: campaigns tell how many they met.
    pub(crate) static CONFLICTS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Requests for ranges of one object.
#[derive(Default)]
pub(super) struct WaitQueue {
    state: RefCell<State>,
}

impl WaitQueue {
    /// Appends a request.
    pub(super) fn request(&self, range: Range<u64>, mode: Mode) -> Ticket {
        let mut state = self.state.borrow_mut();
        let blockers = state.requests.iter().filter(|request| request.conflicts(&range, mode)).count();
        let blockers = u32::try_from(blockers).expect("tasks, and so requests, are far fewer than 2^32");
        #[cfg(test)]
        CONFLICTS.with(|conflicts| conflicts.set(conflicts.get() + u64::from(blockers > 0)));
        let ticket = Ticket(state.next);
        state.next += 1;
        state.requests.push_back(Request { ticket, range, mode, blockers, waker: None });
        ticket
    }

    /// Appends a request only if it is granted at once.
    pub(super) fn request_now(&self, range: Range<u64>, mode: Mode) -> Option<Ticket> {
        if self.state.borrow().requests.iter().any(|request| request.conflicts(&range, mode)) {
            return None;
        }
        Some(self.request(range, mode))
    }

    /// Whether the request is granted; if not, `waker` is called when it is.
    pub(super) fn poll(&self, ticket: Ticket, waker: &Waker) -> bool {
        let mut state = self.state.borrow_mut();
        let index = state.index(ticket);
        let request = &mut state.requests[index];
        if request.blockers == 0 {
            return true;
        }
        match &mut request.waker {
            Some(known) => known.clone_from(waker),
            None => request.waker = Some(waker.clone()),
        }
        false
    }

    /// Removes a request, granted or not, and wakes those that it held up.
    pub(super) fn withdraw(&self, ticket: Ticket) {
        let wakers = {
            let mut state = self.state.borrow_mut();
            let index = state.index(ticket);
            let gone = state.requests.remove(index).expect("the index was found just now");
            state.lift(index, |request| request.conflicts(&gone.range, gone.mode))
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Turns a granted exclusive request into a shared one and wakes the shared requests that it held up.
    pub(super) fn downgrade(&self, ticket: Ticket) {
        let wakers = {
            let mut state = self.state.borrow_mut();
            let index = state.index(ticket);
            if state.requests[index].mode == Mode::Shared {
                return;
            }
            state.requests[index].mode = Mode::Shared;
            let range = state.requests[index].range.clone();
            state.lift(index + 1, |request| {
                request.mode == Mode::Shared && request.conflicts(&range, Mode::Exclusive)
            })
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Whether the queue is empty.
    pub(super) fn is_idle(&self) -> bool {
        self.state.borrow().requests.is_empty()
    }
}
