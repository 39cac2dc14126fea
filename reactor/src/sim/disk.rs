//! A disk in memory, with a volatile write cache that a power cut resolves one way or another.
//!
//! Invariants:
//! - an operation takes effect at one moment between submit and completion: when its completion is handed out;
//! - operations that are in flight together complete in any order (their latencies are drawn from the seed);
//! - a completed write that is neither flushed nor [`Durability::Durable`] is in the volatile cache: readers see it,
//!   a power cut may lose it, keep it or tear it at 512 bytes;
//! - a flush makes durable what had completed before the flush was submitted;
//! - a write in flight when the power goes may have happened, or not, or in part.
//!
//! *Legal crash outcomes*: the durable contents, plus any subset of the unflushed writes in the order of their
//! completion, then any subset of those in flight, each whole or in part by sector of 512 bytes.
//!
//! Excludes: timeouts and resets (the driver's emulated controller has them).

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::block::{
    BlockDevice, Completion, Durability, Geometry, IoError, Lba, LbaCount, LbaRange, OpTag, RejectReason,
    Rejected, Request,
};
use crate::clock::{Clock, Instant};
use crate::dma::{DmaBuffer, DmaPool, HeapRegion};
use crate::handle::ReactorId;
use crate::random::Random;

use super::DiskImage;
use super::failing::{self, Repeat, RequestKind};
use super::miswrite::{Miswrite, Plan};

/// What a [`SimDisk`] is like.
#[derive(Clone, Debug)]
pub struct SimDiskOptions {
    /// Bytes of a logical block.
    pub lba_size: u32,
    /// Logical blocks.
    pub blocks: u64,
    /// How long operations take; without a clock none takes any time.
    pub latency: RangeInclusive<Duration>,
    /// Operations each queue holds at once.
    pub queue_depth: u16,
    /// Whether completed writes may be lost until they are flushed.
    pub write_cache: bool,
    /// Bytes of each queue's buffer pool.
    pub pool_bytes: usize,
    /// Decides the latencies.
    pub seed: u64,
}

impl Default for SimDiskOptions {
    /// 64 MiB in blocks of 4 KiB behind a write cache, 10 to 100 µs away.
    fn default() -> Self {
        Self {
            lba_size: 4096,
            blocks: 16 * 1024,
            latency: Duration::from_micros(10)..=Duration::from_micros(100),
            queue_depth: 64,
            write_cache: true,
            pool_bytes: 16 << 20,
            seed: 0,
        }
    }
}

/// What becomes of the writes that were not durable when the power went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CutPolicy {
    /// All are lost.
    DropAll,
    /// All are kept, those in flight too.
    KeepAll,
    /// Each is lost or kept by chance.
    Random {
        /// Decides.
        seed: u64,
        /// Whether one may be kept in part.
        tearing: Tearing,
    },
    /// The `i`th of [`SimDisk::unsettled_writes`] is kept if the `i`th value says so; beyond the end, lost.
    Select(Vec<bool>),
}

/// Whether a write may be kept in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tearing {
    /// Whole or not at all.
    None,
    /// Any subset of its sectors of 512 bytes.
    Sectors,
    /// Any subset of its blocks of 4 KiB.
    Blocks,
}

impl Tearing {
    /// Bytes that are kept or lost together, if less than a write.
    fn unit(self) -> Option<usize> {
        match self {
            Self::None => None,
            Self::Sectors => Some(512),
            Self::Blocks => Some(4096),
        }
    }
}

/// A disk in memory. Clones are the same disk; each reactor drives a [queue](Self::queue) of its own.
#[derive(Clone)]
pub struct SimDisk {
    medium: Rc<RefCell<Medium>>,
}

/// What [`SimDisk::observe_writes`] calls.
type Observer = Rc<dyn Fn(&SimDisk)>;

