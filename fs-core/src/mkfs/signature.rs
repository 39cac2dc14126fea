//! Recognising what a device holds before it is overwritten.
//!
//! Owns: [`occupant`], and the tables of the signatures that are looked for: superblocks of file systems, partition
//! tables, containers. Offsets and magic numbers are those that `blkid(8)` knows.
//!
//! Excludes: telling whether what was found is intact.

use std::fmt;

use crate::disk::VolumeDisk;
use crate::error::FsError;
use crate::format::superblock::{DecodeError, RING_SLOTS, RING_STARTS, Superblock};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr};

/// Blocks at the start of a device in which the signatures lie.
const HEAD_BLOCKS: u64 = 17;

/// Bytes at the end of a device in which the signatures lie.
const TAIL_BYTES: u64 = 2 << 16;

/// What a device holds, in words that fit "holds …".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Occupant {
    /// A Pollux volume, or what is left of one.
    Pollux(String),
    /// Something of another program.
    Foreign(&'static str),
}

impl fmt::Display for Occupant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Occupant::Pollux(what) => f.write_str(what),
            Occupant::Foreign(what) => f.write_str(what),
        }
    }
}

struct Signature {
    name: &'static str,
    offset: usize,
    magic: &'static [u8],
}

const fn signature(name: &'static str, offset: usize, magic: &'static [u8]) -> Signature {
    Signature { name, offset, magic }
}

