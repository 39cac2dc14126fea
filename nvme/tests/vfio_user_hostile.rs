//! The client against servers that break every rule: each is a clear error, or a removed device, in bounded time.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nvme::transport::vfio_user::VfioUserTransport;
use nvme::transport::{Transport, TransportError};
use vfio_user_protocol::{
    Capabilities, Channel, ChannelError, Command, DeviceInfo, IrqInfo, MAX_MESSAGE, Message, RegionAccess,
    RegionInfo, Reply, SparseArea, region, region_info_body, version_body,
};
use zerocopy::{FromBytes, IntoBytes};

/// What the server does instead of the honest reply to one command.
#[derive(Clone, Copy, Debug)]
enum Spoil {
    /// Answers with an errno.
    Refuse(Errno),
    /// Does not answer.
    Stall,
    /// Closes the connection.
    Close,
    /// Answers with fewer bytes.
    Short,
    /// Answers for another command's identifier.
    WrongId,
    /// Answers another command.
    WrongCommand,
    /// Announces a size nobody allocates.
    HugeSize,
    /// Sends the command back instead of a reply.
    CommandInstead,
    /// Sends commands of its own without end.
    Babble,
    /// Brings as many descriptors.
    Descriptors(usize),
    /// Answers with this body.
    Body(&'static [u8]),
}

struct Hostile {
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
    /// Value of the last write that wanted no reply.
    posted: Arc<AtomicU32>,
    _folder: tempfile::TempDir,
}

impl Hostile {
    /// A server that spoils its replies to `command` and is honest otherwise.
    fn new(command: Command, spoil: Spoil) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cntrl");
        let listener = UnixListener::bind(&path).unwrap();
        let posted = Arc::new(AtomicU32::new(u32::MAX));
        let last = Arc::clone(&posted);
        let thread = std::thread::spawn(move || {
            let channel = Channel::new(listener.accept().unwrap().0).unwrap();
            // Ends when the client hangs up.
            while let Ok(message) = channel.receive(MAX_MESSAGE, None, far()) {
                if !message.header.is_command() {
                    continue; // the client declines a command of ours
                }
                if let (false, Some(value)) = (message.header.wants_reply(), message.body.last_chunk()) {
                    last.store(u32::from_le_bytes(*value), Ordering::Release);
                }
                let spoilt = message.header.command == command;
                if if spoilt { spoil.reply(&channel, &message) } else { honest(&channel, &message) }.is_err()
                {
                    return;
                }
            }
        });
        Self { path, thread: Some(thread), posted, _folder: folder }
    }

