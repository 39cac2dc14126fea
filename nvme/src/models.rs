//! Models of the protocol between a queue and its device, checked with loom: the driver's own [`Queue`] on one thread, a device
//! that does what the specification allows on another, and every interleaving of the two, with every order in which one may
//! see the other's stores.
//!
//! Owns: the [`Bus`] between them, and what a model asserts. Each barrier is also taken away, to see that its model then fails.
//!
//! | model | must hold |
//! |---|---|
//! | submission | a device that sees the tail sees the entry |
//! | completion | a driver that sees the phase tag sees the rest of the entry |
//! | reuse | a device that was told of a completion overwrites its entry only after it was read |
//! | shadow | an entry is seen by a device that looks at its shadow tail, or the doorbell is rung |
//! | sleep | a completion is seen before the owner sleeps, or interrupts it |
//! | end | whoever sees that the controller is quiet sees everything that it did |
//!
//! Excludes: other pairs of threads, which are modelled beside their code: `sync.rs`, `lane.rs`, and the crate `reactor`.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use loom::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use loom::thread;
use nvme_spec::registers::{Cap, Doorbell, doorbell_offset};
use nvme_spec::{CQE_BYTES, CommandId, NamespaceId, QueueId, SQE_BYTES, SubmissionEntry};
use reactor::dma::{DeviceWord, DmaCells, DmaRegion, ModelledRegion, PAGE_SIZE};

use crate::fault::{Health, Life, LifeEvent};
use crate::planted::{Bug, assert_caught};
use crate::queue::{Queue, QueueShape};
use crate::shadow::ShadowMemory;
use crate::sync::publish_then_look;
use crate::transport::{Listen, Transport, TransportError};

/// Words of a region at most: more are never touched here, and each costs time.
const MOST_WORDS: usize = 64;

/// Registers and memory that driver and device share.
struct Bus {
    regions: Mutex<Vec<Arc<ModelledRegion>>>,
    tail: AtomicU32,
    head: AtomicU32,
    /// The interrupt is let through. What comes while it is not is lost, as [`Transport::listen`] allows.
    listening: AtomicU8,
}

impl Bus {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            regions: Mutex::default(),
            tail: AtomicU32::new(0),
            head: AtomicU32::new(0),
            listening: AtomicU8::new(0),
        })
    }

    /// The words of the region at `iova`, as the device reaches them.
    fn cells(&self, iova: u64) -> DmaCells {
        let regions = self.regions.lock().unwrap();
        let region = regions.iter().find(|region| region.iova() == iova).expect("an address of a region");
        DmaCells::new(Arc::clone(region) as Arc<dyn DmaRegion>)
    }
}

impl Transport for Bus {
    fn name(&self) -> &str {
        "model"
    }

    fn bar_bytes(&self) -> u64 {
        0x2000
    }

    fn read32(&self, _: u64) -> Result<u32, TransportError> {
        Ok(0)
    }

    fn read64(&self, _: u64) -> Result<u64, TransportError> {
        Ok(0)
    }

    fn write32(&self, _: u64, _: u32) -> Result<(), TransportError> {
        Ok(())
    }

    fn write64(&self, _: u64, _: u64) -> Result<(), TransportError> {
        Ok(())
    }

    fn doorbell(&self, offset: u64, value: u32) {
        let tail = doorbell_offset(0, QueueId::new(1), Doorbell::SubmissionTail);
        let register = if offset == tail { &self.tail } else { &self.head };
        // Relaxed: a transport keeps an order, it does not make one.
        register.store(value, Ordering::Relaxed);
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        let count = self.regions.lock().unwrap().len() as u64;
        let region = Arc::new(ModelledRegion::new((bytes / 4).min(MOST_WORDS), (count + 1) << 20));
        self.regions.lock().unwrap().push(Arc::clone(&region));
        Ok(region)
    }

    fn interrupt_vectors(&self) -> u16 {
        2
    }

    fn connect_interrupt(&self, _: u16, _: BorrowedFd<'_>) -> Result<(), TransportError> {
        Ok(())
    }

    fn listen(&self, _: u16, listen: Listen) {
        self.listening.store(u8::from(listen == Listen::On), Ordering::Relaxed);
    }

    fn revoke_dma(&self) -> Result<(), TransportError> {
        Err(TransportError::Unsupported("take memory away"))
    }
}

/// A device's view of one queue pair.
struct Device {
    bus: Arc<Bus>,
    sq: DmaCells,
    cq: DmaCells,
    cq_entries: u32,
    sq_entries: u32,
    sq_head: u32,
    cq_tail: u32,
    phase: u32,
}

/// What a device sees of a command: identifier and first block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fetched {
    cid: CommandId,
    block: u32,
}

