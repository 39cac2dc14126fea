//! The proof that the I/O path (submit, ring, process completions) makes no system call, allocates nothing, reads no register
//! and reads no clock, other than the watchdog's look every [`WATCH_POLLS`] polls and, if asked for, two for a latency.
//!
//! The controller runs inside the doorbell and in the same thread, so it is held to the same. That nothing is locked is shown
//! where the locks are: `controller/tests/locks.rs`. Each proof is shown to be able to fail.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::libc;
use nix::sys::signal::Signal;
use nvme::queue_pair::WATCH_POLLS;
use nvme::transport::embedded::EmbeddedTransport;
use nvme::transport::{SystemTiming, Timing};
use nvme::{Controller, ControllerOptions, Interrupts, Keeper, LatencyRecording, QueueOptions, QueuePair};
use nvme_emulator::{ControllerConfig, EmulatedController, NamespaceConfig, ShadowDoorbells};
use reactor::block::{BlockDevice, Durability, Lba, OpTag, Request};
use reactor::clock::Instant;
use reactor::dma::DmaBuffer;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Requests of a full queue.
const FULL: u16 = 64;
/// Long enough for the watchdog to look at the clock, at depth 1 more than once.
const ROUNDS: u64 = 3000;
/// Requests that go out as one command without a list, and some that need one: three pages and more.
const SIZES: [usize; 4] = [4096, 4096, 4096, 64 << 10];

/// Time that stands still and knows how often it was looked at.
#[derive(Default)]
struct CountedTime(AtomicU64);

impl Timing for CountedTime {
    fn now(&self) -> Instant {
        self.0.fetch_add(1, Ordering::Relaxed);
        Instant::ZERO
    }

    fn pause(&self, duration: Duration) {
        SystemTiming::default().pause(duration);
    }
}

/// What the path is tried with.
#[derive(Clone, Copy, Debug)]
struct Case {
    depth: u16,
    latency: LatencyRecording,
    doorbells: ShadowDoorbells,
}

fn cases() -> impl Iterator<Item = Case> {
    [1, FULL].into_iter().flat_map(|depth| {
        [LatencyRecording::Off, LatencyRecording::On].into_iter().flat_map(move |latency| {
            [ShadowDoorbells::Absent, ShadowDoorbells::Offered].into_iter().map(move |doorbells| Case {
                depth,
                latency,
                doorbells,
            })
        })
    })
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    requests: u64,
    polls: u64,
}

/// What must not be done on the path, done once each round, to see that it is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spoil {
    Nothing,
    Allocation,
    RegisterRead,
    ClockRead,
    SystemCall,
}

struct Rig {
    queue: QueuePair,
    idle: Vec<DmaBuffer>,
    emulator: Arc<EmulatedController>,
    time: Arc<CountedTime>,
    depth: u16,
}

impl Rig {
    fn new(case: Case) -> Self {
        let mut config = ControllerConfig::with_namespace(NamespaceConfig::memory(16 << 20));
        config.shadow_doorbells = case.doorbells;
        let emulator = EmulatedController::new(config).unwrap();
        let transport = Arc::new(EmbeddedTransport::new(Arc::clone(&emulator), "emu:test"));
        let time = Arc::new(CountedTime::default());
        let options = ControllerOptions { keeper: Keeper::Polled, ..ControllerOptions::default() };
        let controller = Controller::bring_up(transport, Arc::clone(&time) as _, &options).unwrap();
        let options = QueueOptions {
            depth: case.depth,
            pool_bytes: 8 << 20,
            interrupts: Interrupts::Disabled,
            latency: case.latency,
            ..QueueOptions::default()
        };
        let queue = controller.create_queue(&options).unwrap();
        assert_eq!(queue.geometry().queue_depth, case.depth);
        let sizes = SIZES.iter().cycle().take(usize::from(case.depth));
        let idle = sizes.map(|bytes| queue.pool().try_alloc(*bytes).unwrap()).collect();
        let mut rig = Self { queue, idle, emulator, time, depth: case.depth };
        // The controller's own lists grow to their size.
        rig.run(FULL.into(), Spoil::Nothing);
        rig
    }

    /// Fills the queue and empties it, `rounds` times: reads, writes, durable writes, and a flush each round.
    fn run(&mut self, rounds: u64, spoil: Spoil) -> Tally {
        let mut tally = Tally::default();
        for round in 0..rounds {
            if round.is_multiple_of(8) {
                self.flush(&mut tally);
            }
            while let Some(buffer) = self.idle.pop() {
                let lba = Lba::new(self.idle.len() as u64 * 16);
                let request = match (round + self.idle.len() as u64) % 4 {
                    0 | 1 => Request::Read { lba, buffer },
                    2 => Request::Write { lba, buffer, durability: Durability::Cached },
                    _ => Request::Write { lba, buffer, durability: Durability::Durable },
                };
                self.queue.submit(OpTag(round), request).unwrap();
                tally.requests += 1;
            }
            self.queue.ring();
            self.spoil(spoil);
            while self.queue.in_flight() > 0 {
                self.queue.process_completions(usize::from(self.depth), &mut |completion| {
                    assert!(completion.result.is_ok());
                    self.idle.extend(completion.buffer);
                });
                tally.polls += 1;
            }
        }
        tally
    }

