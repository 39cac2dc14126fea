//! Growing and shrinking a mounted volume.
//!
//! Owns: [`Volume::grow`] and [`Volume::shrink`], the coordinator's part of them, and why a size cannot be changed ([`ResizeError`]).
//!
//! The size is in the superblock, so a change of it becomes true with a checkpoint, like everything else:
//!
//! | | before the checkpoint | after it |
//! |---|---|---|
//! | grow | old bitmaps in the new groups' slots are wiped; the shards take the groups, one after the other in turn | nothing |
//! | shrink | the groups behind the new end are closed, all of them first, and emptied; then the shards give them up | another checkpoint: no superblock that a mount may fall back to knows the old end |
//!
//! A volume shrinks by whole groups. The coordinator does both between two checkpoints of its own, so no entry of the intent log
//! is written in between: the new groups are in the log's superblock before the log can name them.
//!
//! # Legal crash outcomes
//! The old size or the new one. With the old one, what a shrink has moved has moved, and the groups are open again.
//!
//! Excludes: emptying groups ([`crate::relocate`]), changing the device's size.

use std::ops::ControlFlow;
use std::sync::{Arc, PoisonError};

use futures_util::future::try_join_all;
use reactor::block::Durability;
use reactor::{OneshotReceiver, oneshot};
use serde::Serialize;

use crate::error::FsError;
use crate::format::group::{LayoutError, SLOTS_PER_GROUP, VolumeLayout};
use crate::relocate::{RelocateError, RelocateProgress, RelocateReport, RelocateScope, Relocation};
use crate::request::Reply;
use crate::shard::message::{PeerCall, PeerReply, ResizeStep};
use crate::types::{BLOCK_SIZE, BlockCount};

use super::coordinator::{Coordinator, CoordinatorMessage};
use super::{Volume, VolumeShared};

/// Groups whose slots are wiped at the same time.
const GROUPS_AT_ONCE: usize = 16;

/// A change of size that the coordinator is to make.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Resize {
    Grow(VolumeLayout),
    Shrink(VolumeLayout),
}

/// What a change of size has come to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ResizeReport {
    /// Bytes of the volume before.
    pub bytes_before: u64,
    /// Bytes of the volume now.
    pub bytes: u64,
    /// Allocation groups now.
    pub groups: u64,
    /// What was moved on the way.
    pub relocated: RelocateReport,
}

/// Why the size was not changed. What was moved on the way is moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResizeError {
    /// The device ends before.
    #[error(
        "the device has {device} bytes, fewer than the {asked} asked for: make the device larger first (an image file: unmount, `truncate`, mount)"
    )]
    BeyondDevice {
        /// Bytes of the device.
        device: u64,
        /// Bytes asked for.
        asked: u64,
    },
    /// Growing to less.
    #[error(
        "the volume has {bytes} bytes already, more than the {asked} asked for: `pollux relocate --shrink-to` makes it smaller"
    )]
    WouldShrink {
        /// Bytes of the volume.
        bytes: u64,
        /// Bytes asked for.
        asked: u64,
    },
    /// Shrinking to more.
    #[error("the volume has {bytes} bytes, fewer than the {asked} asked for: `pollux grow` makes it larger")]
    WouldGrow {
        /// Bytes of the volume.
        bytes: u64,
        /// Bytes asked for.
        asked: u64,
    },
    /// No volume is made like this.
    #[error("{asked} bytes cannot be: {error}; the smallest size is {least} bytes")]
    Layout {
        /// Bytes asked for.
        asked: u64,
        /// What is wrong.
        error: LayoutError,
        /// The least possible size, empty.
        least: u64,
    },
    /// What the volume holds does not fit.
    #[error("what the volume holds needs at least {needed} bytes ({} MiB), {asked} are asked for", needed.div_ceil(1 << 20))]
    TooSmall {
        /// Bytes asked for.
        asked: u64,
        /// Bytes that might do.
        needed: u64,
    },
    /// Something lies behind the new end that cannot be moved.
    #[error("{groups} groups behind the new end still hold something: {}", left.join("; "))]
    Left {
        /// Groups.
        groups: u64,
        /// What, and why; the first few.
        left: Vec<String>,
    },
    /// Somebody else has changed the size, or opened a group, meanwhile.
    #[error(
        "the groups at the volume's end came into use again meanwhile, or its size was changed: try again"
    )]
    Interfered,
    /// The relocation.
    #[error(transparent)]
    Relocation(RelocateError),
    /// The volume.
    #[error(transparent)]
    Volume(#[from] FsError),
}

