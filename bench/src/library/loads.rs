//! The timed loads. Each runs in a task of the reactor that owns the directory it works in, and returns how long it took
//! and how many operations it has done.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use fs_core::request::{Caller, KillPrivileges, NewInode, SyncScope, WriteSource};
use fs_core::types::{FileOffset, InodeNr};
use fs_core::{Reply, Request, Volume, WriteOutcome};
use futures_util::future::join_all;
use reactor::Context;

use crate::files::next_random;

pub(crate) const BLOCK: u64 = 4096;
/// Files made before as many are unlinked.
const SMALL_FILES: u64 = 1000;
/// Bytes of each.
const SMALL: usize = 100;
/// Blocks of the file that is written and synced.
pub(crate) const SYNCED_BLOCKS: u64 = 1024;

/// Makes a file or a directory.
pub(crate) async fn create(volume: &Volume, parent: InodeNr, name: &str, new: NewInode) -> Result<InodeNr> {
    let request = Request::Create {
        parent,
        name: name.as_bytes().into(),
        new,
        permissions: 0o755,
        caller: Caller { uid: 0, gid: 0 },
    };
    match volume.call(request).await {
        Ok(Reply::Entry(entry)) => Ok(entry.inode),
        other => Err(anyhow!("creating {name}: {other:?}")),
    }
}

/// A directory of each shard, in their order.
pub(crate) async fn homes(volume: &Volume) -> Result<Vec<InodeNr>> {
    let mut homes = vec![None; usize::from(volume.shards())];
    for number in 0.. {
        if homes.iter().all(Option::is_some) {
            break;
        }
        let home = create(volume, Volume::ROOT, &format!("home{number}"), NewInode::Directory).await?;
        homes[home.shard().index()].get_or_insert(home);
    }
    Ok(homes.into_iter().flatten().collect())
}

/// Where the load of a reactor works.
pub(crate) struct Place {
    /// A directory of its own.
    pub(crate) home: InodeNr,
    /// A file in it, of as many blocks as were asked for, durable.
    pub(crate) file: InodeNr,
}

/// A place in each shard.
pub(crate) async fn places(volume: &Volume, blocks: u64) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    for home in homes(volume).await? {
        places.push(Place { home, file: written(volume, home, blocks).await? });
    }
    Ok(places)
}

/// Writes, the short way if there is room.
pub(crate) async fn write(volume: &Volume, inode: InodeNr, offset: u64, data: &[u8]) -> Result<()> {
    let offset = FileOffset::new(offset);
    match volume.write(inode, offset, data, WriteSource::Call, KillPrivileges::Keep) {
        WriteOutcome::Accepted(_) => Ok(()),
        WriteOutcome::Failed(error) => bail!("writing at {offset:?}: {error}"),
        WriteOutcome::Slow => {
            let (source, kill_privileges) = (WriteSource::Call, KillPrivileges::Keep);
            let request = Request::Write { inode, offset, data: data.into(), source, kill_privileges };
            volume.call(request).await?;
            Ok(())
        }
    }
}

/// Makes a file durable.
pub(crate) async fn sync(volume: &Volume, inode: InodeNr) -> Result<()> {
    volume.call(Request::Sync { inode, scope: SyncScope::File }).await?;
    Ok(())
}

/// A file of whole blocks, durable.
async fn written(volume: &Volume, home: InodeNr, blocks: u64) -> Result<InodeNr> {
    let inode = create(volume, home, "data", NewInode::Regular).await?;
    for block in 0..blocks {
        write(volume, inode, block * BLOCK, &[block as u8; BLOCK as usize]).await?;
    }
    sync(volume, inode).await?;
    Ok(inode)
}

fn since(ctx: &Context, began: reactor::Instant) -> Duration {
    ctx.now().duration_since(began)
}

