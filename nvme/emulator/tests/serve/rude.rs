//! Clients that die, vanish, stall or stop listening in the middle of I/O. Whatever one does, the next one is served.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nvme_emulator::serve::{ClientMemory, ServerOptions};
use nvme_spec::command::ForceUnitAccess;
use nvme_spec::{NamespaceId, SubmissionEntry};
use vfio_user_protocol::{Capabilities, Channel, Command, MAX_MESSAGE, RegionAccess, region, version_body};
use zerocopy::IntoBytes;

use crate::client::{Client, DATA, ENTRIES, Host, RW, served, served_with, soon};

const NS1: NamespaceId = NamespaceId::new(1);
/// Tells a process that it is the client of [`client_that_is_killed`].
const SOCKET: &str = "POLLUX_TEST_SOCKET";

fn write(lba: u64) -> SubmissionEntry {
    let mut entry = SubmissionEntry::write(NS1, lba, 0, ForceUnitAccess::No);
    entry.prp1.set(DATA);
    entry
}

fn read(lba: u64) -> SubmissionEntry {
    let mut entry = SubmissionEntry::read(NS1, lba, 0);
    entry.prp1.set(DATA);
    entry
}

/// A client with manners gets what it is entitled to.
fn next_client_is_served(path: &Path, byte: u8) {
    let mut host = Host::new(path);
    host.fill(byte);
    assert_eq!(host.run(1, write(u64::from(byte))), 0);
    host.fill(0);
    assert_eq!(host.run(1, read(u64::from(byte))), 0);
    assert_eq!(host.data(), [byte; 4096]);
}

#[test]
#[ignore = "the client of killed_clients_leave_a_server_that_works, which runs it in a process of its own"]
fn client_that_is_killed() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let mut host = Host::new(Path::new(&socket));
    loop {
        (0..ENTRIES / 2).for_each(|lba| host.push(1, write(lba.into())));
        host.ring(1);
        (0..ENTRIES / 2).for_each(|_| assert_eq!(host.wait(1), 0));
    }
}

#[test]
fn killed_clients_leave_a_server_that_works() {
    let served = served(ClientMemory::Any);
    let commands = || served.emulator.counters().queues[1].commands;
    for round in 1..=3 {
        let mut client = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "rude::client_that_is_killed", "--ignored"])
            .env(SOCKET, &served.path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (before, deadline) = (commands(), Instant::now() + Duration::from_secs(60));
        while commands() < before + 500 {
            assert!(
                Instant::now() < deadline && client.try_wait().unwrap().is_none(),
                "no I/O to be killed in"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        client.kill().unwrap();
        client.wait().unwrap();
        next_client_is_served(&served.path, round);
    }
    assert_eq!(served.emulator.memory().faults(), [], "its memory stays as long as commands may use it");
}

/// The reply finds nobody; the reset is complete all the same before the next client comes.
#[test]
fn clients_that_leave_during_a_reset_leave_a_server_that_works() {
    let served = served(ClientMemory::Any);
    for round in 0..20 {
        let mut host = Host::new(&served.path);
        (0..ENTRIES / 2).for_each(|lba| host.push(1, write(lba.into())));
        host.ring(1);
        let disable = RegionAccess { offset: 0x14.into(), region: region::BAR0.into(), count: 4.into() };
        let disable = [disable.as_bytes(), &[0; 4]].concat();
        let (command, body) = match round % 2 {
            0 => (Command::REGION_WRITE, disable.as_slice()),
            _ => (Command::DEVICE_RESET, [].as_slice()),
        };
        host.client.0.send_command((9, command, 0), &[body], &[], soon()).unwrap();
    }
    next_client_is_served(&served.path, 7);
    assert_eq!(served.emulator.memory().faults(), []);
}

#[test]
fn memory_of_clients_that_vanish_is_given_back() {
    const NAME: &str = "vanishing-client";
    let served = served(ClientMemory::Any);
    let left = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains(NAME)).count()
    };
    for _ in 0..10 {
        let client = Client::connect(&served.path);
        let memory = memfd_create(NAME, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&memory, 4096).unwrap();
        for piece in 0..50 {
            assert_eq!(client.map(0x10_0000 * (piece + 1), 4096, RW, Some(memory.as_fd())), Ok(()));
        }
        assert_eq!(left(), 50, "only its own");
    }
    next_client_is_served(&served.path, 3);
    assert_eq!(left(), 0);
}

