//! A synthetic load on raw devices.
//!
//! Owns: [`Load`] (what), [`RunningLoad`] (a load in progress) and [`Measured`] (the outcome). Each core gets a thread
//! that polls one queue of every device, without reactors or tasks in between: what is measured is the driver and the
//! device. Counting begins when the warm-up is over and ends when the time is up; each thread divides by the time that it
//! measured itself, so that a load that is ended early gives true rates.
//!
//! Invariants:
//! - every thread reports, whatever fails: a queue that meets [`QUEUE_ERROR_LIMIT`] errors, or a failed device, is given up;
//! - no thread begins before all are ready.
//!
//! Excludes: how the figures are shown; the loop itself (`worker`).

use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use hdrhistogram::Histogram;
use nvme::{Controller, QueueError};

use worker::{Part, QueueOutcome, Worker};

mod verify;
mod worker;

pub use verify::Wrong;

/// Latencies are kept up to this; later ones count as this.
const LATENCY_LIMIT_NS: u64 = 60_000_000_000;

/// Significant decimal digits of latencies.
const LATENCY_DIGITS: u8 = 3;

/// Errors after which a queue is given up.
pub const QUEUE_ERROR_LIMIT: u64 = 1000;

/// Where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Anywhere on the device, aligned to the request's size.
    Random,
    /// One after the other; each queue begins at its own part of the device.
    Sequential,
}

/// Whether the time of each request is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Latency {
    /// One clock read for each batch of completions.
    Record,
    /// A look at the clock now and then.
    Ignore,
}

/// What is on the device when a load begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precondition {
    /// Whatever is there.
    Nothing,
    /// Everything was written once: a device need not look up what was never written, and may be quicker then.
    Written,
}

/// Whether data is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Whatever is there will do.
    Off,
    /// Each block is written with contents of its own. Reads of what was written are checked, and at the end everything that was written
    /// is read back. Takes a bit of memory for each place on the device and queue.
    On,
}

/// What a load does.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where requests go.
    pub pattern: Pattern,
    /// Share of reads, 0 to 100.
    pub read_percent: u8,
    /// Bytes of a request: a multiple of the device's block size.
    pub block_bytes: u64,
    /// Requests in flight on each queue.
    pub depth: u32,
    /// How long to measure.
    pub runtime: Duration,
    /// How long to run before that.
    pub warmup: Duration,
    /// Whether latencies are wanted.
    pub latency: Latency,
    /// Seed of the places that a random load goes to, and of the data written.
    pub seed: u64,
    /// Whether data is checked.
    pub verify: Verify,
    /// What is done before the time begins.
    pub precondition: Precondition,
}

/// What came out.
pub struct Measured {
    /// By device, in the order given.
    pub devices: Vec<DeviceFigures>,
    /// The longest time that a thread measured.
    pub elapsed: Duration,
}

/// What came out on one device.
#[derive(Clone)]
pub struct DeviceFigures {
    /// Its name.
    pub device: String,
    /// Reads that succeeded.
    pub read: Figures,
    /// Writes that succeeded.
    pub write: Figures,
    /// Requests that failed, warm-up included.
    pub errors: u64,
    /// What the first of them failed with.
    pub first_error: Option<String>,
    /// Requests whose data was checked.
    pub checked: u64,
    /// Requests of these whose data was wrong.
    pub wrong: u64,
    /// What was wrong with the first of them.
    pub first_wrong: Option<Wrong>,
}

/// Requests of one kind.
#[derive(Clone)]
pub struct Figures {
    /// How many in the measured time.
    pub requests: u64,
    /// How many per second.
    pub iops: f64,
    /// Latencies in nanoseconds; empty if they were not recorded.
    pub latency: Histogram<u64>,
}

impl Figures {
    fn new() -> Self {
        Self { requests: 0, iops: 0.0, latency: new_histogram() }
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.iops += other.iops;
        merge(&mut self.latency, &other.latency);
    }
}

impl DeviceFigures {
    fn new(device: String) -> Self {
        Self {
            device,
            read: Figures::new(),
            write: Figures::new(),
            errors: 0,
            first_error: None,
            checked: 0,
            wrong: 0,
            first_wrong: None,
        }
    }

    /// Reads and writes together.
    pub fn both(&self) -> Figures {
        let mut sum = self.read.clone();
        sum.add(&self.write);
        sum
    }

    fn add(&mut self, other: &Self) {
        self.read.add(&other.read);
        self.write.add(&other.write);
        self.errors += other.errors;
        self.first_error = self.first_error.take().or_else(|| other.first_error.clone());
        self.checked += other.checked;
        self.wrong += other.wrong;
        self.first_wrong = self.first_wrong.take().or_else(|| other.first_wrong.clone());
    }
}

impl Measured {
    /// All devices together, under the name of the first.
    pub fn total(&self) -> DeviceFigures {
        let name = self.devices.first().map_or_else(String::new, |first| first.device.clone());
        let mut sum = DeviceFigures::new(name);
        for device in &self.devices {
            sum.add(device);
        }
        sum
    }
}

