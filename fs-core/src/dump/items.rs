//! Items as text.
//!
//! Owns: [`describe`], one line for one item, and the forms of names and bytes in it.
//!
//! Excludes: which items are shown.

use std::fmt::Write;

use reactor::WallTime;

use crate::format::extent::{self, BACKREF, Backref, EXTENT, Extent, ExtentError, RETURN, RUN, Return, Run};
use crate::format::items::{
    DIR_HASH, DIR_SEQ, HashEntry, INODE, INTENT, InodeRecord, Intent, ItemError, SYMLINK, SequenceEntry,
    XATTR, Xattr,
};
use crate::format::node::Key;
use crate::request::FileKind;

/// Checksums of a run that are shown; more are counted.
const MAX_CHECKSUMS: usize = 4;

/// Why an item cannot be shown as what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Undescribed {
    #[error(transparent)]
    Item(#[from] ItemError),
    #[error(transparent)]
    Extent(#[from] ExtentError),
    #[error("unknown kind")]
    Unknown,
}

/// The item in words, without its kind.
pub(super) fn describe(key: &Key, value: &[u8]) -> Result<String, Undescribed> {
    let Key { object, offset, minor, .. } = *key;
    let block = extent::physical_block(key);
    Ok(match (key.kind, block) {
        (INTENT, None) => format!("of inode {offset}: {:?}", Intent::decode(value)?),
        (INODE, None) => format!("{object}: {}", inode(&InodeRecord::decode(value)?)),
        (SYMLINK, None) => format!("{object} -> {}", name(value)),
        (XATTR, None) => {
            let mut text = format!("of inode {object}, hash {offset:016x}:");
            for attribute in Xattr::decode_chain(value)? {
                let _ = write!(text, " {} = {}", name(&attribute.name), name(&attribute.value));
            }
            text
        }
        (DIR_HASH, None) => {
            let mut text = format!("of directory {object}, hash {offset:016x}:");
            for entry in HashEntry::decode_chain(value)? {
                let (target, kind) = (entry.target.inode, kind(entry.target.kind));
                let _ = write!(
                    text,
                    " {} -> inode {target} ({kind}), sequence {}",
                    name(&entry.name),
                    entry.sequence
                );
            }
            text
        }
        (DIR_SEQ, None) => {
            let entry = SequenceEntry::decode(value)?;
            let (target, kind) = (entry.target.inode, kind(entry.target.kind));
            format!(
                "of directory {object}, sequence {offset}: {} -> inode {target} ({kind})",
                name(&entry.name)
            )
        }
        (EXTENT, None) => {
            let extent = Extent::decode(value)?;
            let (start, blocks, generation) = (extent.start, extent.blocks, extent.generation);
            format!(
                "of inode {object} at {offset}: block {start} + {blocks}, {:?}, generation {generation}",
                extent.kind
            )
        }
        (RUN, Some(start)) => {
            let run = Run::decode(value)?;
            let mut text = format!(
                "block {start} + {}: {:?}, references {}, generation {}",
                run.blocks,
                run.kind(),
                run.references,
                run.generation
            );
            if let Some(lender) = run.lender {
                let _ = write!(text, ", borrowed from shard {lender}");
            }
            for checksum in run.checksums.iter().take(MAX_CHECKSUMS) {
                let _ = write!(text, " {checksum:08x}");
            }
            if run.checksums.len() > MAX_CHECKSUMS {
                let _ = write!(text, " and {} more", run.checksums.len() - MAX_CHECKSUMS);
            }
            text
        }
        (RETURN, None) => {
            let back = Return::decode(value)?;
            let (lender, start) = extent::return_of_key(key, back.blocks)?;
            format!("block {start} + {} to shard {lender}, generation {}", back.blocks, back.generation)
        }
        (BACKREF, Some(start)) => {
            let backref = Backref::decode(value)?;
            format!("block {start} + {}: inode {offset} at {minor}", backref.blocks)
        }
        _ => return Err(Undescribed::Unknown),
    })
}

fn inode(record: &InodeRecord) -> String {
    let mut text = format!(
        "{} {:04o} links {} uid {} gid {} size {} blocks {} generation {}",
        kind(record.kind),
        record.permissions,
        record.links,
        record.uid,
        record.gid,
        record.size,
        record.blocks,
        record.generation
    );
    if record.kind == FileKind::Directory {
        let _ = write!(
            text,
            " parent {} entries {} next_sequence {}",
            record.parent, record.entries, record.next_sequence
        );
    }
    if matches!(record.kind, FileKind::BlockDevice | FileKind::CharDevice) {
        let _ = write!(text, " device {:#x}", record.device);
    }
    if record.xattr_names > 0 {
        let _ = write!(text, " xattr_names {}", record.xattr_names);
    }
    let time = |time: WallTime| format!("{}.{:09}", time.secs(), time.subsec_nanos());
    let _ = write!(
        text,
        " accessed {} modified {} changed {} created {}",
        time(record.accessed),
        time(record.modified),
        time(record.changed),
        time(record.created)
    );
    text
}

fn kind(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Regular => "regular",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::BlockDevice => "block-device",
        FileKind::CharDevice => "char-device",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
    }
}

/// A name in quotes; bytes that are not printable ASCII as escapes, so that a dump cannot disturb a terminal.
fn name(name: &[u8]) -> String {
    format!("\"{}\"", name.escape_ascii())
}

/// Bytes in hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
