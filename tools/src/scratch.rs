//! The scratch marker: what says that a drive is free for destructive tests.
//!
//! Owns: [`Marker`] with its 4 KiB on the medium, [`survey`] (what a drive is and holds), [`permit`] (whether tests may destroy
//! what is on it), [`write()`] and [`remove`].
//!
//! There are two copies, either of which counts: block 15 (blocks of 4 KiB), which is reserved in a Pollux volume, where
//! [`format`](crate::device::format) puts the marker back; and the sixteenth block from the end, for tests that write to the beginning of a
//! drive. Where there is a volume, that block may be its data: the second copy is neither written nor believed there, and making a
//! volume wipes it.
//!
//! | at | bytes | field | meaning |
//! |---|---|---|---|
//! | 0 | 8 | magic | `PLXSCRAT` |
//! | 8 | 4 | crc | CRC32C of the block with this field zero |
//! | 12 | 4 | version | 1 |
//! | 16 | 8 | marked_at | seconds since 1970 |
//! | 24 | 4 | nsid | namespace |
//! | 28 | 4 | | zero |
//! | 32 | 16 | nguid | of the namespace |
//! | 48 | 8 | eui64 | of the namespace |
//! | 56 | 20 | serial | as the controller gives it |
//! | 76 | 40 | model | as the controller gives it |
//! | 116 | 3980 | | zero |
//!
//! Numbers are little-endian.
//!
//! Invariants: a marker permits nothing on another drive than it was made for (a copied image), nor where something that is not
//! ours has appeared beside it (a partition table); but for [`wipe_foreign`] nothing here overwrites anything but the blocks of the
//! marker.
//!
//! *Legal crash outcomes*: either copy, both or none, before [`write()`] or [`remove`] return.
//!
//! Excludes: asking the user (`cli`).

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use fs_core::disk::VolumeDisk;
use fs_core::error::FsError;
use fs_core::mkfs::{Occupant, occupant};
use fs_core::types::{BLOCK_SIZE, BlockCount, BlockNr};
use nvme::Controller;
use reactor::Context;
use reactor::block::Durability;

use crate::device::{self, DeviceSpec};
use crate::failure::{During, Failure};

/// Where the first copy lies: reserved in a Pollux volume, behind the partition tables of others.
pub const FIRST_COPY: BlockNr = BlockNr::new(15);
/// Blocks from the second copy to the end: before what `mkfs` clears there.
const SECOND_COPY_FROM_END: u64 = 16;
/// Blocks of the smallest device that has a second copy.
const TWO_COPIES_BLOCKS: u64 = 64;

/// Blocks at either end of a device that hold everything that [`occupant`] looks for, but a Pollux volume.
const SIGNATURE_BLOCKS: u64 = 33;

const BLOCK_BYTES: usize = BLOCK_SIZE as usize;
const MAGIC: [u8; 8] = *b"PLXSCRAT";
const VERSION: u32 = 1;
/// Bytes that mean something; the rest is zero.
const USED_BYTES: usize = 116;

/// A drive: a namespace of a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// Serial number of the controller, with its padding.
    serial: [u8; 20],
    /// Its model, with its padding.
    model: [u8; 40],
    /// Revision of its firmware.
    pub firmware: String,
    /// The namespace.
    pub nsid: u32,
    /// Its globally unique identifier; zeroes if it has none.
    pub nguid: [u8; 16],
    /// Its IEEE identifier; zeroes if it has none.
    pub eui64: [u8; 8],
    /// Its bytes.
    pub bytes: u64,
}

impl Drive {
    fn of(controller: &Controller) -> Result<Self, nvme::QueueError> {
        let (info, namespace) = (controller.info(), controller.default_namespace()?);
        Ok(Self {
            serial: info.raw.sn,
            model: info.raw.mn,
            firmware: info.firmware.clone(),
            nsid: namespace.nsid.get(),
            nguid: namespace.nguid,
            eui64: namespace.eui64,
            bytes: namespace.blocks.saturating_mul(namespace.lba_size().into()),
        })
    }

    /// Serial number of the controller.
    pub fn serial(&self) -> String {
        shown(&self.serial)
    }

    /// Its model.
    pub fn model(&self) -> String {
        shown(&self.model)
    }
}

/// Says that everything on one drive may be overwritten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marker {
    marked_at: u64,
    nsid: u32,
    nguid: [u8; 16],
    eui64: [u8; 8],
    serial: [u8; 20],
    model: [u8; 40],
}

