//! Requests on a device that is nothing but memory, for callgrind to count: the difference of two runs of different length
//! is what requests cost, and [`transfer`], the device's own work, is left out by its name.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use fs_core::mkfs::{Force, FormatOptions, Owner, format};
use fs_core::request::NewInode;
use fs_core::{MountOptions, Volume};
use futures_util::future::join_all;
use reactor::block::{BlockDevice, Completion, Geometry, Lba, LbaCount, OpTag, Rejected};
use reactor::{Context, DmaPool, HeapRegion, SystemClock};

use crate::library::loads::{BLOCK, create, read_block, scattered, sync, write, write_block};

const DEVICE_BYTES: usize = 1 << 30;
const POOL_BYTES: usize = 16 << 20;
/// Blocks of the file.
const BLOCKS: u64 = 16_384;
/// Requests at once.
const DEPTH: u64 = 32;

/// Options of `instructions`.
#[derive(Args)]
pub(crate) struct Instructions {
    #[arg(long)]
    kind: Kind,
    /// How many
    #[arg(long)]
    requests: u64,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Kind {
    /// Reads of 4 KiB at random, past the cache
    Read,
    /// Writes of 4 KiB at random, past the cache
    Write,
    /// Checksums of 4 KiB
    Checksum,
}

impl Instructions {
    pub(crate) fn run(&self) -> Result<()> {
        if self.kind == Kind::Checksum {
            let page = [7; BLOCK as usize];
            let sum =
                (0..self.requests).fold(0, |sum, _| crc32c::crc32c_append(sum, std::hint::black_box(&page)));
            println!("{{\"sum\": {sum}}}");
            return Ok(());
        }
        let (kind, requests) = (self.kind, self.requests);
        ensure!(
            kind == Kind::Read || requests <= BLOCKS,
            "a block is written once: {BLOCKS} requests at most"
        );
        let device = Box::new(MemoryDevice::new()?);
        let clock = Arc::new(SystemClock::new());
        reactor::block_on(
            Some(device),
            clock,
            0,
            |ctx: Context| async move { load(&ctx, kind, requests).await },
        )?;
        println!("{{}}");
        Ok(())
    }
}

async fn load(ctx: &Context, kind: Kind, requests: u64) -> Result<()> {
    let options = FormatOptions { shards: 1, label: String::new(), force: Force::Refuse, owner: Owner::ROOT };
    format(ctx, &options).await?;
    let volume = Volume::mount(ctx, &[ctx.handle()], MountOptions::default()).await?;
    let inode = create(&volume, Volume::ROOT, "data", NewInode::Regular).await?;
    for block in 0..BLOCKS {
        write(&volume, inode, block * BLOCK, &[block as u8; BLOCK as usize]).await?;
    }
    sync(&volume, inode).await?;
    let workers = (0..DEPTH).map(|worker| {
        let volume = &volume;
        async move {
            for number in (worker..requests).step_by(DEPTH as usize) {
                let block = scattered(number, BLOCKS);
                match kind {
                    Kind::Write => write_block(volume, inode, block).await?,
                    _ => read_block(volume, inode, block).await?,
                }
            }
            anyhow::Ok(())
        }
    });
    join_all(workers).await.into_iter().collect()
}

/// A device that has done everything by the next look at it.
struct MemoryDevice {
    geometry: Geometry,
    pool: DmaPool,
    bytes: Vec<u8>,
    done: VecDeque<Completion>,
}

impl MemoryDevice {
    fn new() -> Result<Self> {
        let geometry = Geometry {
            lba_size: BLOCK as u32,
            lba_count: LbaCount::new(DEVICE_BYTES as u64 / BLOCK),
            preferred_transfer: 1 << 20,
            volatile_write_cache: false,
            deallocate: false,
            queue_depth: 1024,
            name: "memory".to_owned(),
        };
        let pool = DmaPool::new(HeapRegion::new(POOL_BYTES)?);
        Ok(Self { geometry, pool, bytes: vec![0; DEVICE_BYTES], done: VecDeque::new() })
    }
}

/// What a device does and no processor. Not inlined, so that it can be left out by its name.
#[inline(never)]
fn transfer(bytes: &mut [u8], request: &mut reactor::block::Request) {
    let at = |lba: &Lba, length: usize| {
        lba.get() as usize * BLOCK as usize..lba.get() as usize * BLOCK as usize + length
    };
    match request {
        reactor::block::Request::Read { lba, buffer } => buffer.write_at(0, &bytes[at(lba, buffer.len())]),
        reactor::block::Request::Write { lba, buffer, .. } => {
            buffer.read_at(0, &mut bytes[at(lba, buffer.len())]);
        }
        reactor::block::Request::WriteZeroes(range) => {
            bytes[at(&range.start, range.count.get() as usize * BLOCK as usize)].fill(0);
        }
        reactor::block::Request::Flush | reactor::block::Request::Deallocate(_) => {}
    }
}

impl BlockDevice for MemoryDevice {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn pool(&self) -> &DmaPool {
        &self.pool
    }

    fn submit(&mut self, tag: OpTag, mut request: reactor::block::Request) -> Result<(), Rejected> {
        transfer(&mut self.bytes, &mut request);
        let buffer = match request {
            reactor::block::Request::Read { buffer, .. } | reactor::block::Request::Write { buffer, .. } => {
                Some(buffer)
            }
            _ => None,
        };
        self.done.push_back(Completion { tag, result: Ok(()), buffer });
        Ok(())
    }

    fn ring(&mut self) {}

    fn process_completions(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize {
        let count = budget.min(self.done.len());
        self.done.drain(..count).for_each(sink);
        count
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn interrupt(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn arm_interrupt(&mut self) -> bool {
        !self.done.is_empty()
    }
}
