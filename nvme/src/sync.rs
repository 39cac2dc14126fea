//! The atomics that this crate's own protocols between threads are written with: the standard ones, or loom's when a protocol
//! is being model-checked (`RUSTFLAGS="--cfg loom"`).
//!
//! Owns: [`publish_then_look`], one side of the agreement on who looks again.
//!
//! Excludes: memory that a device shares (real cells are `DmaRegion`s; a model brings its own), and counters.

#[cfg(loom)]
pub(crate) use loom::sync::Mutex;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU32, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::Mutex;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU8, AtomicU32, Ordering, fence};

use crate::planted::{Bug, is_planted};

/// A fence, unless its absence is planted.
#[inline(always)]
pub(crate) fn fence_unless(bug: Bug, order: Ordering) {
    if !is_planted(bug) {
        fence(order);
    }
}

/// The order of an access, unless it is planted that it has none.
#[inline(always)]
pub(crate) fn order_unless(bug: Bug, order: Ordering) -> Ordering {
    if is_planted(bug) { Ordering::Relaxed } else { order }
}

/// Publishes a value, and then looks at what the other side published. If both sides do, at least one sees the other's:
/// neither goes to sleep over news.
#[inline]
pub(crate) fn publish_then_look<T>(publish: impl FnOnce(), look: impl FnOnce() -> T) -> T {
    publish();
    // The store before the load that follows. Pairs with the same fence on the other side.
    fence_unless(Bug::LookFenceMissing, Ordering::SeqCst);
    look()
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::planted::assert_caught;
    use crate::shadow::event_passed;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicU32;
    use loom::thread;

    /// The driver publishes tail 1. The controller, which had seen tail 0, publishes the event index 0 and looks again before
    /// it sleeps. In every interleaving it sees the new tail, or the driver writes the doorbell.
    fn tail_and_event_index() {
        loom::model(|| {
            let (tail, event) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(7)));
            let controller = {
                let (tail, event) = (Arc::clone(&tail), Arc::clone(&event));
                thread::spawn(move || {
                    publish_then_look(
                        || event.store(0, Ordering::Relaxed),
                        || tail.load(Ordering::Relaxed) == 1,
                    )
                })
            };
            let event =
                publish_then_look(|| tail.store(1, Ordering::Release), || event.load(Ordering::Relaxed));
            let rung = event_passed(event, 0, 1);
            let seen = controller.join().unwrap();
            assert!(seen || rung, "an entry waits, the controller sleeps, and nobody rang");
        });
    }

    #[test]
    fn loom_a_tail_is_seen_or_the_doorbell_is_rung() {
        tail_and_event_index();
    }

    #[test]
    fn loom_a_missing_fence_between_publishing_and_looking_is_caught() {
        assert_caught(Bug::LookFenceMissing, tail_and_event_index);
    }
}
