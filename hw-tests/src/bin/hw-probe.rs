//! Puts bytes on a device, fetches them, and has the device reach for memory that it was not given: for the guest's steps.
//!
//! `hw-probe write SPEC OFFSET` stores standard input, `hw-probe read SPEC OFFSET BYTES` prints. `hw-probe stray-read SPEC` and
//! `stray-write SPEC` send a command whose data lie at a device address that nothing is mapped at, and check that neither memory
//! nor the medium got anything of it, and that the driver and the controller go on. Only the IOMMU stands in between.
//!
//! It overwrites the medium: it is for devices that tests own.

use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use nvme::spec_string::Target;
use nvme::transport::vfio::VfioTransport;
use nvme::transport::{Listen, SystemTiming, Transport, TransportError};
use nvme::{Controller, ControllerOptions, DeviceSpec, OpenOptions, QueueOptions, QueuePair};
use reactor::block::{BlockDevice, Completion, Durability, Lba, OpTag, Request};
use reactor::dma::DmaRegion;
use vm_memory::{MmapRegion, VolatileSlice};

const USAGE: &str =
    "hw-probe write SPEC OFFSET | read SPEC OFFSET BYTES | stray-read SPEC | stray-write SPEC";

/// Bytes of one request.
const PIECE: usize = 64 << 10;

/// Bytes of the pool whose addresses are wrong: tells its allocation from every other.
const STRAY_POOL: usize = 2 << 20;

/// How far they are wrong: 128 GiB, which no process here maps.
const STRAY_DISTANCE: u64 = 1 << 37;

/// Bytes of a request that goes astray: a page, for one fault, as the IOMMU drops those that come too fast.
const STRAY_BYTES: usize = 4 << 10;

/// Where a stray command works, in bytes: behind anything that a test looks at first.
const STRAY_AT: u64 = 8 << 20;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hw-probe: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["write", spec, offset] => {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes)?;
            Medium::open(&spec.parse()?)?.write(offset.parse()?, &bytes)
        }
        ["read", spec, offset, length] => {
            let bytes = Medium::open(&spec.parse()?)?.read(offset.parse()?, length.parse()?)?;
            std::io::stdout().write_all(&bytes).context("printing")
        }
        ["stray-read", spec] => stray(&spec.parse()?, Way::Read),
        ["stray-write", spec] => stray(&spec.parse()?, Way::Write),
        _ => bail!("usage: {USAGE}"),
    }
}

/// A device and one queue, polled.
struct Medium {
    queue: QueuePair,
    block: u64,
}

impl Medium {
    fn open(spec: &DeviceSpec) -> Result<Self> {
        let controller = nvme::open(spec, OpenOptions::default())?;
        Self::on(&controller, 4 << 20)
    }

    fn on(controller: &Arc<Controller>, pool_bytes: usize) -> Result<Self> {
        let block = controller.default_namespace()?.lba_size().into();
        let queue = controller.create_queue(&QueueOptions { pool_bytes, ..QueueOptions::default() })?;
        Ok(Self { queue, block })
    }

    fn execute(&mut self, request: Request) -> Result<Completion> {
        let sent = self.queue.submit(OpTag(0), request);
        sent.map_err(|rejected| anyhow::anyhow!("rejected: {:?}", rejected.reason))?;
        self.queue.ring();
        let mut done = None;
        while done.is_none() {
            self.queue.process_completions(1, &mut |completion| done = Some(completion));
        }
        done.context("a completion")
    }

    fn lba(&self, offset: u64) -> Result<Lba> {
        ensure!(
            offset.is_multiple_of(self.block),
            "{offset} is no multiple of the device's {} bytes",
            self.block
        );
        Ok(Lba::new(offset / self.block))
    }

    /// Writes and flushes.
    fn write(&mut self, mut offset: u64, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(PIECE) {
            let mut buffer = self.queue.pool().try_alloc(piece.len()).context("no buffer")?;
            buffer.write_at(0, piece);
            let request = Request::Write { lba: self.lba(offset)?, buffer, durability: Durability::Cached };
            self.execute(request)?.result.with_context(|| format!("writing at {offset}"))?;
            offset += piece.len() as u64;
        }
        self.execute(Request::Flush)?.result.context("flushing")
    }

    fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        for (index, piece) in bytes.chunks_mut(PIECE).enumerate() {
            let at = offset + (index * PIECE) as u64;
            let buffer = self.queue.pool().try_alloc(piece.len()).context("no buffer")?;
            let done = self.execute(Request::Read { lba: self.lba(at)?, buffer })?;
            done.result.with_context(|| format!("reading at {at}"))?;
            done.buffer.context("a buffer")?.read_at(0, piece);
        }
        Ok(bytes)
    }
}

