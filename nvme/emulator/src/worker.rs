//! The controller's own threads.
//!
//! Thread `i` of `n` serves the queues `i`, `i + n`, …; thread 0 also carries out the handshake. A thread that finds
//! nothing looks on for a while, then announces that it sleeps, looks once more, and parks: until it is woken, or until
//! shortly before something that waits is due, which it then spins for.
//!
//! Memory ordering: `asleep` and the doorbells form a store-load pair on both sides, each with a sequentially consistent
//! fence in between: either the sleeper sees the doorbell, or the ringer sees the sleeper and wakes it.
//!
//! Excludes: what is executed (`controller`).

use std::hint::spin_loop;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::controller::Core;

/// Spins between two looks at the clock and the queues.
const SPINS_PER_LOOK: u32 = 32;

/// How long before something is due a thread stays or is awake: more than the scheduler takes to wake it.
const SPIN_AHEAD: Duration = Duration::from_micros(100);

#[derive(Debug, Default)]
#[repr(align(128))]
struct Worker {
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

/// What the threads and those who wake them share.
#[derive(Debug)]
pub(crate) struct WorkerSet {
    workers: Box<[Worker]>,
    /// CC was written and thread 0 has not looked yet.
    handshake: AtomicBool,
    stopping: AtomicBool,
}

impl WorkerSet {
    pub(crate) fn new(count: usize) -> Self {
        Self {
            workers: (0..count).map(|_| Worker::default()).collect(),
            handshake: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        }
    }

    /// Wakes the thread that serves queue `qid`, if it sleeps.
    #[inline]
    pub(crate) fn wake_for(&self, qid: u16) {
        self.wake(usize::from(qid) % self.workers.len());
    }

    pub(crate) fn request_handshake(&self) {
        self.handshake.store(true, Ordering::Release);
        self.wake(0);
    }

    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        for index in 0..self.workers.len() {
            self.wake(index);
        }
    }

    #[inline]
    fn wake(&self, index: usize) {
        // See the module's *Memory ordering*.
        fence(Ordering::SeqCst);
        let worker = &self.workers[index];
        if worker.asleep.load(Ordering::Relaxed)
            && worker.asleep.swap(false, Ordering::AcqRel)
            && let Some(thread) = worker.thread.get()
        {
            thread.unpark();
        }
    }
}

/// Starts thread `index`.
pub(crate) fn spawn(core: &Arc<Core>, index: usize, spin: Duration) -> io::Result<JoinHandle<()>> {
    let core = Arc::clone(core);
    thread::Builder::new().name(format!("nvme-emu-{index}")).spawn(move || run(&core, index, spin))
}

fn run(core: &Core, index: usize, spin: Duration) {
    let set = &core.workers;
    let me = &set.workers[index];
    // Set before the first sleep, which is the only thing anyone needs it for.
    me.thread.get_or_init(thread::current);
    let step = set.workers.len();
    let mut idle_since: Option<Instant> = None;
    while !set.stopping.load(Ordering::Acquire) {
        let mut busy = false;
        if index == 0 && set.handshake.swap(false, Ordering::AcqRel) {
            core.apply_cc();
            busy = true;
        }
        busy |= core.round(index, step) > 0;
        if busy {
            idle_since = None;
        } else if idle_since.get_or_insert_with(Instant::now).elapsed() < spin
            || time_to_next(core, index, step).is_some_and(|time| time.is_zero())
        {
            (0..SPINS_PER_LOOK).for_each(|_| spin_loop());
        } else {
            sleep(core, index, step);
            idle_since = None;
        }
    }
}

/// Time that a thread can sleep before something that waits in its queues is due; `None` if nothing is.
fn time_to_next(core: &Core, index: usize, step: usize) -> Option<Duration> {
    let due = core.next_due_ns(index, step)?;
    Some(Duration::from_nanos(due.saturating_sub(core.now_ns())).saturating_sub(SPIN_AHEAD))
}

fn sleep(core: &Core, index: usize, step: usize) {
    let set = &core.workers;
    let me = &set.workers[index];
    me.asleep.store(true, Ordering::Relaxed);
    // See the module's *Memory ordering*.
    fence(Ordering::SeqCst);
    core.arm_shadows(index, step);
    let wanted = set.stopping.load(Ordering::Acquire)
        || (index == 0 && set.handshake.load(Ordering::Acquire))
        || core.has_work(index, step);
    if !wanted {
        // Either may return early; the caller looks again anyway.
        match time_to_next(core, index, step) {
            Some(time) => thread::park_timeout(time),
            None => thread::park(),
        }
    }
    me.asleep.store(false, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use nvme_spec::registers::{self, Aqa, Cc};

    use super::*;
    use crate::config::{ControllerConfig, Mode, ThreadOptions};

    /// Longer than any sleep that is not for ever.
    const DEADLINE: Duration = Duration::from_secs(60);

    /// An enabled controller for two threads, none of which was started.
    fn core_without_threads() -> Arc<Core> {
        let mode = Mode::Threaded(ThreadOptions { workers: 2, ..ThreadOptions::default() });
        let core = Core::new(ControllerConfig { mode, ..ControllerConfig::default() }).unwrap();
        let memory = core.dma.map(8192).unwrap();
        core.registers.aqa.store(Aqa::new().with_asqs_z(15).with_acqs_z(15).into(), Ordering::Release);
        core.registers.asq.store(memory.iova(), Ordering::Release);
        core.registers.acq.store(memory.iova() + 4096, Ordering::Release);
        core.write_cc(Cc::new().with_en(true).into());
        core.apply_cc();
        assert!(core.workers.handshake.swap(false, Ordering::AcqRel) && core.is_ready());
        std::mem::forget(memory); // stays mapped as long as the process
        Arc::new(core)
    }

    /// Whether thread `index` would go to sleep now, for ever as far as this test can tell.
    fn returns_from_sleep(core: &Arc<Core>, index: usize) -> bool {
        let (done, returned) = mpsc::channel();
        let core = Arc::clone(core);
        thread::spawn(move || {
            sleep(&core, index, 2);
            let _ = done.send(());
        });
        returned.recv_timeout(DEADLINE).is_ok()
    }

    /// What was announced between the last look and `asleep` must be seen by the second look.
    #[test]
    fn thread_that_has_something_to_do_does_not_sleep() {
        let core = core_without_threads();
        core.doorbell(registers::DOORBELL_BASE, 1);
        assert!(returns_from_sleep(&core, 0), "doorbell missed");
        let core = core_without_threads();
        core.workers.request_handshake();
        assert!(returns_from_sleep(&core, 0), "write to CC missed");
        let core = core_without_threads();
        core.workers.stop();
        assert!(returns_from_sleep(&core, 0) && returns_from_sleep(&core, 1), "stop missed");
    }
}
