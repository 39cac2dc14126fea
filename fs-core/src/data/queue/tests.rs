//! The queues: order, visibility, fullness, and threads that write at once.

use std::collections::HashMap;
use std::sync::mpsc;

use super::*;
use crate::alloc::SpaceCounter;

fn entry(shared: &DelallocShared, inode: u64, offset: u64, data: &[u8]) -> WriteEntry {
    let parts = WriteParts {
        inode: InodeNr::new(inode),
        offset: FileOffset::new(offset),
        data,
        source: WriteSource::Call,
        kill_privileges: KillPrivileges::Keep,
    };
    let charge = shared.budget().charge(parts.page_count()).unwrap();
    let space = SpaceCounter::new().reserve(0, 0, Priority::Normal).unwrap();
    parts.into_entry(charge, space)
}

fn drained(shared: &DelallocShared, state: &mut DrainState) -> Vec<u64> {
    shared.drain(state).iter().map(|entry| entry.offset).collect()
}

#[test]
fn bytes_are_spread_over_the_pages_that_they_touch() {
    let shared = DelallocShared::new(0);
    let data: Vec<u8> = (0..9000).map(|index| index as u8).collect();
    let entry = entry(&shared, 1, 4000, &data);
    assert_eq!(entry.pages.len(), 4);
    let bytes: Vec<u8> = entry.pages.iter().flat_map(|page| page.iter().copied()).collect();
    assert_eq!(bytes[4000..13_000], data);
    assert!(bytes[..4000].iter().chain(&bytes[13_000..]).all(|byte| *byte == 0));
    assert_eq!(shared.dirty_bytes(), 4 * 4096);
    drop(entry);
    assert_eq!(shared.dirty_bytes(), 0);
}

#[test]
fn writes_of_different_queues_are_drained_in_the_order_of_acceptance() {
    let shared = DelallocShared::new(0);
    let mut state = DrainState::default();
    for offset in 0..40 {
        // Each thread has a queue of its own, or shares one.
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || shared.accept(entry(&shared, 1, offset, &[1])).unwrap()).join().unwrap();
    }
    assert!(!shared.is_drained(&state));
    assert_eq!(drained(&shared, &mut state), (0..40).collect::<Vec<_>>());
    assert!(shared.is_drained(&state) && drained(&shared, &mut state).is_empty());
}

#[test]
fn claimed_queue_is_passed_by_and_full_queues_give_the_write_back() {
    let shared = DelallocShared::new(1 << 20);
    let mut state = DrainState::default();
    // A producer preempted in the middle of a push: it has a number and a claim, and has published nothing.
    shared.queues[3].claimed.store(true, Ordering::Release);
    shared.next_number.fetch_add(1, Ordering::AcqRel);
    let mut accepted = 0;
    while shared.accept(entry(&shared, 1, accepted, &[1])).is_ok() {
        accepted += 1;
    }
    assert_eq!(accepted as usize, (QUEUES - 1) * QUEUE_SLOTS);
    assert_eq!(drained(&shared, &mut state), (0..accepted).collect::<Vec<_>>());
    assert!(shared.accept(entry(&shared, 1, 0, &[1])).is_ok());
}

/// A drain that looked at the queues first and took whatever it found could take a later write and leave an earlier
/// one of a queue it had already passed; the next drain then applied them in reverse.
#[test]
fn drain_leaves_what_was_numbered_after_it_began() {
    let shared = DelallocShared::new(0);
    let mut state = DrainState::default();
    assert!(shared.accept(entry(&shared, 1, 0, &[1])).is_ok());
    // As if the drain had read the counter before this entry's number was drawn.
    let queue = shared.queues.iter().position(|queue| !queue.slots.is_empty()).unwrap();
    shared.next_number.store(0, Ordering::Release);
    assert!(drained(&shared, &mut state).is_empty());
    assert!(state.kept[queue].is_some() && !shared.is_drained(&state));
    shared.next_number.store(1, Ordering::Release);
    assert_eq!(drained(&shared, &mut state), [0]);
}

#[test]
fn acknowledged_writes_are_always_in_the_next_drain_and_each_threads_in_order() {
    const THREADS: u64 = 4;
    const WRITES: u64 = 2000;
    let shared = DelallocShared::new(1 << 20);
    let (told, acknowledged) = mpsc::channel();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (shared, told) = (&shared, told.clone());
            scope.spawn(move || {
                for offset in 0..WRITES {
                    let mut next = entry(shared, thread, offset, &[1]);
                    while let Err(refused) = shared.accept(next) {
                        next = *refused;
                        std::thread::yield_now();
                    }
                    told.send((thread, offset)).unwrap();
                }
            });
        }
        drop(told);
        let mut state = DrainState::default();
        let mut seen: HashMap<u64, u64> = HashMap::new();
        while let Ok((thread, offset)) = acknowledged.recv() {
            for entry in shared.drain(&mut state) {
                let next = seen.entry(entry.inode.get()).or_default();
                assert_eq!(entry.offset, *next, "thread {}", entry.inode);
                *next += 1;
            }
            assert!(seen[&thread] > offset, "an acknowledged write was not drained");
        }
        assert!((0..THREADS).all(|thread| seen[&thread] == WRITES));
    });
}

#[test]
fn budget_bounds_what_is_accepted() {
    let budget = DirtyBudget::new(0);
    let mut all = budget.charge(MIN_BUDGET_PAGES).unwrap();
    assert!(budget.charge(1).is_none());
    let part = all.split(10);
    drop(part);
    assert!(budget.charge(11).is_none());
    all.merge(budget.charge(10).unwrap());
    drop(all);
    assert_eq!(budget.used(), 0);
}
