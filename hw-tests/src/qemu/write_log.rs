//! The log of QEMU's blklogwrites filter: what a disk was written, in the order in which writes were done.
//!
//! The format is that of the kernel's dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst): a super block of one
//! sector, then for each entry a sector with its header, and its data in whole sectors. Little endian.
//!
//! Invariants: bytes are foreign; whatever they are, reading ends, and an entry lies in the file.
//!
//! Excludes: what may be lost at a power cut (`cases::power_cut`).

use anyhow::{Result, ensure};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
/// The smallest sector.
const UNIT: usize = 512;

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Data that was written, at a byte offset.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: std::ops::Range<usize>,
    },
    /// Everything before it is on the medium.
    Flush,
    /// A range that holds nothing any more: offset and length.
    Discard(u64, u64),
}

/// A log.
pub struct WriteLog {
    bytes: Vec<u8>,
    /// Entries, and where in the log each of them ends.
    entries: Vec<(Entry, u64)>,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let found = bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    found.map_or(0, u64::from_le_bytes)
}

impl WriteLog {
    /// Reads a log as far as it was written.
    ///
    /// # Errors
    /// It is no such log.
    pub fn parse(bytes: Vec<u8>) -> Result<Self> {
        ensure!(word(&bytes, 0) == MAGIC, "no log of writes: its magic is {:#x}", word(&bytes, 0));
        let sector = bytes.get(24..28).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
        ensure!(sector.is_power_of_two() && (UNIT..=65536).contains(&sector), "sectors of {sector} bytes");
        let mut entries = Vec::new();
        let mut at = sector;
        while at + sector <= bytes.len() {
            let (start, count, flags) = (word(&bytes, at), word(&bytes, at + 8), word(&bytes, at + 16));
            if count == 0 && flags & FLUSH == 0 {
                break;
            }
            let sizes = (start.checked_mul(sector as u64), count.checked_mul(sector as u64));
            let (Some(offset), Some(length)) = sizes else { break };
            at += sector;
            if flags & DISCARD != 0 {
                entries.push((Entry::Discard(offset, length), at as u64));
                continue;
            }
            if flags & FLUSH != 0 {
                entries.push((Entry::Flush, at as u64));
            }
            if count > 0 {
                let end = usize::try_from(length).ok().and_then(|length| at.checked_add(length));
                let Some(end) = end.filter(|&end| end <= bytes.len()) else { break };
                entries.push((Entry::Write { offset, data: at..end }, end as u64));
                at = end;
            }
        }
        Ok(Self { bytes, entries })
    }

    /// Its entries, each with the length of the log up to and with it.
    pub fn entries(&self) -> &[(Entry, u64)] {
        &self.entries
    }

    /// The data of a write.
    pub fn data(&self, range: &std::ops::Range<usize>) -> &[u8] {
        self.bytes.get(range.clone()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

    use super::*;

    fn sector(words: [u64; 4]) -> Vec<u8> {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.resize(UNIT, 0);
        bytes
    }

    fn sample() -> Vec<u8> {
        let mut bytes = sector([MAGIC, 1, 3, UNIT as u64]);
        bytes.extend(sector([8, 2, 0, 0]));
        bytes.extend([7; 2 * UNIT]);
        bytes.extend(sector([0, 0, FLUSH, 0]));
        bytes.extend(sector([16, 4, DISCARD, 0]));
        bytes
    }

    #[test]
    fn writes_flushes_and_discards_are_read_in_order() {
        let mut bytes = sample();
        bytes.extend([0; 3 * UNIT]);
        let log = WriteLog::parse(bytes).unwrap();
        let unit = UNIT as u64;
        assert_eq!(
            log.entries(),
            [
                (Entry::Write { offset: 8 * unit, data: 2 * UNIT..4 * UNIT }, 4 * unit),
                (Entry::Flush, 5 * unit),
                (Entry::Discard(16 * unit, 4 * unit), 6 * unit),
            ]
        );
        assert_eq!(log.data(&(2 * UNIT..4 * UNIT)), [7; 2 * UNIT]);
    }

    #[test]
    fn a_log_that_breaks_off_or_makes_no_sense_ends_early_and_never_panics() {
        let whole = sample();
        for length in 0..whole.len() {
            if let Ok(log) = WriteLog::parse(whole[..length].to_vec()) {
                assert!(log.entries().len() <= 3);
                assert!(log.entries().iter().all(|(_, end)| *end <= length as u64));
            }
        }
        for at in (0..whole.len()).step_by(8) {
            let mut broken = whole.clone();
            broken[at..at + 8].fill(0xff);
            let _whatever = WriteLog::parse(broken);
        }
        assert!(WriteLog::parse(vec![0; 4096]).is_err());
    }
}
