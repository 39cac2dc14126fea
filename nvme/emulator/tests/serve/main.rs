//! The server against clients that break every rule: the worst that happens is the end of their session.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

mod client;
mod rude;

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nvme_emulator::serve::{ClientMemory, ServeError, Server, ServerOptions};
use nvme_emulator::{ControllerConfig, EmulatedController, NamespaceConfig};
use vfio_user_protocol::{
    Capabilities, Channel, Command, DmaFlags, IrqInfo, IrqSet, IrqSetFlags, MAX_MESSAGE, RegionAccess,
    RegionInfo, UnmapFlags, irq_index, parse_sparse_areas, region, version_body,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use client::{Client, RW, memory, served, soon};

fn parse<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> T {
    T::read_from_prefix(body).unwrap().0
}

#[test]
fn it_looks_like_an_nvme_controller() {
    let served = served(ClientMemory::Any);
    let client = Client::connect(&served.path);
    assert_eq!(client.read32(region::CONFIG, 8) >> 8, 0x01_08_02);
    assert_eq!(client.read32(region::BAR0, 8), 0x0001_0400, "VS");
    let request = RegionInfo { argsz: 4064.into(), index: region::BAR0.into(), ..RegionInfo::default() };
    let reply = client.exchange(Command::DEVICE_GET_REGION_INFO, request.as_bytes(), &[]);
    let areas = parse_sparse_areas(&reply.body).unwrap();
    assert_eq!((areas.len(), areas[0].offset.get(), reply.fds.len()), (1, 0x1000, 1));
    let irqs = IrqInfo { argsz: 16.into(), index: irq_index::MSIX.into(), ..IrqInfo::default() };
    let irqs: IrqInfo = parse(&client.ask(Command::DEVICE_GET_IRQ_INFO, irqs.as_bytes(), &[]).unwrap());
    assert_eq!(irqs.count.get(), u32::from(served.emulator.interrupt_vectors()));
}

#[test]
fn mappings_are_checked_and_bounded() {
    let served = served(ClientMemory::Any);
    let client = Client::connect(&served.path);
    let fd = memory(1 << 20);
    let map = |iova, bytes, flags| client.map(iova, bytes, flags, Some(fd.as_fd()));
    assert_eq!(map(0x10_0000, 1 << 20, RW), Ok(()));
    assert_eq!(map(0x10_0000, 4096, RW), Err(Errno::EEXIST));
    assert_eq!(map(0x1f_f000, 8192, RW), Err(Errno::EEXIST));
    assert_eq!(map(0x40_0000, 0, RW), Err(Errno::EINVAL));
    assert_eq!(map(0x40_0000, 100, RW), Err(Errno::EINVAL));
    assert_eq!(map(0x40_0001, 4096, RW), Err(Errno::EINVAL));
    assert_eq!(map(0x40_0000, 2 << 20, RW), Err(Errno::EINVAL), "beyond the file");
    assert_eq!(map(u64::MAX - 4095, 8192, RW), Err(Errno::EINVAL));
    assert_eq!(map(0x40_0000, 4096, DmaFlags::from_bits_retain(1 << 9)), Err(Errno::EINVAL));
    assert_eq!(client.unmap(0x10_0000, 4096, UnmapFlags::empty()), Err(Errno::EINVAL));
    assert_eq!(client.unmap(0x50_0000, 4096, UnmapFlags::empty()), Err(Errno::ENOENT));
    assert_eq!(client.unmap(0x10_0000, 1 << 20, UnmapFlags::DIRTY_BITMAP), Err(Errno::ENOTSUP));
    assert_eq!(client.unmap(0x10_0000, 1 << 20, UnmapFlags::empty()), Ok(()));
    // Memory without a descriptor is known, and out of reach.
    assert_eq!(client.map(0x10_0000, 4096, RW, None), Ok(()));
    assert_eq!(client.unmap(0, 0, UnmapFlags::ALL), Ok(()));
    let page = memory(4096);
    let full = (0..5000).position(|i| client.map(i << 20, 4096, RW, Some(page.as_fd())).is_err());
    assert_eq!(full, Some(1024));
}

#[test]
fn a_strict_server_takes_only_memory_that_cannot_shrink() {
    let served = served(ClientMemory::Sealed);
    let client = Client::connect(&served.path);
    let sealable = memory(4096);
    assert_eq!(client.map(0x1000, 4096, RW, Some(sealable.as_fd())), Ok(()));
    assert!(nix::unistd::ftruncate(&sealable, 0).is_err(), "it is sealed now");
    let plain = memfd_create("plain", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&plain, 4096).unwrap();
    assert_eq!(client.map(0x8000, 4096, RW, Some(plain.as_fd())), Err(Errno::EPERM));
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    assert_eq!(client.map(0x8000, 4096, RW, Some(file.as_fd())), Err(Errno::EPERM));
}

#[test]
fn interrupts_are_connected_to_eventfds_only() {
    let served = served(ClientMemory::Any);
    let client = Client::connect(&served.path);
    let eventfd = EventFd::new().unwrap();
    let set = |flags: IrqSetFlags, index, start: u32, count: u32, fds: &[BorrowedFd<'_>]| {
        let request = IrqSet {
            argsz: 20.into(),
            flags: flags.bits().into(),
            index: u32::into(index),
            start: start.into(),
            count: count.into(),
        };
        client.ask(Command::DEVICE_SET_IRQS, request.as_bytes(), fds).map(drop)
    };
    let connect = IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER;
    let clear = IrqSetFlags::DATA_NONE | IrqSetFlags::ACTION_TRIGGER;
    let (msix, fd) = (irq_index::MSIX, eventfd.as_fd());
    assert_eq!(set(connect, msix, 0, 2, &[fd, fd]), Ok(()));
    assert_eq!(set(connect, msix, 0, 2, &[fd]), Err(Errno::EINVAL), "one descriptor too few");
    assert_eq!(set(connect, msix, u32::MAX, 2, &[fd, fd]), Err(Errno::EINVAL));
    assert_eq!(set(connect, irq_index::INTX, 0, 1, &[fd]), Err(Errno::EINVAL));
    assert_eq!(set(connect, 77, 0, 1, &[fd]), Err(Errno::EINVAL));
    assert_eq!(set(IrqSetFlags::all(), msix, 0, 1, &[fd]), Err(Errno::EINVAL));
    assert_eq!(set(clear, msix, 0, 0, &[]), Ok(()));
    assert_eq!(set(clear, irq_index::INTX, 0, 0, &[]), Ok(()));
    let (_reader, writer) = std::io::pipe().unwrap();
    assert_eq!(set(connect, msix, 0, 1, &[writer.as_fd()]), Err(Errno::EINVAL), "a full pipe would block");
}

#[test]
fn senseless_commands_are_refused_and_the_session_goes_on() {
    let served = served(ClientMemory::Any);
    let client = Client::connect(&served.path);
    let access = |region: u32, offset: u64, count: u32| RegionAccess {
        offset: offset.into(),
        region: region.into(),
        count: count.into(),
    };
    for (region, offset, count) in [
        (region::BAR0, u64::MAX, 4),
        (region::BAR0, 1 << 40, 4),
        (region::BAR0, 0, u32::MAX),
        (region::CONFIG, 4094, 4),
        (region::VGA, 0, 1),
        (99, 0, 4),
    ] {
        let body = access(region, offset, count);
        let reply = client.ask(Command::REGION_READ, body.as_bytes(), &[]);
        assert_eq!(reply, Err(Errno::EINVAL), "{region} {offset:#x} {count}");
        let reply = client.ask(Command::REGION_WRITE, body.as_bytes(), &[]);
        assert_eq!(reply, Err(Errno::EINVAL), "{region} {offset:#x} {count}");
    }
    let data = [access(region::BAR0, 0x14, 4).as_bytes(), &[0; 3]].concat();
    assert_eq!(client.ask(Command::REGION_WRITE, &data, &[]), Err(Errno::EINVAL), "too little data");
    let data = [access(region::BAR0, 0x15, 2).as_bytes(), &[0; 2]].concat();
    assert_eq!(client.ask(Command::REGION_WRITE, &data, &[]), Err(Errno::EINVAL), "half a register");
    for command in 0..40 {
        for body in [&[][..], &[0xff; 3], &[0xff; 64]] {
            let reply = client.exchange(Command(command), body, &[]);
            // These two have nothing in them that could be wrong.
            let harmless = [Command::DEVICE_RESET, Command::DEVICE_GET_INFO].contains(&Command(command));
            assert!(reply.header.failed() || harmless, "{command} {body:?}");
        }
    }
    assert_eq!(client.read32(region::BAR0, 8), 0x0001_0400);
}

fn raw_header(command: u16, size: u32) -> Vec<u8> {
    let mut bytes = vec![1, 0];
    bytes.extend_from_slice(&command.to_le_bytes());
    bytes.extend_from_slice(&size.to_le_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes
}

/// Each is dropped, none takes the server along, and the next client is served.
#[test]
fn clients_that_break_the_stream_are_dropped() {
    let served = served(ClientMemory::Any);
    let noise: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let first_messages: [Vec<u8>; 7] = [
        noise,
        raw_header(1, 0),
        raw_header(1, u32::MAX),
        raw_header(9, 16),
        raw_header(1, 16),
        [raw_header(1, 20).as_slice(), &[7, 0, 0, 0]].concat(),
        [raw_header(1, 24).as_slice(), &[0, 0, 1, 0], b"{[}\0"].concat(),
    ];
    for bytes in first_messages {
        let mut stream = UnixStream::connect(&served.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // It may have hung up before everything was written.
        let _ = stream.write_all(&bytes);
        let mut rest = Vec::new();
        // An end or a reset, but not silence.
        if let Err(error) = stream.read_to_end(&mut rest) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        }
    }
    for _ in 0..20 {
        drop(UnixStream::connect(&served.path).unwrap());
    }
    assert_eq!(Client::connect(&served.path).read32(region::BAR0, 8), 0x0001_0400);
}

#[test]
fn nonsense_in_the_doorbell_page_does_no_harm() {
    let served = served(ClientMemory::Any);
    let client = Client::connect(&served.path);
    let request = RegionInfo { argsz: 4064.into(), index: region::BAR0.into(), ..RegionInfo::default() };
    let reply = client.exchange(Command::DEVICE_GET_REGION_INFO, request.as_bytes(), &[]);
    let page = std::fs::File::from(reply.fds.into_iter().next().unwrap());
    assert!(page.set_len(0).is_err(), "it cannot shrink under the server");
    for round in 0..200u8 {
        std::os::unix::fs::FileExt::write_all_at(&page, &[round.wrapping_mul(37); 4096], 0x1000).unwrap();
    }
    assert_eq!(client.read32(region::BAR0, 8), 0x0001_0400);
}

#[test]
fn a_socket_in_use_is_not_taken_away() {
    let served = served(ClientMemory::Any);
    let config = ControllerConfig::with_namespace(NamespaceConfig::memory(1 << 20));
    let other = EmulatedController::new(config).unwrap();
    let refused = Server::bind(Arc::clone(&other), &served.path, ServerOptions::default());
    assert!(matches!(refused, Err(ServeError::InUse { .. })));
    let folder = tempfile::tempdir().unwrap();
    let dead = folder.path().join("dead");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let server = Server::bind(other, &dead, ServerOptions::default()).unwrap();
    drop(server);
    assert!(!dead.exists());
}

#[test]
fn nothing_of_a_client_is_left_when_it_goes() {
    let served = served(ClientMemory::Any);
    let fd = memory(4096);
    for _ in 0..3 {
        let client = Client::connect(&served.path);
        // The same address each time: it must be free again.
        assert_eq!(client.map(0x1000, 4096, RW, Some(fd.as_fd())), Ok(()));
    }
}

/// A client that shrinks the file behind its queues makes the server's next access raise SIGBUS, which would end the process.
#[test]
fn memory_that_shrinks_under_the_server_ends_nothing_but_its_owners_commands() {
    let served = served(ClientMemory::Any);
    for _ in 0..3 {
        let client = Client::connect(&served.path);
        // Cannot be sealed, as little as a file could.
        let memory = memfd_create("shrinks", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&memory, 16384).unwrap();
        assert_eq!(client.map(0x1000, 16384, RW, Some(memory.as_fd())), Ok(()));
        client.enable(0x1000);
        nix::unistd::ftruncate(&memory, 0).unwrap();
        // The submission queue is read, and completions written, by the time that the message is answered.
        client.write(region::BAR0, 0x1000, &5u32.to_le_bytes());
        assert_eq!(client.read32(region::BAR0, 8), 0x0001_0400, "the server goes on");
    }
    // The next client has a controller that works: each enables it anew.
    let client = Client::connect(&served.path);
    let whole = memory(16384);
    assert_eq!(client.map(0x1000, 16384, RW, Some(whole.as_fd())), Ok(()));
    client.enable(0x1000);
    // Identify Controller (§5.15) into the third page.
    let mut command = [0u8; 64];
    command[0] = 6;
    command[24..32].copy_from_slice(&0x3000u64.to_le_bytes());
    command[40] = 1;
    nix::sys::uio::pwrite(&whole, &command, 0).unwrap();
    client.write(region::BAR0, 0x1000, &1u32.to_le_bytes());
    let mut completion = [0u8; 16];
    nix::sys::uio::pread(&whole, &mut completion, 4096).unwrap();
    assert_eq!(completion[14..], [1, 0], "success, phase 1");
    let mut model = [0u8; 6];
    nix::sys::uio::pread(&whole, &mut model, 8192 + 24).unwrap();
    assert_eq!(&model, b"Pollux");
}

/// Whoever comes while another is served waits for its turn, and is not turned away.
#[test]
fn a_second_client_has_its_turn_when_the_first_one_leaves() {
    let served = served(ClientMemory::Any);
    let first = Client::connect(&served.path);
    let second = Channel::connect(&served.path, soon()).unwrap();
    let hello = version_body(Capabilities::default());
    second.send_command((9, Command::VERSION, 0), &[&hello], &[], soon()).unwrap();
    assert_eq!(first.read32(region::BAR0, 8), 0x0001_0400);
    let early = second.receive(MAX_MESSAGE, None, Instant::now() + Duration::from_millis(50));
    assert!(early.is_err(), "it was served beside the first");
    drop(first);
    assert!(!second.receive(MAX_MESSAGE, None, soon()).unwrap().header.failed());
}
