//! A synthetic load on a raw device.
//!
//! Owns: [`Load`] (what), [`RunningLoad`] (a load in progress on every reactor of a runtime) and [`Measured`] (the
//! outcome). Each reactor runs as many tasks as requests shall be in flight; a task has one buffer and does one
//! request after the other. Requests that begin before the warm-up is over are not counted, nor those that end after
//! the runtime.
//!
//! Invariant: every reactor reports, whatever fails: a task that meets `TASK_ERROR_LIMIT` errors gives up.
//!
//! Excludes: how the figures are shown.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use reactor::block::{Durability, IoError, Lba};
use reactor::{
    Context, DmaBuffer, Instant, OneshotReceiver, OneshotSender, ReactorHandle, ReactorId, oneshot,
};

/// Latencies are kept up to this; later ones count as this.
const LATENCY_LIMIT_NS: u64 = 60_000_000_000;

/// Significant decimal digits of latencies.
const LATENCY_DIGITS: u8 = 3;

/// Errors after which a task gives up.
const TASK_ERROR_LIMIT: u64 = 100;

/// Where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Anywhere on the device, aligned to the request's size.
    Random,
    /// One after the other; each reactor begins at its own part of the device.
    Sequential,
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
    /// Requests in flight on each reactor.
    pub depth: u32,
    /// How long to measure.
    pub runtime: Duration,
    /// How long to run before that.
    pub warmup: Duration,
}

/// What came out.
pub struct Measured {
    /// Requests that succeeded in the measured time.
    pub requests: u64,
    /// Requests that failed.
    pub errors: u64,
    /// What the first of them failed with.
    pub first_error: Option<String>,
    /// Latencies in nanoseconds.
    pub latency: Histogram<u64>,
    runtime: Duration,
    block_bytes: u64,
}

impl Measured {
    /// Requests per second.
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.runtime.as_secs_f64()
    }

    /// Bytes per second.
    pub fn bandwidth(&self) -> f64 {
        self.iops() * self.block_bytes as f64
    }
}

/// Why a load cannot run.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Requests must be multiples of the device's blocks.
    #[error("requests of {request} bytes do not fit blocks of {block} bytes")]
    Unaligned {
        /// Bytes of a request.
        request: u64,
        /// Bytes of a block.
        block: u32,
    },
    /// The device is smaller than a request.
    #[error("the device has {device} bytes, less than a request of {request}")]
    TooSmall {
        /// Bytes of the device.
        device: u64,
        /// Bytes of a request.
        request: u64,
    },
    /// There is not enough DMA memory.
    #[error("{depth} buffers of {request} bytes do not fit the queue's {pool} bytes of DMA memory")]
    NoBuffers {
        /// Buffers wanted.
        depth: u32,
        /// Bytes of each.
        request: u64,
        /// Bytes there are.
        pool: usize,
    },
    /// The reactor was built without a device.
    #[error("{0} has no device")]
    NoDevice(ReactorId),
    /// A reactor ended or takes no more tasks.
    #[error("{0} does not run tasks")]
    ReactorEnded(ReactorId),
}

/// A load in progress.
pub struct RunningLoad {
    parts: Vec<RunningPart>,
    load: Load,
}

struct RunningPart {
    reactor: ReactorId,
    progress: Arc<Progress>,
    outcome: OneshotReceiver<Result<Outcome, LoadError>>,
}

#[derive(Default)]
struct Progress {
    requests: AtomicU64,
    finished: AtomicBool,
}

/// What one reactor measured.
struct Outcome {
    latency: Histogram<u64>,
    requests: u64,
    errors: u64,
    first_error: Option<IoError>,
}

impl RunningLoad {
    /// Starts `load` on every one of `reactors`.
    ///
    /// # Errors
    /// A reactor takes no tasks.
    pub fn start(reactors: &[ReactorHandle], load: &Load) -> Result<Self, LoadError> {
        let mut parts = Vec::new();
        for (index, handle) in reactors.iter().enumerate() {
            let (sender, outcome) = oneshot();
            let progress = Arc::new(Progress::default());
            let (load, own) = (load.clone(), progress.clone());
            let part = Part { index: index as u64, of: reactors.len() as u64 };
            handle
                .spawn_with(move |ctx| Job::start(&ctx, load, part, own, sender))
                .map_err(|_| LoadError::ReactorEnded(handle.id()))?;
            parts.push(RunningPart { reactor: handle.id(), progress, outcome });
        }
        Ok(Self { parts, load: load.clone() })
    }

    /// Requests done so far, warm-up included.
    pub fn requests(&self) -> u64 {
        // Figures, ordered with nothing.
        self.parts.iter().map(|part| part.progress.requests.load(Ordering::Relaxed)).sum()
    }

    /// Whether every reactor has nothing left to do, be it early.
    pub fn is_finished(&self) -> bool {
        // A hint; the outcome comes through its channel.
        self.parts.iter().all(|part| part.progress.finished.load(Ordering::Relaxed))
    }

    /// Waits for all reactors and adds up what they measured.
    ///
    /// # Errors
    /// A reactor could not run the load.
    pub fn finish(self) -> Result<Measured, LoadError> {
        let mut all = Measured {
            requests: 0,
            errors: 0,
            first_error: None,
            latency: new_histogram(),
            runtime: self.load.runtime,
            block_bytes: self.load.block_bytes,
        };
        for part in self.parts {
            let ended = |_canceled| LoadError::ReactorEnded(part.reactor);
            let outcome = part.outcome.recv_blocking().map_err(ended)??;
            all.requests += outcome.requests;
            all.errors += outcome.errors;
            all.first_error = all.first_error.or(outcome.first_error.map(|error| error.to_string()));
            all.latency.add(outcome.latency).expect("all histograms have the same bounds");
        }
        Ok(all)
    }
}

