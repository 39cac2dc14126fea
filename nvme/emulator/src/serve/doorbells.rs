//! The doorbell page that a client maps, and the thread that watches it.
//!
//! A client's store into the page is not noticed by anybody, so a thread compares the page with what it saw last and
//! rings the controller's doorbells. How often it looks is up to [`Pace`].
//!
//! Invariants: a value is passed on once; when a queue begins, its slot is 0 on both sides before the client can know of the
//! queue. A client that stores nonsense gets the events that nonsense in a doorbell gives.
//!
//! *Memory ordering*: a slot is loaded with acquire, the partner of the client's release before its store, so that the
//! entries it announces are seen. `seen` is loaded before the page and stored to after it: see [`DoorbellPage::scan`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use nvme_spec::registers::DOORBELL_BASE;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::pace::{Next, Pace};
use crate::controller::EmulatedController;
use crate::queue_watch::QueueWatch;

/// Looks at the page between two looks at the clock.
const LOOKS_PER_CLOCK: u32 = 64;
/// How much later than asked for the system may wake the thread. Its default is as long as the shortest pause.
const TIMER_SLACK_NS: u64 = 1000;

/// Memory behind the doorbells of BAR0.
pub(super) struct DoorbellPage {
    /// BAR0 as a file, of which only the doorbells are mapped and used.
    memory: MmapRegion,
    /// Value of each dword when it was last passed on.
    seen: Box<[AtomicU32]>,
}

impl DoorbellPage {
    /// The page of a controller whose BAR0 has `bar_bytes`.
    pub(super) fn new(bar_bytes: u64) -> io::Result<Self> {
        let fd = memfd_create("pollux-doorbells", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        ftruncate(&fd, bar_bytes as i64)?;
        // The client has a descriptor too, and could end us by shrinking the file.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
        let doorbell_bytes = (bar_bytes - DOORBELL_BASE) as usize;
        let memory = MmapRegion::from_file(FileOffset::new(OwnedFd::into(fd), DOORBELL_BASE), doorbell_bytes)
            .map_err(io::Error::other)?;
        let seen = (0..doorbell_bytes / 4).map(|_| AtomicU32::new(0)).collect();
        Ok(Self { memory, seen })
    }

    /// BAR0 as a file.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.memory.file_offset().expect("`new` maps a file").file().as_fd()
    }

    fn slot(&self, index: usize) -> &AtomicU32 {
        self.memory.get_atomic_ref(index * 4).expect("there are as many slots as the mapping has dwords")
    }

    fn index(&self, offset: u64) -> Option<usize> {
        let index = usize::try_from(offset.checked_sub(DOORBELL_BASE)? / 4).ok()?;
        (index < self.seen.len()).then_some(index)
    }

    /// Value of the doorbell at `offset` of BAR0.
    pub(super) fn load(&self, offset: u64) -> u32 {
        self.index(offset).map_or(0, |index| self.slot(index).load(Ordering::Acquire))
    }

    /// Notes a value that came by message and is passed on by the caller.
    pub(super) fn note(&self, offset: u64, value: u32) {
        let Some(index) = self.index(offset) else { return };
        self.seen[index].store(value, Ordering::Release);
        self.slot(index).store(value, Ordering::Release);
    }

    /// Passes on what changed since the last scan of the first `slots` dwords. Returns whether anything had.
    ///
    /// `seen` is loaded before the page. A queue that begins meanwhile sets the page to 0 first: then either both old
    /// values are found, which are equal, or 0 is passed on to a queue that is at 0.
    fn scan(&self, slots: usize, mut ring: impl FnMut(u64, u32)) -> bool {
        let mut changed = false;
        for (index, seen) in self.seen.iter().enumerate().take(slots) {
            let before = seen.load(Ordering::Acquire);
            let value = self.slot(index).load(Ordering::Acquire);
            if value != before {
                seen.store(value, Ordering::Release);
                changed = true;
                ring(DOORBELL_BASE + 4 * index as u64, value);
            }
        }
        changed
    }
}

impl QueueWatch for DoorbellPage {
    fn queue_began(&self, offset: u64) {
        let Some(index) = self.index(offset) else { return };
        self.slot(index).store(0, Ordering::Release);
        self.seen[index].store(0, Ordering::Release);
    }
}

/// The thread that watches a page. Dropping it ends the thread and waits for it.
pub(super) struct Poller {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Poller {
    pub(super) fn start(
        controller: Arc<EmulatedController>,
        page: Arc<DoorbellPage>,
        pace: Pace,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("doorbells".into())
            .spawn(move || watch(&controller, &page, pace, &told))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

fn watch(controller: &EmulatedController, page: &DoorbellPage, mut pace: Pace, stop: &AtomicBool) {
    // Without it pauses are longer than asked for, no more.
    let _ = nix::sys::prctl::set_timerslack(TIMER_SLACK_NS);
    let config = controller.config();
    let slots = (2 * (usize::from(config.io_queues) + 1)) << config.dstrd;
    let mut looks = 0;
    while !stop.load(Ordering::Relaxed) {
        let rung = page.scan(slots, |offset, value| controller.doorbell(offset, value));
        looks += 1;
        if looks < LOOKS_PER_CLOCK && !rung {
            std::hint::spin_loop();
            continue;
        }
        looks = 0;
        match pace.next(Instant::now(), rung) {
            Next::Look => {}
            Next::Pause(time) => {
                thread::sleep(time);
                pace.slept(Instant::now());
                looks = LOOKS_PER_CLOCK - 1; // one look between two pauses
            }
        }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches doorbells has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(page: &DoorbellPage) -> Vec<(u64, u32)> {
        let mut rung = Vec::new();
        page.scan(8, |offset, value| rung.push((offset, value)));
        rung
    }

    #[test]
    fn a_change_is_passed_on_once() {
        let page = DoorbellPage::new(0x2000).unwrap();
        assert_eq!(scan(&page), []);
        nix::sys::uio::pwrite(page.fd(), &7u32.to_le_bytes(), 0x1008).unwrap();
        assert_eq!(page.load(0x1008), 7);
        assert_eq!(scan(&page), [(0x1008, 7)]);
        assert_eq!(scan(&page), []);
    }

    /// A queue that takes an old one's number begins at 0: a first doorbell that equals the old queue's last counts.
    #[test]
    fn old_values_are_forgotten_when_a_queue_begins() {
        let page = DoorbellPage::new(0x2000).unwrap();
        page.slot(2).store(1, Ordering::Release);
        assert_eq!(scan(&page), [(0x1008, 1)]);
        page.queue_began(0x1008);
        assert_eq!(scan(&page), []);
        page.slot(2).store(1, Ordering::Release);
        assert_eq!(scan(&page), [(0x1008, 1)]);
    }

    #[test]
    fn values_that_came_by_message_are_not_passed_on_again() {
        let page = DoorbellPage::new(0x2000).unwrap();
        page.note(0x1000, 3);
        assert_eq!(page.load(0x1000), 3);
        assert_eq!(scan(&page), []);
        page.note(0x9000, 3); // beyond the page
    }

    #[test]
    fn file_cannot_shrink_under_the_mapping() {
        let page = DoorbellPage::new(0x2000).unwrap();
        let fd = page.fd().try_clone_to_owned().unwrap();
        assert!(ftruncate(&fd, 0).is_err());
    }
}