/// Reasons that an error tells.
const LEFT_TOLD: usize = 8;

/// Holds groups back from changing owners, until dropped.
struct Shrinking {
    layout: VolumeLayout,
    asked: u64,
    before: VolumeLayout,
    relocation: Relocation,
    _lease: Arc<()>,
}

impl Shrinking {
    /// Takes an answer of the volume.
    fn supply(&mut self, answer: Result<Reply, FsError>) -> Result<(), ResizeError> {
        self.relocation.supply(answer).map_err(|error| match error {
            RelocateError::TooSmall { groups } => {
                let needed = self.before.group_start(groups).get() * BLOCK_SIZE;
                ResizeError::TooSmall { asked: self.asked, needed }
            }
            other => ResizeError::Relocation(other),
        })
    }

    /// What the emptying of groups has led to: `true` if the volume may end before them.
    fn outcome(&self) -> Result<bool, ResizeError> {
        let report = self.relocation.report();
        if report.cancelled {
            return Ok(false);
        }
        if report.groups_left > 0 {
            let left = report.left.iter().take(LEFT_TOLD).cloned().collect();
            return Err(ResizeError::Left { groups: report.groups_left, left });
        }
        Ok(true)
    }

    fn into_report(self, now: VolumeLayout) -> ResizeReport {
        ResizeReport { relocated: self.relocation.into_report(), ..report(&self.before, &now) }
    }
}

fn report(before: &VolumeLayout, now: &VolumeLayout) -> ResizeReport {
    ResizeReport {
        bytes_before: before.blocks().get() * BLOCK_SIZE,
        bytes: now.blocks().get() * BLOCK_SIZE,
        groups: now.groups(),
        relocated: RelocateReport::default(),
    }
}

