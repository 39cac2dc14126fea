//! Recognising what a device holds before it is overwritten.
//!
//! Owns: [`find`], and the table of the signatures that are looked for: superblocks of file systems, partition
//! tables, containers. Offsets and magic numbers are those that `blkid(8)` knows.
//!
//! Excludes: telling whether what was found is intact.

use crate::disk::VolumeDisk;
use crate::error::FsError;
use crate::format::superblock::{DecodeError, RING_SLOTS, RING_STARTS, Superblock};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr};

/// Blocks at the start of a device in which the signatures lie.
const HEAD_BLOCKS: u64 = 17;

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
    signature("a member of a Linux RAID array", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    signature("a member of a Linux RAID array", 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
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

/// Something known that the device holds, in words that fit "holds …".
///
/// # Errors
/// The device failed.
pub(super) async fn find(disk: &VolumeDisk) -> Result<Option<String>, FsError> {
    for ring in RING_STARTS {
        let slots = RING_SLOTS.min(disk.blocks().get().saturating_sub(ring.get()));
        let bytes = disk.read(ring, BlockCount::new(slots)).await?;
        for block in bytes.chunks_exact(BLOCK_SIZE as usize) {
            match Superblock::decode(block) {
                Ok(superblock) => return Ok(Some(describe(&superblock))),
                Err(DecodeError::Empty | DecodeError::NoMagic) => {}
                Err(_) => return Ok(Some("a Pollux volume".to_owned())),
            }
        }
    }
    let head = disk.read(BlockNr::new(0), BlockCount::new(HEAD_BLOCKS.min(disk.blocks().get()))).await?;
    Ok(find_in(&head).map(str::to_owned))
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
}
