//! Locks driven by hand: requests are polled with a waker that counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Wake, Waker};

use proptest::prelude::*;

use super::*;
use crate::types::ShardId;

struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn inode(sequence: u64) -> InodeNr {
    InodeNr::from_parts(ShardId::new(0).unwrap(), sequence).unwrap()
}

fn poll<C: LockClass>(acquire: &mut Acquire<C>) -> Option<Guard<C>> {
    match Pin::new(acquire).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(guard) => Some(guard),
        Poll::Pending => None,
    }
}

fn lock() -> WholeLock<InodeClass> {
    WholeLock::new(inode(2))
}

#[test]
fn writer_is_not_overtaken_by_later_readers() {
    let lock = lock();
    let reader = poll(&mut lock.shared(&mut LockOrder::new())).unwrap();
    let mut writer = lock.exclusive(&mut LockOrder::new());
    let mut late = lock.shared(&mut LockOrder::new());
    assert!(poll(&mut writer).is_none());
    assert!(poll(&mut late).is_none());
    assert!(lock.try_lock(Mode::Shared).is_none());
    drop(reader);
    assert!(poll(&mut late).is_none());
    let writing = poll(&mut writer).unwrap();
    assert!(poll(&mut late).is_none());
    drop(writing);
    assert!(poll(&mut late).is_some());
    assert!(lock.is_idle());
}

#[test]
fn withdrawn_writer_lets_the_readers_behind_it_in_and_wakes_them() {
    let lock = lock();
    let _reader = poll(&mut lock.shared(&mut LockOrder::new())).unwrap();
    let writer = lock.exclusive(&mut LockOrder::new());
    let mut late = lock.shared(&mut LockOrder::new());
    let count = Arc::new(Count(AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&count));
    assert!(Pin::new(&mut late).poll(&mut Context::from_waker(&waker)).is_pending());
    drop(writer);
    assert_eq!(count.0.load(Ordering::Relaxed), 1);
    assert!(poll(&mut late).is_some());
}

#[test]
fn lock_granted_to_a_future_that_is_then_dropped_goes_on_to_the_next() {
    let lock = lock();
    let first = poll(&mut lock.exclusive(&mut LockOrder::new())).unwrap();
    let second = lock.exclusive(&mut LockOrder::new());
    let mut third = lock.exclusive(&mut LockOrder::new());
    drop(first); // `second` is granted but was never polled
    assert!(poll(&mut third).is_none());
    drop(second);
    assert!(poll(&mut third).is_some());
}

#[test]
fn downgraded_writer_admits_readers_up_to_the_next_writer() {
    let lock = lock();
    let guard = poll(&mut lock.exclusive(&mut LockOrder::new())).unwrap();
    let mut reader = lock.shared(&mut LockOrder::new());
    let mut writer = lock.exclusive(&mut LockOrder::new());
    let mut late = lock.shared(&mut LockOrder::new());
    guard.downgrade();
    guard.downgrade(); // once more changes nothing
    let reading = poll(&mut reader).unwrap();
    assert!(poll(&mut writer).is_none());
    assert!(poll(&mut late).is_none());
    drop(guard);
    assert!(poll(&mut writer).is_none());
    drop(reading);
    assert!(poll(&mut writer).is_some());
}

#[test]
fn ranges_conflict_only_where_they_overlap() {
    let lock = RangeLock::new(inode(2));
    let _low = lock.try_lock(0..4096, Mode::Exclusive).unwrap();
    let _high = lock.try_lock(4096..8192, Mode::Exclusive).unwrap();
    assert!(lock.try_lock(4095..4096, Mode::Shared).is_none());
    let mut across = lock.shared(0..8192, &mut LockOrder::new());
    assert!(poll(&mut across).is_none());
    assert!(lock.try_lock(8192..8193, Mode::Exclusive).is_some());
    // Behind a waiting shared request, an exclusive one of its range waits too.
    assert!(lock.try_lock(6000..6001, Mode::Exclusive).is_none());
}

#[test]
#[should_panic(expected = "lock order broken")]
fn inode_lock_after_range_lock_panics() {
    let mut order = LockOrder::new();
    let _range = RangeLock::new(inode(2)).shared(0..1, &mut order);
    let _whole = lock().shared(&mut order);
}

#[test]
#[should_panic(expected = "lock order broken")]
fn two_inodes_in_descending_order_panic() {
    let mut order = LockOrder::new();
    let _three = WholeLock::<InodeClass>::new(inode(3)).shared(&mut order);
    let _two = WholeLock::<InodeClass>::new(inode(2)).shared(&mut order);
}

#[derive(Clone, Debug)]
enum Step {
    Request { start: u64, length: u64, mode: Mode },
    Remove(prop::sample::Index),
    Downgrade(prop::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    let mode = prop_oneof![Just(Mode::Shared), Just(Mode::Exclusive)];
    prop_oneof![
        4 => (0..32u64, 1..12u64, mode).prop_map(|(start, length, mode)| Step::Request { start, length, mode }),
        3 => any::<prop::sample::Index>().prop_map(Step::Remove),
        1 => any::<prop::sample::Index>().prop_map(Step::Downgrade),
    ]
}

proptest! {
    /// The queue agrees with the definition: granted ⇔ nothing conflicting stands before.
    #[test]
    fn request_is_granted_exactly_when_no_conflicting_one_stands_before_it(steps in prop::collection::vec(step(), 1..80)) {
        let queue = WaitQueue::default();
        let mut model: Vec<(Ticket, Range<u64>, Mode)> = Vec::new();
        let granted = |model: &[(Ticket, Range<u64>, Mode)], index: usize| {
            let (_, range, mode) = &model[index];
            !model[..index].iter().any(|(_, other, other_mode)| {
                (*mode == Mode::Exclusive || *other_mode == Mode::Exclusive)
                    && other.start < range.end && range.start < other.end
            })
        };
        for step in steps {
            match step {
                Step::Request { start, length, mode } => {
                    let range = start..start + length;
                    model.push((queue.request(range.clone(), mode), range, mode));
                }
                Step::Remove(index) if !model.is_empty() => {
                    let (ticket, ..) = model.remove(index.index(model.len()));
                    queue.withdraw(ticket);
                }
                Step::Downgrade(index) if !model.is_empty() => {
                    let index = index.index(model.len());
                    if granted(&model, index) {
                        queue.downgrade(model[index].0);
                        model[index].2 = Mode::Shared;
                    }
                }
                _ => {}
            }
            for (index, entry) in model.iter().enumerate() {
                prop_assert_eq!(queue.poll(entry.0, Waker::noop()), granted(&model, index));
            }
        }
    }
}