struct Medium {
    options: SimDiskOptions,
    clock: Option<Arc<dyn Clock>>,
    random: Random,
    /// What readers see.
    current: DiskImage,
    /// What survives the loss of everything in the cache.
    durable: DiskImage,
    /// Completed and not durable, in order of completion.
    cached: VecDeque<CachedWrite>,
    queues: Vec<QueueState>,
    next_sequence: u64,
    writes: u64,
    flushes: u64,
    /// Writes that may still reach the medium.
    writes_left: Option<u64>,
    faults: Vec<(FaultKind, LbaRange)>,
    miswrite: Option<Plan>,
    failing: Option<failing::Plan>,
    observer: Option<Observer>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FaultKind {
    Read,
    Write,
}

struct CachedWrite {
    sequence: u64,
    offset: u64,
    data: Data,
}

enum Data {
    Bytes(Vec<u8>),
    Zeroes(u64),
}

#[derive(Default)]
struct QueueState {
    in_flight: BTreeMap<(Instant, u64), InFlight>,
    /// Set by a power cut: the queue belongs to a past life of the device.
    dead: bool,
}

struct InFlight {
    tag: OpTag,
    request: Request,
    /// Writes with a smaller sequence number had completed when this was submitted.
    horizon: u64,
}

impl SimDisk {
    /// A disk full of zeroes.
    pub fn new(options: SimDiskOptions) -> Self {
        let image = DiskImage::zeroed(options.blocks * u64::from(options.lba_size));
        Self::from_image(options, image)
    }

    /// A disk with the contents of `image`, all of it durable.
    ///
    /// # Panics
    /// If the image does not have the size that `options` say, or the block size is not a power of two ≥ 512.
    pub fn from_image(options: SimDiskOptions, image: DiskImage) -> Self {
        assert!(options.lba_size >= 512 && options.lba_size.is_power_of_two(), "invalid block size");
        assert_eq!(
            image.len(),
            options.blocks * u64::from(options.lba_size),
            "image and options differ in size"
        );
        let medium = Medium {
            random: Random::new(options.seed, 0),
            options,
            clock: None,
            current: image.clone(),
            durable: image,
            cached: VecDeque::new(),
            queues: Vec::new(),
            next_sequence: 0,
            writes: 0,
            flushes: 0,
            writes_left: None,
            faults: Vec::new(),
            miswrite: None,
            failing: None,
            observer: None,
        };
        Self { medium: Rc::new(RefCell::new(medium)) }
    }

    /// Lets operations take time, by `clock`. The simulator calls this for its disk.
    pub fn set_clock(&self, clock: Arc<dyn Clock>) {
        self.medium.borrow_mut().clock = Some(clock);
    }

    /// A queue of this disk with a buffer pool of its own.
    ///
    /// # Panics
    /// If the system has no memory for the pool.
    pub fn queue(&self, reactor: ReactorId) -> Box<dyn BlockDevice> {
        let mut medium = self.medium.borrow_mut();
        let options = &medium.options;
        let geometry = Geometry {
            lba_size: options.lba_size,
            lba_count: LbaCount::new(options.blocks),
            preferred_transfer: 128 << 10,
            volatile_write_cache: options.write_cache,
            deallocate: true,
            queue_depth: options.queue_depth,
            name: format!("sim:{}", reactor.get()),
        };
        let region = HeapRegion::new(options.pool_bytes).expect("memory for a simulated disk's buffers");
        medium.queues.push(QueueState::default());
        let index = medium.queues.len() - 1;
        Box::new(SimQueue { disk: self.clone(), index, geometry, pool: DmaPool::new(region) })
    }

    /// Cuts the power: decides what becomes of the unsettled writes, and fails everything in flight and everything
    /// that is asked of the present queues from now on. New queues find the disk with the power back. Lifts
    /// [`crash_after_writes`](Self::crash_after_writes).
    pub fn power_cut(&self, policy: &CutPolicy) {
        let mut medium = self.medium.borrow_mut();
        let image = medium.survivor(policy);
        medium.cached.clear();
        medium.current = image.clone();
        medium.durable = image;
        medium.writes_left = None;
        for queue in &mut medium.queues {
            queue.dead = true;
        }
    }

    /// What a [`power_cut`](Self::power_cut) at this moment would leave behind. Nothing changes.
    pub fn image_after_cut(&self, policy: &CutPolicy) -> DiskImage {
        self.medium.borrow().survivor(policy)
    }

    /// Calls `observer` after each write, zeroing or deallocation that has taken effect, before anybody is told of
    /// it: for looking at every moment at which the power could go. It replaces an observer set before.
    pub fn observe_writes(&self, observer: impl Fn(&SimDisk) + 'static) {
        self.medium.borrow_mut().observer = Some(Rc::new(observer));
    }

