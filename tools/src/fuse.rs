//! The FUSE front end: mount points, the session with the kernel, and the translation of requests.
//!
//! Owns: everything that knows of FUSE. Behind it lies [`fs_core::Volume`], which does not; another front end can take
//! its place at [`VolumeFront`].

mod front;
mod handoff;
mod mount_point;
mod mount_table;
mod session;
mod translate;

#[cfg(test)]
mod memory;
#[cfg(test)]
mod tests;

pub(crate) use front::EXTENTS_ATTRIBUTE;
pub use front::{FrontEnd, VolumeFront};
pub use mount_point::{Absent, MountPoint};
pub use mount_table::{MountEntry, mounts};
pub use session::{Extras, Honoured, Mounted, Urgency, collect_mapped_pages};

/// The inode that has this number on the mount.
pub(crate) fn inode_of(number: u64) -> fs_core::types::InodeNr {
    translate::inode(fuser::INodeNo(number))
}
