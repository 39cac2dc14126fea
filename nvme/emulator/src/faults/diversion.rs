//! The data of a command that a rule met: moved through a scratch buffer, where it can be spoiled.
//!
//! Owns: [`DataFaults`] (what happens to the data), [`Diversion`] (the scratch buffer put in place of what the command's
//! data pointer names).
//!
//! Invariants:
//! - the command's own data pointer is walked and checked as ever; only where the bytes come from or go changes;
//! - the scratch buffer begins as zeroes and is part of the space for as long as the command is executed;
//! - data reaches the host only after the command succeeded.
//!
//! One transfer of a command is diverted, its first.

use std::sync::Arc;

use nvme_spec::StatusCode;

use super::Effect;
use crate::dma::{DmaDirection, DmaFault, DmaSpace, DmaView, MappedRegion, Payload, SegmentList};

/// Added to the address of a transfer that goes nowhere: beyond any address that is ever mapped by the space itself.
const NOWHERE: u64 = 1 << 62;

/// What happens to a command's data.
#[derive(Clone, Debug, Default)]
pub(super) struct DataFaults {
    /// Byte and bit.
    flips: Vec<(usize, u8)>,
    /// First byte and what to put there.
    patches: Vec<(usize, Box<[u8]>)>,
    limit: Option<usize>,
    iova_delta: i64,
    outside: bool,
}

impl DataFaults {
    pub(super) fn add(&mut self, effect: &Effect) {
        let mut limit = |bytes: usize| self.limit = Some(self.limit.map_or(bytes, |old| old.min(bytes)));
        match effect {
            Effect::ShortTransfer { bytes } => limit(*bytes),
            Effect::NoTransfer => limit(0),
            Effect::OutsideMapping => self.outside = true,
            Effect::MisplacedTransfer { iova_delta } => {
                self.iova_delta = self.iova_delta.wrapping_add(*iova_delta);
            }
            Effect::CorruptData { byte, bit } => self.flips.push((*byte, bit & 7)),
            Effect::PatchData { offset, bytes } => self.patch(*offset, bytes.clone().into()),
            _ => {}
        }
    }

    pub(super) fn patch(&mut self, offset: usize, bytes: Box<[u8]>) {
        self.patches.push((offset, bytes));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flips.is_empty()
            && self.patches.is_empty()
            && self.limit.is_none()
            && self.iova_delta == 0
            && !self.outside
    }

    fn spoil(&self, data: &mut [u8]) {
        for (offset, bytes) in &self.patches {
            let room = data.get_mut(*offset..).unwrap_or_default();
            let fits = room.len().min(bytes.len());
            room[..fits].copy_from_slice(&bytes[..fits]);
        }
        for (byte, bit) in &self.flips {
            if let Some(byte) = data.get_mut(*byte) {
                *byte ^= 1 << bit;
            }
        }
    }
}

/// A transfer that goes through the scratch buffer.
#[derive(Debug)]
struct Active {
    scratch: Arc<MappedRegion>,
    /// What the command's data pointer names.
    real: SegmentList,
    len: usize,
    direction: DmaDirection,
}

/// The faults of a command being executed, and its transfer once there is one.
#[derive(Debug)]
pub(crate) struct Diversion {
    space: DmaSpace,
    faults: DataFaults,
    active: Option<Active>,
}

impl Diversion {
    pub(super) fn new(space: &DmaSpace, faults: DataFaults) -> Self {
        Self { space: space.clone(), faults, active: None }
    }

    /// Called in place of `walk`, which resolves `len` bytes of the command's data pointer into the list it is given. Leaves
    /// the scratch buffer in `segments`.
    pub(crate) fn resolve(
        &mut self,
        len: u64,
        direction: DmaDirection,
        view: &mut DmaView,
        segments: &mut SegmentList,
        walk: impl FnOnce(&mut DmaView, &mut SegmentList) -> Result<(), StatusCode>,
    ) -> Result<(), StatusCode> {
        if self.active.is_some() || len == 0 {
            return walk(view, segments);
        }
        let len = len as usize;
        let scratch = self.space.map(len.next_multiple_of(4096)).map_err(|_| StatusCode::INTERNAL_ERROR)?;
        view.refresh(); // before the walk: it invalidates what was resolved
        walk(view, segments)?;
        let mut real = SegmentList::default();
        std::mem::swap(&mut real, segments);
        segments.clear();
        segments.push(view.resolve(scratch.iova(), len as u64, direction)?, len);
        if direction == DmaDirection::FromHost {
            let mut data = vec![0; len];
            self.move_real(view, &real, direction, |payload, moved| {
                payload.cursor().take(&mut data[..moved]);
            });
            self.faults.spoil(&mut data);
            Payload::new(view, segments).cursor().put(&data);
        }
        self.active = Some(Active { scratch, real, len, direction });
        Ok(())
    }

    /// The command succeeded: what it returned goes to the host.
    pub(super) fn finish(self, view: &mut DmaView) {
        let Some(active) = &self.active else { return };
        if active.direction == DmaDirection::FromHost {
            return;
        }
        let mut data = vec![0; active.len];
        active
            .scratch
            .slice()
            .subslice(0, active.len)
            .expect("the scratch buffer is as long as the data")
            .copy_to(&mut data);
        self.faults.spoil(&mut data);
        self.move_real(view, &active.real, active.direction, |payload, moved| {
            payload.cursor().put(&data[..moved]);
        });
    }

    /// Hands the host's memory, as far and where the faults let it be reached, to `transfer`.
    fn move_real(
        &self,
        view: &mut DmaView,
        real: &SegmentList,
        direction: DmaDirection,
        mut transfer: impl FnMut(Payload<'_>, usize),
    ) {
        let len = Payload::new(view, real).len();
        let moved = self.faults.limit.map_or(len, |limit| limit.min(len));
        if self.faults.outside {
            let iova = real.addresses(view).next().map_or(0, |(iova, _)| iova) | NOWHERE;
            return self.space.record(DmaFault { iova, len: moved as u64, direction });
        }
        if self.faults.iova_delta == 0 {
            return transfer(Payload::new(view, real), moved);
        }
        let mut displaced = SegmentList::default();
        for (iova, len) in real.addresses(view).collect::<Vec<_>>() {
            let iova = iova.wrapping_add_signed(self.faults.iova_delta);
            match view.resolve(iova, len as u64, direction) {
                Ok(place) => displaced.push(place, len),
                Err(_) => return, // recorded
            }
        }
        transfer(Payload::new(view, &displaced), moved);
    }
}
