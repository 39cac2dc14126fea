//! One core's part of a load: a thread that polls one queue of every device.
//!
//! Owns: [`Worker`], its `Lane`s (one for each device: queue, buffers, figures) and the loop.
//!
//! Invariants:
//! - a buffer is either idle or in flight under its slot's number;
//! - a round writes at most two doorbells for each queue, and reads the clock at most once for each queue: a request's time
//!   runs from the round that submitted it to the round that found it done.
//!
//! Excludes: adding up, and what is shown.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use nvme::{Controller, Interrupts, LatencyRecording, QueueOptions, QueuePair, Taking};
use reactor::block::{BlockDevice, Durability, IoError, Lba, OpTag, RejectReason, Rejected, Request};
use reactor::{Clock, CoreId, DmaBuffer, Instant, Random, SystemClock};

use super::verify::Verifier;
use super::{
    DeviceFigures, Figures, Latency, Load, LoadError, Pattern, Precondition, Progress, QUEUE_ERROR_LIMIT,
    Verify, Wrong, merge, new_histogram,
};

/// Completions taken from a queue in one round.
const BUDGET: usize = 256;

/// Rounds between two looks at the clock if latencies are not recorded, or nothing completes.
const ROUNDS_PER_LOOK: u32 = 16;

/// Rounds that found nothing, after which the thread lets others run: the device may need this core.
const EMPTY_ROUNDS_LIMIT: u32 = 4096;

/// Time between two reports of progress.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);

/// DMA memory for each byte of buffers: the pool hands out powers of two.
const POOL_SLACK: usize = 2;

/// Smallest pool.
const POOL_MINIMUM: usize = 2 << 20;

/// Which part of the whole a worker does; it sets apart the beginnings of sequential loads.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) index: u64,
    pub(super) of: u64,
}

/// What a worker is given.
pub(super) struct Plan {
    pub(super) core: usize,
    pub(super) part: Part,
    pub(super) devices: Vec<Arc<Controller>>,
    pub(super) load: Load,
    /// Sets this run's data apart from that of others.
    pub(super) verify_key: u64,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) progress: Arc<Progress>,
}

/// What one queue measured.
pub(super) struct QueueOutcome {
    pub(super) device: usize,
    pub(super) figures: DeviceFigures,
    pub(super) elapsed: Duration,
}

pub(super) struct Worker {
    load: Load,
    lanes: Vec<Lane>,
    clock: SystemClock,
    random: Random,
    stop: Arc<AtomicBool>,
    progress: Arc<Progress>,
    next_report: Instant,
    measuring: bool,
}

impl Worker {
    /// Pins the calling thread and makes its queues and buffers.
    pub(super) fn new(plan: Plan) -> Result<Self, LoadError> {
        let Plan { core, part, devices, load, verify_key, stop, progress } = plan;
        pin(core);
        let random = Random::new(load.seed, part.index);
        let lanes = devices
            .iter()
            .enumerate()
            .map(|(device, controller)| Lane::new(device, controller, core, part, &load, verify_key, &random))
            .collect::<Result<_, _>>()?;
        let clock = SystemClock::new();
        let next_report = clock.now();
        Ok(Self { load, lanes, clock, random, stop, progress, next_report, measuring: false })
    }

    pub(super) fn run(mut self) -> Vec<QueueOutcome> {
        let begun = self.clock.now();
        self.round(begun);
        let warm = self.until(begun + self.load.warmup);
        self.measuring = true;
        for lane in &mut self.lanes {
            lane.tally.restart();
        }
        let ended = self.until(warm + self.load.runtime);
        let elapsed = ended - warm;
        let mut outcomes: Vec<QueueOutcome> =
            self.lanes.iter_mut().map(|lane| lane.outcome(elapsed)).collect();
        self.drain();
        self.read_back();
        // Errors count until the last request is back.
        for (outcome, lane) in outcomes.iter_mut().zip(&mut self.lanes) {
            outcome.figures.errors = lane.tally.errors;
            (outcome.figures.checked, outcome.figures.wrong) = (lane.tally.checked, lane.tally.wrong);
            outcome.figures.first_wrong = lane.tally.first_wrong.take();
            outcome.figures.first_error = lane.tally.first_error.take().map(|error| error.to_string());
        }
        outcomes
    }

