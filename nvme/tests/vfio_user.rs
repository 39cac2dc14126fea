//! The driver over vfio-user against the served embedded controller, both in this process: the whole stack below the
//! reactor, and what happens when the server goes.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

mod requests;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nvme::transport::Transport;
use nvme::transport::vfio_user::{DEFAULT_TIMEOUT, VfioUserTransport};
use nvme::{Controller, Interrupts, OpenOptions, QueueOptions};
use nvme_emulator::serve::{ClientMemory, Server, ServerOptions};
use nvme_emulator::{ControllerConfig, EmulatedController, Mode, NamespaceConfig, ThreadOptions};
use reactor::block::{BlockDevice, Lba, OpTag, Request};
use requests::{drain, pattern, read, read_asleep, write};

struct Served {
    emulator: Arc<EmulatedController>,
    path: PathBuf,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Served {
    fn new(config: ControllerConfig, options: ServerOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cntrl");
        let emulator = EmulatedController::new(config).unwrap();
        let server = Server::bind(Arc::clone(&emulator), &path, options).unwrap();
        let stop = Arc::new(EventFd::new().unwrap());
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || server.run(told.as_fd()).unwrap());
        Self { emulator, path, stop, thread: Some(thread), _folder: folder }
    }

    fn open(&self) -> Arc<Controller> {
        let spec = format!("vfio-user:{}", self.path.display()).parse().unwrap();
        nvme::open(&spec, OpenOptions::default()).unwrap()
    }

    fn stop(&mut self) {
        self.stop.write(1).unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop();
    }
}

const MODES: [fn() -> Mode; 2] = [|| Mode::Inline, || Mode::Threaded(ThreadOptions::default())];

fn config(mode: Mode, lba: u32) -> ControllerConfig {
    let namespace = NamespaceConfig::memory(64 << 20).with_lba_size(lba);
    ControllerConfig { mode, ..ControllerConfig::with_namespace(namespace) }
}

fn served(mode: Mode) -> Served {
    Served::new(config(mode, 4096), ServerOptions::default())
}

fn small_pool() -> QueueOptions {
    QueueOptions { pool_bytes: 8 << 20, ..QueueOptions::default() }
}

#[test]
fn data_survives_the_way_in_every_mode_and_block_size() {
    for mode in MODES {
        for lba in [512, 4096] {
            let served = Served::new(config(mode(), lba), ServerOptions::default());
            let controller = served.open();
            assert!(controller.name().starts_with("vfio-user:"));
            let mut queue = controller.create_queue(&small_pool()).unwrap();
            for bytes in [4096, 8192, 128 << 10, (1 << 20) + 4096] {
                let data = pattern(bytes as u64, bytes);
                write(&mut queue, 7, &data);
                assert!(read(&mut queue, 7, bytes) == data, "{bytes} bytes, lba {lba}");
            }
            assert_eq!(served.emulator.memory().fault_count(), 0);
        }
    }
}

#[test]
fn two_queues_are_used_by_two_threads() {
    let served = served(MODES[1]());
    let controller = served.open();
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let controller = &controller;
            scope.spawn(move || {
                let mut queue = controller.create_queue(&small_pool()).unwrap();
                for round in 0..300 {
                    let lba = thread * 1000 + round % 50;
                    let data = pattern(thread << 32 | round, 4096);
                    write(&mut queue, lba, &data);
                    assert!(read(&mut queue, lba, 4096) == data);
                }
            });
        }
    });
    assert_eq!(served.emulator.memory().fault_count(), 0);
}

/// The second queue has the first one's number: its first doorbell has a value that the first queue rang too.
#[test]
fn queues_come_and_go() {
    let served = served(MODES[0]());
    let controller = served.open();
    for round in 0..20 {
        let mut queue = controller.create_queue(&small_pool()).unwrap();
        let data = pattern(round, 4096);
        write(&mut queue, round, &data);
        assert!(read(&mut queue, round, 4096) == data);
    }
}

#[test]
fn a_sleeping_owner_is_woken() {
    let served = served(MODES[1]());
    let controller = served.open();
    let options = QueueOptions { interrupts: Interrupts::Enabled, ..small_pool() };
    let mut queue = controller.create_queue(&options).unwrap();
    read_asleep(&mut queue, 50);
}

#[test]
fn the_next_client_finds_what_the_last_one_wrote() {
    let served = served(MODES[1]());
    let data = pattern(5, 16 << 10);
    {
        let mut queue = served.open().create_queue(&small_pool()).unwrap();
        write(&mut queue, 3, &data);
    }
    for _ in 0..5 {
        let mut queue = served.open().create_queue(&small_pool()).unwrap();
        assert!(read(&mut queue, 3, data.len()) == data);
    }
}

