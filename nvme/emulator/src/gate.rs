//! Letting one fused command have a namespace's blocks to itself (§6.2.1).
//!
//! A compare-and-write must see no other write between its two halves. Writers of different queues must not share
//! anything for that, so each has a flag of its own ([`WriterFlag`], in its submission queue's slot); a fused command
//! closes the gate and waits until every flag is down.
//!
//! Invariants: a writer holds its flag only while it changes a store, and takes no lock of another queue meanwhile, so
//! that the gate closes in bounded time. The holder of a closed gate raises no flag.
//!
//! Memory ordering: `closed` and the flags form a store-load pair, all sequentially consistent: either the writer sees
//! the gate closed, or who closes it sees the writer's flag.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::locks::lock;

/// Whether a queue is changing a store.
#[derive(Debug, Default)]
pub(crate) struct WriterFlag(AtomicBool);

/// The gate, one for the controller.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    closed: AtomicBool,
    holder: Mutex<()>,
}

/// Right to write; given back when dropped.
pub(crate) struct Writing<'a>(&'a WriterFlag);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        // Release: who closes the gate sees what was written.
        self.0.0.store(false, Ordering::Release);
    }
}

/// The gate closed: nobody else writes.
pub(crate) struct Closed<'a> {
    gate: &'a Gate,
    _one: MutexGuard<'a, ()>,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.closed.store(false, Ordering::SeqCst);
    }
}

impl Gate {
    /// Waits while the gate is closed, then raises `flag`.
    #[inline]
    pub(crate) fn enter<'a>(&self, flag: &'a WriterFlag) -> Writing<'a> {
        loop {
            flag.0.swap(true, Ordering::SeqCst);
            if !self.closed.load(Ordering::SeqCst) {
                return Writing(flag);
            }
            flag.0.store(false, Ordering::Release);
            drop(lock(&self.holder)); // until the gate opens
        }
    }

    /// Closes the gate and waits until none of `flags` is up.
    pub(crate) fn close<'a>(&'a self, flags: impl Iterator<Item = &'a WriterFlag>) -> Closed<'a> {
        let one = lock(&self.holder);
        self.closed.store(true, Ordering::SeqCst);
        for flag in flags {
            while flag.0.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        }
        Closed { gate: self, _one: one }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn nobody_writes_while_the_gate_is_closed() {
        let (gate, flags) = (Gate::default(), [WriterFlag::default(), WriterFlag::default()]);
        let (value, rounds) = (AtomicU64::new(0), 2000);
        std::thread::scope(|scope| {
            for flag in &flags {
                scope.spawn(|| {
                    for _ in 0..rounds {
                        let _writing = gate.enter(flag);
                        value.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..rounds {
                let _closed = gate.close(flags.iter());
                // Not atomic as a whole: another writer in between would be lost.
                let old = value.load(Ordering::Relaxed);
                std::hint::spin_loop();
                value.store(old + 1, Ordering::Relaxed);
            }
        });
        assert_eq!(value.into_inner(), 3 * rounds);
    }
}
