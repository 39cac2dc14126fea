//! Where file systems may differ, and why.
//!
//! Owns: the table of legitimate differences. What is not in it is a failure. Beyond it, these are not compared at all: size and link count
//! of directories, blocks in use, where exactly a hole begins, the order of names (`operation`, `tree`).

use rustix::fs::{FallocateFlags, RenameFlags};
use rustix::io::Errno;

use super::kernel::Kernel;
use super::operation::{Operation, Outcome};

/// What the kernel's FUSE refuses before Pollux sees it; it is not tried elsewhere, so that the trees stay the same.
pub(crate) fn refused_by_fuse(operation: &Operation, ours: &Outcome) -> Option<&'static str> {
    match (operation, ours) {
        (Operation::Clone { .. }, Err(errno)) if is(*errno, &[Errno::OPNOTSUPP]) => {
            Some("FUSE has no FICLONE; copy_file_range clones")
        }
        (Operation::Allocate { mode, .. }, Err(errno))
            if is(*errno, &[Errno::OPNOTSUPP])
                && mode.intersects(
                    FallocateFlags::COLLAPSE_RANGE
                        | FallocateFlags::INSERT_RANGE
                        | FallocateFlags::UNSHARE_RANGE,
                ) =>
        {
            Some("FUSE passes on neither collapse nor insert nor unshare")
        }
        (Operation::Rename { flags, .. }, Err(errno))
            if flags.contains(RenameFlags::WHITEOUT) && is(*errno, &[Errno::INVAL]) =>
        {
            Some("FUSE passes on no RENAME_WHITEOUT")
        }
        _ => None,
    }
}

/// Why `theirs` may differ from `ours`, which left both trees the same.
pub(crate) fn why(
    operation: &Operation,
    ours: &Outcome,
    theirs: &Outcome,
    kernel: Kernel,
) -> Option<&'static str> {
    match (operation, ours, theirs) {
        (Operation::Rename { .. }, Err(ours), Err(theirs))
            if kernel == Kernel::Xfs && is(*ours, &[Errno::NOTEMPTY]) && is(*theirs, &[Errno::EXIST]) =>
        {
            Some("XFS says EEXIST where a directory in the way is not empty: POSIX allows both")
        }
        _ => None,
    }
}

fn is(errno: i32, of: &[Errno]) -> bool {
    of.iter().any(|one| one.raw_os_error() == errno)
}
