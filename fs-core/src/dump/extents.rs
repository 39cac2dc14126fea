//! How a file of a volume that is not mounted lies on the device.
//!
//! Owns: [`extents`]: the way from a path to its inode, and the file's pieces, as they are once the log is replayed (in
//! memory: nothing is written).
//!
//! Memory: [`EXTENTS_PER_BATCH`] extents at a time, and of the runs beneath them those that are shared. The file may have
//! any number.
//!
//! Every byte is input: damage ends the list with an error that says where it is.
//!
//! Excludes: files on a mount (`Request::ListExtents`), text.

use std::io;
use std::ops::{ControlFlow, Range};

use reactor::Context;

use crate::data::extent_map::Mapped;
use crate::data::listing::{Piece, rows};
use crate::disk::{UnsupportedDevice, VolumeDisk};
use crate::format::extent::{
    Extent, ExtentError, PHYSICAL, RUN, RunHead, check_extent_offset, extent_key, physical_block, run_key,
};
use crate::format::items::{HashEntry, InodeRecord, ItemError, hash_key, inode_key, symlink_key};
use crate::format::node::{Key, KeyBounds};
use crate::log::read_log;
use crate::log::state::{Replayed, Stored, StoredError};
use crate::namespace::directory::name_hash;
use crate::request::{ExtentRow, FileKind, Sharing};
use crate::superblock::{self, SuperblockError};
use crate::types::{BlockNr, InodeNr};

/// Extents in memory at once.
const EXTENTS_PER_BATCH: usize = 16_384;