    fn connect(&self) -> Result<VfioUserTransport, String> {
        VfioUserTransport::connect(&self.path, Duration::from_millis(300)).map_err(|error| error.to_string())
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn memory(bytes: i64) -> OwnedFd {
    let fd = memfd_create("hostile", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, bytes).unwrap();
    fd
}

/// What an honest server says, and the descriptors that belong to it.
fn honest_body(message: &Message) -> (Vec<u8>, Option<OwnedFd>) {
    let body = match message.header.command {
        Command::VERSION => version_body(Capabilities::default()),
        Command::DEVICE_GET_INFO => {
            DeviceInfo { argsz: 16.into(), flags: 3.into(), regions: 9.into(), irqs: 5.into() }
                .as_bytes()
                .to_vec()
        }
        Command::DEVICE_GET_REGION_INFO => {
            let info = RegionInfo { flags: 7.into(), size: 0x2000.into(), ..RegionInfo::default() };
            let area = SparseArea { offset: 0x1000.into(), size: 0x1000.into() };
            return (region_info_body(info, &[area], 4096), Some(memory(0x2000)));
        }
        Command::DEVICE_GET_IRQ_INFO => {
            IrqInfo { argsz: 16.into(), flags: 1.into(), index: 2.into(), count: 4.into() }
                .as_bytes()
                .to_vec()
        }
        Command::REGION_READ => {
            let (access, _) = RegionAccess::read_from_prefix(&message.body).unwrap();
            let mut body = access.as_bytes().to_vec();
            let class = access.region.get() == region::CONFIG && access.offset.get() == 8;
            let data = if class { [0, 2, 8, 1] } else { [0; 4] };
            body.extend((0..access.count.get() as usize).map(|i| data[i % 4]));
            body
        }
        _ => message.body.clone(),
    };
    (body, None)
}

fn send(
    channel: &Channel,
    message: &Message,
    body: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), ChannelError> {
    channel.send_reply(&message.header, &Reply::Done { body, fds }, far())
}

fn honest(channel: &Channel, message: &Message) -> Result<(), ChannelError> {
    if !message.header.wants_reply() {
        return Ok(());
    }
    let (body, fd) = honest_body(message);
    let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
    send(channel, message, &body, &fds)
}

impl Spoil {
    fn reply(self, channel: &Channel, message: &Message) -> Result<(), ChannelError> {
        let mut header = message.header;
        let (body, fd) = honest_body(message);
        let file = fd.unwrap_or_else(|| memory(4096));
        match self {
            Self::Refuse(errno) => channel.send_reply(&header, &Reply::Failed(errno), far()),
            Self::Stall => Ok(()),
            Self::Close => Err(ChannelError::Closed),
            Self::Short => send(channel, message, &body[..body.len().min(7)], &[]),
            Self::WrongId => {
                header.id = header.id.wrapping_add(1);
                channel.send_reply(&header, &Reply::Done { body: &body, fds: &[] }, far())
            }
            Self::WrongCommand => {
                header.command = Command(99);
                channel.send_reply(&header, &Reply::Done { body: &body, fds: &[] }, far())
            }
            Self::HugeSize => send(channel, message, &vec![0; 2 * MAX_MESSAGE], &[]),
            Self::CommandInstead => {
                channel.send_command((header.id, header.command, 0), &[&body], &[], far())
            }
            Self::Babble => loop {
                channel.send_command((1, Command::DMA_READ, 0x10), &[&[0; 16]], &[], far())?;
            },
            Self::Descriptors(count) => send(channel, message, &body, &vec![file.as_fd(); count]),
            Self::Body(body) => send(channel, message, body, &[file.as_fd()]),
        }
    }
}

/// Every reply of bring-up, spoilt in every way, is an error with words, well before the test's patience ends.
#[test]
fn spoilt_replies_while_connecting_are_clear_errors() {
    let commands =
        [Command::VERSION, Command::DEVICE_GET_INFO, Command::DEVICE_GET_IRQ_INFO, Command::REGION_READ];
    let spoils = [
        (Spoil::Refuse(Errno::EPERM), "refuses"),
        (Spoil::Stall, "in time"),
        (Spoil::Close, "closed the connection"),
        (Spoil::Short, ""),
        (Spoil::WrongId, "came for command"),
        (Spoil::WrongCommand, "came for command"),
        (Spoil::HugeSize, "bytes was announced"),
        (Spoil::CommandInstead, "in time"),
        (Spoil::Babble, "nobody asked for"),
        (Spoil::Descriptors(2), "brought 2 descriptors"),
    ];
    for command in commands {
        for (spoil, words) in spoils {
            let hostile = Hostile::new(command, spoil);
            let began = Instant::now();
            let error = hostile.connect().err().unwrap_or_else(|| panic!("{command}, {spoil:?}: no error"));
            assert!(error.contains(words), "{command}, {spoil:?}: {error}");
            assert!(began.elapsed() < Duration::from_secs(15), "{command}, {spoil:?}");
        }
    }
}

#[test]
fn devices_that_cannot_be_are_refused_by_name() {
    let of_class = |class: &'static [u8]| Hostile::new(Command::REGION_READ, Spoil::Body(class));
    // The descriptor that comes along is an error of its own, so these go through other commands.
    drop(of_class(&[0; 20]).connect().err().unwrap());
    let cases: [(Command, &'static [u8], &str); 3] = [
        (Command::DEVICE_GET_REGION_INFO, &[0xff; 32], "BAR0"),
        (Command::DEVICE_GET_REGION_INFO, &[0; 32], "BAR0"),
        (Command::DEVICE_GET_REGION_INFO, &[0; 31], "too short"),
    ];
    for (command, body, words) in cases {
        let error = Hostile::new(command, Spoil::Body(body)).connect().err().unwrap();
        assert!(error.contains(words), "{command}: {error}");
    }
}

fn region_info(offset: u64, size: u64) -> &'static [u8] {
    let info = RegionInfo { flags: 7.into(), size: 0x2000.into(), ..RegionInfo::default() };
    let area = SparseArea { offset: offset.into(), size: size.into() };
    region_info_body(info, &[area], 4096).leak()
}

/// A mapping beyond its file would end this process at the first doorbell.
#[test]
fn doorbells_that_cannot_be_mapped_are_refused() {
    for (offset, size) in [(0x1000, 0x4000), (0x800, 0x1800), (0x1000, 0x1001), (0, 1 << 40)] {
        let body = region_info(offset, size);
        let error = Hostile::new(Command::DEVICE_GET_REGION_INFO, Spoil::Body(body)).connect().err();
        assert!(
            error.as_ref().is_some_and(|error| error.contains("doorbells")),
            "{offset:#x} {size:#x}: {error:?}"
        );
    }
    // An area whose end wraps holds no doorbell: they are written by message.
    for (offset, size) in [(0x1000, u64::MAX), (0x3000, 0x1000)] {
        let hostile = Hostile::new(Command::DEVICE_GET_REGION_INFO, Spoil::Body(region_info(offset, size)));
        assert!(!hostile.connect().unwrap().maps_doorbells());
    }
}

#[test]
fn many_descriptors_are_too_many() {
    let hostile = Hostile::new(Command::DEVICE_GET_REGION_INFO, Spoil::Descriptors(16));
    assert!(hostile.connect().unwrap().maps_doorbells(), "one for each area is taken, the rest closed");
}

#[test]
fn a_server_that_fails_later_counts_as_removed() {
    for spoil in [Spoil::Stall, Spoil::Close, Spoil::WrongId, Spoil::HugeSize, Spoil::Babble] {
        let hostile = Hostile::new(Command::DEVICE_RESET, spoil);
        let transport = hostile.connect().unwrap();
        assert_eq!(transport.read32(8), Ok(0));
        assert!(transport.reset_function().is_err());
        assert_eq!(transport.read32(8), Ok(u32::MAX), "{spoil:?}");
        assert_eq!(transport.write32(0x14, 1), Ok(()));
        transport.doorbell(0x1000, 1);
        let mut watched =
            [nix::poll::PollFd::new(transport.removal_event().unwrap(), nix::poll::PollFlags::POLLIN)];
        assert_eq!(nix::poll::poll(&mut watched, nix::poll::PollTimeout::from(10_000u16)).unwrap(), 1);
        let revoked = transport.revoke_dma();
        assert_eq!(
            revoked.is_ok(),
            matches!(spoil, Spoil::Close),
            "only a server that went is quiet: {spoil:?}"
        );
    }
}

#[test]
fn memory_that_the_server_refuses_is_an_error_and_no_more() {
    let hostile = Hostile::new(Command::DMA_MAP, Spoil::Refuse(Errno::ENOSPC));
    let transport = hostile.connect().unwrap();
    let error = transport.allocate(4096).err().unwrap();
    assert!(matches!(&error, TransportError::Memory { reason, .. } if reason.contains("ENOSPC")), "{error}");
    assert_eq!(transport.read32(8), Ok(0), "the connection lives");
}

/// So many do not fit into the socket at once. The server was given up for that, and later, doorbells were lost.
#[test]
fn doorbells_by_message_wait_for_room_and_arrive() {
    let hostile = Hostile::new(Command::DEVICE_GET_REGION_INFO, Spoil::Body(region_info(0x3000, 0x1000)));
    let transport = hostile.connect().unwrap();
    for value in 0..20_000 {
        transport.doorbell(0x1000, value);
    }
    assert_eq!(transport.read32(8), Ok(0));
    assert_eq!(
        hostile.posted.load(Ordering::Acquire),
        19_999,
        "the last one went out before the register read"
    );
}

/// The file behind the doorbells shrinks: the store raised SIGBUS and ended the process.
#[test]
fn a_doorbell_page_that_vanishes_costs_its_doorbells_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cntrl");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let channel = Channel::new(listener.accept().unwrap().0).unwrap();
        let page = memory(0x2000);
        while let Ok(message) = channel.receive(MAX_MESSAGE, None, far()) {
            let fds = [page.as_fd()];
            let body = honest_body(&message).0;
            let info = message.header.command == Command::DEVICE_GET_REGION_INFO;
            if message.header.command == Command::DEVICE_RESET {
                nix::unistd::ftruncate(&page, 0).unwrap();
            }
            if send(&channel, &message, &body, if info { &fds } else { &[] }).is_err() {
                return;
            }
        }
    });
    let transport = VfioUserTransport::connect(&path, Duration::from_secs(10)).unwrap();
    transport.doorbell(0x1000, 1);
    transport.reset_function().unwrap();
    transport.doorbell(0x1000, 2);
    assert_eq!(transport.read32(8), Ok(0));
    drop(transport);
    server.join().unwrap();
}