/// `depth` readers of 4 KiB at random.
pub(crate) async fn random_read(
    ctx: &Context,
    volume: &Volume,
    inode: InodeNr,
    blocks: u64,
    depth: usize,
    period: Duration,
) -> Result<(Duration, u64)> {
    let began = ctx.now();
    let readers = (0..depth).map(|reader| async move {
        let (mut state, mut done) = (reader as u64, 0);
        while since(ctx, began) < period {
            read_block(volume, inode, next_random(&mut state) % blocks).await?;
            done += 1;
        }
        Ok::<u64, anyhow::Error>(done)
    });
    let done = join_all(readers).await.into_iter().sum::<Result<u64>>()?;
    Ok((since(ctx, began), done))
}

/// Reads a block past the cache and looks at a byte of it.
pub(crate) async fn read_block(volume: &Volume, inode: InodeNr, block: u64) -> Result<()> {
    let request = Request::ReadDirect { inode, offset: FileOffset::new(block * BLOCK), length: BLOCK as u32 };
    match volume.call(request).await? {
        Reply::Data(data) if data.len() as u64 == BLOCK && data[7] == block as u8 => Ok(()),
        _ => bail!("block {block} has wrong contents"),
    }
}

/// `depth` writers, past the cache, that together write every block once, in an order that has no neighbours in it.
pub(crate) async fn random_write(
    ctx: &Context,
    volume: &Volume,
    inode: InodeNr,
    blocks: u64,
    depth: usize,
) -> Result<(Duration, u64)> {
    let began = ctx.now();
    let writers = (0..depth as u64).map(|writer| async move {
        for number in (writer..blocks).step_by(depth) {
            write_block(volume, inode, scattered(number, blocks)).await?;
        }
        anyhow::Ok(())
    });
    join_all(writers).await.into_iter().collect::<Result<()>>()?;
    Ok((since(ctx, began), blocks))
}

/// Writes a block past the cache.
pub(crate) async fn write_block(volume: &Volume, inode: InodeNr, block: u64) -> Result<()> {
    let request = Request::WriteDirect {
        inode,
        offset: FileOffset::new(block * BLOCK),
        data: vec![block as u8; BLOCK as usize].into(),
        kill_privileges: KillPrivileges::Keep,
    };
    volume.call(request).await?;
    Ok(())
}

/// A permutation of `0..blocks` that jumps about; `blocks` is a power of two.
pub(crate) fn scattered(number: u64, blocks: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15 | 1) % blocks
}

/// Writes 4 KiB somewhere in a small file and makes it durable, one after the other.
pub(crate) async fn write_fsync(
    ctx: &Context,
    volume: &Volume,
    inode: InodeNr,
    period: Duration,
) -> Result<(Duration, u64)> {
    let (began, mut done) = (ctx.now(), 0_u64);
    while since(ctx, began) < period {
        let offset = (done * 611) % SYNCED_BLOCKS * BLOCK;
        write(volume, inode, offset, &[done as u8; BLOCK as usize]).await?;
        sync(volume, inode).await?;
        done += 1;
    }
    Ok((since(ctx, began), done))
}

/// Makes small files and unlinks them.
pub(crate) async fn create_unlink(
    ctx: &Context,
    volume: &Volume,
    home: InodeNr,
    period: Duration,
) -> Result<(Duration, u64)> {
    let (began, mut done) = (ctx.now(), 0);
    while since(ctx, began) < period {
        for number in 0..SMALL_FILES {
            let inode = create(volume, home, &format!("file{number}"), NewInode::Regular).await?;
            write(volume, inode, 0, &[7; SMALL]).await?;
            volume.call(Request::Forget { inode, lookups: 1 }).await?;
        }
        for number in 0..SMALL_FILES {
            let name = format!("file{number}").into_bytes().into();
            volume.call(Request::Unlink { parent: home, name }).await?;
        }
        done += SMALL_FILES;
    }
    Ok((since(ctx, began), done))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_numbers_are_a_permutation_without_neighbours() {
        let mut all: Vec<u64> = (0..1024).map(|number| scattered(number, 1024)).collect();
        assert!(all.windows(2).all(|pair| pair[0].abs_diff(pair[1]) > 1));
        all.sort_unstable();
        assert_eq!(all, (0..1024).collect::<Vec<_>>());
    }
}
