//! A page of the cache: 4 KiB of a file in memory, possibly with gaps.
//!
//! Owns: [`Page`] and its states:
//!
//! | dirty | ordered | the page | may be evicted |
//! |---|---|---|---|
//! | no | no | equals the device | yes, unless it has gaps to lose nothing: then too, the device has the rest |
//! | yes | no | holds changes that no ordered extent covers | no |
//! | no | yes | is being written as it is | no |
//! | yes | yes | was changed again while being written | no |
//!
//! A *partial* page knows only some of its bytes: those of a write that touched it while the rest was on the device.
//! So applying a write never waits for a read. The gaps are filled when somebody reads the page or writes it back.
//!
//! Excludes: which file and place a page belongs to (`data/file.rs`).

use std::ops::Range;

use crate::types::BLOCK_SIZE;

use super::range_set::RangeSet;

/// Bytes of a page: one block.
pub(crate) const PAGE_SIZE: usize = BLOCK_SIZE as usize;

/// The bytes of a page.
pub(crate) type PageBytes = [u8; PAGE_SIZE];

/// A page of zeroes.
pub(crate) fn zeroed_page() -> Box<PageBytes> {
    vec![0; PAGE_SIZE].into_boxed_slice().try_into().expect("the slice is a page long")
}

/// A page with these bytes, without zeroing it first.
pub(crate) fn page_from(bytes: &PageBytes) -> Box<PageBytes> {
    Box::<[u8]>::from(bytes.as_slice()).try_into().expect("the slice is a page long")
}

/// A page of the cache.
#[derive(Debug)]
pub(crate) struct Page {
    bytes: Box<PageBytes>,
    /// The bytes that are known; `None` if all are. Unknown bytes are zero.
    known: Option<RangeSet>,
    /// Holds changes that no ordered extent covers.
    pub(super) dirty: bool,
    /// Is being written by an ordered extent.
    pub(super) ordered: bool,
    /// Was used since the eviction hand last passed.
    pub(super) referenced: bool,
    /// The eviction hand knows the page.
    pub(super) queued: bool,
}

impl Page {
    /// A clean page whose bytes are all known.
    pub(super) fn whole(bytes: Box<PageBytes>) -> Self {
        Self { bytes, known: None, dirty: false, ordered: false, referenced: true, queued: false }
    }

    /// A clean page of which only `range` is known; the other bytes are zero.
    pub(super) fn partial(bytes: Box<PageBytes>, range: &Range<usize>) -> Self {
        let mut page = Self::whole(bytes);
        if *range != (0..PAGE_SIZE) {
            let mut known = RangeSet::default();
            known.insert(range.start as u64..range.end as u64);
            page.known = Some(known);
        }
        page
    }

    /// Whether every byte is known.
    pub(super) fn is_whole(&self) -> bool {
        self.known.is_none()
    }

    /// The bytes of a page that is whole.
    pub(super) fn bytes(&self) -> &PageBytes {
        assert!(self.is_whole(), "only whole pages are read");
        &self.bytes
    }

    /// Overwrites `range` with the same range of `source`.
    pub(super) fn write(&mut self, range: &Range<usize>, source: Box<PageBytes>) {
        if *range == (0..PAGE_SIZE) {
            self.bytes = source;
            self.known = None;
            return;
        }
        self.bytes[range.clone()].copy_from_slice(&source[range.clone()]);
        self.learn(range);
    }

    /// Overwrites `range` with zeroes.
    pub(super) fn zero(&mut self, range: &Range<usize>) {
        self.bytes[range.clone()].fill(0);
        self.learn(range);
    }

    fn learn(&mut self, range: &Range<usize>) {
        if let Some(known) = &mut self.known {
            known.insert(range.start as u64..range.end as u64);
            if known.covers(0..BLOCK_SIZE) {
                self.known = None;
            }
        }
    }

    /// Fills the gaps with the device's bytes.
    pub(super) fn fill(&mut self, device: &PageBytes) {
        if let Some(known) = self.known.take() {
            let mut bytes = page_from(device);
            for run in known.runs() {
                let run = run.start as usize..run.end as usize;
                bytes[run.clone()].copy_from_slice(&self.bytes[run]);
            }
            self.bytes = bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_page_takes_only_its_gaps_from_the_device() {
        let mut source = zeroed_page();
        source[100..200].fill(1);
        let mut page = Page::partial(source, &(100..200));
        let mut second = zeroed_page();
        second[300..400].fill(2);
        page.write(&(300..400), second);
        page.zero(&(150..160));
        assert!(!page.is_whole());
        page.fill(&[9; PAGE_SIZE]);
        let mut expected = [9; PAGE_SIZE];
        expected[100..200].fill(1);
        expected[150..160].fill(0);
        expected[300..400].fill(2);
        assert_eq!(page.bytes(), &expected);
    }

    #[test]
    fn page_written_piece_by_piece_becomes_whole() {
        let mut page = Page::partial(page_from(&[7; PAGE_SIZE]), &(0..4095));
        assert!(!page.is_whole());
        page.write(&(4000..4096), page_from(&[8; PAGE_SIZE]));
        assert!(page.is_whole());
        assert_eq!((page.bytes()[3999], page.bytes()[4000], page.bytes()[4095]), (7, 8, 8));
        assert!(Page::partial(zeroed_page(), &(0..PAGE_SIZE)).is_whole());
    }
}