    /// Writes this core's part of every device once, if that is wanted.
    pub(super) fn precondition(&mut self) {
        if self.load.precondition == Precondition::Nothing {
            return;
        }
        // Relaxed: a hint.
        while !self.stop.load(Ordering::Relaxed) && self.lanes.iter().any(Lane::has_to_write_once) {
            for lane in &mut self.lanes {
                lane.submit_once();
                lane.poll(&self.clock, Latency::Ignore);
            }
        }
        self.drain();
    }

    /// Keeps the load going until `end`, or until there is a reason to end early; returns the time.
    fn until(&mut self, end: Instant) -> Instant {
        let mut now = self.clock.now();
        let mut rounds_left = ROUNDS_PER_LOOK;
        let mut empty_rounds = 0;
        // Relaxed: a hint.
        while now < end && !self.stop.load(Ordering::Relaxed) && self.lanes.iter().any(Lane::is_alive) {
            let (found, seen) = self.round(now);
            rounds_left -= 1;
            match seen {
                Some(seen) => now = seen,
                None if rounds_left == 0 => now = self.clock.now(),
                None => {}
            }
            if rounds_left == 0 {
                rounds_left = ROUNDS_PER_LOOK;
                self.report(now);
            }
            empty_rounds = if found > 0 { 0 } else { empty_rounds + 1 };
            if empty_rounds == EMPTY_ROUNDS_LIMIT {
                empty_rounds = 0;
                std::thread::yield_now();
            }
        }
        now
    }

    /// One round over all queues: what completed, and the time if it was taken.
    fn round(&mut self, now: Instant) -> (usize, Option<Instant>) {
        let mut all = 0;
        let mut seen = None;
        for lane in &mut self.lanes {
            let (found, at) = lane.poll(&self.clock, self.load.latency);
            all += found;
            seen = at.or(seen);
            lane.submit(&self.load, &self.random, seen.unwrap_or(now));
        }
        (all, seen)
    }

    fn report(&mut self, now: Instant) {
        if now < self.next_report {
            return;
        }
        self.next_report = now + REPORT_INTERVAL;
        let requests = self.lanes.iter().map(|lane| lane.queue.counters().read().completed).sum();
        self.progress.requests.store(requests, Ordering::Relaxed);
        let mut recent = self.progress.recent.lock().unwrap_or_else(PoisonError::into_inner);
        for lane in &mut self.lanes {
            for direction in [&mut lane.tally.read, &mut lane.tally.write] {
                merge(&mut recent, &direction.recent);
                direction.settle();
            }
        }
    }

    /// Checks everything that was written, if data is checked, until somebody has had enough.
    fn read_back(&mut self) {
        // Relaxed: a hint.
        while !self.stop.load(Ordering::Relaxed) && self.lanes.iter().any(Lane::has_to_read_back) {
            for lane in &mut self.lanes {
                lane.submit_read_back();
                lane.poll(&self.clock, Latency::Ignore);
            }
        }
        self.drain();
    }

    /// Waits for what is in flight; the driver bounds how long.
    fn drain(&mut self) {
        while self.lanes.iter().any(|lane| lane.queue.in_flight() > 0) {
            for lane in &mut self.lanes {
                lane.poll(&self.clock, Latency::Ignore);
            }
        }
    }
}

