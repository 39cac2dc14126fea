//! The log of writes that QEMU's `blklogwrites` keeps, in the format of dm-log-writes (Documentation/admin-guide/device-mapper/
//! log-writes): a sector of header, then for each write a sector of description, and its data.
//!
//! Invariants: a log is data from elsewhere: what makes no sense ends it or is an error, never a panic. The number of entries in the
//! header is not used: it lags behind.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1 << 0;
const DISCARD: u64 = 1 << 2;

/// A log.
pub(super) struct WriteLog<'a> {
    bytes: &'a [u8],
    sector: usize,
}

/// What was done to the drive.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    offset: u64,
    length: u64,
    flags: u64,
    data: &'a [u8],
}

impl<'a> WriteLog<'a> {
    /// Reads the header.
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self> {
        ensure!(word(bytes, 0)? == MAGIC, "no log of writes: it begins with {:#x}", word(bytes, 0)?);
        let sector = usize::try_from(word(bytes, 24)? & u64::from(u32::MAX))?;
        ensure!(sector.is_power_of_two() && sector >= 512, "a log with sectors of {sector} bytes");
        Ok(Self { bytes, sector })
    }

    /// The whole entries, in order.
    pub(super) fn entries(&self) -> Vec<Entry<'a>> {
        let mut entries = Vec::new();
        let mut at = self.sector;
        while let Some((entry, next)) = self.entry(at) {
            entries.push(entry);
            at = next;
        }
        entries
    }

    /// The entry at `at`, and where the next one is.
    fn entry(&self, at: usize) -> Option<(Entry<'a>, usize)> {
        let head = self.bytes.get(at..at.checked_add(self.sector)?)?;
        let field = |index: usize| word(head, index * 8).ok();
        let (sector, sectors, flags) = (field(0)?, field(1)?, field(2)?);
        let unit = self.sector as u64;
        let length = sectors.checked_mul(unit)?;
        let start = at + self.sector;
        let stored = if flags & DISCARD == 0 { usize::try_from(length).ok()? } else { 0 };
        let data = self.bytes.get(start..start.checked_add(stored)?)?;
        // A hole in the file: the rest was not written any more.
        if length == 0 && flags & FLUSH == 0 {
            return None;
        }
        Some((Entry { offset: sector.checked_mul(unit)?, length, flags, data }, start + stored))
    }
}

impl Entry<'_> {
    /// Whether everything before it is durable.
    pub(super) fn is_flush(&self) -> bool {
        self.flags & FLUSH != 0
    }

    /// Where, in bytes.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// How much, in bytes.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Whether what is written begins so.
    pub(super) fn starts_with(&self, magic: &[u8]) -> bool {
        self.data.starts_with(magic)
    }

    /// Does the same to an image. A discard leaves what is there, as a drive may.
    pub(super) fn apply(&self, image: &File) -> Result<()> {
        image.write_all_at(self.data, self.offset).with_context(|| format!("writing at {}", self.offset))
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u64> {
    let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
    word.map(u64::from_le_bytes).context("a log of writes that is cut off")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(words: &[u64]) -> Vec<u8> {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.resize(512, 0);
        bytes
    }

    fn log() -> Vec<u8> {
        let parts = [
            sector(&[MAGIC, 1, 0, 512]),
            sector(&[8, 2, 0, 0]),
            vec![0xaa; 1024],
            sector(&[0, 0, FLUSH, 0]),
            sector(&[4, 100, DISCARD, 0]),
            sector(&[9, 1, 0, 0]),
            vec![0xbb; 512],
        ];
        parts.concat()
    }

    #[test]
    fn entries_come_back_in_order_and_are_applied() {
        let bytes = log();
        let entries = WriteLog::new(&bytes).unwrap().entries();
        let shown: Vec<_> = entries.iter().map(|e| (e.offset(), e.length(), e.is_flush())).collect();
        assert_eq!(shown, [(4096, 1024, false), (0, 0, true), (2048, 51_200, false), (4608, 512, false)]);
        let image = tempfile::tempfile().unwrap();
        for entry in &entries {
            entry.apply(&image).unwrap();
        }
        let mut written = [0; 1024];
        image.read_exact_at(&mut written, 4096).unwrap();
        assert!(
            written[..512].iter().all(|byte| *byte == 0xaa)
                && written[512..].iter().all(|byte| *byte == 0xbb)
        );
    }

    #[test]
    fn a_log_that_is_cut_off_ends_with_its_last_whole_entry() {
        let bytes = log();
        for length in 512..bytes.len() {
            let entries = WriteLog::new(&bytes[..length]).unwrap().entries();
            assert!(entries.len() < 4, "at {length}");
        }
        let mut with_hole = bytes.clone();
        with_hole.resize(bytes.len() + 4096, 0);
        assert_eq!(WriteLog::new(&with_hole).unwrap().entries().len(), 4);
        assert!(WriteLog::new(b"something else, and more").is_err());
    }
}