/// The reset between two clients, not the driver's orderly end, takes the memory away.
#[test]
fn a_client_that_dies_leaves_a_quiet_controller() {
    let served = served(MODES[1]());
    for _ in 0..3 {
        let transport = VfioUserTransport::connect(&served.path, DEFAULT_TIMEOUT).unwrap();
        let region = transport.allocate(64 << 10).unwrap();
        transport.write32(0x24, 0x000f_000f).unwrap();
        transport.write64(0x28, region.iova()).unwrap();
        transport.write64(0x30, region.iova() + 8192).unwrap();
        transport.write32(0x14, 0x0046_0001).unwrap();
        while transport.read32(0x1c).unwrap() & 1 == 0 {}
        drop(transport);
        let next = VfioUserTransport::connect(&served.path, DEFAULT_TIMEOUT).unwrap();
        assert_eq!(next.read32(0x14).unwrap() & 1, 0, "CC.EN");
        assert_eq!(next.read64(0x28).unwrap(), 0, "ASQ");
    }
}

#[test]
fn requests_in_flight_finish_as_errors_when_the_server_goes() {
    // Nothing is executed, so everything is in flight.
    let mut served = served(Mode::Stepped);
    let controller = {
        let emulator = Arc::clone(&served.emulator);
        let stepping = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let told = Arc::clone(&stepping);
        let steps = std::thread::spawn(move || {
            while told.load(std::sync::atomic::Ordering::Relaxed) {
                emulator.step();
                std::thread::yield_now();
            }
        });
        let controller = served.open();
        let queue = controller.create_queue(&small_pool()).unwrap();
        stepping.store(false, std::sync::atomic::Ordering::Relaxed);
        steps.join().unwrap();
        (controller, queue)
    };
    let (controller, mut queue) = controller;
    for lba in 0..10 {
        let buffer = queue.pool().try_alloc(4096).unwrap();
        queue.submit(OpTag(lba), Request::Read { lba: Lba::new(lba), buffer }).unwrap();
    }
    queue.ring();
    let began = Instant::now();
    served.stop();
    let done = drain(&mut queue);
    assert_eq!(done.len(), 10);
    assert!(done.iter().all(|completion| completion.result.is_err()));
    assert!(controller.fault().is_some());
    // Found by the end of the connection, not by the commands' deadline.
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[test]
fn registers_of_a_server_that_is_gone_are_all_ones() {
    let mut served = served(MODES[0]());
    let transport = VfioUserTransport::connect(&served.path, DEFAULT_TIMEOUT).unwrap();
    assert!(transport.maps_doorbells());
    assert_ne!(transport.read64(0).unwrap(), u64::MAX);
    served.stop();
    let mut watched = [PollFd::new(transport.removal_event().unwrap(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut watched, PollTimeout::from(10_000u16)).unwrap(), 1);
    assert_eq!(transport.revoke_dma(), Ok(()), "the server went by itself");
    assert_eq!(transport.read32(0x1c), Ok(u32::MAX));
    assert_eq!(transport.read64(0), Ok(u64::MAX));
    assert_eq!(transport.write32(0x14, 0), Ok(()));
    transport.doorbell(0x1000, 1);
    assert!(transport.allocate(4096).is_err());
}

#[test]
fn function_reset_disables_the_controller() {
    let served = served(MODES[1]());
    let controller = served.open();
    let mut queue = controller.create_queue(&small_pool()).unwrap();
    write(&mut queue, 0, &pattern(1, 4096));
    drop(queue);
    drop(controller);
    let transport = VfioUserTransport::connect(&served.path, DEFAULT_TIMEOUT).unwrap();
    assert_eq!(transport.reset_function(), Ok(()));
}

#[test]
fn sealed_memory_satisfies_a_strict_server() {
    let options = ServerOptions { memory: ClientMemory::Sealed, ..ServerOptions::default() };
    let served = Served::new(config(Mode::Inline, 4096), options);
    let mut queue = served.open().create_queue(&small_pool()).unwrap();
    write(&mut queue, 0, &pattern(1, 4096));
}

fn error_of(path: &Path) -> String {
    VfioUserTransport::connect(path, Duration::from_millis(200)).err().unwrap().to_string()
}

#[test]
fn sockets_that_nobody_serves_are_clear_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cntrl");
    assert!(error_of(&path).contains("is the server running"), "{}", error_of(&path));
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(error_of(&path).contains("is gone"), "{}", error_of(&path));
    let long = folder.path().join("x".repeat(200));
    assert!(error_of(&long).contains("cannot connect"), "{}", error_of(&long));
}