/// Which part of the device is a reactor's own, for sequential loads.
#[derive(Clone, Copy)]
struct Part {
    index: u64,
    of: u64,
}

/// The load of one reactor.
struct Job {
    ctx: Context,
    load: Load,
    /// Requests' places on the device, and blocks of each.
    places: u64,
    blocks_per_request: u64,
    next: Cell<u64>,
    measure_from: Instant,
    end: Instant,
    outcome: RefCell<Outcome>,
    running: Cell<u32>,
    report: RefCell<Option<OneshotSender<Result<Outcome, LoadError>>>>,
    progress: Arc<Progress>,
}

impl Job {
    fn start(
        ctx: &Context,
        load: Load,
        part: Part,
        progress: Arc<Progress>,
        report: OneshotSender<Result<Outcome, LoadError>>,
    ) {
        match Self::prepare(ctx, load, part, progress) {
            // Whoever started the load may have given up.
            Err(error) => drop(report.send(Err(error))),
            Ok((job, buffers)) => {
                *job.report.borrow_mut() = Some(report);
                for buffer in buffers {
                    let task = job.clone();
                    if ctx.spawn(async move { task.run(buffer).await }).is_err() {
                        job.leave();
                    }
                }
            }
        }
    }

    fn prepare(
        ctx: &Context,
        load: Load,
        part: Part,
        progress: Arc<Progress>,
    ) -> Result<(Rc<Self>, Vec<DmaBuffer>), LoadError> {
        let disk = ctx.try_disk().ok_or(LoadError::NoDevice(ctx.reactor()))?;
        let geometry = disk.geometry();
        let (request, block) = (load.block_bytes, geometry.lba_size);
        if !request.is_multiple_of(u64::from(block)) {
            return Err(LoadError::Unaligned { request, block });
        }
        let places = geometry.size_bytes() / request;
        if places == 0 {
            return Err(LoadError::TooSmall { device: geometry.size_bytes(), request });
        }
        let bytes = usize::try_from(request).unwrap_or(usize::MAX);
        let buffers: Option<Vec<DmaBuffer>> = (0..load.depth)
            .map(|_| {
                let mut buffer = disk.pool().try_alloc(bytes)?;
                let noise: Vec<u8> = (0..bytes / 8).flat_map(|_| ctx.random().to_le_bytes()).collect();
                buffer.write_at(0, &noise);
                Some(buffer)
            })
            .collect();
        let depth = load.depth;
        let pool = disk.pool().capacity();
        let buffers = buffers.ok_or(LoadError::NoBuffers { depth, request, pool })?;
        let measure_from = ctx.now() + load.warmup;
        let job = Self {
            ctx: ctx.clone(),
            places,
            blocks_per_request: request / u64::from(block),
            next: Cell::new(places / part.of * part.index),
            measure_from,
            end: measure_from + load.runtime,
            outcome: RefCell::new(Outcome {
                latency: new_histogram(),
                requests: 0,
                errors: 0,
                first_error: None,
            }),
            running: Cell::new(load.depth),
            report: RefCell::new(None),
            progress,
            load,
        };
        Ok((Rc::new(job), buffers))
    }

    async fn run(&self, mut buffer: DmaBuffer) {
        let disk = self.ctx.disk().clone();
        let mut errors = 0;
        let mut started = self.ctx.now();
        while started < self.end && errors < TASK_ERROR_LIMIT {
            let lba = self.place();
            let result;
            (result, buffer) = if self.reads_next() {
                disk.read(lba, buffer).await
            } else {
                disk.write(lba, buffer, Durability::Cached).await
            };
            let ended = self.ctx.now();
            errors += u64::from(result.is_err());
            self.note(started, ended, result);
            started = ended;
        }
        self.leave();
    }

    fn place(&self) -> Lba {
        let place = match self.load.pattern {
            // Multiply and shift instead of a division; the bias is below 2⁻³².
            Pattern::Random => ((u128::from(self.ctx.random()) * u128::from(self.places)) >> 64) as u64,
            Pattern::Sequential => {
                let place = self.next.get();
                self.next.set(if place + 1 == self.places { 0 } else { place + 1 });
                place
            }
        };
        Lba::new(place * self.blocks_per_request)
    }

    fn reads_next(&self) -> bool {
        match self.load.read_percent {
            0 => false,
            100 => true,
            percent => self.ctx.random() % 100 < u64::from(percent),
        }
    }

    fn note(&self, started: Instant, ended: Instant, result: Result<(), IoError>) {
        // This thread alone writes it, so a load and a store count.
        let requests = &self.progress.requests;
        requests.store(requests.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let mut outcome = self.outcome.borrow_mut();
        match result {
            Err(error) => {
                outcome.errors += 1;
                outcome.first_error.get_or_insert(error);
            }
            Ok(()) if started >= self.measure_from && ended <= self.end => {
                outcome.requests += 1;
                let nanos = u64::try_from((ended - started).as_nanos()).unwrap_or(u64::MAX);
                outcome.latency.saturating_record(nanos);
            }
            Ok(()) => {}
        }
    }

    /// One task fewer; the last one reports.
    fn leave(&self) {
        self.running.set(self.running.get() - 1);
        if self.running.get() > 0 {
            return;
        }
        self.progress.finished.store(true, Ordering::Relaxed);
        if let Some(report) = self.report.borrow_mut().take() {
            let empty = Outcome { latency: new_histogram(), requests: 0, errors: 0, first_error: None };
            // Whoever started the load may have given up.
            let _unheard = report.send(Ok(self.outcome.replace(empty)));
        }
    }
}

fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_LIMIT_NS, LATENCY_DIGITS)
        .expect("the bounds are constants that work")
}
