//! One client, from its first message to its last.
//!
//! Owns: the dispatch of messages. A message that makes no sense is answered with an error; a stream that makes no sense ends
//! the session.
//!
//! Invariants: one message at a time, in order; a reply to every message that wants one; no message holds the session
//! longer than [`ServerOptions::message_timeout`]. The controller's workers may hold it while they finish a command.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nvme_spec::registers::DOORBELL_BASE;
use vfio_user_protocol::{
    Capabilities, Channel, ChannelError, Command, DeviceFlags, DeviceInfo, DmaMap, DmaUnmap, IrqInfo,
    IrqInfoFlags, IrqSet, IrqSetFlags, MAX_DATA, MAX_DESCRIPTORS, MAX_MESSAGE, Message, RegionAccess,
    RegionFlags, RegionInfo, Reply, SparseArea, irq_index, parse_version, region, region_info_body,
    version_body,
};
use zerocopy::{FromBytes, IntoBytes};

use super::config_space::{CONFIG_BYTES, ConfigEffect, ConfigSpace, MSIX_BAR_BYTES};
use super::doorbells::{DoorbellPage, Poller};
use super::memory::Memory;
use super::notifier::Notifier;
use super::pace::Pace;
use super::{ServerOptions, reset};
use crate::controller::EmulatedController;
use crate::interrupt::VectorMask;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionEnd {
    #[error("it left")]
    Left,
    #[error("the server was stopped")]
    Stopped,
    #[error("{0}")]
    Channel(ChannelError),
    #[error("its first message is {0}, not VERSION")]
    NoVersion(Command),
    #[error("{0}")]
    Version(#[from] vfio_user_protocol::VersionError),
    #[error("the system has no {what} for it: {source}")]
    System { what: &'static str, source: io::Error },
}

impl From<ChannelError> for SessionEnd {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Closed => Self::Left,
            ChannelError::Stopped => Self::Stopped,
            other => Self::Channel(other),
        }
    }
}

impl From<io::Error> for SessionEnd {
    fn from(source: io::Error) -> Self {
        Self::System { what: "socket", source }
    }
}

/// What a message is answered with.
#[derive(Default)]
struct Answer {
    body: Vec<u8>,
    /// The descriptor of BAR0 comes along.
    with_bar0: bool,
}

impl Answer {
    fn bytes(value: &(impl IntoBytes + zerocopy::Immutable)) -> Self {
        Self { body: value.as_bytes().to_vec(), with_bar0: false }
    }
}

