//! Operation slots: buffers come back, dropped futures keep theirs.

use super::*;
use crate::block::{LbaCount, OpTag};
use crate::dma::HeapRegion;
use crate::park::CountingWaker;
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::task::Waker;

/// A device that answers when the test says so.
struct ManualDevice {
    geometry: Geometry,
    pool: DmaPool,
    script: Rc<RefCell<Script>>,
}

#[derive(Default)]
struct Script {
    accepted: Vec<(OpTag, Request)>,
    finished: VecDeque<Completion>,
    rings: usize,
}

impl Script {
    /// Completes the accepted request number `index`.
    fn finish(&mut self, index: usize, result: Result<(), IoError>) {
        let (tag, request) = self.accepted.remove(index);
        self.finished.push_back(Completion { tag, result, buffer: buffer_of(request) });
    }

    fn lbas(&self) -> Vec<u64> {
        let lba = |(_, request): &(OpTag, Request)| match request {
            Request::Read { lba, .. } | Request::Write { lba, .. } => lba.get(),
            other => panic!("unexpected {other:?}"),
        };
        self.accepted.iter().map(lba).collect()
    }
}

impl BlockDevice for ManualDevice {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }
    fn pool(&self) -> &DmaPool {
        &self.pool
    }
    fn submit(&mut self, tag: OpTag, request: Request) -> Result<(), Rejected> {
        let mut script = self.script.borrow_mut();
        if let Request::Read { lba, .. } = &request
            && lba.get() >= self.geometry.lba_count.get()
        {
            let error = IoError::InvalidRange { lba: lba.get(), bytes: 512, lba_size: 512 };
            return Err(Rejected { request, reason: RejectReason::Error(error) });
        }
        if script.accepted.len() + script.finished.len() == usize::from(self.geometry.queue_depth) {
            return Err(Rejected { request, reason: RejectReason::QueueFull });
        }
        script.accepted.push((tag, request));
        Ok(())
    }
    fn ring(&mut self) {
        self.script.borrow_mut().rings += 1;
    }
    fn process_completions(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize {
        let mut count = 0;
        while count < budget {
            let next = self.script.borrow_mut().finished.pop_front();
            let Some(completion) = next else { break };
            sink(completion);
            count += 1;
        }
        count
    }
    fn in_flight(&self) -> usize {
        let script = self.script.borrow();
        script.accepted.len() + script.finished.len()
    }
    fn interrupt(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn arm_interrupt(&mut self) -> bool {
        false
    }
}

fn disk(queue_depth: u16) -> (Disk, Rc<RefCell<Script>>) {
    let script = Rc::new(RefCell::new(Script::default()));
    let geometry = Geometry {
        lba_size: 512,
        lba_count: LbaCount::new(1 << 20),
        preferred_transfer: 65536,
        volatile_write_cache: false,
        deallocate: false,
        queue_depth,
        name: "manual".to_owned(),
    };
    let pool = DmaPool::new(HeapRegion::new(16 << 20).unwrap());
    (Disk::new(Box::new(ManualDevice { geometry, pool, script: Rc::clone(&script) })), script)
}

fn read(disk: &Disk, lba: u64) -> Operation {
    disk.read(Lba::new(lba), disk.pool().try_alloc(512).unwrap())
}

fn poll<F: Future + Unpin>(future: &mut F, waker: &Waker) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(waker))
}

fn settle(disk: &Disk) {
    disk.process_completions(usize::MAX, &mut |_| ());
    disk.pump();
    disk.ring();
}

#[test]
fn operation_starts_before_it_is_polled_and_wakes_once_when_done() {
    let (disk, script) = disk(4);
    let mut operation = read(&disk, 7);
    assert_eq!(script.borrow().lbas(), [7]);
    let wakes = CountingWaker::new();
    assert!(poll(&mut operation, &wakes.waker()).is_pending());
    script.borrow_mut().finish(0, Ok(()));
    settle(&disk);
    assert_eq!(wakes.count(), 1);
    let Poll::Ready((result, buffer)) = poll(&mut operation, &wakes.waker()) else { panic!("not ready") };
    assert_eq!((result, buffer.len()), (Ok(()), 512));
}

