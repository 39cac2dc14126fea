//! What is behind a connection: whether it is an NVMe controller, how large its BAR0 is, how many vectors it has, and
//! where its doorbells can be mapped.
//!
//! Invariants: everything the server says is checked before it is used: sizes, alignments, that a mapping lies in its file.
//!
//! A file that shrinks after it was looked at does no harm: stores into it are watched. It is sealed besides, where it can be.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nvme_sigbus::Watch;
use nvme_spec::registers::DOORBELL_BASE;
use reactor::dma::PAGE_SIZE;
use vfio_user_protocol::{
    Command, DeviceFlags, DeviceInfo, IrqInfo, IrqInfoFlags, RegionFlags, RegionInfo, SparseArea, irq_index,
    parse_sparse_areas, region,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};
use zerocopy::IntoBytes;

use super::VfioUserError;
use super::connection::{Connection, RequestError};

/// Largest BAR0 that is believed.
const MAX_BAR_BYTES: u64 = 1 << 30;
/// Room for a region's capabilities.
const REGION_INFO_ROOM: u32 = 1024;
/// Vectors that are used at most (PCI: MSI-X has 2,048).
const MAX_VECTORS: u32 = 2048;
/// Class code of NVMe controllers, in the upper three bytes of the dword at 8.
const NVME_CLASS: u32 = 0x01_08_02;
const CONFIG_COMMAND: u64 = 4;
const CONFIG_STATUS: u64 = 6;
const CONFIG_CLASS: u64 = 8;
const CONFIG_CAPABILITIES: u64 = 0x34;
/// Status: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Identifier of the MSI-X capability; Message Control lies 2 bytes into it.
const CAPABILITY_MSIX: u8 = 0x11;
const MSIX_ENABLE: u16 = 1 << 15;
/// Capabilities that fit behind the header: a longer list is a loop.
const MAX_CAPABILITIES: usize = 48;
/// Memory space, bus master, no INTx.
const COMMAND_BITS: u16 = 1 << 1 | 1 << 2 | 1 << 10;

/// What was found.
pub(super) struct Device {
    pub(super) bar_bytes: u64,
    pub(super) vectors: u16,
    pub(super) doorbells: Option<DoorbellArea>,
}

impl Device {
    /// Asks the server, and enables the function.
    pub(super) fn explore(connection: &Connection, path: &Path) -> Result<Self, VfioUserError> {
        let failed = |source| VfioUserError::Request { path: path.to_owned(), source };
        let unfit = |what: String| VfioUserError::Device { path: path.to_owned(), what };
        let info = device_info(connection).map_err(failed)?;
        if !DeviceFlags::from_bits_retain(info.flags.get()).contains(DeviceFlags::PCI)
            || info.regions.get() <= region::CONFIG
        {
            return Err(unfit("does not serve a PCI device".into()));
        }
        let mut class = [0; 4];
        connection.region_read(region::CONFIG, CONFIG_CLASS, &mut class).map_err(failed)?;
        let class = u32::from_le_bytes(class) >> 8;
        if class != NVME_CLASS {
            return Err(unfit(format!(
                "serves a device of class {class:06x}, not an NVMe controller ({NVME_CLASS:06x})"
            )));
        }
        let (bar, areas, fds) = bar0(connection).map_err(failed)?;
        let bar_bytes = bar.size.get();
        if !(DOORBELL_BASE + 8..=MAX_BAR_BYTES).contains(&bar_bytes) {
            return Err(unfit(format!("says that BAR0 has {bar_bytes:#x} bytes, which cannot be")));
        }
        let doorbells = doorbell_area(&bar, &areas, fds).map_err(unfit)?;
        let vectors =
            if info.irqs.get() > irq_index::MSIX { vectors(connection).map_err(failed)? } else { 0 };
        enable(connection).map_err(failed)?;
        Ok(Self { bar_bytes, vectors, doorbells })
    }
}

fn device_info(connection: &Connection) -> Result<DeviceInfo, RequestError> {
    let request = DeviceInfo { argsz: (size_of::<DeviceInfo>() as u32).into(), ..DeviceInfo::default() };
    let reply = connection.request(Command::DEVICE_GET_INFO, &[request.as_bytes()], &[])?;
    connection.parse(&reply)
}

