//! Plans on directories: find, insert, remove, replace, list.
//!
//! Owns: the two items of every entry (by the name's hash, by sequence number) and the directory's counters.
//!
//! Invariants:
//! - both items of an entry are written in one plan, together with the counters in the directory's inode;
//! - a sequence number is never used twice in a directory, so a listing that goes on "after number n" sees every entry
//!   that existed all the time exactly once, whatever is made and removed meanwhile;
//! - entries are found by point lookups only, so a rehearsed plan finds its nodes in memory until it commits.
//!
//! Excludes: link counts and other inodes (`change.rs`), `.` and `..` (not stored).

use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::items::{
    DIR_SEQ, EntryTarget, FIRST_SEQUENCE, HashEntry, InodeRecord, MAX_CHAIN, SequenceEntry, hash_key,
    sequence_key,
};
use crate::request::DirectoryEntry;
use crate::types::InodeNr;

use super::inode;

/// Hash of a name, keyed by the volume's seed so that nobody can choose names that collide.
pub(crate) fn name_hash(seed: &[u8; 16], name: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new_with_key(seed);
    hasher.write(name);
    hasher.finish()
}

fn chain(batch: &Batch<'_>, directory: InodeNr, hash: u64) -> Plan<Vec<HashEntry>> {
    let Some(value) = batch.get(&hash_key(directory, hash))? else { return Ok(Vec::new()) };
    Ok(HashEntry::decode_chain(&value).map_err(|error| error.of("directory entry", directory))?)
}

fn store_chain(batch: &mut Batch<'_>, directory: InodeNr, hash: u64, entries: &[HashEntry]) -> Plan<()> {
    if entries.is_empty() {
        batch.delete(hash_key(directory, hash));
        return Ok(());
    }
    let value = HashEntry::encode_chain(entries);
    if value.len() > MAX_CHAIN {
        return Err(FsError::NoSpace.into());
    }
    batch.put(hash_key(directory, hash), value);
    Ok(())
}

/// The entry `name` of `directory`.
pub(crate) fn find(batch: &Batch<'_>, directory: InodeNr, name: &[u8]) -> Plan<Option<HashEntry>> {
    let hash = name_hash(batch.hash_seed(), name);
    Ok(chain(batch, directory, hash)?.into_iter().find(|entry| *entry.name == *name))
}

/// Adds an entry.
///
/// # Errors
/// [`FsError::Exists`]; [`FsError::NotFound`] or [`FsError::NotDirectory`] of the directory; [`FsError::NoSpace`] if
/// too many names share the hash.
pub(crate) fn insert(
    batch: &mut Batch<'_>,
    directory: InodeNr,
    name: &[u8],
    target: EntryTarget,
) -> Plan<()> {
    let mut record = inode::load_directory(batch, directory)?;
    let hash = name_hash(batch.hash_seed(), name);
    let mut entries = chain(batch, directory, hash)?;
    if entries.iter().any(|entry| *entry.name == *name) {
        return Err(FsError::Exists.into());
    }
    let sequence = record.next_sequence;
    entries.push(HashEntry { sequence, target, name: name.into() });
    store_chain(batch, directory, hash, &entries)?;
    batch.put(sequence_key(directory, sequence), SequenceEntry { target, name: name.into() }.encode());
    record.next_sequence = sequence.checked_add(1).ok_or(FsError::NoSpace)?;
    record.entries += 1;
    record.size += name.len() as u64;
    store_touched(batch, directory, &mut record);
    Ok(())
}

/// Removes the entry `name`, which must name `expected`.
///
/// # Errors
/// [`FsError::NotFound`] if there is no such entry, or it names something else.
pub(crate) fn remove(batch: &mut Batch<'_>, directory: InodeNr, name: &[u8], expected: InodeNr) -> Plan<()> {
    let mut record = inode::load_directory(batch, directory)?;
    let hash = name_hash(batch.hash_seed(), name);
    let mut entries = chain(batch, directory, hash)?;
    let found = position(&entries, name, expected)?;
    let entry = entries.remove(found);
    store_chain(batch, directory, hash, &entries)?;
    batch.delete(sequence_key(directory, entry.sequence));
    let length = name.len() as u64;
    let (Some(count), Some(size)) = (record.entries.checked_sub(1), record.size.checked_sub(length)) else {
        return Err(damaged("a directory has more entries than it counts", directory).into());
    };
    record.entries = count;
    record.size = size;
    store_touched(batch, directory, &mut record);
    Ok(())
}

/// Lets the entry `name`, which must name `expected`, name `target` from now on, in the same place of the listing.
///
/// # Errors
/// As [`remove`].
pub(crate) fn replace(
    batch: &mut Batch<'_>,
    directory: InodeNr,
    name: &[u8],
    expected: InodeNr,
    target: EntryTarget,
) -> Plan<()> {
    let mut record = inode::load_directory(batch, directory)?;
    let hash = name_hash(batch.hash_seed(), name);
    let mut entries = chain(batch, directory, hash)?;
    let found = position(&entries, name, expected)?;
    entries[found].target = target;
    let sequence = entries[found].sequence;
    store_chain(batch, directory, hash, &entries)?;
    batch.put(sequence_key(directory, sequence), SequenceEntry { target, name: name.into() }.encode());
    store_touched(batch, directory, &mut record);
    Ok(())
}

/// Up to `limit` entries whose sequence is above `after`, in the order of their sequences; `.` and `..` not included.
pub(crate) fn list(
    batch: &Batch<'_>,
    directory: InodeNr,
    after: u64,
    limit: usize,
) -> Plan<Vec<DirectoryEntry>> {
    let mut listed = Vec::new();
    let mut next = after.checked_add(1).map(|first| first.max(FIRST_SEQUENCE));
    while let Some(from) = next
        && listed.len() < limit
        && let Some((key, value)) = batch.next(&sequence_key(directory, from))?
        && (key.object, key.kind) == (directory.get(), DIR_SEQ)
    {
        let entry = SequenceEntry::decode(&value).map_err(|error| error.of("directory entry", directory))?;
        listed.push(DirectoryEntry {
            inode: entry.target.inode,
            kind: entry.target.kind,
            name: entry.name,
            cookie: key.offset,
        });
        next = key.offset.checked_add(1);
    }
    Ok(listed)
}

fn position(entries: &[HashEntry], name: &[u8], expected: InodeNr) -> Result<usize, FsError> {
    entries
        .iter()
        .position(|entry| *entry.name == *name && entry.target.inode == expected)
        .ok_or(FsError::NotFound)
}

fn store_touched(batch: &mut Batch<'_>, directory: InodeNr, record: &mut InodeRecord) {
    record.modified = batch.now();
    record.changed = batch.now();
    inode::store(batch, directory, record);
}

fn damaged(what: &str, inode: InodeNr) -> FsError {
    FsError::Damaged { what: what.to_owned(), block: None, inode: Some(inode) }
}
