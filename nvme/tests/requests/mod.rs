//! Requests on a queue, one at a time: what the tests of every way to a device need.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nvme::QueuePair;
use reactor::block::{BlockDevice, Completion, Durability, Lba, OpTag, Request};

/// Takes completions until nothing is in flight.
pub(crate) fn drain(queue: &mut QueuePair) -> Vec<Completion> {
    queue.ring();
    let mut done = Vec::new();
    while queue.in_flight() > 0 {
        queue.process_completions(64, &mut |completion| done.push(completion));
        queue.ring();
    }
    done
}

/// One request, to its end.
pub(crate) fn execute(queue: &mut QueuePair, request: Request) -> Completion {
    queue.submit(OpTag(1), request).unwrap();
    drain(queue).pop().unwrap()
}

/// Contents that differ for each seed and place.
pub(crate) fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64)
        .map(|i| ((seed + i / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (i % 8 * 8)) as u8)
        .collect()
}

/// Writes, and insists on success.
pub(crate) fn write(queue: &mut QueuePair, lba: u64, data: &[u8]) {
    let mut buffer = queue.pool().try_alloc(data.len()).unwrap();
    buffer.write_at(0, data);
    let request = Request::Write { lba: Lba::new(lba), buffer, durability: Durability::Cached };
    assert_eq!(execute(queue, request).result, Ok(()));
}

/// Reads, and insists on success.
pub(crate) fn read(queue: &mut QueuePair, lba: u64, bytes: usize) -> Vec<u8> {
    let buffer = queue.pool().try_alloc(bytes).unwrap();
    let done = execute(queue, Request::Read { lba: Lba::new(lba), buffer });
    assert_eq!(done.result, Ok(()));
    let mut data = vec![0; bytes];
    done.buffer.unwrap().read_at(0, &mut data);
    data
}

/// Reads so many blocks, asleep until the interrupt of each.
pub(crate) fn read_asleep(queue: &mut QueuePair, blocks: u64) {
    for lba in 0..blocks {
        let buffer = queue.pool().try_alloc(4096).unwrap();
        queue.submit(OpTag(lba), Request::Read { lba: Lba::new(lba), buffer }).unwrap();
        queue.ring();
        let mut done = 0;
        while done == 0 {
            if !queue.arm_interrupt() {
                let mut fds = [PollFd::new(queue.interrupt().unwrap(), PollFlags::POLLIN)];
                assert_eq!(poll(&mut fds, PollTimeout::from(20_000u16)).unwrap(), 1, "never woken");
            }
            queue.process_completions(8, &mut |completion| {
                assert_eq!(completion.result, Ok(()));
                done += 1;
            });
        }
    }
}