pub(super) struct Session<'a> {
    controller: &'a Arc<EmulatedController>,
    channel: Channel,
    config: ConfigSpace,
    /// MSI-X table and pending bits: kept, without effect.
    bar4: Vec<u8>,
    memory: Memory,
    doorbells: Arc<DoorbellPage>,
    poller: Option<Poller>,
    /// From the first interrupt that is connected on.
    notifier: Option<Notifier>,
    bar0_bytes: u64,
    options: ServerOptions,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        controller: &'a Arc<EmulatedController>,
        channel: Channel,
        options: ServerOptions,
    ) -> Result<Self, SessionEnd> {
        let bar0_bytes = controller.bar_bytes().next_power_of_two();
        let doorbells = DoorbellPage::new(bar0_bytes)
            .map_err(|source| SessionEnd::System { what: "doorbell page", source })?;
        Ok(Self {
            controller,
            channel,
            config: ConfigSpace::new(bar0_bytes, controller.interrupt_vectors()),
            bar4: vec![0; MSIX_BAR_BYTES],
            memory: Memory::new(controller.memory(), options.memory),
            doorbells: Arc::new(doorbells),
            poller: None,
            notifier: None,
            bar0_bytes,
            options,
        })
    }

    /// Serves the client until one side ends it.
    pub(super) fn run(mut self, stop: BorrowedFd<'_>) -> SessionEnd {
        let end = self.greet(stop).and_then(|()| {
            self.controller.watch_queues(Some(Arc::clone(&self.doorbells) as _));
            loop {
                let message = self.next(stop)?;
                self.answer(message)?;
            }
        });
        // The poller first: it may be executing a command. Then no doorbell is rung any more, and the memory can go
        // once the controller has been reset.
        self.poller = None;
        self.controller.watch_queues(None);
        reset(self.controller);
        match end {
            Ok(never) => never,
            Err(end) => end,
        }
    }

    fn message_deadline(&self) -> Instant {
        Instant::now() + self.options.message_timeout
    }

    fn next(&self, stop: BorrowedFd<'_>) -> Result<Message, SessionEnd> {
        self.channel.wait_readable(Some(stop), None)?;
        Ok(self.channel.receive(MAX_MESSAGE, Some(stop), self.message_deadline())?)
    }

    /// The first message, and a thread for the doorbells.
    fn greet(&mut self, stop: BorrowedFd<'_>) -> Result<(), SessionEnd> {
        let message = self.channel.receive(MAX_MESSAGE, Some(stop), self.message_deadline())?;
        let deadline = self.message_deadline();
        if message.header.command != Command::VERSION || !message.header.is_command() {
            let _ = self.channel.send_reply(&message.header, &Reply::Failed(Errno::EINVAL), deadline);
            return Err(SessionEnd::NoVersion(message.header.command));
        }
        if let Err(error) = parse_version(&message.body) {
            let _ = self.channel.send_reply(&message.header, &Reply::Failed(Errno::EINVAL), deadline);
            return Err(error.into());
        }
        let ours = Capabilities { max_msg_fds: MAX_DESCRIPTORS as u64, max_data_xfer_size: MAX_DATA as u64 };
        let body = version_body(ours);
        self.channel.send_reply(&message.header, &Reply::Done { body: &body, fds: &[] }, deadline)?;
        let ServerOptions { spin, shortest_pause, longest_pause, .. } = self.options;
        let pace = Pace::new(Instant::now(), spin, shortest_pause, longest_pause);
        let poller = Poller::start(Arc::clone(self.controller), Arc::clone(&self.doorbells), pace)
            .map_err(|source| SessionEnd::System { what: "thread", source })?;
        self.poller = Some(poller);
        Ok(())
    }

    fn answer(&mut self, message: Message) -> Result<(), SessionEnd> {
        let header = message.header;
        let answer = if header.is_command() { self.execute(message) } else { Err(Errno::EINVAL) };
        if let Err(errno) = answer {
            tracing::debug!(command = %header.command, %errno, "message refused");
        }
        if !header.wants_reply() {
            return Ok(());
        }
        let deadline = self.message_deadline();
        match answer {
            Ok(answer) => {
                let bar0 = [self.doorbells.fd()];
                let fds: &[BorrowedFd<'_>] = if answer.with_bar0 { &bar0 } else { &[] };
                self.channel.send_reply(&header, &Reply::Done { body: &answer.body, fds }, deadline)?;
            }
            Err(errno) => self.channel.send_reply(&header, &Reply::Failed(errno), deadline)?,
        }
        Ok(())
    }

    fn execute(&mut self, message: Message) -> Result<Answer, Errno> {
        let Message { header, body, mut fds } = message;
        match header.command {
            Command::DMA_MAP => {
                let request = parse::<DmaMap>(&body)?;
                self.memory.map(&request, fds.pop()).map(|()| Answer::default())
            }
            Command::DMA_UNMAP => {
                let request = parse::<DmaUnmap>(&body)?;
                self.memory.unmap(&request).map(|()| Answer::bytes(&request))
            }
            Command::DEVICE_GET_INFO => {
                parse::<DeviceInfo>(&body)?;
                Ok(Answer::bytes(&DeviceInfo {
                    argsz: (size_of::<DeviceInfo>() as u32).into(),
                    flags: (DeviceFlags::RESET | DeviceFlags::PCI).bits().into(),
                    regions: region::COUNT.into(),
                    irqs: irq_index::COUNT.into(),
                }))
            }
            Command::DEVICE_GET_REGION_INFO => self.region_info(&parse(&body)?),
            Command::DEVICE_GET_IRQ_INFO => self.irq_info(&parse(&body)?),
            Command::DEVICE_SET_IRQS => self.set_irqs(&body, fds).map(|()| Answer::default()),
            Command::REGION_READ => self.region_read(&parse(&body)?),
            Command::REGION_WRITE => self.region_write(&body),
            Command::DEVICE_RESET => self.reset_device().map(|()| Answer::default()),
            Command::VERSION => Err(Errno::EINVAL),
            _ => Err(Errno::ENOTSUP),
        }
    }

    fn reset_device(&self) -> Result<(), Errno> {
        if reset(self.controller) { Ok(()) } else { Err(Errno::EBUSY) }
    }

    fn region_bytes(&self, index: u32) -> Option<u64> {
        match index {
            region::BAR0 => Some(self.bar0_bytes),
            region::BAR4 => Some(MSIX_BAR_BYTES as u64),
            region::CONFIG => Some(CONFIG_BYTES as u64),
            other => (other < region::COUNT).then_some(0),
        }
    }

    fn region_info(&self, request: &RegionInfo) -> Result<Answer, Errno> {
        let index = request.index.get();
        let size = self.region_bytes(index).ok_or(Errno::EINVAL)?;
        let mut flags = RegionFlags::empty();
        if size > 0 {
            flags |= RegionFlags::READ | RegionFlags::WRITE;
        }
        let area =
            SparseArea { offset: DOORBELL_BASE.into(), size: (self.bar0_bytes - DOORBELL_BASE).into() };
        let areas = if index == region::BAR0 { std::slice::from_ref(&area) } else { &[] };
        if !areas.is_empty() {
            flags |= RegionFlags::MMAP;
        }
        let info = RegionInfo {
            flags: flags.bits().into(),
            index: index.into(),
            size: size.into(),
            ..RegionInfo::default()
        };
        let body = region_info_body(info, areas, request.argsz.get() as usize);
        let with_bar0 = body.len() > size_of::<RegionInfo>();
        Ok(Answer { body, with_bar0 })
    }

    fn irq_info(&self, request: &IrqInfo) -> Result<Answer, Errno> {
        let index = request.index.get();
        let count = self.vectors(index).ok_or(Errno::EINVAL)?;
        Ok(Answer::bytes(&IrqInfo {
            argsz: (size_of::<IrqInfo>() as u32).into(),
            flags: (IrqInfoFlags::EVENTFD | IrqInfoFlags::MASKABLE).bits().into(),
            index: index.into(),
            count: u32::from(count).into(),
        }))
    }

    fn vectors(&self, index: u32) -> Option<u16> {
        match index {
            irq_index::MSIX => Some(self.controller.interrupt_vectors()),
            other => (other < irq_index::COUNT).then_some(0),
        }
    }

    fn set_irqs(&mut self, body: &[u8], fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let request = parse::<IrqSet>(body)?;
        let vectors = u32::from(self.vectors(request.index.get()).ok_or(Errno::EINVAL)?);
        let (start, count) = (request.start.get(), request.count.get());
        let end = start.checked_add(count).filter(|&end| end <= vectors).ok_or(Errno::EINVAL)?;
        let flags = IrqSetFlags::from_bits(request.flags.get()).ok_or(Errno::EINVAL)?;
        // Nothing of nothing: how all vectors of a kind are disconnected, also of one that has none.
        let range = if count == 0 { 0..vectors } else { start..end };
        let range = range.map(|vector| vector as u16);
        let (none, eventfd) = (IrqSetFlags::DATA_NONE, IrqSetFlags::DATA_EVENTFD);
        let trigger = IrqSetFlags::ACTION_TRIGGER;
        if flags == none | trigger && count == 0 || flags == eventfd | trigger && fds.is_empty() {
            range.for_each(|vector| drop(self.controller.clear_interrupt(vector)));
            return Ok(());
        }
        if flags == eventfd | trigger && fds.len() == count as usize {
            return range.zip(fds).try_for_each(|(vector, fd)| self.connect(vector, fd));
        }
        let mask = if flags == none | IrqSetFlags::ACTION_MASK {
            VectorMask::Masked
        } else if flags == none | IrqSetFlags::ACTION_UNMASK {
            VectorMask::Unmasked
        } else {
            return Err(Errno::EINVAL);
        };
        range.for_each(|vector| drop(self.controller.mask_interrupt(vector, mask)));
        Ok(())
    }

    fn connect(&mut self, vector: u16, fd: OwnedFd) -> Result<(), Errno> {
        // Writing to anything else might block, or do who knows what.
        let link = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)));
        if link.is_ok_and(|target| target.as_os_str() != "anon_inode:[eventfd]") {
            return Err(Errno::EINVAL);
        }
        let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
        fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        if self.notifier.is_none() {
            let notifier = Notifier::start(self.controller.interrupt_vectors()).map_err(|error| {
                tracing::warn!(%error, "no thread for the client's interrupts");
                Errno::EAGAIN
            })?;
            self.notifier = Some(notifier);
        }
        let notifier = self.notifier.as_ref().ok_or(Errno::EAGAIN)?;
        let relay = notifier.connect(vector, fd);
        self.controller.relay_interrupt(vector, relay).map_err(|_| Errno::EINVAL)
    }

    /// Checks that an access lies in its region. Returns offset and count.
    fn locate(&self, access: &RegionAccess) -> Result<(u64, usize), Errno> {
        let size = self.region_bytes(access.region.get()).ok_or(Errno::EINVAL)?;
        let (offset, count) = (access.offset.get(), access.count.get());
        let inside = offset.checked_add(u64::from(count)).is_some_and(|end| end <= size);
        if !inside || count as usize > MAX_DATA {
            return Err(Errno::EINVAL);
        }
        Ok((offset, count as usize))
    }

    fn region_read(&self, access: &RegionAccess) -> Result<Answer, Errno> {
        let (offset, count) = self.locate(access)?;
        let mut body = access.as_bytes().to_vec();
        match access.region.get() {
            region::BAR0 => self.read_bar0(offset, count, &mut body),
            region::BAR4 => body.extend_from_slice(&self.bar4[offset as usize..offset as usize + count]),
            _ => body.extend_from_slice(self.config.read(offset as usize, count)),
        }
        Ok(Answer { body, with_bar0: false })
    }

    fn read_bar0(&self, offset: u64, count: usize, body: &mut Vec<u8>) {
        if count == 8 && offset.is_multiple_of(8) && offset < DOORBELL_BASE {
            return body.extend_from_slice(&self.controller.read64(offset).to_le_bytes());
        }
        let end = offset + count as u64;
        let mut dword = offset & !3;
        while dword < end {
            let value = if dword < DOORBELL_BASE {
                self.controller.read32(dword)
            } else {
                self.doorbells.load(dword)
            };
            let from = offset.max(dword) - dword;
            let to = (end - dword).min(4);
            body.extend_from_slice(&value.to_le_bytes()[from as usize..to as usize]);
            dword += 4;
        }
    }

    fn region_write(&mut self, body: &[u8]) -> Result<Answer, Errno> {
        let (access, data) = RegionAccess::read_from_prefix(body).map_err(|_| Errno::EINVAL)?;
        let (offset, count) = self.locate(&access)?;
        if data.len() != count {
            return Err(Errno::EINVAL);
        }
        match access.region.get() {
            region::BAR0 => self.write_bar0(offset, data)?,
            region::BAR4 => self.bar4[offset as usize..offset as usize + count].copy_from_slice(data),
            _ => {
                if self.config.write(offset as usize, data) == ConfigEffect::Reset {
                    self.reset_device()?;
                }
            }
        }
        Ok(Answer::bytes(&access))
    }

    /// Registers are written by whole dwords or quadwords (§3.1).
    fn write_bar0(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        if let (Ok(bytes), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            let value = u32::from_le_bytes(bytes);
            if offset >= DOORBELL_BASE {
                self.doorbells.note(offset, value);
                self.controller.doorbell(offset, value);
            } else {
                self.controller.write32(offset, value);
            }
            return Ok(());
        }
        match <[u8; 8]>::try_from(data) {
            Ok(bytes) if offset.is_multiple_of(8) && offset < DOORBELL_BASE => {
                self.controller.write64(offset, u64::from_le_bytes(bytes));
                Ok(())
            }
            _ => Err(Errno::EINVAL),
        }
    }
}

/// The structure at the beginning of a body.
fn parse<T: FromBytes + zerocopy::Immutable + zerocopy::KnownLayout>(body: &[u8]) -> Result<T, Errno> {
    T::read_from_prefix(body).map(|(value, _)| value).map_err(|_| Errno::EINVAL)
}
