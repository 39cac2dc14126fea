//! A volume in readable form: superblock, groups, tree nodes, items.
//!
//! Owns: [`dump`], what can be selected, the text. One line is one thing; damage is a line that begins with `!`, and
//! the dump goes on behind it. Parts of a tree that cannot hold what was selected are not read.
//!
//! Every byte is input: what cannot be decoded is shown as bytes.
//!
//! Excludes: judging what is shown (`fsck`), programs as readers: the text may change.

mod extents;
mod items;

pub use extents::{ExtentsError, extents};

use std::io::{self, Write};

use reactor::Context;

use crate::alloc::read_group;
use crate::disk::{UnsupportedDevice, VolumeDisk};
use crate::format::extent::{BACKREF, EXTENT, PHYSICAL, RETURN, RUN};
use crate::format::group::VolumeLayout;
use crate::format::items::{DIR_HASH, DIR_SEQ, INODE, INTENT, SYMLINK, XATTR};
use crate::format::node::{Expected, ItemKind, Key, KeyBounds};
use crate::log::read_log;
use crate::superblock::{self, Superblock, SuperblockError, SuperblockWarning};
use crate::tree::Walk;
use crate::types::{BLOCK_SIZE, InodeNr, ShardId};

/// Names of the kinds of items, as they are selected and shown.
const KINDS: &[(&str, ItemKind)] = &[
    ("intent", INTENT),
    ("inode", INODE),
    ("symlink", SYMLINK),
    ("xattr", XATTR),
    ("dir-hash", DIR_HASH),
    ("dir-seq", DIR_SEQ),
    ("extent", EXTENT),
    ("run", RUN),
    ("backref", BACKREF),
    ("return", RETURN),
];

/// The kind of items with this name, such as `inode` or `dir-seq`.
pub fn kind_named(name: &str) -> Option<ItemKind> {
    KINDS.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind)
}

/// All names that [`kind_named`] knows.
pub fn kind_names() -> impl Iterator<Item = &'static str> {
    KINDS.iter().map(|(name, _)| *name)
}

/// An item of a tree in words, as a dump shows it; `None` if it is no item of a known kind.
pub fn describe_item(key: &Key, value: &[u8]) -> Option<String> {
    items::describe(key, value).ok()
}

/// What to show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// The superblock.
    #[default]
    Superblock,
    /// The allocation groups.
    Groups,
    /// The nodes of the trees.
    Nodes,
    /// The items of the trees.
    Items,
}

/// Which of it. `None` means all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// What to show.
    pub part: Part,
    /// Of this shard only.
    pub shard: Option<ShardId>,
    /// Items of this inode only: its own, its intents, and references to its blocks.
    pub inode: Option<InodeNr>,
    /// Items of this kind only.
    pub kind: Option<ItemKind>,
}

/// Why a dump ended early.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The device cannot hold a volume.
    #[error(transparent)]
    Device(#[from] UnsupportedDevice),
    /// No superblock can be used.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// The output could not be written.
    #[error("output: {0}")]
    Output(#[from] io::Error),
}

/// What a dump met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DumpSummary {
    /// Things shown.
    pub shown: u64,
    /// Things that are damaged, each with a line that begins with `!`.
    pub damaged: u64,
}

/// Writes what is selected of the volume on the reactor's device to `out`. Nothing is written to the device.
///
/// # Errors
/// [`DumpError`]; damage within the volume is not one.
pub async fn dump(
    ctx: &Context,
    selection: &Selection,
    out: &mut dyn Write,
) -> Result<DumpSummary, DumpError> {
    let disk = VolumeDisk::new(ctx.disk().clone())?;
    let (superblock, warnings) = superblock::read_newest(&disk).await?;
    let mut dump = Dump { disk, superblock, selection: *selection, out, summary: DumpSummary::default() };
    match selection.part {
        Part::Superblock => {
            dump.superblock(&warnings)?;
            dump.log().await?;
        }
        Part::Groups => dump.groups().await?,
        Part::Nodes | Part::Items => dump.trees().await?,
    }
    Ok(dump.summary)
}

struct Dump<'a> {
    disk: VolumeDisk,
    superblock: Superblock,
    selection: Selection,
    out: &'a mut dyn Write,
    summary: DumpSummary,
}