    /// Writes whose fate a power cut would decide now: the unflushed, in order of completion, then those in flight.
    pub fn unsettled_writes(&self) -> usize {
        let medium = self.medium.borrow();
        let lba_size = u64::from(medium.options.lba_size);
        let in_flight =
            medium.queues.iter().filter(|queue| !queue.dead).flat_map(|queue| queue.in_flight.values());
        medium.cached.len()
            + in_flight.filter(|operation| effect(&operation.request, lba_size).is_some()).count()
    }

    /// What a reader sees now: all completed writes, durable or not.
    pub fn image(&self) -> DiskImage {
        self.medium.borrow().current.clone()
    }

    /// What would be left if every unsettled write were lost.
    pub fn durable_image(&self) -> DiskImage {
        self.medium.borrow().durable.clone()
    }

    /// Writes, zeroings and deallocations that have completed.
    pub fn write_count(&self) -> u64 {
        self.medium.borrow().writes
    }

    /// Flushes done so far.
    pub fn flush_count(&self) -> u64 {
        self.medium.borrow().flushes
    }

    /// After `count` more writes the device fails: from then on nothing reaches the medium and everything is
    /// answered with [`IoError::DeviceFailed`]. To be followed by a [`power_cut`](Self::power_cut).
    pub fn crash_after_writes(&self, count: u64) {
        self.medium.borrow_mut().writes_left = Some(count);
    }

    /// Whether [`crash_after_writes`](Self::crash_after_writes) has struck.
    pub fn has_crashed(&self) -> bool {
        self.medium.borrow().writes_left == Some(0)
    }

    /// Reads that touch `range` fail with [`IoError::Medium`] until the faults are cleared.
    pub fn fail_reads(&self, range: LbaRange) {
        self.medium.borrow_mut().faults.push((FaultKind::Read, range));
    }

    /// Writes that touch `range` fail with [`IoError::Medium`], and change nothing, until the faults are cleared.
    pub fn fail_writes(&self, range: LbaRange) {
        self.medium.borrow_mut().faults.push((FaultKind::Write, range));
    }

    /// Lifts every fault set by [`fail_reads`](Self::fail_reads) and [`fail_writes`](Self::fail_writes).
    pub fn clear_faults(&self) {
        self.medium.borrow_mut().faults.clear();
    }

    /// After `after` more requests of a kind, the next one fails, or all that follow do, with a medium error.
    pub fn fail_request(&self, kind: RequestKind, after: u64, repeat: Repeat) {
        self.medium.borrow_mut().failing = Some(failing::Plan::new(kind, after, repeat));
    }

    /// Requests that failed since [`Self::fail_request`]; from now on none does.
    pub fn stop_failing(&self) -> u64 {
        self.medium.borrow_mut().failing.take().map_or(0, |plan| plan.refused())
    }

    /// After `after` more writes, zeroings or deallocations, one is acknowledged and goes wrong as `how` says.
    pub fn miswrite(&self, after: u64, how: Miswrite) {
        self.medium.borrow_mut().miswrite = Some(Plan::new(after, how));
    }

    /// Where the write that went wrong should have gone; `None` while none has.
    pub fn miswritten(&self) -> Option<LbaRange> {
        self.medium.borrow().miswrite.and_then(|plan| plan.met())
    }

    /// Inverts bit `bit % 8` of the byte at `offset`, for readers and for good.
    ///
    /// # Panics
    /// If the byte is not on the disk.
    pub fn flip_bit(&self, offset: u64, bit: u8) {
        let mut medium = self.medium.borrow_mut();
        medium.current.flip_bit(offset, bit);
        medium.durable.flip_bit(offset, bit);
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let medium = self.medium.borrow();
        f.debug_struct("SimDisk").field("options", &medium.options).field("writes", &medium.writes).finish()
    }
}

impl Data {
    fn store(&self, image: &mut DiskImage, offset: u64) {
        match self {
            Data::Bytes(bytes) => image.write(offset, bytes),
            Data::Zeroes(len) => image.zero(offset, *len),
        }
    }

