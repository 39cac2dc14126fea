//! Extended attributes.
//!
//! Owns: which attributes there are, and their plans.
//!
//! | namespace | kept |
//! |---|---|
//! | `user.`, `trusted.`, `security.` | yes; who may do what is the kernel's matter |
//! | `system.posix_acl_access`, `system.posix_acl_default`, all others | refused: an access list that the permission check does not know would be a lie |
//!
//! Invariant: the inode's `xattr_names` is what a listing needs, so "none" is told without looking for any.

use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::items::{
    InodeRecord, MAX_CHAIN, MAX_NAME, MAX_XATTR_NAMES, MAX_XATTR_VALUE, XATTR, Xattr, xattr_key,
};
use crate::request::SetXattrMode;
use crate::types::InodeNr;

use super::directory::name_hash;
use super::inode;

/// Value beyond which the system call's own limit is exceeded (XATTR_SIZE_MAX), in bytes.
const SYSTEM_VALUE_LIMIT: usize = 65_536;

/// Prefixes of the attributes that are kept.
const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

/// Items that setting or removing an attribute changes: the attribute and the inode.
pub(super) const XATTR_ITEMS: u32 = 2;

/// Checks an attribute's name.
///
/// # Errors
/// [`FsError::NotSupported`] outside the namespaces that are kept, [`FsError::Range`], [`FsError::Invalid`].
pub(super) fn check_name(name: &[u8]) -> Result<(), FsError> {
    if name.len() > MAX_NAME {
        return Err(FsError::Range);
    }
    let Some(prefix) = NAMESPACES.iter().find(|prefix| name.starts_with(prefix)) else {
        return Err(FsError::NotSupported);
    };
    if name.len() == prefix.len() || name.contains(&0) {
        return Err(FsError::Invalid);
    }
    Ok(())
}

/// Checks the length of a value to be set.
///
/// # Errors
/// [`FsError::NoSpace`] beyond the format's limit, [`FsError::TooBig`] beyond the system call's.
pub(super) fn check_value(value: &[u8]) -> Result<(), FsError> {
    if value.len() > SYSTEM_VALUE_LIMIT {
        return Err(FsError::TooBig);
    }
    if value.len() > MAX_XATTR_VALUE { Err(FsError::NoSpace) } else { Ok(()) }
}

fn chain(batch: &Batch<'_>, inode: InodeNr, hash: u64) -> Plan<Vec<Xattr>> {
    let Some(value) = batch.get(&xattr_key(inode, hash))? else { return Ok(Vec::new()) };
    Ok(Xattr::decode_chain(&value).map_err(|error| error.of("extended attribute", inode))?)
}

/// The value of an attribute.
///
/// # Errors
/// [`FsError::NoAttribute`].
pub(super) fn get(batch: &Batch<'_>, inode: InodeNr, name: &[u8]) -> Plan<Vec<u8>> {
    let record = inode::load(batch, inode)?;
    if record.xattr_names == 0 {
        return Err(FsError::NoAttribute.into());
    }
    let hash = name_hash(batch.hash_seed(), name);
    let found = chain(batch, inode, hash)?.into_iter().find(|attribute| *attribute.name == *name);
    Ok(found.ok_or(FsError::NoAttribute)?.value.into_vec())
}

/// Sets an attribute.
///
/// # Errors
/// [`FsError::Exists`], [`FsError::NoAttribute`] by `mode`; [`FsError::NoSpace`] beyond the format's limits.
pub(super) fn set(
    batch: &mut Batch<'_>,
    inode: InodeNr,
    name: &[u8],
    value: &[u8],
    mode: SetXattrMode,
) -> Plan<()> {
    let mut record = inode::load(batch, inode)?;
    let hash = name_hash(batch.hash_seed(), name);
    let mut attributes = chain(batch, inode, hash)?;
    match (attributes.iter_mut().find(|attribute| *attribute.name == *name), mode) {
        (Some(_), SetXattrMode::Create) => return Err(FsError::Exists.into()),
        (None, SetXattrMode::Replace) => return Err(FsError::NoAttribute.into()),
        (Some(attribute), _) => attribute.value = value.into(),
        (None, _) => {
            attributes.push(Xattr { name: name.into(), value: value.into() });
            record.xattr_names = record
                .xattr_names
                .checked_add(listed_length(name))
                .filter(|names| *names <= MAX_XATTR_NAMES)
                .ok_or(FsError::NoSpace)?;
        }
    }
    let stored = Xattr::encode_chain(&attributes);
    if stored.len() > MAX_CHAIN {
        return Err(FsError::NoSpace.into());
    }
    batch.put(xattr_key(inode, hash), stored);
    store_changed(batch, inode, &mut record);
    Ok(())
}

/// Removes an attribute.
///
/// # Errors
/// [`FsError::NoAttribute`].
pub(super) fn remove(batch: &mut Batch<'_>, inode: InodeNr, name: &[u8]) -> Plan<()> {
    let mut record = inode::load(batch, inode)?;
    let hash = name_hash(batch.hash_seed(), name);
    let mut attributes = chain(batch, inode, hash)?;
    let Some(found) = attributes.iter().position(|attribute| *attribute.name == *name) else {
        return Err(FsError::NoAttribute.into());
    };
    attributes.remove(found);
    if attributes.is_empty() {
        batch.delete(xattr_key(inode, hash));
    } else {
        batch.put(xattr_key(inode, hash), Xattr::encode_chain(&attributes));
    }
    record.xattr_names = record.xattr_names.saturating_sub(listed_length(name));
    store_changed(batch, inode, &mut record);
    Ok(())
}

/// The names of all attributes, each ended by NUL.
pub(super) fn list(batch: &Batch<'_>, inode: InodeNr) -> Plan<Vec<u8>> {
    let record = inode::load(batch, inode)?;
    let mut names = Vec::new();
    if record.xattr_names == 0 {
        return Ok(names);
    }
    let mut next = Some(0);
    while let Some(from) = next
        && let Some((key, value)) = batch.next(&xattr_key(inode, from))?
        && (key.object, key.kind) == (inode.get(), XATTR)
    {
        for attribute in Xattr::decode_chain(&value).map_err(|error| error.of("extended attribute", inode))? {
            names.extend_from_slice(&attribute.name);
            names.push(0);
        }
        if names.len() > MAX_XATTR_NAMES as usize {
            return Err(FsError::TooBig.into());
        }
        next = key.offset.checked_add(1);
    }
    Ok(names)
}

/// Deletes up to `limit` items of attributes; returns whether any may be left. For inodes about to be deleted.
pub(super) fn delete_some(batch: &mut Batch<'_>, inode: InodeNr, limit: u32) -> Plan<bool> {
    for _ in 0..limit {
        match batch.next(&xattr_key(inode, 0))? {
            Some((key, _)) if (key.object, key.kind) == (inode.get(), XATTR) => batch.delete(key),
            _ => return Ok(false),
        }
    }
    Ok(true)
}

fn listed_length(name: &[u8]) -> u32 {
    u32::try_from(name.len() + 1).expect("a name is at most MAX_NAME long")
}

fn store_changed(batch: &mut Batch<'_>, inode: InodeNr, record: &mut InodeRecord) {
    record.changed = batch.now();
    inode::store(batch, inode, record);
}
