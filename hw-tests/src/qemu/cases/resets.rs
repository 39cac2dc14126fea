//! The controller is reset behind the driver's back after N register accesses, for N = 1, 2, … until nothing happens any more.
//!
//! Invariants checked: bring-up fails in bounded time or succeeds; requests end well or with an error; what was flushed is
//! there afterwards, read by another driver.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nvme::transport::qtest::{DEFAULT_TIMEOUT, QtestTransport};
use nvme::transport::{Listen, Timing, Transport, TransportError};
use nvme::{Controller, ControllerOptions};
use reactor::block::Request;
use reactor::clock::{Clock, Instant, SystemClock};
use reactor::dma::DmaRegion;

use super::device::{execute, open, options, queue, reads_back, write};
use crate::qemu::{Configuration, Machine};
use crate::suite::{Environment, MachineCase, Verdict};

pub(super) const CASES: &[MachineCase] = &[MachineCase {
    suite: "qemu",
    name: "a_reset_at_any_access_loses_nothing_that_was_flushed",
    run: everywhere,
}];

/// Register CC (NVMe 1.4 §3.1.5): zero resets the controller.
const CC: u64 = 0x14;

/// Resets the controller at one access.
struct Resetting {
    inner: QtestTransport,
    accesses: AtomicU64,
    at: u64,
}

impl Resetting {
    fn count(&self) {
        // Relaxed: a count orders nothing.
        if self.accesses.fetch_add(1, Ordering::Relaxed) + 1 == self.at {
            let _ = self.inner.write32(CC, 0);
        }
    }
}

impl Transport for Resetting {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn bar_bytes(&self) -> u64 {
        self.inner.bar_bytes()
    }
    fn read32(&self, offset: u64) -> Result<u32, TransportError> {
        self.count();
        self.inner.read32(offset)
    }
    fn read64(&self, offset: u64) -> Result<u64, TransportError> {
        self.count();
        self.inner.read64(offset)
    }
    fn write32(&self, offset: u64, value: u32) -> Result<(), TransportError> {
        self.count();
        self.inner.write32(offset, value)
    }
    fn write64(&self, offset: u64, value: u64) -> Result<(), TransportError> {
        self.count();
        self.inner.write64(offset, value)
    }
    fn doorbell(&self, offset: u64, value: u32) {
        self.count();
        self.inner.doorbell(offset, value);
    }
    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        self.inner.allocate(bytes)
    }
    fn interrupt_vectors(&self) -> u16 {
        self.inner.interrupt_vectors()
    }
    fn connect_interrupt(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), TransportError> {
        self.inner.connect_interrupt(vector, eventfd)
    }
    fn listen(&self, vector: u16, listen: Listen) {
        self.inner.listen(vector, listen);
    }
    fn revoke_dma(&self) -> Result<(), TransportError> {
        self.inner.revoke_dma()
    }
    fn reset_function(&self) -> Result<(), TransportError> {
        self.inner.reset_function()
    }
    fn removal_event(&self) -> Option<BorrowedFd<'_>> {
        self.inner.removal_event()
    }
}

/// Time that passes faster, so that deadlines of many seconds are not waited for.
#[derive(Default)]
struct Hurried(SystemClock);

const HURRY: u64 = 40;

impl Timing for Hurried {
    fn now(&self) -> Instant {
        Instant::from_nanos(self.0.now().as_nanos() * HURRY)
    }
    fn pause(&self, duration: Duration) {
        std::thread::sleep(duration / HURRY as u32);
    }
}

/// What became of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// The reset was to come later.
    Untouched,
    /// The driver gave up, or went on.
    Struck { flushed: bool },
}

fn everywhere(_: &Environment) -> Result<Verdict> {
    let machine = Machine::start(&Configuration::new("resets"))?;
    let (mut at, mut struck) = (1, 0);
    loop {
        let byte = (at % 251) as u8 + 1;
        let ended = run(machine.path(), at, byte).with_context(|| format!("reset at access {at}"))?;
        let Ended::Struck { flushed } = ended else { break };
        struck += 1;
        // Another driver, which nobody disturbs.
        let controller = open(&machine)?;
        let mut queue = queue(&controller)?;
        if flushed {
            reads_back(&mut queue, 64, 8 * 512, byte)
                .with_context(|| format!("after a reset at access {at}"))?;
        }
        drop(queue);
        controller.shutdown()?;
        // Bring-up and shutdown in every step near the start, further on in strides.
        at += if at < 24 { 1 } else { 3 };
    }
    ensure!(struck >= 20, "only {struck} resets before a run was over");
    Ok(Verdict::Passed)
}

fn run(directory: &Path, at: u64, byte: u8) -> Result<Ended> {
    let inner = QtestTransport::open(directory, DEFAULT_TIMEOUT)?;
    let transport = Arc::new(Resetting { inner, accesses: AtomicU64::new(0), at });
    let mut flushed = false;
    let dynamic: Arc<dyn Transport> = transport.clone();
    let opened = Controller::bring_up(dynamic, Arc::new(Hurried::default()), &ControllerOptions::default());
    if let Ok(controller) = opened {
        let _may_fail = work(&controller, byte, &mut flushed)?;
        let _may_fail = controller.shutdown();
    }
    let struck = transport.accesses.load(Ordering::Relaxed) >= at;
    Ok(if struck { Ended::Struck { flushed } } else { Ended::Untouched })
}

/// Writes, flushes, reads. What the driver reports as an error ends it; what is wrong without being reported fails the case.
fn work(controller: &Arc<Controller>, byte: u8, flushed: &mut bool) -> Result<bool> {
    let Ok(mut queue) = controller.create_queue(&options()) else { return Ok(false) };
    for block in 0..8 {
        let request = write(&queue, 64 + block, 512, byte)?;
        if execute(&mut queue, request)?.is_err() {
            return Ok(false);
        }
    }
    if execute(&mut queue, Request::Flush)?.is_err() {
        return Ok(false);
    }
    *flushed = true;
    reads_back(&mut queue, 64, 8 * 512, byte)?;
    Ok(true)
}