/// Why a load cannot run.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Requests must be multiples of the device's blocks.
    #[error("requests of {request} bytes do not fit the blocks of {block} bytes of {device}")]
    Unaligned {
        /// The device.
        device: String,
        /// Bytes of a request.
        request: u64,
        /// Bytes of a block.
        block: u32,
    },
    /// The device is smaller than a request.
    #[error("{device} has {size} bytes, less than a request of {request}")]
    TooSmall {
        /// The device.
        device: String,
        /// Its bytes.
        size: u64,
        /// Bytes of a request.
        request: u64,
    },
    /// There is not enough DMA memory.
    #[error(
        "{depth} buffers of {request} bytes do not fit the {pool} bytes of DMA memory of a queue of {device}"
    )]
    NoBuffers {
        /// The device.
        device: String,
        /// Buffers wanted.
        depth: u32,
        /// Bytes of each.
        request: u64,
        /// Bytes there are.
        pool: usize,
    },
    /// A queue could not be created.
    #[error("no queue for core {core}: {error}")]
    Queue {
        /// The core.
        core: usize,
        /// Why.
        error: QueueError,
    },
    /// A thread could not be started.
    #[error("cannot start a thread for core {core}: {error}")]
    Thread {
        /// The core.
        core: usize,
        /// The system's word.
        error: std::io::Error,
    },
    /// A thread ended without a report.
    #[error("the thread of core {0} ended without a report")]
    Lost(usize),
}

/// A load in progress.
pub struct RunningLoad {
    threads: Vec<Thread>,
    stop: Arc<AtomicBool>,
    devices: Vec<String>,
}

struct Thread {
    core: usize,
    progress: Arc<Progress>,
    handle: JoinHandle<Vec<QueueOutcome>>,
}

/// What a thread tells while it runs.
struct Progress {
    requests: AtomicU64,
    /// Latencies since the last look at them.
    recent: Mutex<Histogram<u64>>,
}

impl RunningLoad {
    /// Starts `load` on every one of `devices`, from a thread on each of `cores`.
    ///
    /// # Errors
    /// A thread or a queue could not be made, or the load does not fit a device.
    pub fn start(devices: &[Arc<Controller>], cores: &[usize], load: &Load) -> Result<Self, LoadError> {
        let stop = Arc::new(AtomicBool::new(false));
        let verify_key = std::hash::RandomState::new().build_hasher().finish();
        let (ready, all_ready) = mpsc::channel();
        let mut begin: Vec<Sender<()>> = Vec::new();
        let mut threads = Vec::new();
        for (index, core) in cores.iter().copied().enumerate() {
            let progress =
                Arc::new(Progress { requests: AtomicU64::new(0), recent: Mutex::new(new_histogram()) });
            let (begin_here, may_begin) = mpsc::channel();
            let plan = worker::Plan {
                core,
                part: Part { index: index as u64, of: cores.len() as u64 },
                devices: devices.to_vec(),
                load: load.clone(),
                verify_key,
                stop: stop.clone(),
                progress: progress.clone(),
            };
            let ready = ready.clone();
            let handle = std::thread::Builder::new()
                .name(format!("perf-{core}"))
                .spawn(move || {
                    let made = Worker::new(plan);
                    let (worker, outcome) = match made {
                        Ok(mut worker) => {
                            worker.precondition();
                            (Some(worker), Ok(()))
                        }
                        Err(error) => (None, Err(error)),
                    };
                    // Whoever started the load may have given up; then nobody says begin.
                    let _unheard = ready.send(outcome);
                    match (worker, may_begin.recv()) {
                        (Some(worker), Ok(())) => worker.run(),
                        _ => Vec::new(),
                    }
                })
                .map_err(|error| LoadError::Thread { core, error })?;
            begin.push(begin_here);
            threads.push(Thread { core, progress, handle });
        }
        drop(ready);
        for _ in cores {
            all_ready.recv().map_err(|_| LoadError::Lost(cores[0]))??;
        }
        for begin in begin {
            // A thread that is gone is noticed when it is joined.
            let _gone = begin.send(());
        }
        let devices = devices.iter().map(|device| device.name().to_owned()).collect();
        Ok(Self { threads, stop, devices })
    }

    /// Requests done so far, warm-up included. Lags behind by a fraction of a second.
    pub fn requests(&self) -> u64 {
        // Figures, ordered with nothing.
        self.threads.iter().map(|thread| thread.progress.requests.load(Ordering::Relaxed)).sum()
    }

    /// Latencies since the last call.
    pub fn recent_latency(&self) -> Histogram<u64> {
        let mut recent = new_histogram();
        for thread in &self.threads {
            let mut theirs = thread.progress.recent.lock().unwrap_or_else(PoisonError::into_inner);
            merge(&mut recent, &theirs);
            theirs.reset();
        }
        recent
    }

    /// Whether every thread has ended, be it early.
    pub fn is_finished(&self) -> bool {
        self.threads.iter().all(|thread| thread.handle.is_finished())
    }

    /// Asks the threads to end before their time.
    pub fn end_early(&self) {
        // A hint that is looked at again and again; ordered with nothing.
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Waits for all threads and adds up what they measured.
    ///
    /// # Errors
    /// A thread did not report.
    pub fn finish(self) -> Result<Measured, LoadError> {
        let mut devices: Vec<DeviceFigures> = self.devices.into_iter().map(DeviceFigures::new).collect();
        let mut elapsed = Duration::ZERO;
        for thread in self.threads {
            let outcomes = thread.handle.join().map_err(|_| LoadError::Lost(thread.core))?;
            for outcome in outcomes {
                elapsed = elapsed.max(outcome.elapsed);
                devices[outcome.device].add(&outcome.figures);
            }
        }
        Ok(Measured { devices, elapsed })
    }
}

fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_LIMIT_NS, LATENCY_DIGITS)
        .expect("the bounds are constants that work")
}

fn merge(into: &mut Histogram<u64>, from: &Histogram<u64>) {
    into.add(from).expect("all histograms have the same bounds");
}

#[cfg(test)]
mod tests;