fn vectors(connection: &Connection) -> Result<u16, RequestError> {
    let request = IrqInfo {
        argsz: (size_of::<IrqInfo>() as u32).into(),
        index: irq_index::MSIX.into(),
        ..IrqInfo::default()
    };
    let reply = connection.request(Command::DEVICE_GET_IRQ_INFO, &[request.as_bytes()], &[])?;
    let info: IrqInfo = connection.parse(&reply)?;
    if !IrqInfoFlags::from_bits_retain(info.flags.get()).contains(IrqInfoFlags::EVENTFD) {
        return Ok(0);
    }
    Ok(info.count.get().min(MAX_VECTORS) as u16)
}

/// BAR0, its mappable areas, and the descriptors that came with them.
fn bar0(connection: &Connection) -> Result<(RegionInfo, Vec<SparseArea>, Vec<OwnedFd>), RequestError> {
    let request =
        RegionInfo { argsz: REGION_INFO_ROOM.into(), index: region::BAR0.into(), ..RegionInfo::default() };
    // The structure is sent with as much room as the reply may take: some servers look at one, some at the other.
    let room = [0; REGION_INFO_ROOM as usize - size_of::<RegionInfo>()];
    let body = [request.as_bytes(), &room];
    let reply = connection.request_with_fds(Command::DEVICE_GET_REGION_INFO, &body, &[])?;
    let info: RegionInfo = connection.parse(&reply)?;
    let areas = if !RegionFlags::from_bits_retain(info.flags.get()).contains(RegionFlags::MMAP) {
        Vec::new()
    } else {
        let whole = SparseArea { offset: 0.into(), size: info.size };
        parse_sparse_areas(&reply.body).unwrap_or_else(|| vec![whole])
    };
    Ok((info, areas, reply.fds))
}

/// Enables memory space, bus mastering and MSI-X, and turns the legacy interrupt off. SPDK's target sends nothing to an eventfd
/// while MSI-X is off in the configuration space, however the eventfd was connected.
pub(super) fn enable(connection: &Connection) -> Result<(), RequestError> {
    let mut command = [0; 2];
    connection.region_read(region::CONFIG, CONFIG_COMMAND, &mut command)?;
    let command = u16::from_le_bytes(command) | COMMAND_BITS;
    connection.region_write(region::CONFIG, CONFIG_COMMAND, &command.to_le_bytes())?;
    let read = |at, bytes: &mut [u8]| connection.region_read(region::CONFIG, at, bytes);
    let Some(at) = msix_control(read)? else { return Ok(()) };
    let mut control = [0; 2];
    connection.region_read(region::CONFIG, at, &mut control)?;
    let control = u16::from_le_bytes(control) | MSIX_ENABLE;
    connection.region_write(region::CONFIG, at, &control.to_le_bytes())
}

/// Where in the configuration space MSI-X's Message Control is, if the function has MSI-X.
fn msix_control<E>(mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>) -> Result<Option<u64>, E> {
    let mut status = [0; 2];
    read(CONFIG_STATUS, &mut status)?;
    if u16::from_le_bytes(status) & STATUS_CAPABILITIES == 0 {
        return Ok(None);
    }
    let mut next = [0; 1];
    read(CONFIG_CAPABILITIES, &mut next)?;
    for _ in 0..MAX_CAPABILITIES {
        let at = u64::from(next[0] & !3);
        // Below is the header: the end of the list, or nonsense.
        if at < 0x40 {
            break;
        }
        let mut capability = [0; 2];
        read(at, &mut capability)?;
        if capability[0] == CAPABILITY_MSIX {
            return Ok(Some(at + 2));
        }
        next[0] = capability[1];
    }
    Ok(None)
}

/// Doorbells that are mapped.
pub(super) struct DoorbellArea {
    /// Where in BAR0 it begins.
    first: u64,
    /// A file that shrinks makes stores raise SIGBUS; they are lost instead. Dropped before the mapping.
    _watch: Watch,
    memory: MmapRegion,
}