    fn store_torn(&self, image: &mut DiskImage, offset: u64, unit: usize, decide: &Random) {
        match self {
            Data::Bytes(bytes) => {
                for (index, part) in bytes.chunks(unit).enumerate() {
                    if decide.below(2) == 0 {
                        image.write(offset + (index * unit) as u64, part);
                    }
                }
            }
            Data::Zeroes(len) => {
                let parts = len / unit as u64;
                // Large ranges are torn in two places rather than at every one.
                let (from, to) = (decide.below(parts + 1), decide.below(parts + 1));
                let (from, to) = (from.min(to) * unit as u64, from.max(to) * unit as u64);
                image.zero(offset + from, to - from);
            }
        }
    }
}

/// What a request would store, and where; `None` for those that store nothing.
fn effect(request: &Request, lba_size: u64) -> Option<(u64, Data)> {
    match request {
        Request::Write { lba, buffer, .. } => {
            let mut bytes = vec![0; buffer.len()];
            buffer.read_at(0, &mut bytes);
            Some((lba.get() * lba_size, Data::Bytes(bytes)))
        }
        Request::WriteZeroes(range) | Request::Deallocate(range) => {
            Some((range.start.get() * lba_size, Data::Zeroes(range.count.get() * lba_size)))
        }
        Request::Read { .. } | Request::Flush => None,
    }
}

fn shuffle<T>(items: &mut [T], random: &Random) {
    for last in (1..items.len()).rev() {
        items.swap(last, random.index(last + 1));
    }
}

impl Medium {
    /// What a power cut would leave behind.
    fn survivor(&self, policy: &CutPolicy) -> DiskImage {
        let lba_size = u64::from(self.options.lba_size);
        let mut in_flight: Vec<_> = self
            .queues
            .iter()
            .filter(|queue| !queue.dead)
            .flat_map(|queue| queue.in_flight.values())
            .filter_map(|operation| effect(&operation.request, lba_size))
            .collect();
        if let CutPolicy::Random { seed, .. } = policy {
            shuffle(&mut in_flight, &Random::new(*seed, 1));
        }
        let cached = self.cached.iter().map(|write| (write.offset, &write.data));
        let unsettled = cached.chain(in_flight.iter().map(|(offset, data)| (*offset, data)));
        let decide = Random::new(if let CutPolicy::Random { seed, .. } = policy { *seed } else { 0 }, 0);
        let mut image = self.durable.clone();
        for (index, (offset, data)) in unsettled.enumerate() {
            match policy {
                CutPolicy::DropAll => {}
                CutPolicy::KeepAll => data.store(&mut image, offset),
                CutPolicy::Select(kept) if kept.get(index) == Some(&true) => data.store(&mut image, offset),
                CutPolicy::Select(_) => {}
                CutPolicy::Random { tearing, .. } => match (decide.below(3), tearing.unit()) {
                    (0, _) => {}
                    (1, Some(unit)) => data.store_torn(&mut image, offset, unit, &decide),
                    _ => data.store(&mut image, offset),
                },
            }
        }
        image
    }

    fn now(&self) -> Instant {
        self.clock.as_ref().map_or(Instant::ZERO, |clock| clock.now())
    }

    fn latency(&self) -> Duration {
        let (low, high) = (*self.options.latency.start(), *self.options.latency.end());
        let span = u64::try_from(high.saturating_sub(low).as_nanos()).unwrap_or(u64::MAX - 1);
        low + Duration::from_nanos(self.random.below(span + 1))
    }

    /// The range of a request in bytes, checked.
    fn check(&self, request: &Request) -> Result<(), IoError> {
        let lba_size = self.options.lba_size;
        let (lba, bytes) = match request {
            Request::Flush => return Ok(()),
            Request::Read { lba, buffer } | Request::Write { lba, buffer, .. } => {
                (lba.get(), buffer.len() as u64)
            }
            Request::WriteZeroes(range) | Request::Deallocate(range) => {
                (range.start.get(), range.count.get().saturating_mul(u64::from(lba_size)))
            }
        };
        let end = lba.checked_add(bytes.div_ceil(u64::from(lba_size)));
        if bytes.is_multiple_of(u64::from(lba_size)) && end.is_some_and(|end| end <= self.options.blocks) {
            Ok(())
        } else {
            Err(IoError::InvalidRange { lba, bytes, lba_size })
        }
    }