impl Marker {
    /// A marker for `drive`, made now.
    pub fn new(drive: &Drive) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            marked_at: now.as_secs(),
            nsid: drive.nsid,
            nguid: drive.nguid,
            eui64: drive.eui64,
            serial: drive.serial,
            model: drive.model,
        }
    }

    /// Whether it was made for this drive.
    pub fn fits(&self, drive: &Drive) -> bool {
        (self.nsid, self.nguid, self.eui64) == (drive.nsid, drive.nguid, drive.eui64)
            && (self.serial, self.model) == (drive.serial, drive.model)
    }

    /// When it was made, in seconds since 1970.
    pub fn marked_at(&self) -> u64 {
        self.marked_at
    }

    /// Serial number of the controller that it was made for.
    pub fn serial(&self) -> String {
        shown(&self.serial)
    }

    /// Model of the controller that it was made for.
    pub fn model(&self) -> String {
        shown(&self.model)
    }

    /// Its block.
    pub fn encode(&self) -> Vec<u8> {
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        block.extend_from_slice(&MAGIC);
        block.extend_from_slice(&[0; 4]);
        block.extend_from_slice(&VERSION.to_le_bytes());
        block.extend_from_slice(&self.marked_at.to_le_bytes());
        block.extend_from_slice(&self.nsid.to_le_bytes());
        block.extend_from_slice(&[0; 4]);
        block.extend_from_slice(&self.nguid);
        block.extend_from_slice(&self.eui64);
        block.extend_from_slice(&self.serial);
        block.extend_from_slice(&self.model);
        block.resize(BLOCK_BYTES, 0);
        let crc = crc32c::crc32c(&block);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// The marker in a block; `None` if there is none, or it is damaged, or of a version that this code does not know.
    pub fn decode(block: &[u8]) -> Option<Self> {
        if block.len() != BLOCK_BYTES || !block.starts_with(&MAGIC) {
            return None;
        }
        let crc = crc32c::crc32c(&block[..8]);
        let crc = crc32c::crc32c_append(crc, &[0; 4]);
        let crc = crc32c::crc32c_append(crc, &block[12..]);
        let stored = u32::from_le_bytes(field(block, 8)?);
        let version = u32::from_le_bytes(field(block, 12)?);
        let blank = block[28..32].iter().chain(&block[USED_BYTES..]).all(|byte| *byte == 0);
        (crc == stored && version == VERSION && blank).then_some(())?;
        Some(Self {
            marked_at: u64::from_le_bytes(field(block, 16)?),
            nsid: u32::from_le_bytes(field(block, 24)?),
            nguid: field(block, 32)?,
            eui64: field(block, 48)?,
            serial: field(block, 56)?,
            model: field(block, 76)?,
        })
    }
}

fn field<const N: usize>(block: &[u8], at: usize) -> Option<[u8; N]> {
    block.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// A text of Identify Controller without its padding. What is no printable ASCII is a question mark.
fn shown(text: &[u8]) -> String {
    let printable = |byte: &u8| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { '?' };
    text.iter().filter(|byte| **byte != 0).map(printable).collect::<String>().trim().to_owned()
}

/// What a drive is and holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// The drive.
    pub drive: Drive,
    /// A file system, partition table or the like.
    pub holds: Option<Occupant>,
    /// The marker, even one for another drive.
    pub marker: Option<Marker>,
}

impl Survey {
    /// The marker, if it permits destructive tests.
    ///
    /// # Errors
    /// Why they are not permitted, and how to permit them. `spec` is what the device is called there.
    pub fn permission(&self, spec: &DeviceSpec) -> Result<&Marker, Failure> {
        let mark = format!("if its contents may be lost: pollux mkscratch --device {spec}");
        let Some(marker) = &self.marker else {
            return Err(Failure::new(format!("{spec} is not marked as a scratch drive")).remedy(mark));
        };
        if !marker.fits(&self.drive) {
            return Err(Failure::new(format!(
                "the scratch marker on {spec} is that of another drive: {}, serial number {}",
                marker.model(),
                marker.serial()
            ))
            .remedy(mark));
        }
        if let Some(Occupant::Foreign(what)) = &self.holds {
            return Err(Failure::new(format!("{spec} is marked as a scratch drive, but now holds {what}"))
                .remedy(format!("if that may be lost: pollux mkscratch --force --device {spec}")));
        }
        Ok(marker)
    }
}

/// Looks at a drive; writes nothing.
///
/// # Errors
/// It cannot be opened or read.
pub fn survey(spec: &DeviceSpec) -> Result<Survey, Failure> {
    with_disk(spec, async |disk, drive| {
        Ok(Survey { drive, holds: occupant(&disk).await?, marker: read_on(&disk).await? })
    })
}