impl Device {
    fn new(bus: &Arc<Bus>, queue: &Queue, shape: QueueShape) -> Self {
        Self {
            bus: Arc::clone(bus),
            sq: bus.cells(queue.sq_iova()),
            cq: bus.cells(queue.cq_iova()),
            cq_entries: shape.cq_entries,
            sq_entries: shape.sq_entries,
            sq_head: 0,
            cq_tail: 0,
            phase: 1,
        }
    }

    fn fetch(&mut self) -> Fetched {
        let entry: &[DeviceWord; SQE_BYTES / 4] = self.sq.entry_32(self.sq_head);
        self.sq_head = (self.sq_head + 1) % self.sq_entries;
        let cid = CommandId::new((entry[0].load(Ordering::Relaxed) >> 16) as u16);
        Fetched { cid, block: entry[10].load(Ordering::Relaxed) }
    }

    /// The next command, once the doorbell has told of it.
    fn wait_and_fetch(&mut self) -> Fetched {
        while self.bus.tail.load(Ordering::Acquire) == self.sq_head {
            thread::yield_now();
        }
        self.fetch()
    }

    /// Posts the completion of a command, once there is room. Its first word, which is the command's, says `result`.
    fn complete(&mut self, cid: CommandId, result: u32) {
        let next = (self.cq_tail + 1) % self.cq_entries;
        while self.bus.head.load(Ordering::Acquire) == next {
            thread::yield_now();
        }
        let entry: &[DeviceWord; CQE_BYTES / 4] = self.cq.entry_32(self.cq_tail);
        entry[0].store(result, Ordering::Relaxed);
        entry[2].store(self.sq_head | 1 << 16, Ordering::Relaxed);
        // Release: the last word of an entry is written last (NVMe 1.4 §4.1).
        entry[3].store(u32::from(cid.get()) | self.phase << 16, Ordering::Release);
        self.cq_tail = next;
        if next == 0 {
            self.phase ^= 1;
        }
    }
}

fn shape(slots: u16, cq_entries: u32) -> QueueShape {
    let whole = QueueShape::for_depth(QueueId::new(1), slots, 64, Cap::new());
    QueueShape { cq_entries, ..whole }
}

fn read(block: u64) -> SubmissionEntry {
    SubmissionEntry::read(NamespaceId::new(1), block, 0)
}

fn queue(bus: &Arc<Bus>, shape: QueueShape, shadow: Option<&ShadowMemory>) -> Queue {
    Queue::new(Arc::clone(bus) as Arc<dyn Transport>, shape, shadow).unwrap()
}

/// Runs a model whose interleavings are bounded: so many switches away from a thread that could go on.
fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

fn submission() {
    explore(3, || {
        let (bus, shape) = (Bus::new(), shape(1, 2));
        let mut queue = queue(&bus, shape, None);
        let mut device = Device::new(&bus, &queue, shape);
        let device = thread::spawn(move || device.wait_and_fetch());
        let (_, cid) = queue.push(read(7), 0);
        queue.ring();
        assert_eq!(
            device.join().unwrap(),
            Fetched { cid, block: 7 },
            "the device saw the tail and not the entry"
        );
    });
}

fn completion() {
    explore(3, || {
        let (bus, shape) = (Bus::new(), shape(1, 2));
        let mut queue = queue(&bus, shape, None);
        let mut device = Device::new(&bus, &queue, shape);
        let (_, cid) = queue.push(read(7), 3);
        queue.ring();
        let device = thread::spawn(move || {
            device.fetch();
            device.complete(cid, 0x1234);
        });
        let reaped = loop {
            if let Some(reaped) = queue.poll().expect("an honest completion") {
                break reaped;
            }
            thread::yield_now();
        };
        assert_eq!(
            (reaped.dw0, reaped.command.owner),
            (0x1234, 3),
            "the driver saw the phase tag and not the rest"
        );
        device.join().unwrap();
    });
}

/// A completion queue shorter than the submission queue, so that nothing but its head keeps the device from an entry.
fn reuse() {
    explore(2, || {
        let (bus, shape) = (Bus::new(), shape(3, 2));
        let mut queue = queue(&bus, shape, None);
        let mut device = Device::new(&bus, &queue, shape);
        for block in 0..3 {
            queue.push(read(block), block as u16);
        }
        queue.ring();
        let device = thread::spawn(move || {
            for _ in 0..3 {
                let fetched = device.fetch();
                device.complete(fetched.cid, fetched.block);
            }
        });
        for expected in 0..3 {
            let reaped = loop {
                if let Some(reaped) = queue.poll().expect("an honest completion") {
                    break reaped;
                }
                thread::yield_now();
            };
            assert_eq!((reaped.dw0, reaped.command.owner), (expected, expected as u16));
            queue.ring_completions();
        }
        device.join().unwrap();
    });
}