#[test]
fn dropped_future_keeps_the_buffer_from_reuse_until_the_device_answers() {
    let (disk, script) = disk(4);
    let before = disk.pool().available();
    drop(read(&disk, 1));
    settle(&disk);
    assert!(disk.pool().available() < before, "the device may still write into it");
    script.borrow_mut().finish(0, Ok(()));
    settle(&disk);
    assert_eq!(disk.pool().available(), before);
}

#[test]
fn requests_beyond_the_queue_depth_wait_in_order_and_one_ring_serves_many() {
    let (disk, script) = disk(2);
    let _operations: Vec<_> = (0..5).map(|lba| read(&disk, lba)).collect();
    settle(&disk);
    assert_eq!((script.borrow().lbas(), script.borrow().rings), (vec![0, 1], 1));
    script.borrow_mut().finish(0, Ok(()));
    script.borrow_mut().finish(0, Ok(()));
    settle(&disk);
    assert_eq!((script.borrow().lbas(), script.borrow().rings), (vec![2, 3], 2));
    settle(&disk);
    assert_eq!(script.borrow().rings, 2, "nothing new, no ring");
}

#[test]
fn future_dropped_before_the_device_took_the_request_cancels_it() {
    let (disk, script) = disk(1);
    let before = disk.pool().available();
    let first = read(&disk, 1);
    let second = read(&disk, 2);
    let _third = read(&disk, 3);
    drop(second);
    script.borrow_mut().finish(0, Ok(()));
    settle(&disk);
    assert_eq!(script.borrow().lbas(), [3]);
    drop(first);
    assert_eq!(disk.pool().available(), before - 4096);
}

#[test]
fn refused_request_fails_with_its_buffer_also_after_waiting() {
    let (disk, script) = disk(1);
    let mut bad_now = read(&disk, 1 << 20);
    assert!(matches!(poll(&mut bad_now, Waker::noop()), Poll::Ready((Err(IoError::InvalidRange { .. }), _))));
    let _first = read(&disk, 0);
    let _second = read(&disk, 1);
    let mut bad_later = read(&disk, 1 << 20);
    let wakes = CountingWaker::new();
    assert!(poll(&mut bad_later, &wakes.waker()).is_pending());
    script.borrow_mut().finish(0, Ok(()));
    settle(&disk);
    script.borrow_mut().finish(0, Ok(()));
    settle(&disk);
    assert_eq!(wakes.count(), 1);
    assert!(matches!(
        poll(&mut bad_later, Waker::noop()),
        Poll::Ready((Err(IoError::InvalidRange { .. }), _))
    ));
}

#[test]
fn slots_run_out_into_a_line_that_moves_in_order_of_first_polls() {
    let (disk, script) = disk(1);
    let mut placed: Vec<_> = (0..MIN_OPERATION_SLOTS as u64).map(|lba| read(&disk, lba)).collect();
    let (mut unpolled, mut early, mut late) = (read(&disk, 9000), read(&disk, 9001), read(&disk, 9002));
    let (early_wakes, late_wakes) = (CountingWaker::new(), CountingWaker::new());
    assert!(poll(&mut early, &early_wakes.waker()).is_pending());
    assert!(poll(&mut late, &late_wakes.waker()).is_pending());
    script.borrow_mut().finish(0, Ok(()));
    settle(&disk);
    assert!(poll(&mut placed[0], Waker::noop()).is_ready());
    assert_eq!(
        (early_wakes.count(), late_wakes.count()),
        (1, 0),
        "one slot, one call, to the first that polled"
    );
    assert!(poll(&mut unpolled, Waker::noop()).is_pending(), "the free slot is spoken for");
    drop(early);
    assert_eq!(late_wakes.count(), 1, "the turn is passed on");
    assert!(poll(&mut late, &late_wakes.waker()).is_pending());
    drop((placed, unpolled));
    script.borrow_mut().finish(0, Ok(()));
    settle(&disk);
    assert_eq!(script.borrow().lbas(), [9002]);
}

#[test]
#[should_panic(expected = "completion of an operation that does not exist")]
fn second_completion_of_one_operation_is_caught() {
    let (disk, script) = disk(4);
    let mut operation = read(&disk, 0);
    let tag = script.borrow().accepted[0].0;
    script.borrow_mut().finish(0, Ok(()));
    settle(&disk);
    assert!(poll(&mut operation, Waker::noop()).is_ready());
    script.borrow_mut().finished.push_back(Completion { tag, result: Ok(()), buffer: None });
    settle(&disk);
}