    /// Lets an operation take effect.
    fn perform(&mut self, operation: &mut InFlight) -> Result<(), IoError> {
        if self.writes_left == Some(0) {
            return Err(power_lost());
        }
        if self.failing.as_mut().is_some_and(|plan| plan.refuses(&operation.request)) {
            let lba = match &operation.request {
                Request::Read { lba, .. } | Request::Write { lba, .. } => lba.get(),
                Request::WriteZeroes(range) | Request::Deallocate(range) => range.start.get(),
                Request::Flush => 0,
            };
            return Err(IoError::Medium { lba, detail: "injected".to_owned() });
        }
        let lba_size = u64::from(self.options.lba_size);
        match &mut operation.request {
            Request::Flush => {
                self.flushes += 1;
                self.settle_before(operation.horizon);
            }
            Request::Read { lba, buffer } => {
                self.check_faults(FaultKind::Read, *lba, buffer.len() as u64 / lba_size)?;
                let mut bytes = vec![0; buffer.len()];
                self.current.read(lba.get() * lba_size, &mut bytes);
                buffer.write_at(0, &bytes);
            }
            Request::Write { lba, buffer, .. } => {
                self.check_faults(FaultKind::Write, *lba, buffer.len() as u64 / lba_size)?;
                self.store(&operation.request);
            }
            Request::WriteZeroes(range) | Request::Deallocate(range) => {
                self.check_faults(FaultKind::Write, range.start, range.count.get())?;
                self.store(&operation.request);
            }
        }
        Ok(())
    }

    fn store(&mut self, request: &Request) {
        let Some((offset, data)) = effect(request, u64::from(self.options.lba_size)) else { return };
        self.writes += 1;
        if let Some(left) = &mut self.writes_left {
            *left -= 1;
        }
        let Some((offset, data)) = self.gone_wrong(offset, data) else { return };
        data.store(&mut self.current, offset);
        let durable = matches!(request, Request::Write { durability: Durability::Durable, .. });
        if durable || !self.options.write_cache {
            data.store(&mut self.durable, offset);
            self.forget_cached(offset, data.len());
        } else {
            self.cached.push_back(CachedWrite { sequence: self.next_sequence, offset, data });
            self.next_sequence += 1;
        }
    }

    /// What is stored, and where, of a write that is to be stored; all of it but for the one of a [`Plan`].
    fn gone_wrong(&mut self, offset: u64, data: Data) -> Option<(u64, Data)> {
        let lba_size = u64::from(self.options.lba_size);
        let (start, count) = (Lba::new(offset / lba_size), LbaCount::new(data.len() / lba_size));
        match self.miswrite.as_mut().and_then(|plan| plan.strike(start, count)) {
            None => Some((offset, data)),
            Some(Miswrite::Lost) => None,
            Some(Miswrite::Misdirected(to)) => {
                let to = to.get() * lba_size;
                (to + data.len() <= self.current.len()).then_some((to, data))
            }
            Some(Miswrite::Torn(sectors)) => {
                let kept = (sectors * 512).min(data.len());
                (kept > 0).then(|| (offset, data.part(0, kept)))
            }
            Some(Miswrite::Stale) => {
                data.store(&mut self.current, offset);
                None
            }
        }
    }

    /// A durable write supersedes what the cache holds for the same bytes: a power cut must not bring it back.
    fn forget_cached(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        let mut kept = VecDeque::with_capacity(self.cached.len());
        for write in self.cached.drain(..) {
            let write_end = write.offset + write.data.len();
            if write_end <= offset || write.offset >= end {
                kept.push_back(write);
                continue;
            }
            for (from, to) in [(write.offset, offset.min(write_end)), (end.max(write.offset), write_end)] {
                if from < to {
                    let data = write.data.part(from - write.offset, to - write.offset);
                    kept.push_back(CachedWrite { sequence: write.sequence, offset: from, data });
                }
            }
        }
        self.cached = kept;
    }

    fn settle_before(&mut self, horizon: u64) {
        while self.cached.front().is_some_and(|write| write.sequence < horizon) {
            if let Some(write) = self.cached.pop_front() {
                write.data.store(&mut self.durable, write.offset);
            }
        }
    }

    fn check_faults(&self, kind: FaultKind, lba: Lba, count: u64) -> Result<(), IoError> {
        let end = lba.get() + count;
        let hit = self.faults.iter().find(|(fault, range)| {
            let range_end = range.start.get().saturating_add(range.count.get());
            *fault == kind && range.start.get() < end && lba.get() < range_end
        });
        match hit {
            None => Ok(()),
            Some(_) => Err(IoError::Medium { lba: lba.get(), detail: "injected".to_owned() }),
        }
    }
}

impl Data {
    fn len(&self) -> u64 {
        match self {
            Data::Bytes(bytes) => bytes.len() as u64,
            Data::Zeroes(len) => *len,
        }
    }