    fn flush(&mut self, tally: &mut Tally) {
        self.queue.submit(OpTag(0), Request::Flush).unwrap();
        self.queue.ring();
        self.queue.process_completions(1, &mut |completion| assert!(completion.result.is_ok()));
        tally.requests += 1;
        tally.polls += 1;
    }

    fn spoil(&self, spoil: Spoil) {
        match spoil {
            Spoil::Nothing => {}
            Spoil::Allocation => drop(std::hint::black_box(Box::new(1_u64))),
            // Looks at CSTS.
            Spoil::RegisterRead => drop(std::hint::black_box(self.emulator.read32(0x1c))),
            Spoil::ClockRead => drop(std::hint::black_box(self.time.now())),
            Spoil::SystemCall => drop(std::hint::black_box(nix::unistd::getppid())),
        }
    }
}

/// What a run cost beside what it was there for.
#[derive(Debug, PartialEq, Eq)]
struct Audit {
    allocations: u64,
    register_reads: u64,
    register_writes: u64,
    clock_reads: u64,
}

/// Runs, and tells what it cost and what of clock reads was due.
fn audit(case: Case, spoil: Spoil) -> (Audit, u64) {
    let mut rig = Rig::new(case);
    let (before, looks) = (rig.emulator.counters(), rig.time.0.load(Ordering::Relaxed));
    let mut tally = Tally::default();
    let allocations = allocation_counter::measure(|| tally = rig.run(ROUNDS, spoil)).count_total;
    let after = rig.emulator.counters();
    let spent = Audit {
        allocations,
        register_reads: after.register_reads - before.register_reads,
        register_writes: after.register_writes - before.register_writes,
        clock_reads: rig.time.0.load(Ordering::Relaxed) - looks,
    };
    assert!(tally.polls > u64::from(2 * WATCH_POLLS), "the watchdog had nothing to do: {tally:?}");
    // The count of polls began with those of the warm-up.
    let warm_up = u64::from(FULL) + u64::from(FULL) / 8;
    let watch = u64::from(WATCH_POLLS);
    let due = (warm_up + tally.polls) / watch - warm_up / watch;
    let recorded = if case.latency == LatencyRecording::On { 2 * tally.requests } else { 0 };
    (spent, due + recorded)
}

const FREE: Audit = Audit { allocations: 0, register_reads: 0, register_writes: 0, clock_reads: 0 };

#[test]
fn io_allocates_nothing_reads_no_register_and_no_clock() {
    for case in cases() {
        let (spent, clock_reads) = audit(case, Spoil::Nothing);
        assert_eq!(spent, Audit { clock_reads, ..FREE }, "{case:?}");
    }
}

#[test]
fn an_allocation_a_register_read_and_a_clock_read_would_be_noticed() {
    let case = Case { depth: 1, latency: LatencyRecording::Off, doorbells: ShadowDoorbells::Absent };
    let spent = |spoil| {
        let (spent, due) = audit(case, spoil);
        Audit { clock_reads: spent.clock_reads - due, ..spent }
    };
    assert_eq!(spent(Spoil::Allocation), Audit { allocations: ROUNDS, ..FREE });
    assert_eq!(spent(Spoil::RegisterRead), Audit { register_reads: ROUNDS, ..FREE });
    assert_eq!(spent(Spoil::ClockRead), Audit { clock_reads: ROUNDS, ..FREE });
}

/// Names the case that a child is to run: its number, and whether it is to make a system call.
const CHILD: &str = "POLLUX_IO_PATH_CHILD";
/// The child got through.
const THROUGH: i32 = 77;

/// The other end of the tests below: runs under a filter, in a process of its own, and does not return.
#[test]
fn child_under_a_filter() {
    let Ok(task) = std::env::var(CHILD) else { return };
    let (number, spoil) = task.split_once(' ').unwrap();
    let spoil = if spoil == "call" { Spoil::SystemCall } else { Spoil::Nothing };
    let mut rig = Rig::new(cases().nth(number.parse().unwrap()).unwrap());
    // Killed by a signal that usually leaves a core file.
    nix::sys::prctl::set_dumpable(false).unwrap();
    let filter = filter();
    seccompiler::apply_filter(&filter).expect("the kernel has seccomp filters");
    rig.run(ROUNDS, spoil);
    std::process::exit(THROUGH);
}

/// Kills the process at any system call but those of a process that ends, and messages of a panic.
fn filter() -> BpfProgram {
    let stderr = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, 2).unwrap();
    let rules = BTreeMap::from([
        (libc::SYS_exit_group, vec![]),
        (libc::SYS_sigaltstack, vec![]),
        (libc::SYS_munmap, vec![]),
        (libc::SYS_write, vec![SeccompRule::new(vec![stderr]).unwrap()]),
    ]);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch);
    filter.unwrap().try_into().unwrap()
}

fn child(case: usize, spoil: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_under_a_filter", "--nocapture", "--test-threads=1"])
        .env(CHILD, format!("{case} {spoil}"))
        .status()
        .unwrap()
}

#[test]
fn io_makes_no_system_call() {
    for (number, case) in cases().enumerate() {
        let status = child(number, "nothing");
        assert_eq!(status.code(), Some(THROUGH), "{case:?}: {status}");
    }
}

#[test]
fn a_system_call_would_be_noticed() {
    assert_eq!(child(0, "call").signal(), Some(Signal::SIGSYS as i32));
}
