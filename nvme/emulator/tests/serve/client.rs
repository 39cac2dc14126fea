//! A client that speaks the protocol by hand, and so can break it; and a host that does I/O through one.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nvme_emulator::serve::{ClientMemory, Server, ServerOptions};
use nvme_emulator::{ControllerConfig, EmulatedController, NamespaceConfig};
use nvme_spec::command::QueueInterrupt;
use nvme_spec::{QueueId, SubmissionEntry};
use vfio_user_protocol::{
    Capabilities, Channel, Command, DmaFlags, DmaMap, DmaUnmap, IrqSet, IrqSetFlags, MAX_MESSAGE, Message,
    RegionAccess, RegionInfo, UnmapFlags, irq_index, region, version_body,
};
use zerocopy::IntoBytes;

pub(crate) struct Served {
    pub(crate) emulator: Arc<EmulatedController>,
    pub(crate) path: PathBuf,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

pub(crate) fn served(memory: ClientMemory) -> Served {
    served_with(ServerOptions { memory, ..ServerOptions::default() })
}

pub(crate) fn served_with(options: ServerOptions) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cntrl");
    let config = ControllerConfig::with_namespace(NamespaceConfig::memory(1 << 20));
    let emulator = EmulatedController::new(config).unwrap();
    let server = Server::bind(Arc::clone(&emulator), &path, options).unwrap();
    let stop = Arc::new(EventFd::new().unwrap());
    let told = Arc::clone(&stop);
    let thread = std::thread::spawn(move || server.run(told.as_fd()).unwrap());
    Served { emulator, path, stop, thread: Some(thread), _folder: folder }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.write(1).unwrap();
        self.thread.take().unwrap().join().unwrap();
        assert!(!self.path.exists(), "the socket is removed");
    }
}

pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

pub(crate) struct Client(pub(crate) Channel);

impl Client {
    pub(crate) fn connect(path: &Path) -> Self {
        let client = Self(Channel::connect(path, soon()).unwrap());
        client.ask(Command::VERSION, &version_body(Capabilities::default()), &[]).unwrap();
        client
    }