/// Whether destructive tests may run on a drive.
///
/// # Errors
/// They may not, or it cannot be opened or read.
pub fn permit(spec: &DeviceSpec) -> Result<Marker, Failure> {
    survey(spec)?.permission(spec).cloned()
}

/// The marker on a drive, if it was made for it.
///
/// # Errors
/// It cannot be opened or read.
pub fn read(spec: &DeviceSpec) -> Result<Option<Marker>, Failure> {
    with_disk(spec, async |disk, drive| Ok(read_on(&disk).await?.filter(|marker| marker.fits(&drive))))
}

/// Puts a marker on a drive, durably. Tests call it when they have written all over a drive that was marked.
///
/// # Errors
/// It cannot be opened or written, or does not read back.
pub fn write(spec: &DeviceSpec, marker: &Marker) -> Result<(), Failure> {
    with_disk(spec, async |disk, _| {
        for at in copies(&disk).await? {
            write_block(&disk, at, &marker.encode()).await?;
        }
        if read_on(&disk).await?.as_ref() == Some(marker) {
            return Ok(());
        }
        Err(FsError::Io(format!("{}: the scratch marker did not read back as written", disk.name())))
    })
}

/// Wipes the signatures of what others have put on a drive, durably, so that a marker permits something there. Does nothing to a
/// Pollux volume.
///
/// # Errors
/// It cannot be opened or written, or still holds something.
pub fn wipe_foreign(spec: &DeviceSpec) -> Result<(), Failure> {
    with_disk(spec, async |disk, _| {
        if !matches!(occupant(&disk).await?, Some(Occupant::Foreign(_))) {
            return Ok(());
        }
        let blocks = disk.blocks().get();
        let ends = SIGNATURE_BLOCKS.min(blocks);
        let zeroes = vec![0; ends as usize * BLOCK_BYTES];
        disk.write(BlockNr::new(0), &zeroes, Durability::Cached).await?;
        disk.write(BlockNr::new(blocks - ends), &zeroes, Durability::Cached).await?;
        disk.flush().await?;
        match occupant(&disk).await? {
            Some(Occupant::Foreign(what)) => {
                Err(FsError::Io(format!("{} still holds {what} after its signature was wiped", disk.name())))
            }
            _ => Ok(()),
        }
    })
}

/// Takes the marker off a drive, durably. Returns whether there was one.
///
/// # Errors
/// It cannot be opened or written.
pub fn remove(spec: &DeviceSpec) -> Result<bool, Failure> {
    with_disk(spec, async |disk, _| {
        let mut found = false;
        for at in copies(&disk).await? {
            found |= wipe(&disk, at).await?;
        }
        Ok(found)
    })
}

/// The marker on an open disk, even one for another drive.
pub(crate) async fn read_on(disk: &VolumeDisk) -> Result<Option<Marker>, FsError> {
    for at in copies(disk).await? {
        if let Some(marker) = Marker::decode(&disk.read(at, BlockCount::new(1)).await?) {
            return Ok(Some(marker));
        }
    }
    Ok(None)
}

/// Puts the marker back on a disk on which a volume was just made.
pub(crate) async fn renew_on(disk: &VolumeDisk, marker: &Marker) -> Result<(), FsError> {
    // Nothing of the new volume lies there yet.
    if let Some(second) = second_copy(disk) {
        wipe(disk, second).await?;
    }
    write_block(disk, FIRST_COPY, &marker.encode()).await
}

/// Zeroes a block that holds a marker, be it damaged or of another version, and nothing else. Returns whether it did.
async fn wipe(disk: &VolumeDisk, at: BlockNr) -> Result<bool, FsError> {
    let found = disk.read(at, BlockCount::new(1)).await?.starts_with(&MAGIC);
    if found {
        write_block(disk, at, &[0; BLOCK_BYTES]).await?;
    }
    Ok(found)
}

async fn write_block(disk: &VolumeDisk, at: BlockNr, block: &[u8]) -> Result<(), FsError> {
    disk.write(at, block, Durability::Cached).await?;
    disk.flush().await
}

/// Where copies lie, the first one first.
async fn copies(disk: &VolumeDisk) -> Result<Vec<BlockNr>, FsError> {
    let second = match occupant(disk).await? {
        Some(Occupant::Pollux(_)) => None,
        _ => second_copy(disk),
    };
    let first = (disk.blocks().get() > FIRST_COPY.get()).then_some(FIRST_COPY);
    Ok(first.into_iter().chain(second).collect())
}