#[test]
fn client_that_does_not_take_its_interrupts_gets_its_completions() {
    let served = served(ClientMemory::Any);
    let mut host = Host::new(&served.path);
    let eventfd = EventFd::new().unwrap();
    host.connect_interrupt(eventfd.as_fd());
    // Blocking again, and full.
    let flags = OFlag::from_bits_retain(fcntl(eventfd.as_fd(), FcntlArg::F_GETFL).unwrap());
    fcntl(eventfd.as_fd(), FcntlArg::F_SETFL(flags & !OFlag::O_NONBLOCK)).unwrap();
    eventfd.write(u64::MAX - 1).unwrap();
    for lba in 0..200 {
        assert_eq!(host.run(1, write(lba)), 0);
    }
    // Once it listens again, it hears.
    assert_eq!(eventfd.read(), Ok(u64::MAX - 1));
    assert_eq!(host.run(1, write(0)), 0);
    let mut watched = [PollFd::new(eventfd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut watched, PollTimeout::from(60_000u16)), Ok(1), "no interrupt");
    eventfd.read().unwrap();
    eventfd.write(u64::MAX - 1).unwrap();
    assert_eq!(host.run(1, write(0)), 0);
    drop(host);
    next_client_is_served(&served.path, 9);
}

/// A server whose patience a test can wait for.
fn impatient() -> ServerOptions {
    ServerOptions { message_timeout: Duration::from_millis(300), ..ServerOptions::default() }
}

#[test]
fn clients_that_stall_are_dropped() {
    let served = served_with(impatient());
    // Nothing at all; half a header; a header without all of its body.
    for bytes in [&[][..], &[1, 0, 1, 0, 24], &[1, 0, 1, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
        let mut silent = UnixStream::connect(&served.path).unwrap();
        silent.write_all(bytes).unwrap();
        next_client_is_served(&served.path, 1);
    }
}

/// Its replies fill the socket, and the server cannot go on.
#[test]
fn client_that_asks_and_does_not_listen_is_dropped() {
    let served = served_with(impatient());
    let deaf = Client::connect(&served.path);
    let request = RegionAccess { offset: 0.into(), region: region::CONFIG.into(), count: 256.into() };
    let is_taken = |n: u16| {
        let deadline = Instant::now() + Duration::from_millis(100);
        deaf.0.send_command((n, Command::REGION_READ, 0), &[request.as_bytes()], &[], deadline).is_ok()
    };
    assert!(!(0..u16::MAX).all(is_taken), "the server takes everything");
    next_client_is_served(&served.path, 2);
}

#[test]
fn client_that_is_only_slow_is_kept() {
    let served = served_with(impatient());
    let mut host = Host::new(&served.path);
    std::thread::sleep(3 * impatient().message_timeout);
    assert_eq!(host.run(1, write(0)), 0);
    assert_eq!(host.client.read32(region::BAR0, 8), 0x0001_0400);
}

/// One that waits for its turn can give up or talk; the one being served does not notice.
#[test]
fn clients_that_wait_do_not_disturb_the_one_being_served() {
    let served = served(ClientMemory::Any);
    let mut host = Host::new(&served.path);
    let hello = version_body(Capabilities::default());
    let waiting = Channel::connect(&served.path, soon()).unwrap();
    waiting.send_command((9, Command::VERSION, 0), &[&hello], &[], soon()).unwrap();
    for lba in 0..20 {
        drop(UnixStream::connect(&served.path).unwrap());
        assert_eq!(host.run(1, write(lba)), 0);
    }
    drop(host);
    assert!(!waiting.receive(MAX_MESSAGE, None, soon()).unwrap().header.failed());
    drop(waiting);
    next_client_is_served(&served.path, 5);
}