impl Volume {
    /// Makes the volume `to` bytes large, or as large as its device, with what does not make a group left over. In a task of any reactor.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub async fn grow(&self, to: Option<u64>) -> Result<ResizeReport, ResizeError> {
        let before = self.shared.layout();
        let layout = self.plan_growth(&before, to)?;
        if layout != before {
            let done = self.ask_resize(Resize::Grow(layout)).await?;
            done.await.map_err(|_| FsError::ShuttingDown)??;
        }
        Ok(report(&before, &layout))
    }

    /// As [`Self::grow`], on an ordinary thread.
    ///
    /// # Errors
    /// As there.
    pub fn grow_blocking(&self, to: Option<u64>) -> Result<ResizeReport, ResizeError> {
        let before = self.shared.layout();
        let layout = self.plan_growth(&before, to)?;
        if layout != before {
            self.ask_resize_blocking(Resize::Grow(layout))?;
        }
        Ok(report(&before, &layout))
    }

    /// Empties what lies behind `to` bytes, while the volume is in use, and ends the volume before it, at the border of a group. `watch` sees
    /// how far it is after every step, and may end it: then the report says that the size is as it was. In a task of any reactor.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub async fn shrink(
        &self,
        to: u64,
        mut watch: impl FnMut(RelocateProgress) -> ControlFlow<()>,
    ) -> Result<ResizeReport, ResizeError> {
        let mut shrinking = self.plan_shrinking(to)?;
        let emptied = async {
            while let Some(request) = shrinking.relocation.request() {
                shrinking.supply(self.call(request).await)?;
                if watch(shrinking.relocation.progress()).is_break() {
                    shrinking.relocation.cancel();
                }
            }
            if !shrinking.outcome()? {
                return Ok(false);
            }
            let done = self.ask_resize(Resize::Shrink(shrinking.layout)).await?;
            done.await.map_err(|_| FsError::ShuttingDown)??;
            Ok(true)
        };
        let outcome: Result<bool, ResizeError> = emptied.await;
        if !matches!(outcome, Ok(true)) {
            for request in shrinking.relocation.opening() {
                let _opened_by_a_checkpoint_else = self.call(request).await;
            }
        }
        let now = if outcome? { shrinking.layout } else { shrinking.before };
        Ok(shrinking.into_report(now))
    }

    /// As [`Self::shrink`], on an ordinary thread.
    ///
    /// # Errors
    /// As there.
    pub fn shrink_blocking(
        &self,
        to: u64,
        mut watch: impl FnMut(RelocateProgress) -> ControlFlow<()>,
    ) -> Result<ResizeReport, ResizeError> {
        let mut shrinking = self.plan_shrinking(to)?;
        let mut empty = || {
            while let Some(request) = shrinking.relocation.request() {
                shrinking.supply(self.call_blocking(request))?;
                if watch(shrinking.relocation.progress()).is_break() {
                    shrinking.relocation.cancel();
                }
            }
            if !shrinking.outcome()? {
                return Ok(false);
            }
            self.ask_resize_blocking(Resize::Shrink(shrinking.layout))?;
            Ok(true)
        };
        let outcome: Result<bool, ResizeError> = empty();
        if !matches!(outcome, Ok(true)) {
            for request in shrinking.relocation.opening() {
                let _opened_by_a_checkpoint_else = self.call_blocking(request);
            }
        }
        let now = if outcome? { shrinking.layout } else { shrinking.before };
        Ok(shrinking.into_report(now))
    }

    fn plan_growth(&self, before: &VolumeLayout, to: Option<u64>) -> Result<VolumeLayout, ResizeError> {
        let (device, bytes) =
            (self.shared.device_blocks.get() * BLOCK_SIZE, before.blocks().get() * BLOCK_SIZE);
        let asked = to.unwrap_or(device);
        if asked > device {
            return Err(ResizeError::BeyondDevice { device, asked });
        }
        if asked < bytes {
            return Err(ResizeError::WouldShrink { bytes, asked });
        }
        let layout = before.resized(BlockCount::new(asked / BLOCK_SIZE));
        // What does not make a group of its own is not used, now as before.
        let layout = layout.map_err(|error| ResizeError::Layout { asked, error, least: bytes })?;
        Ok(if layout.blocks() > before.blocks() { layout } else { *before })
    }

    fn plan_shrinking(&self, asked: u64) -> Result<Shrinking, ResizeError> {
        let before = self.shared.layout();
        let bytes = before.blocks().get() * BLOCK_SIZE;
        if asked > bytes {
            return Err(ResizeError::WouldGrow { bytes, asked });
        }
        let group = BLOCK_SIZE << before.group_shift();
        let whole = BlockCount::new(asked / group * group / BLOCK_SIZE);
        let layout = if asked == bytes { Ok(before) } else { before.resized(whole) };
        let least = group * crate::format::group::GROUPS_PER_SHARD;
        let layout = layout.map_err(|error| ResizeError::Layout { asked, error, least })?;
        let lease = Arc::new(());
        let limit = (layout.groups(), Arc::downgrade(&lease));
        *self.shared.shrinking.lock().unwrap_or_else(PoisonError::into_inner) = Some(limit);
        let relocation = Relocation::new(RelocateScope::Tail(layout.groups()), self.shards());
        Ok(Shrinking { layout, asked, before, relocation, _lease: lease })
    }

    async fn ask_resize(
        &self,
        resize: Resize,
    ) -> Result<OneshotReceiver<Result<(), ResizeError>>, ResizeError> {
        let (reply, done) = oneshot();
        let message = CoordinatorMessage::Resize(resize, reply);
        self.shared.coordinator.send(message).await.map_err(|_| FsError::ShuttingDown)?;
        Ok(done)
    }

    fn ask_resize_blocking(&self, resize: Resize) -> Result<(), ResizeError> {
        let (reply, done) = oneshot();
        let message = CoordinatorMessage::Resize(resize, reply);
        self.shared.coordinator.send_blocking(message).map_err(|_| FsError::ShuttingDown)?;
        done.recv_blocking().map_err(|_| FsError::ShuttingDown)?
    }
}