fn second_copy(disk: &VolumeDisk) -> Option<BlockNr> {
    let blocks = disk.blocks().get();
    (blocks >= TWO_COPIES_BLOCKS).then(|| BlockNr::new(blocks - SECOND_COPY_FROM_END))
}

/// Opens a drive, does `task` on it, and shuts it down.
fn with_disk<T, F>(spec: &DeviceSpec, task: F) -> Result<T, Failure>
where
    F: AsyncFnOnce(VolumeDisk, Drive) -> Result<T, FsError>,
{
    let controller = device::open(spec)?;
    let drive = Drive::of(&controller).during(format_args!("cannot use {spec}"))?;
    device::over_one_reactor(&Arc::clone(&controller), spec, async |ctx: Context| {
        let disk = VolumeDisk::new(ctx.disk().clone()).map_err(|error| FsError::Io(error.to_string()))?;
        if disk.blocks().get() <= FIRST_COPY.get() {
            return Err(FsError::Io(format!("{}: too small for a scratch marker", disk.name())));
        }
        task(disk, drive).await
    })?
    .map_err(|error| Failure::new(format!("cannot look for the scratch marker of {spec}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive() -> Drive {
        Drive {
            serial: *b"S1                  ",
            model: [b'M'; 40],
            firmware: "1".to_owned(),
            nsid: 1,
            nguid: [7; 16],
            eui64: [0; 8],
            bytes: 1 << 30,
        }
    }

    fn spec() -> DeviceSpec {
        device::parse("emu:mem,size=1GiB").unwrap()
    }

    #[test]
    fn marker_survives_its_block_and_no_changed_bit_does() {
        let marker = Marker::new(&drive());
        let block = marker.encode();
        assert_eq!(Marker::decode(&block), Some(marker));
        for bit in 0..block.len() * 8 {
            let mut damaged = block.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Marker::decode(&damaged), None, "bit {bit}");
        }
        assert_eq!(Marker::decode(&block[..4095]), None);
        assert_eq!(Marker::decode(&[]), None);
    }

    #[test]
    fn version_of_the_future_is_no_permission() {
        let mut block = Marker::new(&drive()).encode();
        block[12] = 2;
        block[8..12].fill(0);
        let crc = crc32c::crc32c(&block);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Marker::decode(&block), None);
    }

    #[test]
    fn marker_fits_its_drive_only() {
        let marker = Marker::new(&drive());
        assert!(marker.fits(&drive()));
        assert!(marker.fits(&Drive { firmware: "2".to_owned(), ..drive() }), "firmware may be updated");
        assert!(!marker.fits(&Drive { nsid: 2, ..drive() }));
        assert!(!marker.fits(&Drive { nguid: [8; 16], ..drive() }));
        assert!(!marker.fits(&Drive { eui64: [8; 8], ..drive() }));
        assert!(!marker.fits(&Drive { serial: [b'T'; 20], ..drive() }));
        assert!(!marker.fits(&Drive { model: [b'T'; 40], ..drive() }));
    }

    #[test]
    fn only_a_marker_of_this_drive_without_anything_foreign_permits_tests() {
        let marker = Marker::new(&drive());
        let bare = Survey { drive: drive(), holds: None, marker: None };
        let said = |survey: &Survey| survey.permission(&spec()).unwrap_err().to_string();
        assert!(
            said(&bare).contains("not marked") && said(&bare).contains("pollux mkscratch --device emu:mem")
        );

        let marked = Survey { marker: Some(marker.clone()), ..bare.clone() };
        assert_eq!(marked.permission(&spec()).unwrap(), &marker);
        let volume = Survey { holds: Some(Occupant::Pollux("a volume".to_owned())), ..marked.clone() };
        assert_eq!(volume.permission(&spec()).unwrap(), &marker);

        let copied = Survey { drive: Drive { nsid: 2, ..drive() }, ..marked.clone() };
        assert!(said(&copied).contains("another drive") && said(&copied).contains("S1"), "{}", said(&copied));
        let reused = Survey { holds: Some(Occupant::Foreign("an XFS file system")), ..marked };
        assert!(said(&reused).contains("now holds an XFS file system"), "{}", said(&reused));
    }

    #[test]
    fn names_of_a_drive_are_shown_without_padding_and_control_characters() {
        assert_eq!(shown(b"  S1\x1b[31m\0\0   "), "S1?[31m");
        assert_eq!(shown(&[0; 20]), "");
    }
}