/// Why the extents of a file could not be listed, or not to the end.
#[derive(Debug, thiserror::Error)]
pub enum ExtentsError {
    /// The device cannot hold a volume.
    #[error(transparent)]
    Device(#[from] UnsupportedDevice),
    /// No superblock can be used.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// Part of a tree cannot be read.
    #[error(transparent)]
    Stored(#[from] StoredError),
    /// An item of the file, or of a directory that leads to it, is damaged.
    #[error("inode {inode}: {what}")]
    Damaged {
        /// Whose item it is.
        inode: InodeNr,
        /// What is wrong.
        what: String,
    },
    /// The path leads nowhere.
    #[error("{0} does not exist")]
    NotFound(String),
    /// A part of the path is no directory, or its end no regular file.
    #[error("{path} is {found}, and should be {wanted}")]
    WrongKind {
        /// The path so far.
        path: String,
        /// What it is.
        found: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// Whoever takes the rows failed.
    #[error("output: {0}")]
    Output(#[from] io::Error),
}

/// Gives `row` the pieces of the regular file at `path`, which begins at the root of the volume on the reactor's device.
/// Symbolic links are not followed. Nothing is written to the device.
///
/// # Errors
/// [`ExtentsError`].
pub async fn extents(
    ctx: &Context,
    path: &[u8],
    row: &mut dyn FnMut(ExtentRow) -> io::Result<()>,
) -> Result<(), ExtentsError> {
    let disk = VolumeDisk::new(ctx.disk().clone())?;
    let (superblock, _warnings) = superblock::read_newest(&disk).await?;
    let log = read_log(&disk, &superblock).await;
    let log = Replayed::new(&superblock, &log);
    let log = log.map_err(|error| damaged(InodeNr::ROOT, &format!("the intent log: {error}")))?;
    let stored = Stored { disk, superblock, log };
    let (inode, record) = find(&stored, path).await?;
    list(&stored, inode, record.size, row).await
}

fn damaged(inode: InodeNr, what: &impl ToString) -> ExtentsError {
    ExtentsError::Damaged { inode, what: what.to_string() }
}

fn shown(path: &[u8]) -> String {
    format!("\"{}\"", path.escape_ascii())
}

async fn record_of(stored: &Stored, inode: InodeNr) -> Result<InodeRecord, ExtentsError> {
    let value = stored.get(inode, inode_key(inode)).await?;
    let value = value.ok_or_else(|| damaged(inode, &"there is a name of it, and no inode"))?;
    InodeRecord::decode(&value).map_err(|error| damaged(inode, &error))
}

/// The regular file at `path`.
async fn find(stored: &Stored, path: &[u8]) -> Result<(InodeNr, InodeRecord), ExtentsError> {
    let mut inode = InodeNr::ROOT;
    let mut record = record_of(stored, inode).await?;
    let mut sofar = Vec::new();
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".") {
        if record.kind != FileKind::Directory {
            return Err(wrong_kind(stored, inode, &record, &sofar, "a directory").await?);
        }
        sofar.push(b'/');
        sofar.extend_from_slice(name);
        inode = if name == b".." { record.parent } else { entry(stored, inode, name, &sofar).await? };
        record = record_of(stored, inode).await?;
    }
    if record.kind != FileKind::Regular {
        return Err(wrong_kind(stored, inode, &record, &sofar, "a regular file").await?);
    }
    Ok((inode, record))
}

async fn entry(
    stored: &Stored,
    directory: InodeNr,
    name: &[u8],
    path: &[u8],
) -> Result<InodeNr, ExtentsError> {
    let hash = name_hash(&stored.superblock.hash_seed, name);
    let not_found = || ExtentsError::NotFound(shown(path));
    let value = stored.get(directory, hash_key(directory, hash)).await?.ok_or_else(not_found)?;
    let chain = HashEntry::decode_chain(&value).map_err(|error: ItemError| damaged(directory, &error))?;
    let found = chain.iter().find(|entry| *entry.name == *name);
    found.map(|entry| entry.target.inode).ok_or_else(not_found)
}

/// The error for something that is not what the path needs there.
async fn wrong_kind(
    stored: &Stored,
    inode: InodeNr,
    record: &InodeRecord,
    path: &[u8],
    wanted: &'static str,
) -> Result<ExtentsError, ExtentsError> {
    let found = match record.kind {
        FileKind::Directory => "a directory".to_owned(),
        FileKind::Symlink => {
            let target = stored.get(inode, symlink_key(inode)).await?.unwrap_or_default();
            format!("a symbolic link to {}", shown(&target))
        }
        FileKind::Regular => "a regular file".to_owned(),
        _ => "a special file".to_owned(),
    };
    let path = if path.is_empty() { b"/" } else { path };
    Ok(ExtentsError::WrongKind { path: shown(path), found, wanted })
}

async fn list(
    stored: &Stored,
    inode: InodeNr,
    size: u64,
    row: &mut dyn FnMut(ExtentRow) -> io::Result<()>,
) -> Result<(), ExtentsError> {
    let mut from = 0;
    loop {
        let pieces = batch(stored, inode, from).await?;
        let whole = pieces.len() == EXTENTS_PER_BATCH;
        let known = pieces.last().filter(|_| whole).map_or(u64::MAX, |piece| piece.mapped.end());
        let mut pieces = &pieces[..];
        // A call gives a bounded number of rows.
        while from < known {
            let list = rows(from, known, size, pieces, |_| 0..0);
            for one in &list.rows {
                row(*one)?;
            }
            let Some(next) = list.next else { return Ok(()) };
            from = next;
            pieces = &pieces[pieces.partition_point(|piece| piece.mapped.end() <= from)..];
        }
    }
}

/// Up to [`EXTENTS_PER_BATCH`] extents of a file that begin at or after `from`, where no extent lies across.
async fn batch(stored: &Stored, inode: InodeNr, from: u64) -> Result<Vec<Piece>, ExtentsError> {
    let (mut pieces, mut error) = (Vec::<Piece>::new(), None);
    let mut end = from;
    let take = |key: Key, value: &[u8]| {
        let decoded = Extent::decode(value).and_then(|extent| {
            check_extent_offset(key.offset, extent.blocks)?;
            Ok(Mapped { offset: key.offset, extent })
        });
        match decoded {
            Ok(mapped) if mapped.offset < end => {
                let offset = key.offset;
                error = Some(damaged(inode, &format!("its extents overlap at byte {offset}")));
            }
            Ok(mapped) => {
                end = mapped.end();
                pieces.push(Piece { mapped, sharing: Sharing::default() });
            }
            Err(what) => {
                let offset = key.offset;
                error = Some(damaged(inode, &format!("extent at byte {offset}: {what}")));
            }
        }
        if error.is_some() || pieces.len() == EXTENTS_PER_BATCH {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    };
    let (first, last) = (extent_key(inode, from), extent_key(inode, u64::MAX));
    stored.range(inode.shard(), first, last, take).await?;
    if let Some(error) = error {
        return Err(error);
    }
    note_sharing(stored, inode, &mut pieces).await?;
    Ok(pieces)
}

/// Blocks of runs that others have too, and whether they are borrowed.
type SharedRuns = Vec<(Range<u64>, bool)>;

async fn note_sharing(stored: &Stored, inode: InodeNr, pieces: &mut [Piece]) -> Result<(), ExtentsError> {
    let covered = covered(pieces);
    let (Some(first), Some(last)) = (covered.first(), covered.last()) else { return Ok(()) };
    let (from, to) = (run_key(BlockNr::new(first.start)), run_key(BlockNr::new(last.end - 1)));
    let touches = |start: u64, end: u64| {
        let next = covered.partition_point(|range| range.end <= start);
        covered.get(next).is_some_and(|range| range.start < end)
    };
    let wanted = |bounds: &KeyBounds| {
        let start = bounds.low.object.saturating_sub(PHYSICAL);
        let end = bounds.high.map_or(u64::MAX, |high| high.object.saturating_add(1).saturating_sub(PHYSICAL));
        bounds.low <= to && bounds.high.is_none_or(|high| high > from) && touches(start, end)
    };
    let (mut shared, mut error) = (SharedRuns::new(), None);
    let take = |key: Key, value: &[u8]| {
        let Some(start) = physical_block(&key).filter(|_| key.kind == RUN) else {
            return ControlFlow::Continue(());
        };
        match RunHead::decode(value) {
            Ok(run) => {
                let (start, lent) = (start.get(), run.lender.is_some());
                let end = start.saturating_add(run.blocks.get());
                if (run.references > 1 || lent) && touches(start, end) {
                    match shared.last_mut() {
                        Some((last, same)) if last.end == start && *same == lent => last.end = end,
                        _ => shared.push((start..end, lent)),
                    }
                }
            }
            Err(what) => error = Some((start, what)),
        }
        if error.is_some() || key > to { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    stored.scan(inode.shard(), wanted, take).await?;
    let error: Option<(BlockNr, ExtentError)> = error;
    if let Some((start, what)) = error {
        return Err(damaged(inode, &format!("run at block {start}: {what}")));
    }
    for piece in pieces {
        let start = piece.mapped.extent.start.get();
        let end = start + piece.mapped.extent.blocks.get();
        let first = shared.partition_point(|(range, _)| range.end <= start);
        for (_, lent) in shared[first..].iter().take_while(|(range, _)| range.start < end) {
            piece.sharing.shared = true;
            piece.sharing.lent |= lent;
        }
    }
    Ok(())
}

/// The blocks of extents, in order, each once.
fn covered(pieces: &[Piece]) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = pieces
        .iter()
        .map(|piece| &piece.mapped.extent)
        .map(|extent| extent.start.get()..extent.start.get() + extent.blocks.get())
        .collect();
    all.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in all {
        match merged.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests;