impl VolumeShared {
    fn set_layout(&self, layout: VolumeLayout) {
        *self.layout.lock().unwrap_or_else(PoisonError::into_inner) = layout;
    }
}

impl Coordinator {
    /// Changes the volume's size.
    pub(super) async fn resize(&mut self, resize: Resize) -> Result<(), ResizeError> {
        self.volume.check_writable()?;
        let before = self.superblock.layout;
        let layout = match resize {
            Resize::Grow(layout) if layout.blocks() > before.blocks() => self.grow(&before, layout).await?,
            Resize::Shrink(layout) if layout == before => return Ok(()),
            Resize::Shrink(layout) if layout.blocks() < before.blocks() => {
                self.shrink(&before, layout).await?
            }
            Resize::Grow(_) | Resize::Shrink(_) => return Err(ResizeError::Interfered),
        };
        self.volume.set_layout(layout);
        Ok(())
    }

    async fn grow(
        &mut self,
        before: &VolumeLayout,
        layout: VolumeLayout,
    ) -> Result<VolumeLayout, ResizeError> {
        self.wipe_slots(before, &layout).await?;
        self.step(ResizeStep::Grow(layout)).await?;
        self.superblock.layout = layout;
        self.checkpoint_or_fail().await?;
        Ok(layout)
    }

    async fn shrink(
        &mut self,
        before: &VolumeLayout,
        layout: VolumeLayout,
    ) -> Result<VolumeLayout, ResizeError> {
        let first = layout.groups();
        let detached = self.step(ResizeStep::Detach(first)).await?;
        let whole: Option<u64> = detached.iter().copied().sum();
        if whole != Some(before.groups() - first) {
            self.step(ResizeStep::Reattach).await?;
            return Err(ResizeError::Interfered);
        }
        let gone = self.step(ResizeStep::Shrink(layout)).await?;
        for part in gone.into_iter().flatten() {
            self.superblock.group_digest = self.superblock.group_digest.wrapping_sub(part);
        }
        self.superblock.layout = layout;
        self.checkpoint_or_fail().await?;
        // The superblock before this one, too, must know the new end only.
        self.checkpoint_or_fail().await?;
        Ok(layout)
    }

    /// Every shard's answer to a step.
    async fn step(&self, step: ResizeStep) -> Result<Vec<Option<u64>>, FsError> {
        let replies = self.all_shards(|_| PeerCall::Resize(step)).await?;
        replies
            .into_iter()
            .map(|(shard, reply)| match reply {
                PeerReply::Resized(result) => Ok(result),
                _ => Err(FsError::Io(format!("shard {shard} gave a wrong answer to a change of size"))),
            })
            .collect()
    }

    async fn checkpoint_or_fail(&mut self) -> Result<(), FsError> {
        let result = self.checkpoint().await;
        if let Err(error) = &result {
            self.volume.fail(&format!("a checkpoint that changes the size failed: {error}"));
        }
        result
    }

    /// Nothing that an earlier volume, or this one when it was larger, has left in the new groups' slots counts.
    async fn wipe_slots(&self, before: &VolumeLayout, layout: &VolumeLayout) -> Result<(), FsError> {
        let zeroes = [0; BLOCK_SIZE as usize];
        let groups: Vec<u64> = (before.groups()..layout.groups()).collect();
        for groups in groups.chunks(GROUPS_AT_ONCE) {
            let slots = groups
                .iter()
                .flat_map(|group| (0..SLOTS_PER_GROUP).map(|slot| layout.slot_start(*group, slot)));
            let writes = slots.map(|slot| self.disk.write(slot, &zeroes, Durability::Cached));
            try_join_all(writes).await?;
        }
        Ok(())
    }
}
