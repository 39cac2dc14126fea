//! Between FUSE's words and the volume's: inode numbers, attributes, times, errors, flags.
//!
//! Owns: the pure translations; nothing here talks to anybody.
//!
//! FUSE calls the root directory inode 1, a volume calls it [`InodeNr::ROOT`]; the two numbers change places, so that
//! the translation is its own inverse and loses nothing.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fs_core::FsError;
use fs_core::request::{
    AllocateMode, Attributes, FileKind, NewInode, RenameMode, SeekWhat, SetXattrMode, TimeChange,
};
use fs_core::types::InodeNr;
use fuser::{Errno, FileAttr, FileType, INodeNo, RenameFlags, TimeOrNow};
use reactor::WallTime;

/// Preferred size of I/O that `stat(2)` shows.
const PREFERRED_BLOCK: u32 = 4096;

/// The inode that FUSE means.
pub(super) fn inode(number: INodeNo) -> InodeNr {
    InodeNr::new(swap_root(number.0))
}

/// The number under which FUSE knows an inode.
pub(super) fn number(inode: InodeNr) -> INodeNo {
    INodeNo(swap_root(inode.get()))
}

fn swap_root(number: u64) -> u64 {
    let root = InodeNr::ROOT.get();
    if number == root {
        INodeNo::ROOT.0
    } else if number == INodeNo::ROOT.0 {
        root
    } else {
        number
    }
}

/// The errno for the kernel.
pub(super) fn errno(error: &FsError) -> Errno {
    Errno::from_i32(error.errno())
}

/// An inode's kind in FUSE's words.
pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
    }
}

/// An inode's attributes in FUSE's words.
pub(super) fn attributes(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: number(attributes.inode),
        size: attributes.size,
        blocks: attributes.sectors,
        atime: to_system(attributes.accessed),
        mtime: to_system(attributes.modified),
        ctime: to_system(attributes.changed),
        crtime: to_system(attributes.created),
        kind: file_type(attributes.kind),
        perm: attributes.permissions,
        nlink: attributes.links,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.device,
        blksize: PREFERRED_BLOCK,
        flags: 0,
    }
}

/// The answer to a lookup that found nothing: inode 0 makes the kernel remember just that.
pub(super) fn no_entry() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: PREFERRED_BLOCK,
        flags: 0,
    }
}

