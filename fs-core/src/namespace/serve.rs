//! From request to operation.
//!
//! Owns: [`Shard::serve`]. Invariant: every request ends in exactly one reply.
//!
//! Excludes: what the operations do; the delalloc queues, which the caller has drained.

use std::rc::Rc;

use crate::data::read::Caching;
use crate::error::FsError;
use crate::request::{Reply, Request};
use crate::shard::Shard;

use super::create::Creation;
use super::remove::Removal;
use super::rename::Renaming;

impl Shard {
    /// Serves a request.
    ///
    /// # Errors
    /// The operation's.
    pub(crate) async fn serve(self: &Rc<Self>, request: Request) -> Result<Reply, FsError> {
        match request {
            Request::Lookup { parent, name } => self.lookup(parent, name).await.map(Reply::Entry),
            Request::Forget { inode, lookups } => {
                self.forget(inode, lookups);
                Ok(Reply::Done)
            }
            Request::GetAttributes { inode } => self.attributes_of(inode).await.map(Reply::Attributes),
            Request::SetAttributes { inode, change } => {
                self.set_attributes(inode, change).await.map(Reply::Attributes)
            }
            Request::ReadLink { inode } => self.read_link(inode).await.map(Reply::Data),
            Request::ReadDirectory { inode, after, limit } => {
                self.read_directory(inode, after, limit).await.map(Reply::Directory)
            }
            names @ (Request::Create { .. }
            | Request::Unlink { .. }
            | Request::RemoveDirectory { .. }
            | Request::Rename { .. }
            | Request::Link { .. }) => self.serve_names(names).await,
            xattr @ (Request::GetXattr { .. }
            | Request::SetXattr { .. }
            | Request::ListXattr { .. }
            | Request::RemoveXattr { .. }) => self.serve_xattr(xattr).await,
            Request::Scrub { from, .. } => self.scrub(from).await.map(Reply::Scrubbed),
            Request::Groups { .. } => Ok(Reply::Groups(self.alloc.borrow().figures())),
            Request::Relocate { group, step, lease, .. } => {
                self.relocate(group, step, &lease).await.map(Reply::Relocated)
            }
            Request::StatFs => Ok(Reply::Space(self.volume.space())),
            contents => self.serve_contents(contents).await,
        }
    }

    async fn serve_names(self: &Rc<Self>, request: Request) -> Result<Reply, FsError> {
        match request {
            Request::Create { parent, name, new, permissions, caller } => {
                let creation = Creation { parent, name, new, permissions, caller };
                self.create_entry(creation).await.map(Reply::Entry)
            }
            Request::Unlink { parent, name } => {
                self.remove(parent, name, Removal::Unlink).await?;
                Ok(Reply::Done)
            }
            Request::RemoveDirectory { parent, name } => {
                self.remove(parent, name, Removal::Directory).await?;
                Ok(Reply::Done)
            }
            Request::Rename { parent, name, new_parent, new_name, mode } => {
                self.rename(Renaming { parent, name, new_parent, new_name, mode }).await?;
                Ok(Reply::Done)
            }
            Request::Link { inode, new_parent, new_name } => {
                self.link(inode, new_parent, new_name).await.map(Reply::Entry)
            }
            _ => Err(FsError::NotSupported),
        }
    }

    async fn serve_xattr(self: &Rc<Self>, request: Request) -> Result<Reply, FsError> {
        match request {
            Request::GetXattr { inode, name } => self.get_xattr(inode, name).await.map(Reply::Data),
            Request::SetXattr { inode, name, value, mode } => {
                self.set_xattr(inode, name, value, mode).await?;
                Ok(Reply::Done)
            }
            Request::ListXattr { inode } => self.list_xattr(inode).await.map(Reply::Data),
            Request::RemoveXattr { inode, name } => {
                self.remove_xattr(inode, name).await?;
                Ok(Reply::Done)
            }
            _ => Err(FsError::NotSupported),
        }
    }

    async fn serve_contents(self: &Rc<Self>, request: Request) -> Result<Reply, FsError> {
        match request {
            Request::Read { inode, offset, length } => {
                self.read(inode, offset, length, Caching::Cached).await.map(Reply::Data)
            }
            Request::ReadDirect { inode, offset, length } => {
                self.read(inode, offset, length, Caching::Direct).await.map(Reply::Data)
            }
            Request::WriteDirect { inode, offset, data, kill_privileges } => {
                self.write_direct(inode, offset, data, kill_privileges).await.map(Reply::Written)
            }
            Request::Write { inode, offset, data, source, kill_privileges } => {
                self.write_slow(inode, offset, data, source, kill_privileges).await.map(Reply::Written)
            }
            Request::Flush { inode } => {
                self.handle_closed(inode).await?;
                Ok(Reply::Done)
            }
            Request::Sync { inode, scope } => {
                self.sync_inode(inode, scope).await?;
                Ok(Reply::Done)
            }
            Request::Allocate { inode, offset, length, mode } => {
                self.allocate(inode, offset, length, mode).await?;
                Ok(Reply::Done)
            }
            Request::CountExtents { inode } => self.count_extents(inode).await.map(Reply::Extents),
            Request::ListExtents { inode, offset } => {
                self.list_extents(inode, offset).await.map(Reply::ExtentList)
            }
            Request::Clone(range) => self.clone_range(range).await.map(Reply::Cloned),
            Request::Deduplicate(range) => self.deduplicate(range).await.map(Reply::Deduplicated),
            Request::CopyRange(range) => self.copy_range(range).await.map(Reply::Cloned),
            Request::Seek { inode, offset, what } => self.seek(inode, offset, what).await.map(Reply::Offset),
            _ => Err(FsError::NotSupported),
        }
    }
}