fn shadow() {
    explore(3, || {
        let (bus, shape) = (Bus::new(), shape(1, 2));
        let memory = ShadowMemory::new(&*bus, PAGE_SIZE).unwrap();
        let mut queue = queue(&bus, shape, Some(&memory));
        let mut device = Device::new(&bus, &queue, shape);
        let (values, events) = memory.addresses();
        let (values, events) = (bus.cells(values), bus.cells(events));
        // The place of queue 1's tail (NVMe 1.4 §5.7).
        let place = 8;
        // Before it falls asleep the device had asked not to be told.
        events.store_32(place, 5, Ordering::Release);
        let device = thread::spawn(move || {
            let tail = publish_then_look(
                || events.store_32(place, 0, Ordering::Release),
                || values.load_32(place, Ordering::Acquire),
            );
            (tail == 1).then(|| device.fetch())
        });
        let (_, cid) = queue.push(read(7), 0);
        queue.ring();
        let rung = bus.tail.load(Ordering::Relaxed) == 1;
        let seen = device.join().unwrap();
        assert!(seen.is_some() || rung, "an entry waits, the device sleeps, and nobody rang");
        assert!(
            seen.is_none_or(|seen| seen == Fetched { cid, block: 7 }),
            "the tail was seen and not the entry"
        );
    });
}

/// The device posts a completion and interrupts, if it may; the owner lets the interrupt through and looks once more.
fn sleep() {
    explore(3, || {
        let (bus, shape) = (Bus::new(), shape(1, 2));
        let mut queue = queue(&bus, shape, None);
        let mut device = Device::new(&bus, &queue, shape);
        let (_, cid) = queue.push(read(7), 0);
        queue.ring();
        let device = thread::spawn(move || {
            device.fetch();
            let bus = Arc::clone(&device.bus);
            publish_then_look(|| device.complete(cid, 0), || bus.listening.load(Ordering::Relaxed) == 1)
        });
        let seen = publish_then_look(|| bus.listen(1, Listen::On), || queue.has_completion());
        let interrupted = device.join().unwrap();
        assert!(seen || interrupted, "a completion waits, the owner sleeps, and nothing wakes it");
    });
}

/// A controller's last write to memory, then the news that it is quiet; a queue that hears of it takes the buffer back.
fn end() {
    explore(3, || {
        let (bus, health) = (Bus::new(), Arc::new(Health::new()));
        let buffer = bus.allocate(4).unwrap();
        let (ours, theirs) = (DmaCells::new(Arc::clone(&buffer)), DmaCells::new(buffer));
        health.apply(LifeEvent::Fault);
        // The queue on the other thread: loom tries every value that a load may see, but does not put a load of its own thread
        // off until after a read-modify-write that begins with a load.
        let queue = {
            let health = Arc::clone(&health);
            thread::spawn(move || {
                if health.pulse().life() == Life::Quiet {
                    assert_eq!(ours.load_32(0, Ordering::Relaxed), 1, "quiet, but for a write");
                }
            })
        };
        theirs.store_32(0, 1, Ordering::Relaxed);
        health.apply(LifeEvent::Quiet);
        queue.join().unwrap();
    });
}

#[test]
fn loom_a_device_that_sees_the_tail_sees_the_entry() {
    submission();
}

#[test]
fn loom_a_driver_that_sees_the_phase_sees_the_rest_of_the_completion() {
    completion();
}

#[test]
fn loom_an_entry_is_overwritten_only_after_it_was_read() {
    reuse();
}

#[test]
fn loom_a_shadow_tail_is_seen_with_its_entry_or_the_doorbell_rings() {
    shadow();
}

#[test]
fn loom_a_completion_is_seen_before_the_owner_sleeps_or_interrupts() {
    sleep();
}

#[test]
fn loom_quiet_means_that_every_write_is_seen() {
    end();
}

#[test]
fn loom_every_missing_barrier_of_a_queue_is_caught() {
    assert_caught(Bug::TailFenceMissing, submission);
    assert_caught(Bug::PhaseRelaxed, completion);
    assert_caught(Bug::HeadFenceMissing, reuse);
    assert_caught(Bug::LookFenceMissing, shadow);
    assert_caught(Bug::LookFenceMissing, sleep);
}

#[test]
fn loom_a_change_of_life_that_orders_nothing_is_caught() {
    assert_caught(Bug::PulseRelaxed, end);
    assert_caught(Bug::PulseReadRelaxed, end);
}