/// A time for FUSE. Every `WallTime` fits a `SystemTime` on 64-bit Linux.
fn to_system(time: WallTime) -> SystemTime {
    let nanos = Duration::from_nanos(u64::from(time.subsec_nanos()));
    let seconds = Duration::from_secs(time.secs().unsigned_abs());
    let whole =
        if time.secs() >= 0 { UNIX_EPOCH.checked_add(seconds) } else { UNIX_EPOCH.checked_sub(seconds) };
    whole.and_then(|whole| whole.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// A time from FUSE. fuser turns seconds `-s` and nanoseconds `n` into `s` seconds *and* `n` nanoseconds before 1970;
/// here the pair is taken apart again as the kernel sent it.
pub(super) fn from_system(time: SystemTime) -> WallTime {
    let (seconds, nanos) = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (i64::try_from(after.as_secs()).unwrap_or(i64::MAX), after.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            let seconds = 0_i64.checked_sub_unsigned(before.as_secs()).unwrap_or(i64::MIN);
            (seconds, before.subsec_nanos())
        }
    };
    WallTime::new(seconds, nanos).unwrap_or(WallTime::EPOCH)
}

/// A new time stamp.
pub(super) fn time_change(time: TimeOrNow) -> TimeChange {
    match time {
        TimeOrNow::SpecificTime(time) => TimeChange::To(from_system(time)),
        TimeOrNow::Now => TimeChange::Now,
    }
}

/// The permission bits of a mode.
pub(super) fn permissions(mode: u32) -> u16 {
    // Masked to 12 bits, so nothing is cut off.
    (mode & 0o7777) as u16
}

/// What `mknod(2)` makes.
pub(super) fn new_inode(mode: u32, device: u32) -> Result<NewInode, FsError> {
    match mode & libc::S_IFMT {
        libc::S_IFREG | 0 => Ok(NewInode::Regular),
        libc::S_IFBLK => Ok(NewInode::BlockDevice(device)),
        libc::S_IFCHR => Ok(NewInode::CharDevice(device)),
        libc::S_IFIFO => Ok(NewInode::Fifo),
        libc::S_IFSOCK => Ok(NewInode::Socket),
        _ => Err(FsError::Invalid),
    }
}

/// What `renameat2(2)` does with an existing destination.
pub(super) fn rename_mode(flags: RenameFlags) -> Result<RenameMode, FsError> {
    if flags.is_empty() {
        Ok(RenameMode::Replace)
    } else if flags == RenameFlags::RENAME_NOREPLACE {
        Ok(RenameMode::NoReplace)
    } else if flags == RenameFlags::RENAME_EXCHANGE {
        Ok(RenameMode::Exchange)
    } else {
        Err(FsError::Invalid)
    }
}

/// What `setxattr(2)` does with an existing attribute.
pub(super) fn xattr_mode(flags: i32) -> Result<SetXattrMode, FsError> {
    match flags {
        0 => Ok(SetXattrMode::Set),
        libc::XATTR_CREATE => Ok(SetXattrMode::Create),
        libc::XATTR_REPLACE => Ok(SetXattrMode::Replace),
        _ => Err(FsError::Invalid),
    }
}

/// What `fallocate(2)` does.
pub(super) fn allocate_mode(mode: i32) -> Result<AllocateMode, FsError> {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    const ZERO_KEEP: i32 = ZERO | KEEP;
    match mode {
        0 => Ok(AllocateMode::Extend),
        KEEP => Ok(AllocateMode::KeepSize),
        PUNCH => Ok(AllocateMode::PunchHole),
        ZERO => Ok(AllocateMode::ZeroRange),
        ZERO_KEEP => Ok(AllocateMode::ZeroRangeKeepSize),
        _ => Err(FsError::NotSupported),
    }
}

/// What `lseek(2)` looks for; the kernel does the other kinds itself.
pub(super) fn seek_what(whence: i32) -> Result<SeekWhat, FsError> {
    match whence {
        libc::SEEK_DATA => Ok(SeekWhat::Data),
        libc::SEEK_HOLE => Ok(SeekWhat::Hole),
        _ => Err(FsError::Invalid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_changes_places_and_others_stay() {
        assert_eq!(inode(INodeNo::ROOT), InodeNr::ROOT);
        assert_eq!(number(InodeNr::ROOT), INodeNo::ROOT);
        for raw in [0, 1, 2, 63, 64, 65, u64::MAX] {
            assert_eq!(number(inode(INodeNo(raw))), INodeNo(raw));
        }
    }

    #[test]
    fn times_before_1970_keep_their_nanoseconds() {
        let time = WallTime::new(-2, 750_000_000).unwrap();
        assert_eq!(to_system(time), UNIX_EPOCH - Duration::from_millis(1_250));
        // As fuser decodes seconds -2, nanoseconds 750,000,000 of a request:
        let decoded = UNIX_EPOCH - Duration::new(2, 750_000_000);
        assert_eq!(from_system(decoded), time);
    }

    #[test]
    fn extreme_times_do_not_panic() {
        for time in [WallTime::new(i64::MIN, 0), WallTime::new(i64::MAX, 999_999_999)] {
            let time = time.unwrap();
            assert_eq!(from_system(to_system(time)), time);
        }
    }

    #[test]
    fn unknown_flags_are_refused() {
        assert_eq!(rename_mode(RenameFlags::from_bits_retain(3)), Err(FsError::Invalid));
        assert_eq!(allocate_mode(libc::FALLOC_FL_PUNCH_HOLE), Err(FsError::NotSupported));
        assert_eq!(allocate_mode(libc::FALLOC_FL_COLLAPSE_RANGE), Err(FsError::NotSupported));
        assert_eq!(xattr_mode(3), Err(FsError::Invalid));
        assert_eq!(seek_what(libc::SEEK_SET), Err(FsError::Invalid));
        assert_eq!(new_inode(libc::S_IFDIR, 0), Err(FsError::Invalid));
    }
}