/// Bytes that say where they come from.
fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|index| (index as u8).wrapping_mul(31) ^ (index >> 8) as u8 ^ seed).collect()
}

/// Which way data go astray.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

fn stray(spec: &DeviceSpec, way: Way) -> Result<()> {
    let Target::Pci(address) = spec.target else { bail!("{spec}: only a pci: device is behind an IOMMU") };
    let transport = Arc::new(Astray { inner: VfioTransport::open(address)? });
    let options =
        ControllerOptions { queues: spec.queues, namespace: spec.namespace, ..ControllerOptions::default() };
    let controller = Controller::bring_up(transport, Arc::new(SystemTiming::default()), &options)?;
    let mut honest = Medium::on(&controller, 4 << 20)?;
    let mut lost = Medium::on(&controller, STRAY_POOL)?;
    let behind = STRAY_AT + STRAY_BYTES as u64;
    let (first, second) = (pattern(1, STRAY_BYTES), pattern(2, STRAY_BYTES));
    honest.write(STRAY_AT, &first)?;
    honest.write(behind, &second)?;
    match way {
        Way::Read => stray_read(&mut lost)?,
        Way::Write => stray_write(&mut lost, &mut honest, behind, &second)?,
    }
    ensure!(honest.read(STRAY_AT, STRAY_BYTES)? == first, "the blocks beside it have changed");
    honest.write(behind, &second)?;
    ensure!(honest.read(behind, STRAY_BYTES)? == second, "what was written afterwards does not read back");
    ensure!(controller.fault().is_none(), "the controller has failed: {:?}", controller.fault());
    println!("the driver goes on, after {} resets", controller.resets());
    Ok(())
}

/// What the device answers is not to be relied on: QEMU says that all went well.
fn stray_read(lost: &mut Medium) -> Result<()> {
    let sentinel = pattern(0xa5, STRAY_BYTES);
    let mut buffer = lost.queue.pool().try_alloc(STRAY_BYTES).context("no buffer")?;
    buffer.write_at(0, &sentinel);
    println!("stray address {:#x}", buffer.iova());
    let done = lost.execute(Request::Read { lba: lost.lba(STRAY_AT)?, buffer })?;
    println!("the device answers {:?}", done.result);
    let mut memory = vec![0; STRAY_BYTES];
    done.buffer.context("a buffer")?.read_at(0, &mut memory);
    ensure!(memory == sentinel, "memory was written to by a read whose address was not mapped");
    Ok(())
}

fn stray_write(lost: &mut Medium, honest: &mut Medium, offset: u64, before: &[u8]) -> Result<()> {
    let secret = pattern(0x5c, STRAY_BYTES);
    let mut buffer = lost.queue.pool().try_alloc(STRAY_BYTES).context("no buffer")?;
    buffer.write_at(0, &secret);
    println!("stray address {:#x}", buffer.iova());
    let request = Request::Write { lba: lost.lba(offset)?, buffer, durability: Durability::Durable };
    println!("the device answers {:?}", lost.execute(request)?.result);
    let medium = honest.read(offset, STRAY_BYTES)?;
    let zeroes = medium.iter().all(|byte| *byte == 0);
    ensure!(
        medium == before || zeroes,
        "the medium holds neither what was there nor zeroes after a write whose address was not mapped"
    );
    println!("the medium holds {}", if zeroes { "zeroes" } else { "what it held before" });
    Ok(())
}

/// VFIO, but for one allocation that is not where it says.
struct Astray {
    inner: Arc<VfioTransport>,
}

impl Transport for Astray {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn bar_bytes(&self) -> u64 {
        self.inner.bar_bytes()
    }

    fn read32(&self, offset: u64) -> Result<u32, TransportError> {
        self.inner.read32(offset)
    }

    fn read64(&self, offset: u64) -> Result<u64, TransportError> {
        self.inner.read64(offset)
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), TransportError> {
        self.inner.write32(offset, value)
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), TransportError> {
        self.inner.write64(offset, value)
    }

    fn doorbell(&self, offset: u64, value: u32) {
        self.inner.doorbell(offset, value);
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        let region = self.inner.allocate(bytes)?;
        if bytes != STRAY_POOL {
            return Ok(region);
        }
        let iova = region.iova() + STRAY_DISTANCE;
        Ok(Arc::new(Elsewhere { region, iova }))
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

/// Memory that says it is elsewhere.
struct Elsewhere {
    region: Arc<dyn DmaRegion>,
    iova: u64,
}

impl DmaRegion for Elsewhere {
    fn slice(&self) -> VolatileSlice<'_> {
        self.region.slice()
    }

    fn iova(&self) -> u64 {
        self.iova
    }

    fn mapping(&self) -> (Arc<MmapRegion>, usize) {
        self.region.mapping()
    }
}
