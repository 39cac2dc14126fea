//! A modelled volatile write cache in front of a store.
//!
//! The store behind always holds the newest data; what is kept here is how to go *back*: for each write that is not
//! durable, the bytes it replaced. A power cut first undoes all of them, newest first, which yields exactly the durable
//! state and, on the way, what each write had written; then it repeats, oldest first, those that the policy keeps. So a
//! process that is merely killed loses nothing, and reads cost nothing extra.
//!
//! Invariants:
//! - undoing the journal from its end to its start gives the durable contents;
//! - a sector made durable by FUA is struck from all earlier entries: neither undoing nor repeating them can touch it;
//! - the journal holds at most `capacity` bytes; beyond that the oldest entry counts as written back.
//!
//! Legal crash outcomes: any [`Fate`] for each entry; later entries win over earlier ones where both survive.
//!
//! One lock covers journal and store: writes to a namespace take turns. That is the price of the model; it is not
//! used unless asked for.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::{Durability, SECTOR, Store, StoreError};
use crate::dma::PayloadCursor;
use crate::locks::lock;
use crate::power_cut::{CutReport, Fate, PowerCut};

/// Bytes of a journal entry for a cleared range; longer ranges become several.
const CLEAR_PIECE: u64 = 1 << 20;

/// A write that is not durable: what it replaced.
struct Undo {
    offset: u64,
    old: Box<[u8]>,
    /// One flag for each sector: false once a later durable write made it irrelevant.
    live: Box<[bool]>,
}

impl Undo {
    fn end(&self) -> u64 {
        self.offset + self.old.len() as u64
    }

    /// The live sectors: index and offset in the namespace.
    fn sectors(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.live
            .iter()
            .enumerate()
            .filter(|(_, live)| **live)
            .map(|(i, _)| (i, self.offset + i as u64 * SECTOR))
    }
}

#[derive(Default)]
struct Journal {
    entries: VecDeque<Undo>,
    bytes: u64,
}

impl Journal {
    fn push(&mut self, offset: u64, old: Box<[u8]>, capacity: u64) {
        self.bytes += old.len() as u64;
        let live = vec![true; old.len() / SECTOR as usize].into_boxed_slice();
        self.entries.push_back(Undo { offset, old, live });
        while self.bytes > capacity
            && let Some(oldest) = self.entries.pop_front()
        {
            self.bytes -= oldest.old.len() as u64;
        }
    }

    /// Strikes the range from all entries: it is durable now.
    fn strike(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        for entry in &mut self.entries {
            let (from, to) = (offset.max(entry.offset), end.min(entry.end()));
            if from < to {
                let first = ((from - entry.offset) / SECTOR) as usize;
                let last = ((to - entry.offset) / SECTOR) as usize;
                entry.live[first..last].fill(false);
            }
        }
        let bytes = &mut self.bytes;
        self.entries.retain(|entry| {
            let keep = entry.live.contains(&true);
            *bytes -= if keep { 0 } else { entry.old.len() as u64 };
            keep
        });
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
    }
}

/// A store behind a modelled cache.
pub(crate) struct CachedStore<S> {
    inner: S,
    capacity: u64,
    journal: Mutex<Journal>,
}

impl<S: Store> CachedStore<S> {
    /// A cache that holds up to `capacity` bytes of unflushed writes.
    pub(crate) fn new(inner: S, capacity: u64) -> Self {
        Self { inner, capacity, journal: Mutex::default() }
    }

    fn old_bytes(&self, offset: u64, len: usize) -> Result<Box<[u8]>, StoreError> {
        let mut old = vec![0; len].into_boxed_slice();
        self.inner.read_host(offset, &mut old)?;
        Ok(old)
    }

    /// Writes a sector, or makes a hole if it is all zeroes: undoing must not fill a sparse store.
    fn put_sector(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        if bytes.iter().all(|b| *b == 0) {
            self.inner.clear(offset, bytes.len() as u64, Durability::Cached)
        } else {
            self.inner.write_host(offset, bytes)
        }
    }

