//! The atomics and locks that the wake-up protocols of this crate are written with: the standard ones, or loom's
//! when a protocol is being model-checked (`RUSTFLAGS="--cfg loom"`).
//!
//! Excludes: everything that is not a protocol of its own (counters use the standard atomics directly).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::{Mutex, MutexGuard};

use crate::planted::{Bug, is_planted};

/// A full fence, unless its absence is planted.
#[inline(always)]
pub(crate) fn fence_unless(bug: Bug) {
    if !is_planted(bug) {
        fence(Ordering::SeqCst);
    }
}

/// The order of an access, unless it is planted that it has none.
#[inline(always)]
pub(crate) fn order_unless(bug: Bug, order: Ordering) -> Ordering {
    if is_planted(bug) { Ordering::Relaxed } else { order }
}
