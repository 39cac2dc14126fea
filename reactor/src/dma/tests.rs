//! DMA pool and buddy allocator.

use super::*;
use std::sync::atomic::AtomicUsize;
use std::task::Wake;

struct CountingWaker(AtomicUsize);

impl Wake for CountingWaker {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn pool(pages: usize) -> DmaPool {
    DmaPool::new(HeapRegion::new(pages * PAGE_SIZE).unwrap())
}

fn poll(future: &mut Alloc) -> Poll<Result<DmaBuffer, PoolError>> {
    Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

fn ready(future: &mut Alloc) -> DmaBuffer {
    match poll(future) {
        Poll::Ready(Ok(buffer)) => buffer,
        other => panic!("expected a buffer, got {other:?}"),
    }
}

#[test]
fn buffers_hold_what_was_written_and_do_not_overlap() {
    let pool = pool(4);
    let mut first = pool.try_alloc(PAGE_SIZE).unwrap();
    let mut second = pool.try_alloc(512).unwrap();
    first.fill(0, PAGE_SIZE, 0x11);
    second.fill(0, 512, 0x22);
    second.write_at(510, &[1, 2]);
    let mut bytes = [0; 4];
    second.read_at(508, &mut bytes);
    assert_eq!(bytes, [0x22, 0x22, 1, 2]);
    first.read_at(PAGE_SIZE - 4, &mut bytes);
    assert_eq!(bytes, [0x11; 4]);
    assert_ne!(first.iova(), second.iova());
    assert_eq!(second.len(), 512);
}

#[test]
#[should_panic(expected = "access to 2 bytes at 511")]
fn access_beyond_the_length_is_refused_even_inside_the_page() {
    let pool = pool(1);
    pool.try_alloc(512).unwrap().write_at(511, &[0, 0]);
}

#[test]
fn shortened_buffer_keeps_its_beginning_and_gives_the_rest_back() {
    let pool = pool(64);
    let free = pool.available();
    let mut buffer = pool.try_alloc(16 * PAGE_SIZE).unwrap();
    buffer.fill(0, 16 * PAGE_SIZE, 7);
    for pages in [16, 9, 8, 3, 1] {
        buffer.shorten(pages * PAGE_SIZE);
        assert_eq!(buffer.len(), pages * PAGE_SIZE);
        assert_eq!(pool.available(), free - pages.next_power_of_two() * PAGE_SIZE);
    }
    buffer.shorten(512);
    let mut byte = [0];
    buffer.read_at(511, &mut byte);
    assert_eq!((buffer.len(), byte), (512, [7]));
    // What was given back is one piece again once the beginning follows.
    drop(buffer);
    assert_eq!(pool.available(), free);
    assert!(pool.try_alloc(64 * PAGE_SIZE).is_some());
}

/// Write-back used to give its buffer back and ask for a shorter one. With somebody in line that failed, each took the
/// other's turn, and on a full, fragmented volume nothing was written any more.
#[test]
fn shortening_does_not_stand_in_line_and_serves_who_does() {
    let pool = pool(16);
    let mut buffer = pool.try_alloc(16 * PAGE_SIZE).unwrap();
    let mut waiting = pool.alloc(8 * PAGE_SIZE);
    assert!(poll(&mut waiting).is_pending());
    assert!(pool.try_alloc(PAGE_SIZE).is_none());
    buffer.shorten(PAGE_SIZE);
    assert_eq!(buffer.len(), PAGE_SIZE);
    assert_eq!(ready(&mut waiting).len(), 8 * PAGE_SIZE);
}

#[test]
fn dropped_buffer_comes_back() {
    let pool = pool(2);
    let buffer = pool.try_alloc(2 * PAGE_SIZE).unwrap();
    assert_eq!(pool.available(), 0);
    assert!(pool.try_alloc(512).is_none());
    drop(buffer);
    assert_eq!(pool.available(), pool.capacity());
}

#[test]
fn impossible_lengths_are_errors_not_waits() {
    let pool = pool(4);
    assert_eq!(
        poll(&mut pool.alloc(0)).map(Result::err),
        Poll::Ready(Some(PoolError::InvalidLength { bytes: 0 }))
    );
    assert!(matches!(poll(&mut pool.alloc(513)), Poll::Ready(Err(PoolError::InvalidLength { bytes: 513 }))));
    let too_large = PoolError::TooLarge { bytes: 5 * PAGE_SIZE, limit: 4 * PAGE_SIZE };
    assert_eq!(poll(&mut pool.alloc(5 * PAGE_SIZE)).map(Result::err), Poll::Ready(Some(too_large)));
    assert!(pool.try_alloc(usize::MAX & !511).is_none());
}

#[test]
fn small_request_does_not_overtake_a_large_one_in_line() {
    let pool = pool(2);
    let (a, b) = (pool.try_alloc(PAGE_SIZE).unwrap(), pool.try_alloc(PAGE_SIZE).unwrap());
    let (mut large, mut small) = (pool.alloc(2 * PAGE_SIZE), pool.alloc(512));
    assert!(poll(&mut large).is_pending());
    assert!(poll(&mut small).is_pending());
    drop(a);
    assert!(poll(&mut small).is_pending(), "the page belongs to the one ahead");
    assert!(pool.try_alloc(512).is_none(), "try_alloc gives way to the line");
    drop(b);
    let held = ready(&mut large);
    assert!(poll(&mut small).is_pending());
    drop(held);
    ready(&mut small);
}

#[test]
fn waiter_that_goes_away_passes_its_turn_on() {
    let pool = pool(2);
    let buffer = pool.try_alloc(PAGE_SIZE).unwrap();
    let wakes = Arc::new(CountingWaker(AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&wakes));
    let (mut large, mut small) = (pool.alloc(2 * PAGE_SIZE), pool.alloc(512));
    assert!(poll(&mut large).is_pending());
    assert!(Pin::new(&mut small).poll(&mut Context::from_waker(&waker)).is_pending());
    drop(large);
    assert_eq!(wakes.0.load(Ordering::Relaxed), 1, "the free page was held up only by the one who left");
    ready(&mut small);
    drop(buffer);
    assert_eq!(pool.available(), pool.capacity());
}

#[test]
fn grant_that_was_never_taken_comes_back() {
    let pool = pool(1);
    let buffer = pool.try_alloc(PAGE_SIZE).unwrap();
    let mut waiting = pool.alloc(PAGE_SIZE);
    assert!(poll(&mut waiting).is_pending());
    drop(buffer);
    assert_eq!(pool.available(), 0, "granted to the waiter");
    drop(waiting);
    assert_eq!(pool.available(), PAGE_SIZE);
}

#[test]
fn quarantined_pages_are_never_handed_out_and_fail_who_needs_them() {
    let pool = pool(2);
    let buffer = pool.try_alloc(PAGE_SIZE).unwrap();
    let mut large = pool.alloc(2 * PAGE_SIZE);
    assert!(poll(&mut large).is_pending());
    let quarantined = buffer.iova();
    buffer.quarantine();
    let error = PoolError::TooLarge { bytes: 2 * PAGE_SIZE, limit: PAGE_SIZE };
    assert_eq!(poll(&mut large).map(Result::err), Poll::Ready(Some(error)));
    assert_eq!(pool.capacity(), PAGE_SIZE);
    let other = pool.try_alloc(PAGE_SIZE).unwrap();
    assert_ne!(other.iova(), quarantined);
    assert!(pool.try_alloc(PAGE_SIZE).is_none());
}