impl Dump<'_> {
    fn damage(&mut self, what: std::fmt::Arguments<'_>) -> io::Result<()> {
        self.summary.damaged += 1;
        writeln!(self.out, "! {what}")
    }

    fn superblock(&mut self, warnings: &[SuperblockWarning]) -> io::Result<()> {
        for warning in warnings {
            self.damage(format_args!("{warning}"))?;
        }
        self.summary.shown += 1;
        let Self { superblock, out, .. } = self;
        let layout: &VolumeLayout = &superblock.layout;
        writeln!(out, "uuid                  {}", superblock.uuid)?;
        writeln!(out, "label                 {:?}", superblock.label)?;
        writeln!(out, "generation            {}", superblock.generation)?;
        writeln!(out, "epoch                 {}", superblock.epoch)?;
        writeln!(out, "incarnation           {:#018x}", superblock.incarnation)?;
        writeln!(out, "compatible            {:#x}", superblock.compatible)?;
        writeln!(out, "read_only_compatible  {:#x}", superblock.read_only_compatible)?;
        writeln!(
            out,
            "blocks                {} ({} bytes)",
            layout.blocks(),
            layout.blocks().get() * BLOCK_SIZE
        )?;
        writeln!(
            out,
            "groups                {} of {} blocks",
            layout.groups(),
            1_u64 << layout.group_shift()
        )?;
        writeln!(out, "group_digest          {:#018x}", superblock.group_digest)?;
        match superblock.log {
            None => writeln!(out, "log                   none")?,
            Some(area) => writeln!(
                out,
                "log                   {} blocks at {} and {}; current {}",
                area.blocks, area.segments[0], area.segments[1], area.current
            )?,
        }
        writeln!(out, "hash_seed             {}", items::hex(&superblock.hash_seed))?;
        for (shard, record) in superblock.shards.iter().enumerate() {
            let ptr = record.tree.ptr;
            writeln!(
                out,
                "shard {shard}: root {} level {} epoch {} crc {:#010x} next_inode {} inodes {}",
                ptr.address, record.tree.level, ptr.epoch, ptr.crc, record.next_inode, record.inodes
            )?;
        }
        Ok(())
    }

    async fn log(&mut self) -> io::Result<()> {
        let log = read_log(&self.disk, &self.superblock).await;
        for entry in &log.entries {
            let sections = entry.sections.iter().map(|section| {
                let records = crate::format::log::records(&section.records).count();
                format!(" shard {}: {records} records;", section.shard)
            });
            writeln!(
                self.out,
                "log entry {}: epoch {}, {} blocks, crc {:#010x};{}",
                entry.place.sequence,
                entry.epoch,
                entry.blocks,
                entry.crc,
                sections.collect::<String>()
            )?;
        }
        match &log.damage {
            Some(damage) => self.damage(format_args!("{damage}")),
            None => Ok(()),
        }
    }

    async fn groups(&mut self) -> io::Result<()> {
        let layout = self.superblock.layout;
        for number in 0..layout.groups() {
            let group = match read_group(&self.disk, &self.superblock, number).await {
                Ok(group) => group,
                Err(error) => {
                    self.damage(format_args!("{error}"))?;
                    continue;
                }
            };
            if self.selection.shard.is_some_and(|shard| shard != group.owner) {
                continue;
            }
            for warning in &group.warnings {
                self.damage(format_args!("{warning}"))?;
            }
            self.summary.shown += 1;
            let free: u64 = group.used().iter().map(|word| u64::from(word.count_zeros())).sum();
            let (start, blocks) = (layout.group_start(number), layout.group_blocks(number));
            writeln!(
                self.out,
                "group {number}: block {start} + {blocks}, shard {}, free {free}",
                group.owner
            )?;
        }
        Ok(())
    }

    async fn trees(&mut self) -> io::Result<()> {
        for shard in (0..self.superblock.shard_count()).filter_map(ShardId::new) {
            let of_inode = self.selection.inode.is_none_or(|inode| inode.shard() == shard);
            if !of_inode || self.selection.shard.is_some_and(|selected| selected != shard) {
                continue;
            }
            self.tree(shard).await?;
        }
        Ok(())
    }

    async fn tree(&mut self, shard: ShardId) -> io::Result<()> {
        let Some(record) = self.superblock.shard(shard).copied() else { return Ok(()) };
        let mut walk = Walk::new(self.superblock.tree_identity(shard), record.tree);
        while let Some(expected) = walk.next_node() {
            if !self.selection.may_be_in(&expected.bounds) {
                continue;
            }
            let address = expected.ptr.address;
            let image = match crate::log::state::read_image(&self.disk, address).await {
                Ok(image) => image,
                Err(error) => {
                    self.damage(format_args!("shard {shard}: node at block {address}: {error}"))?;
                    continue;
                }
            };
            match walk.supply(&image) {
                Ok(node) if self.selection.part == Part::Nodes => {
                    self.node(shard, &expected, node.count())?;
                }
                Ok(node) => {
                    for (key, value) in node.items() {
                        self.item(shard, key, value)?;
                    }
                }
                Err(error) => {
                    self.damage(format_args!("shard {shard}: node at block {address}: {error}"))?;
                }
            }
        }
        Ok(())
    }

    fn node(&mut self, shard: ShardId, expected: &Expected, count: usize) -> io::Result<()> {
        self.summary.shown += 1;
        let (ptr, low) = (expected.ptr, expected.bounds.low);
        writeln!(
            self.out,
            "shard {shard}: node {} level {} epoch {} crc {:#010x} entries {count} from {low}",
            ptr.address, expected.level, ptr.epoch, ptr.crc
        )
    }

    fn item(&mut self, shard: ShardId, key: Key, value: &[u8]) -> io::Result<()> {
        if !self.selection.wants(&key) {
            return Ok(());
        }
        self.summary.shown += 1;
        let kind = KINDS.iter().find(|(_, kind)| *kind == key.kind).map_or("unknown", |(name, _)| name);
        match items::describe(&key, value) {
            Ok(text) => writeln!(self.out, "shard {shard}: {kind} {text}"),
            Err(error) => {
                let bytes = items::hex(value);
                self.damage(format_args!("shard {shard}: {kind} {key}: {error}: {bytes}"))
            }
        }
    }
}

impl Selection {
    fn wants(&self, key: &Key) -> bool {
        let of_inode = self.inode.is_none_or(|inode| {
            let referring = key.kind == INTENT || key.kind == BACKREF;
            key.object == inode.get() || referring && key.offset == inode.get()
        });
        of_inode && self.kind.is_none_or(|kind| kind == key.kind)
    }

    /// Whether a node with these bounds may hold, or lead to, something wanted.
    fn may_be_in(&self, bounds: &KeyBounds) -> bool {
        let Some(inode) = self.inode.filter(|_| self.part == Part::Items) else { return true };
        let overlaps = |from: u64, to: u64| {
            bounds.low.object <= to && bounds.high.is_none_or(|high| high.object >= from)
        };
        overlaps(0, 0) || overlaps(inode.get(), inode.get()) || overlaps(PHYSICAL, u64::MAX)
    }
}

#[cfg(test)]
mod tests;