impl DoorbellArea {
    /// Stores a doorbell. `false`: it lies outside.
    pub(super) fn store(&self, offset: u64, value: u32) -> bool {
        let Some(at) = offset.checked_sub(self.first).and_then(|at| usize::try_from(at).ok()) else {
            return false;
        };
        // Out of range or misaligned is an error.
        let Ok(slot) = self.memory.get_atomic_ref::<AtomicU32>(at) else { return false };
        // Release: the server that sees the doorbell sees the entries.
        slot.store(value.to_le(), Ordering::Release);
        true
    }
}

/// Maps the area with the first doorbell, if there is one. The others are for other registers, or other queues, which
/// then are written by message.
fn doorbell_area(
    bar: &RegionInfo,
    areas: &[SparseArea],
    fds: Vec<OwnedFd>,
) -> Result<Option<DoorbellArea>, String> {
    let holds_doorbells = |area: &SparseArea| {
        area.offset.get() <= DOORBELL_BASE && end_of(area).is_some_and(|end| end > DOORBELL_BASE)
    };
    let Some(index) = areas.iter().position(holds_doorbells) else { return Ok(None) };
    let area = &areas[index];
    let (offset, size) = (area.offset.get(), area.size.get());
    let page = PAGE_SIZE as u64;
    let in_bar = end_of(area).is_some_and(|end| end <= bar.size.get());
    let in_file = bar.offset.get().checked_add(offset);
    let (true, Some(in_file)) = (in_bar && offset.is_multiple_of(page) && size.is_multiple_of(page), in_file)
    else {
        return Err(format!("offers doorbells to map at {offset:#x}, {size:#x} bytes, which cannot be"));
    };
    // One descriptor for each area, or one for all.
    let count = fds.len();
    let fd = fds.into_iter().enumerate().find(|(i, _)| *i == index || count == 1).map(|(_, fd)| fd);
    let Some(fd) = fd else { return Ok(None) };
    let refused = |reason: String| format!("offers doorbells that cannot be mapped: {reason}");
    // Fails for what cannot be sealed.
    let _ = fcntl(fd.as_fd(), FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK));
    let file = File::from(fd);
    let length = file.metadata().map_err(|error| refused(error.to_string()))?.len();
    if in_file.checked_add(size).is_none_or(|end| end > length) {
        return Err(refused(format!("they end beyond their file of {length:#x} bytes")));
    }
    let memory = MmapRegion::from_file(FileOffset::new(file, in_file), size as usize)
        .map_err(|error| refused(error.to_string()))?;
    let watch =
        Watch::new(memory.as_ptr() as usize, memory.size()).map_err(|error| refused(error.to_string()))?;
    Ok(Some(DoorbellArea { first: offset, _watch: watch, memory }))
}

fn end_of(area: &SparseArea) -> Option<u64> {
    area.offset.get().checked_add(area.size.get())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn found(space: &[u8; 256]) -> Option<u64> {
        let read = |at: u64, bytes: &mut [u8]| -> Result<(), Infallible> {
            let at = at as usize;
            bytes.copy_from_slice(&space[at..at + bytes.len()]);
            Ok(())
        };
        match msix_control(read) {
            Ok(found) => found,
        }
    }

    /// SPDK's target sent no interrupt, so that a sleeping reactor was woken once a second, by its watchdog.
    #[test]
    fn msix_is_found_behind_other_capabilities_and_in_no_nonsense() {
        let mut space = [0; 256];
        (space[0x34], space[0x40], space[0x41], space[0x50]) = (0x40, 0x01, 0x50, 0x11);
        assert_eq!(found(&space), None, "no list is announced");
        space[6] = 1 << 4;
        assert_eq!(found(&space), Some(0x52));
        space[0x50] = 0x10;
        assert_eq!(found(&space), None);
        space[0x51] = 0x40;
        assert_eq!(found(&space), None, "a loop");
        space[0x51] = 0x08;
        assert_eq!(found(&space), None, "into the header");
        assert_eq!(found(&[0xff; 256]), None, "the last capability leads to itself");
    }
}