fn pin(core: usize) {
    if !CoreId::available().contains(&CoreId::new(core))
        || !core_affinity::set_for_current(core_affinity::CoreId { id: core })
    {
        tracing::warn!(core, "this process may not run on the core: its thread runs anywhere");
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Flight {
    started: Instant,
    direction: Direction,
    place: u64,
    check: Check,
}

/// Whether a request's data can be checked: it was written before the request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    Yes,
    No,
}

/// One queue.
struct Lane {
    device: usize,
    queue: QueuePair,
    /// Buffers that are not in flight, by slot.
    idle: Vec<(usize, DmaBuffer)>,
    flights: Vec<Flight>,
    /// Requests' places on the device, and blocks of each.
    places: u64,
    blocks_per_request: u64,
    next: u64,
    /// This core's part of the places; those that were not written before the time began.
    unwritten: Range<u64>,
    verifier: Option<Verifier>,
    /// Places before this one were read back.
    read_back: u64,
    tally: Tally,
}

impl Lane {
    fn new(
        device: usize,
        controller: &Arc<Controller>,
        core: usize,
        part: Part,
        load: &Load,
        verify_key: u64,
        random: &Random,
    ) -> Result<Self, LoadError> {
        let name = || controller.name().to_owned();
        let bytes = usize::try_from(load.block_bytes).unwrap_or(usize::MAX);
        let default = QueueOptions::default();
        let options = QueueOptions {
            depth: u16::try_from(load.depth).unwrap_or(u16::MAX),
            pool_bytes: bytes
                .saturating_mul(load.depth as usize)
                .saturating_mul(POOL_SLACK)
                .max(POOL_MINIMUM),
            max_transfer: default.max_transfer.max(bytes),
            interrupts: Interrupts::Disabled,
            latency: LatencyRecording::Off,
            taking: Taking::InRuns,
            ..default
        };
        let queue = controller.create_queue(&options).map_err(|error| LoadError::Queue { core, error })?;
        let geometry = queue.geometry();
        let (request, block, size) = (load.block_bytes, geometry.lba_size, geometry.size_bytes());
        if !request.is_multiple_of(u64::from(block)) {
            return Err(LoadError::Unaligned { device: name(), request, block });
        }
        let places = size / request;
        if places == 0 {
            return Err(LoadError::TooSmall { device: name(), size, request });
        }
        let idle: Option<Vec<_>> = (0..load.depth as usize)
            .map(|slot| {
                let mut buffer = queue.pool().try_alloc(bytes)?;
                let noise: Vec<u8> = (0..bytes / 8).flat_map(|_| random.next().to_le_bytes()).collect();
                buffer.write_at(0, &noise);
                Some((slot, buffer))
            })
            .collect();
        let (depth, pool) = (load.depth, queue.pool().capacity());
        let idle = idle.ok_or_else(|| LoadError::NoBuffers { device: name(), depth, request, pool })?;
        let flight =
            Flight { started: Instant::ZERO, direction: Direction::Read, place: 0, check: Check::No };
        let verifier = || Verifier::new(verify_key, block as usize, bytes, places);
        Ok(Self {
            device,
            flights: vec![flight; idle.len()],
            idle,
            places,
            blocks_per_request: request / u64::from(block),
            next: places / part.of * part.index,
            // The last part has what is left over.
            unwritten: places / part.of * part.index..if part.index + 1 == part.of {
                places
            } else {
                places / part.of * (part.index + 1)
            },
            verifier: (load.verify == Verify::On).then(verifier),
            read_back: 0,
            tally: Tally::new(),
            queue,
        })
    }

    fn is_alive(&self) -> bool {
        !self.tally.given_up || self.queue.in_flight() > 0
    }

    /// Takes what has completed: how much, and the time if it was taken.
    fn poll(&mut self, clock: &SystemClock, latency: Latency) -> (usize, Option<Instant>) {
        let Self { queue, idle, flights, tally, verifier, blocks_per_request, .. } = self;
        let mut now = None;
        let found = queue.process_completions(BUDGET, &mut |completion| {
            let slot = completion.tag.0 as usize;
            let flight = flights[slot];
            match completion.result {
                Err(error) => tally.fail(error),
                Ok(()) => {
                    let nanos = (latency == Latency::Record).then(|| {
                        let now = *now.get_or_insert_with(|| clock.now());
                        u64::try_from((now - flight.started).as_nanos()).unwrap_or(u64::MAX)
                    });
                    tally.of(flight.direction).note(nanos);
                    if let (Some(verifier), Some(buffer)) = (verifier.as_mut(), &completion.buffer) {
                        match (flight.direction, flight.check) {
                            (Direction::Write, _) => verifier.note_written(flight.place),
                            (Direction::Read, Check::No) => {}
                            (Direction::Read, Check::Yes) => {
                                tally.note_check(verifier.check(buffer, flight.place * *blocks_per_request));
                            }
                        }
                    }
                }
            }
            // A buffer that the device may write to for ever does not come back.
            if let Some(buffer) = completion.buffer {
                idle.push((slot, buffer));
            }
        });
        (found, now)
    }

    /// Submits what is idle, as far as the queue takes it, and tells the device once.
    fn submit(&mut self, load: &Load, random: &Random, now: Instant) {
        while !self.tally.given_up
            && let Some((slot, mut buffer)) = self.idle.pop()
        {
            let place = self.place(load.pattern, random);
            let lba = Lba::new(place * self.blocks_per_request);
            let direction = direction(load.read_percent, random);
            let mut check = Check::No;
            if let Some(verifier) = &mut self.verifier {
                match direction {
                    Direction::Write => verifier.fill(&mut buffer, lba.get()),
                    Direction::Read if verifier.is_written(place) => check = Check::Yes,
                    Direction::Read => {}
                }
            }
            let request = match direction {
                Direction::Read => Request::Read { lba, buffer },
                Direction::Write => Request::Write { lba, buffer, durability: Durability::Cached },
            };
            self.flights[slot] = Flight { started: now, direction, place, check };
            if let Err(rejected) = self.queue.submit(OpTag(slot as u64), request) {
                self.take_back(slot, rejected);
                break;
            }
        }
        self.queue.ring();
    }

    fn has_to_write_once(&self) -> bool {
        !self.tally.given_up && !self.unwritten.is_empty()
    }

    /// Writes places of the own part that were not written yet, as far as buffers and the queue go.
    fn submit_once(&mut self) {
        while self.has_to_write_once()
            && let Some((slot, mut buffer)) = self.idle.pop()
        {
            let place = self.unwritten.start;
            let lba = Lba::new(place * self.blocks_per_request);
            if let Some(verifier) = &mut self.verifier {
                verifier.fill(&mut buffer, lba.get());
            }
            let direction = Direction::Write;
            self.flights[slot] = Flight { started: Instant::ZERO, direction, place, check: Check::No };
            let request = Request::Write { lba, buffer, durability: Durability::Cached };
            if let Err(rejected) = self.queue.submit(OpTag(slot as u64), request) {
                self.take_back(slot, rejected);
                break;
            }
            self.unwritten.start += 1;
        }
        self.queue.ring();
    }

    fn has_to_read_back(&self) -> bool {
        let rest = self.verifier.as_ref().and_then(|verifier| verifier.next_written(self.read_back));
        !self.tally.given_up && rest.is_some()
    }

    /// Reads places that were written, as far as buffers and the queue go.
    fn submit_read_back(&mut self) {
        let Some(verifier) = &self.verifier else { return };
        while !self.tally.given_up
            && let Some(place) = verifier.next_written(self.read_back)
            && let Some((slot, mut buffer)) = self.idle.pop()
        {
            // What a read that transfers nothing leaves there is not what was written.
            buffer.fill(0, buffer.len(), 0);
            let lba = Lba::new(place * self.blocks_per_request);
            let direction = Direction::Read;
            self.flights[slot] = Flight { started: Instant::ZERO, direction, place, check: Check::Yes };
            if let Err(rejected) = self.queue.submit(OpTag(slot as u64), Request::Read { lba, buffer }) {
                self.take_back(slot, rejected);
                break;
            }
            self.read_back = place + 1;
        }
        self.queue.ring();
    }

    #[cold]
    fn take_back(&mut self, slot: usize, rejected: Rejected) {
        if let RejectReason::Error(error) = rejected.reason {
            self.tally.fail(error);
        }
        if let Request::Read { buffer, .. } | Request::Write { buffer, .. } = rejected.request {
            self.idle.push((slot, buffer));
        }
    }

    fn place(&mut self, pattern: Pattern, random: &Random) -> u64 {
        match pattern {
            Pattern::Random => random.below(self.places),
            Pattern::Sequential => {
                let place = self.next;
                self.next = if place + 1 == self.places { 0 } else { place + 1 };
                place
            }
        }
    }

    fn outcome(&mut self, elapsed: Duration) -> QueueOutcome {
        let figures = DeviceFigures {
            read: self.tally.read.figures(elapsed),
            write: self.tally.write.figures(elapsed),
            ..DeviceFigures::new(String::new())
        };
        QueueOutcome { device: self.device, figures, elapsed }
    }
}

fn direction(read_percent: u8, random: &Random) -> Direction {
    let read = match read_percent {
        0 => false,
        100 => true,
        percent => random.below(100) < u64::from(percent),
    };
    if read { Direction::Read } else { Direction::Write }
}

/// What a queue has done.
struct Tally {
    read: Count,
    write: Count,
    errors: u64,
    first_error: Option<IoError>,
    given_up: bool,
    checked: u64,
    wrong: u64,
    first_wrong: Option<Wrong>,
}

impl Tally {
    fn new() -> Self {
        Self {
            read: Count::new(),
            write: Count::new(),
            errors: 0,
            first_error: None,
            given_up: false,
            checked: 0,
            wrong: 0,
            first_wrong: None,
        }
    }

    fn of(&mut self, direction: Direction) -> &mut Count {
        match direction {
            Direction::Read => &mut self.read,
            Direction::Write => &mut self.write,
        }
    }

    #[cold]
    fn fail(&mut self, error: IoError) {
        self.errors += 1;
        self.given_up |= self.errors >= QUEUE_ERROR_LIMIT || matches!(error, IoError::DeviceFailed { .. });
        self.first_error.get_or_insert(error);
    }

    fn note_check(&mut self, outcome: Result<(), Wrong>) {
        self.checked += 1;
        if let Err(wrong) = outcome {
            self.wrong += 1;
            self.first_wrong.get_or_insert(wrong);
        }
    }

    /// Forgets what the warm-up did, but not its errors.
    fn restart(&mut self) {
        (self.read, self.write) = (Count::new(), Count::new());
    }
}

/// Requests in one direction. Latencies go to a histogram that is passed on with each report of progress.
struct Count {
    requests: u64,
    recent: Histogram<u64>,
    settled: Histogram<u64>,
}

impl Count {
    fn new() -> Self {
        Self { requests: 0, recent: new_histogram(), settled: new_histogram() }
    }

    fn note(&mut self, nanos: Option<u64>) {
        self.requests += 1;
        if let Some(nanos) = nanos {
            self.recent.saturating_record(nanos);
        }
    }

    fn settle(&mut self) {
        merge(&mut self.settled, &self.recent);
        self.recent.reset();
    }

    fn figures(&mut self, elapsed: Duration) -> Figures {
        self.settle();
        let iops = if elapsed.is_zero() { 0.0 } else { self.requests as f64 / elapsed.as_secs_f64() };
        let latency = std::mem::replace(&mut self.settled, new_histogram());
        Figures { requests: self.requests, iops, latency }
    }
}