/// More telling ones first: a file system may leave room for a boot sector that looks like a partition table.
const SIGNATURES: &[Signature] = &[
    signature("an ext2, ext3 or ext4 file system", 1080, &[0x53, 0xef]),
    signature("an XFS file system", 0, b"XFSB"),
    signature("a btrfs file system", 65_600, b"_BHRfS_M"),
    signature("an F2FS file system", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    signature("an EROFS file system", 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    signature("a bcachefs file system", 4120, &[0xc6, 0x85, 0x73, 0xf6]),
    signature("a squashfs file system", 0, b"hsqs"),
    signature("an ISO 9660 file system", 32_769, b"CD001"),
    signature("a LUKS container", 0, b"LUKS\xba\xbe"),
    signature("an LVM physical volume", 512, b"LABELONE"),
    signature(RAID, 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    signature(RAID, 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
    signature("swap space", 4086, b"SWAPSPACE2"),
    signature("an NTFS file system", 3, b"NTFS    "),
    signature("an exFAT file system", 3, b"EXFAT   "),
    signature("a FAT file system", 82, b"FAT32   "),
    signature("a FAT file system", 54, b"FAT16   "),
    signature("a FAT file system", 54, b"FAT12   "),
    signature("a GUID partition table", 512, b"EFI PART"),
    signature("a GUID partition table", 4096, b"EFI PART"),
    signature("a partition table or boot sector", 510, &[0x55, 0xaa]),
];

const RAID: &str = "a member of a Linux RAID array";

/// Where a disk of `bytes` bytes has signatures at its end.
fn at_the_end(bytes: u64) -> [(&'static str, Option<u64>, &'static [u8]); 4] {
    const MD: &[u8] = &[0xfc, 0x4e, 0x2b, 0xa9];
    const BACKUP: &str = "the backup of a GUID partition table";
    [
        // Version 1.0: 8 KiB before the end, then down to 4 KiB; 0.90: the last but one whole 64 KiB.
        (RAID, bytes.checked_sub(8192).map(|at| at & !4095), MD),
        (RAID, (bytes & !0xffff).checked_sub(1 << 16), MD),
        (BACKUP, bytes.checked_sub(512), b"EFI PART"),
        (BACKUP, bytes.checked_sub(4096), b"EFI PART"),
    ]
}

/// Something known that the device holds.
///
/// # Errors
/// The device failed.
pub async fn occupant(disk: &VolumeDisk) -> Result<Option<Occupant>, FsError> {
    for ring in RING_STARTS {
        let slots = RING_SLOTS.min(disk.blocks().get().saturating_sub(ring.get()));
        if slots == 0 {
            continue; // the device ends before
        }
        let bytes = disk.read(ring, BlockCount::new(slots)).await?;
        for block in bytes.chunks_exact(BLOCK_SIZE as usize) {
            match Superblock::decode(block) {
                Ok(superblock) => return Ok(Some(Occupant::Pollux(describe(&superblock)))),
                Err(DecodeError::Empty | DecodeError::NoMagic) => {}
                Err(_) => return Ok(Some(Occupant::Pollux("a Pollux volume".to_owned()))),
            }
        }
    }
    let blocks = disk.blocks().get();
    let head = disk.read(BlockNr::new(0), BlockCount::new(HEAD_BLOCKS.min(blocks))).await?;
    if let Some(what) = find_in(&head) {
        return Ok(Some(Occupant::Foreign(what)));
    }
    let bytes = disk.raw().geometry().size_bytes();
    // A rest of less than a block is not looked at.
    let start = bytes.saturating_sub(TAIL_BYTES) / BLOCK_SIZE;
    let tail = disk.read(BlockNr::new(start), BlockCount::new(blocks - start)).await?;
    Ok(find_at_the_end(bytes, start * BLOCK_SIZE, &tail).map(Occupant::Foreign))
}

/// Looks at the end of a disk of `bytes` bytes: `tail`, which lies at `start`.
fn find_at_the_end(bytes: u64, start: u64, tail: &[u8]) -> Option<&'static str> {
    let found = |(_, at, magic): &(&str, Option<u64>, &[u8])| {
        let offset = at.and_then(|at| usize::try_from(at.checked_sub(start)?).ok());
        offset.and_then(|offset| tail.get(offset..)).is_some_and(|rest| rest.starts_with(magic))
    };
    at_the_end(bytes).into_iter().find(found).map(|(name, ..)| name)
}

fn find_in(head: &[u8]) -> Option<&'static str> {
    let found = |signature: &&Signature| {
        head.get(signature.offset..).is_some_and(|rest| rest.starts_with(signature.magic))
    };
    SIGNATURES.iter().find(found).map(|signature| signature.name)
}

fn describe(superblock: &Superblock) -> String {
    match superblock.label.as_str() {
        "" => format!("the Pollux volume {}", superblock.uuid),
        label => format!("the Pollux volume {} ({label:?})", superblock.uuid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signature_is_found_at_its_place_and_only_there() {
        for signature in SIGNATURES {
            let mut head = vec![0; (HEAD_BLOCKS * BLOCK_SIZE) as usize];
            assert_eq!(find_in(&head), None);
            head[signature.offset..signature.offset + signature.magic.len()].copy_from_slice(signature.magic);
            assert_eq!(find_in(&head), Some(signature.name));
            head[signature.offset] ^= 1;
            assert_eq!(find_in(&head), None);
        }
        assert_eq!(find_in(&[]), None);
    }

    #[test]
    fn signatures_at_the_end_are_found_there_whatever_the_size() {
        for bytes in [1 << 20, (1 << 20) + 4096, (1 << 20) + 65_536 - 4096, 1_000_204_886_016] {
            let start = (bytes - TAIL_BYTES) / BLOCK_SIZE * BLOCK_SIZE;
            for (name, at, magic) in at_the_end(bytes) {
                let mut tail = vec![0; usize::try_from(bytes - start).unwrap()];
                assert_eq!(find_at_the_end(bytes, start, &tail), None);
                let offset = usize::try_from(at.unwrap() - start).unwrap();
                tail[offset..offset + magic.len()].copy_from_slice(magic);
                assert_eq!(find_at_the_end(bytes, start, &tail), Some(name), "{bytes}");
            }
        }
        for bytes in [0, 512, 4096] {
            assert_eq!(find_at_the_end(bytes, 0, &[]), None);
        }
    }
}
