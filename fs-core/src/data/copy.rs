//! `copy_file_range(2)`: shares what can be shared, copies what cannot.
//!
//! Owns: [`Shard::copy_range`]. One call does one thing, a clone or a short copy, and says for how many bytes; who wants
//! more calls again, as the system call's users do anyway.
//!
//! # Legal crash outcomes
//! Of what one call has shared: all or nothing. Of what it has copied: those of a write.

use std::rc::Rc;

use crate::error::FsError;
use crate::request::{CloneRange, Cloned, KillPrivileges, WriteSource};
use crate::shard::Shard;
use crate::shard::message::{PeerCall, PeerReply};
use crate::types::{BLOCK_SIZE, InodeNr};

use super::apply::load_regular;
use super::lending::{LendingCall, LendingReply, misanswered};
use super::queue::MAX_WRITE;
use super::read::Caching;

impl Shard {
    /// See [`crate::Request::CopyRange`].
    ///
    /// # Errors
    /// [`FsError::Invalid`] for ranges that overlap in one file; [`FsError::FileTooLarge`]; what the inodes are;
    /// [`FsError::NoSpace`]; failures of the device.
    pub(crate) async fn copy_range(self: &Rc<Self>, range: CloneRange) -> Result<Cloned, FsError> {
        self.view(|batch| load_regular(batch, range.target)).await?;
        if range.source == range.target {
            let (from, to) = (range.source_offset.get(), range.target_offset.get());
            let length = range.length.min(self.visible_size(range.source).await?.saturating_sub(from));
            let overlap = from < to.saturating_add(length) && to < from.saturating_add(length);
            if overlap && length > 0 {
                return Err(FsError::Invalid);
            }
        }
        if range.length == 0 {
            return Ok(Cloned::default());
        }
        if let Some(shareable) = self.shareable(&range).await? {
            match self.clone_range(shareable).await {
                // The files have changed since they were looked at: copying is right whatever they are now.
                Err(FsError::Invalid) => {}
                outcome => return outcome,
            }
        }
        self.copy_some(&range).await
    }

    /// The part of `range` that a clone can do, from its beginning on.
    async fn shareable(&self, range: &CloneRange) -> Result<Option<CloneRange>, FsError> {
        let (from, to) = (range.source_offset.get(), range.target_offset.get());
        let possible = from.is_multiple_of(BLOCK_SIZE)
            && to.is_multiple_of(BLOCK_SIZE)
            && to.checked_add(range.length).is_some();
        if !possible {
            return Ok(None);
        }
        let (source, target) =
            (self.size_anywhere(range.source).await?, self.visible_size(range.target).await?);
        let length = range.length.min(source.saturating_sub(from));
        let whole_end = from + length == source && to + length >= target;
        let length = if whole_end { length } else { length - length % BLOCK_SIZE };
        Ok((length > 0).then_some(CloneRange { length, ..*range }))
    }

    async fn size_anywhere(&self, nr: InodeNr) -> Result<u64, FsError> {
        if nr.shard() == self.id {
            return self.visible_size(nr).await;
        }
        match self.ask_lending(nr.shard(), LendingCall::Size(nr)).await? {
            LendingReply::Size(size) => Ok(size),
            other => Err(misanswered(&other)),
        }
    }

    /// The size of a file of this shard as programs see it.
    pub(super) async fn visible_size(&self, nr: InodeNr) -> Result<u64, FsError> {
        let stored = self.view(|batch| load_regular(batch, nr)).await?.size;
        Ok(self.inode_in_use(nr).map_or(stored, |inode| inode.data.borrow().size(stored)))
    }

    /// Copies up to [`MAX_WRITE`] bytes.
    async fn copy_some(self: &Rc<Self>, range: &CloneRange) -> Result<Cloned, FsError> {
        let length = range.length.min(MAX_WRITE as u64) as u32;
        let bytes = if range.source.shard() == self.id {
            self.read(range.source, range.source_offset, length, Caching::Cached).await?
        } else if range.source.shard().index() >= self.volume.shard_count() {
            return Err(FsError::NotFound);
        } else {
            let call = PeerCall::Read(range.source, range.source_offset, length);
            match self.call(range.source.shard(), call).await? {
                PeerReply::Data(bytes) => bytes,
                other => return Err(FsError::Io(format!("a shard gave a wrong answer: {other:?}"))),
            }
        };
        if bytes.is_empty() {
            return Ok(Cloned::default());
        }
        let written = self.write_slow(
            range.target,
            range.target_offset,
            bytes.into(),
            WriteSource::Call,
            KillPrivileges::Keep,
        );
        Ok(Cloned { bytes: u64::from(written.await?), extents: 0 })
    }
}
