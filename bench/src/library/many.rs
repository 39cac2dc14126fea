//! Volumes with very many files and extents: the extents are made by clones, as nobody has the space otherwise.

use anyhow::{Result, bail};
use fs_core::request::{CloneRange, NewInode, SyncScope};
use fs_core::types::{FileOffset, InodeNr};
use fs_core::{Reply, Request, Volume};

use super::loads::{BLOCK, create, homes, write};

/// Extents of the file that the others are clones of.
const BASE: u64 = 65_536;
/// Files of a directory.
const FILES_OF_A_DIRECTORY: u64 = 10_000;

/// Makes files of no bytes and clones of a file of many extents, all durable; the last file only in the intent log. Returns the
/// number of extents.
pub(crate) async fn fill(volume: &Volume, files: u64, extents: u64) -> Result<u64> {
    let homes = homes(volume).await?;
    let mut folder = Volume::ROOT;
    for number in 0..files - 1 {
        if number % FILES_OF_A_DIRECTORY == 0 {
            folder = create(volume, Volume::ROOT, &folder_name(number), NewInode::Directory).await?;
        }
        let inode = create(volume, folder, &file_name(number), NewInode::Regular).await?;
        volume.call(Request::Forget { inode, lookups: 1 }).await?;
    }
    let made = if extents == 0 { 0 } else { clones(volume, &homes, extents).await? };
    sync_all(volume).await?;
    create(volume, folder, &file_name(files - 1), NewInode::Regular).await?;
    sync_all(volume).await?;
    Ok(made)
}

async fn sync_all(volume: &Volume) -> Result<()> {
    volume.call(Request::Sync { inode: Volume::ROOT, scope: SyncScope::Volume }).await?;
    Ok(())
}

async fn clones(volume: &Volume, homes: &[InodeNr], extents: u64) -> Result<u64> {
    let mut made = 0;
    for home in homes {
        let base = create(volume, *home, "base", NewInode::Regular).await?;
        for first in 0..2 {
            for block in (first..BASE).step_by(2) {
                write(volume, base, block * BLOCK, &[block as u8; BLOCK as usize]).await?;
            }
            sync_all(volume).await?;
        }
        made += BASE;
        let goal = made + (extents / homes.len() as u64).saturating_sub(BASE);
        while made < goal {
            let target = create(volume, *home, &format!("clone{made}"), NewInode::Regular).await?;
            let start = FileOffset::new(0);
            let range =
                CloneRange { source: base, source_offset: start, target, target_offset: start, length: 0 };
            match volume.call(Request::Clone(range)).await? {
                Reply::Cloned(cloned) if cloned.extents > 0 => made += cloned.extents,
                other => bail!("a clone answered {other:?}"),
            }
        }
    }
    Ok(made)
}

fn folder_name(number: u64) -> String {
    format!("folder{}", number / FILES_OF_A_DIRECTORY)
}

fn file_name(number: u64) -> String {
    format!("file{number}")
}

async fn find(volume: &Volume, parent: InodeNr, name: String) -> Result<Option<InodeNr>> {
    match volume.call(Request::Lookup { parent, name: name.into_bytes().into() }).await {
        Ok(Reply::Entry(entry)) => Ok(Some(entry.inode)),
        Err(fs_core::FsError::NotFound) => Ok(None),
        other => bail!("a lookup answered {other:?}"),
    }
}

/// Whether the last file that [`fill`] has made is there.
pub(crate) async fn last_file(volume: &Volume, files: u64) -> Result<bool> {
    // It lies beside the one before it.
    let Some(folder) = find(volume, Volume::ROOT, folder_name(files - 2)).await? else { return Ok(false) };
    Ok(find(volume, folder, file_name(files - 1)).await?.is_some())
}

/// Looks every file up, and keeps the lookups.
pub(crate) async fn look_up(volume: &Volume, files: u64) -> Result<()> {
    let mut folder = Volume::ROOT;
    for number in 0..files - 1 {
        if number % FILES_OF_A_DIRECTORY == 0 {
            let found = find(volume, Volume::ROOT, folder_name(number)).await?;
            let Some(found) = found else { bail!("{} is missing", folder_name(number)) };
            folder = found;
        }
        if find(volume, folder, file_name(number)).await?.is_none() {
            bail!("{} is missing", file_name(number));
        }
    }
    Ok(())
}