    fn resolve(&self, journal: &mut Journal, cut: &mut PowerCut) -> Result<CutReport, StoreError> {
        let mut entries: Vec<Undo> = std::mem::take(journal).entries.into();
        for entry in entries.iter_mut().rev() {
            let new = self.old_bytes(entry.offset, entry.old.len())?;
            for (i, at) in entry.sectors() {
                let within = i * SECTOR as usize;
                self.put_sector(at, &entry.old[within..within + SECTOR as usize])?;
            }
            entry.old = new; // from here on what the write wrote
        }
        let mut report = CutReport::default();
        for entry in &entries {
            let fate = cut.next_fate();
            let (mut kept, mut dropped) = (0, 0);
            for (i, at) in entry.sectors() {
                if fate.keeps(entry.offset, at) {
                    let within = i * SECTOR as usize;
                    self.put_sector(at, &entry.old[within..within + SECTOR as usize])?;
                    kept += 1;
                } else {
                    dropped += 1;
                }
            }
            match (fate, kept, dropped) {
                (Fate::Kept, ..) | (_, 1.., 0) => report.kept += 1,
                (Fate::Dropped, ..) | (_, 0, _) => report.dropped += 1,
                _ => report.torn += 1,
            }
        }
        Ok(report)
    }
}

impl<S: Store> Store for CachedStore<S> {
    fn read(&self, offset: u64, len: usize, into: &mut PayloadCursor<'_>) -> Result<(), StoreError> {
        self.inner.read(offset, len, into)
    }

    fn write(
        &self,
        offset: u64,
        len: usize,
        from: &mut PayloadCursor<'_>,
        when: Durability,
    ) -> Result<(), StoreError> {
        let mut journal = lock(&self.journal);
        if when == Durability::Durable || len as u64 > self.capacity {
            self.inner.write(offset, len, from, when)?;
            journal.strike(offset, len as u64);
            return Ok(());
        }
        let old = self.old_bytes(offset, len)?;
        // Journaled even if the write fails: part of it may have happened.
        let done = self.inner.write(offset, len, from, when);
        journal.push(offset, old, self.capacity);
        done
    }

    fn clear(&self, offset: u64, len: u64, when: Durability) -> Result<(), StoreError> {
        let mut journal = lock(&self.journal);
        if when == Durability::Durable || len > self.capacity {
            self.inner.clear(offset, len, when)?;
            journal.strike(offset, len);
            return Ok(());
        }
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let piece = CLEAR_PIECE.min(end - at);
            let old = self.old_bytes(at, piece as usize)?;
            let done = self.inner.clear(at, piece, when);
            journal.push(at, old, self.capacity);
            done?;
            at += piece;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), StoreError> {
        let mut journal = lock(&self.journal);
        self.inner.flush()?;
        journal.clear();
        Ok(())
    }

    fn allocated(&self) -> u64 {
        self.inner.allocated()
    }

    fn resize(&self, bytes: u64) -> Result<(), StoreError> {
        self.flush()?; // what was undone must be there to be undone
        self.inner.resize(bytes)
    }

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn read_host(&self, offset: u64, dst: &mut [u8]) -> Result<(), StoreError> {
        self.inner.read_host(offset, dst)
    }

    fn write_host(&self, offset: u64, src: &[u8]) -> Result<(), StoreError> {
        let mut journal = lock(&self.journal);
        let old = self.old_bytes(offset, src.len())?;
        let done = self.inner.write_host(offset, src);
        journal.push(offset, old, self.capacity);
        done
    }

    fn power_cut(&self, cut: &mut PowerCut) -> CutReport {
        let mut journal = lock(&self.journal);
        self.resolve(&mut journal, cut).unwrap_or_else(|error| {
            tracing::error!(%error, "power cut could not be modelled: the image failed");
            CutReport::default()
        })
    }

    fn unflushed(&self) -> usize {
        lock(&self.journal).entries.len()
    }
}