    pub(crate) fn exchange(&self, command: Command, body: &[u8], fds: &[BorrowedFd<'_>]) -> Message {
        self.0.send_command((9, command, 0), &[body], fds, soon()).unwrap();
        let reply = self.0.receive(MAX_MESSAGE, None, soon()).unwrap();
        assert_eq!((reply.header.id, reply.header.command), (9, command));
        reply
    }

    pub(crate) fn ask(
        &self,
        command: Command,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, Errno> {
        let reply = self.exchange(command, body, fds);
        if reply.header.failed() {
            return Err(Errno::from_raw(reply.header.error as i32));
        }
        Ok(reply.body)
    }

    pub(crate) fn read32(&self, region: u32, offset: u64) -> u32 {
        let access = RegionAccess { offset: offset.into(), region: region.into(), count: 4.into() };
        let body = self.ask(Command::REGION_READ, access.as_bytes(), &[]).unwrap();
        u32::from_le_bytes(body[16..].try_into().unwrap())
    }

    pub(crate) fn write(&self, region: u32, offset: u64, data: &[u8]) {
        let count = (data.len() as u32).into();
        let access = RegionAccess { offset: offset.into(), region: region.into(), count };
        self.ask(Command::REGION_WRITE, &[access.as_bytes(), data].concat(), &[]).unwrap();
    }

    /// Enables the controller with an admin queue of 64 entries: submissions at `iova`, completions a page behind.
    pub(crate) fn enable(&self, iova: u64) {
        self.write(region::BAR0, 0x24, &0x003f_003fu32.to_le_bytes());
        self.write(region::BAR0, 0x28, &iova.to_le_bytes());
        self.write(region::BAR0, 0x30, &(iova + 4096).to_le_bytes());
        self.write(region::BAR0, 0x14, &0x0046_0001u32.to_le_bytes());
        let deadline = soon();
        while self.read32(region::BAR0, 0x1c) & 1 == 0 {
            assert!(Instant::now() < deadline, "never ready");
        }
    }

    pub(crate) fn map(
        &self,
        iova: u64,
        bytes: u64,
        flags: DmaFlags,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), Errno> {
        let map = DmaMap {
            argsz: 32.into(),
            flags: flags.bits().into(),
            offset: 0.into(),
            address: iova.into(),
            size: bytes.into(),
        };
        let fds: Vec<_> = fd.into_iter().collect();
        self.ask(Command::DMA_MAP, map.as_bytes(), &fds).map(drop)
    }

    pub(crate) fn unmap(&self, iova: u64, bytes: u64, flags: UnmapFlags) -> Result<(), Errno> {
        let unmap = DmaUnmap {
            argsz: 24.into(),
            flags: flags.bits().into(),
            address: iova.into(),
            size: bytes.into(),
        };
        self.ask(Command::DMA_UNMAP, unmap.as_bytes(), &[]).map(drop)
    }
}

pub(crate) fn memory(bytes: u64) -> OwnedFd {
    let fd = memfd_create("test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&fd, bytes as i64).unwrap();
    fd
}

pub(crate) const RW: DmaFlags = DmaFlags::READ.union(DmaFlags::WRITE);

/// Entries of each of its queues.
pub(crate) const ENTRIES: u32 = 64;
/// Where its memory is: the four rings a page each, then a page for data.
const BASE: u64 = 0x10_0000;
const RINGS: u64 = 4 * 4096;
const HOST_BYTES: u64 = RINGS + 4096;
/// Address of its data page.
pub(crate) const DATA: u64 = BASE + RINGS;
/// Interrupt vector of its I/O queue.
const VECTOR: u16 = 1;

/// A client with an admin and an I/O queue, which rings the doorbells in the shared page.
pub(crate) struct Host {
    pub(crate) client: Client,
    memory: File,
    doorbells: File,
    tail: [u32; 2],
    head: [u32; 2],
    phase: [u8; 2],
}

impl Host {
    pub(crate) fn new(path: &Path) -> Self {
        let client = Client::connect(path);
        let memory = memory(HOST_BYTES);
        client.map(BASE, HOST_BYTES, RW, Some(memory.as_fd())).unwrap();
        client.enable(BASE);
        let request = RegionInfo { argsz: 4064.into(), index: region::BAR0.into(), ..RegionInfo::default() };
        let reply = client.exchange(Command::DEVICE_GET_REGION_INFO, request.as_bytes(), &[]);
        let doorbells = File::from(reply.fds.into_iter().next().unwrap());
        let memory = File::from(memory);
        let mut host = Self { client, memory, doorbells, tail: [0; 2], head: [0; 2], phase: [1; 2] };
        let queue = QueueId::new(1);
        let entries_z = (ENTRIES - 1) as u16;
        for (mut command, at) in [
            (SubmissionEntry::create_io_cq(queue, entries_z, QueueInterrupt::Vector(VECTOR)), 3),
            (SubmissionEntry::create_io_sq(queue, entries_z, queue), 2),
        ] {
            command.prp1.set(BASE + at * 4096);
            assert_eq!(host.run(0, command), 0);
        }
        host
    }

    /// Executes one command and returns its status.
    pub(crate) fn run(&mut self, queue: usize, command: SubmissionEntry) -> u16 {
        self.push(queue, command);
        self.ring(queue);
        self.wait(queue)
    }

    pub(crate) fn push(&mut self, queue: usize, command: SubmissionEntry) {
        let at = ring_offset(queue, 0) + u64::from(self.tail[queue]) * 64;
        self.memory.write_all_at(command.as_bytes(), at).unwrap();
        self.tail[queue] = (self.tail[queue] + 1) % ENTRIES;
    }

    pub(crate) fn ring(&self, queue: usize) {
        self.doorbells.write_all_at(&self.tail[queue].to_le_bytes(), 0x1000 + 8 * queue as u64).unwrap();
    }

    /// The status of the next completion.
    pub(crate) fn wait(&mut self, queue: usize) -> u16 {
        let at = ring_offset(queue, 1) + u64::from(self.head[queue]) * 16;
        let deadline = soon();
        let mut entry = [0u8; 16];
        loop {
            self.memory.read_exact_at(&mut entry, at).unwrap();
            if entry[14] & 1 == self.phase[queue] {
                break;
            }
            assert!(Instant::now() < deadline, "a command of queue {queue} never completes");
            std::thread::yield_now();
        }
        self.head[queue] = (self.head[queue] + 1) % ENTRIES;
        self.phase[queue] ^= u8::from(self.head[queue] == 0);
        self.doorbells.write_all_at(&self.head[queue].to_le_bytes(), 0x1004 + 8 * queue as u64).unwrap();
        u16::from_le_bytes([entry[14], entry[15]]) >> 1
    }

    /// Puts `byte` all over the data page.
    pub(crate) fn fill(&self, byte: u8) {
        self.memory.write_all_at(&[byte; 4096], RINGS).unwrap();
    }

    pub(crate) fn data(&self) -> [u8; 4096] {
        let mut data = [0; 4096];
        self.memory.read_exact_at(&mut data, RINGS).unwrap();
        data
    }

    /// Connects the I/O queue's vector.
    pub(crate) fn connect_interrupt(&self, eventfd: BorrowedFd<'_>) {
        let request = IrqSet {
            argsz: 20.into(),
            flags: (IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER).bits().into(),
            index: irq_index::MSIX.into(),
            start: u32::from(VECTOR).into(),
            count: 1.into(),
        };
        self.client.ask(Command::DEVICE_SET_IRQS, request.as_bytes(), &[eventfd]).unwrap();
    }
}

/// Where a ring begins in the host's memory: of submissions (0) or completions (1).
fn ring_offset(queue: usize, which: usize) -> u64 {
    4096 * (2 * queue + which) as u64
}