    fn part(&self, from: u64, to: u64) -> Data {
        match self {
            Data::Bytes(bytes) => Data::Bytes(bytes[from as usize..to as usize].to_vec()),
            Data::Zeroes(_) => Data::Zeroes(to - from),
        }
    }
}

fn power_lost() -> IoError {
    IoError::DeviceFailed { detail: "power lost".to_owned() }
}

/// One reactor's queue of a [`SimDisk`].
struct SimQueue {
    disk: SimDisk,
    index: usize,
    geometry: Geometry,
    pool: DmaPool,
}

impl SimQueue {
    /// Takes out the next operation whose time has come and lets it take effect.
    fn finish_next(&mut self) -> Option<Completion> {
        let mut medium = self.disk.medium.borrow_mut();
        let now = medium.now();
        let timeless = medium.clock.is_none();
        let queue = &mut medium.queues[self.index];
        let dead = queue.dead;
        let entry = queue.in_flight.first_entry()?;
        if entry.key().0 > now && !dead && !timeless {
            return None;
        }
        let mut operation = entry.remove();
        let writes = medium.writes;
        let result = if dead { Err(power_lost()) } else { medium.perform(&mut operation) };
        let observer = medium.observer.clone().filter(|_| medium.writes > writes);
        drop(medium);
        if let Some(observe) = observer {
            observe(&self.disk);
        }
        let buffer: Option<DmaBuffer> = match operation.request {
            Request::Read { buffer, .. } | Request::Write { buffer, .. } => Some(buffer),
            Request::Flush | Request::WriteZeroes(_) | Request::Deallocate(_) => None,
        };
        Some(Completion { tag: operation.tag, result, buffer })
    }
}

impl BlockDevice for SimQueue {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn pool(&self) -> &DmaPool {
        &self.pool
    }

    fn submit(&mut self, tag: OpTag, request: Request) -> Result<(), Rejected> {
        let mut medium = self.disk.medium.borrow_mut();
        if medium.queues[self.index].dead {
            return Err(Rejected { request, reason: RejectReason::Error(power_lost()) });
        }
        if let Err(error) = medium.check(&request) {
            return Err(Rejected { request, reason: RejectReason::Error(error) });
        }
        if medium.queues[self.index].in_flight.len() >= usize::from(self.geometry.queue_depth) {
            return Err(Rejected { request, reason: RejectReason::QueueFull });
        }
        let due = medium.now().saturating_add(medium.latency());
        // Distinguishes operations that are due together; from the random stream, so that they come in any order.
        let tie = medium.random.next();
        let horizon = medium.next_sequence;
        let replaced =
            medium.queues[self.index].in_flight.insert((due, tie), InFlight { tag, request, horizon });
        assert!(replaced.is_none(), "two operations of one queue drew the same 64 random bits");
        Ok(())
    }

    fn ring(&mut self) {}

    fn process_completions(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize {
        for done in 0..budget {
            match self.finish_next() {
                Some(completion) => sink(completion),
                None => return done,
            }
        }
        budget
    }

    fn in_flight(&self) -> usize {
        self.disk.medium.borrow().queues[self.index].in_flight.len()
    }

    fn interrupt(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn arm_interrupt(&mut self) -> bool {
        self.next_event().is_some_and(|event| event <= self.disk.medium.borrow().now())
    }

    fn next_event(&self) -> Option<Instant> {
        let medium = self.disk.medium.borrow();
        let queue = &medium.queues[self.index];
        let ((due, _), _) = queue.in_flight.first_key_value()?;
        Some(if queue.dead || medium.clock.is_none() { Instant::ZERO } else { *due })
    }
}

impl Drop for SimQueue {
    fn drop(&mut self) {
        // What is still in flight gives its buffers back to the pool, which lives as long as they do.
        let mut medium = self.disk.medium.borrow_mut();
        let operations = std::mem::take(&mut medium.queues[self.index].in_flight);
        drop(medium);
        drop(operations);
    }
}

#[cfg(test)]
mod tests;
