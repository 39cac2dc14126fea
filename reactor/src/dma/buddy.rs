//! Buddy allocator over page numbers: which pages of a region are free, nothing about memory.
//!
//! Invariants:
//! - every page is in exactly one block: free, allocated or retired;
//! - a block of order `n` covers `2^n` pages and starts at a multiple of `2^n`;
//! - no two free buddies exist side by side (they would have merged), so the largest free block is always found;
//! - nothing is allocated after construction: free lists are threaded through arrays.
//!
//! Excludes: waiting, buffers, lengths in bytes.

/// Largest order: blocks of `2^9` pages of 4 KiB, 2 MiB.
pub(super) const MAX_ORDER: u8 = 9;

/// End of a free list.
const NIL: u32 = u32::MAX;

/// State of the page that heads a block; other pages of the block are `Inside`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageState {
    Inside,
    Free(u8),
    Allocated(u8),
    Retired(u8),
}

/// Free and allocated blocks of a region.
#[derive(Debug)]
pub(super) struct Buddy {
    state: Vec<PageState>,
    next: Vec<u32>,
    prev: Vec<u32>,
    heads: [u32; MAX_ORDER as usize + 1],
    free_pages: usize,
    retired_pages: usize,
}

impl Buddy {
    /// An allocator of `pages` pages, all free.
    ///
    /// # Panics
    /// If `pages` does not fit in 32 bits (16 TiB of memory).
    pub(super) fn new(pages: usize) -> Self {
        let count = u32::try_from(pages).expect("a DMA region has fewer than 2^32 pages");
        assert!(count < NIL, "a DMA region has fewer than 2^32 - 1 pages");
        let mut buddy = Self {
            state: vec![PageState::Inside; pages],
            next: vec![NIL; pages],
            prev: vec![NIL; pages],
            heads: [NIL; MAX_ORDER as usize + 1],
            free_pages: pages,
            retired_pages: 0,
        };
        let mut page = 0;
        while page < count {
            let alignment =
                if page == 0 { MAX_ORDER } else { page.trailing_zeros().min(u32::from(MAX_ORDER)) as u8 };
            let room = (count - page).ilog2().min(u32::from(MAX_ORDER)) as u8;
            let order = alignment.min(room);
            buddy.push(page, order);
            page += 1 << order;
        }
        buddy
    }

    /// Pages in free blocks.
    pub(super) fn free_pages(&self) -> usize {
        self.free_pages
    }

    /// Pages that are not retired.
    pub(super) fn usable_pages(&self) -> usize {
        self.state.len() - self.retired_pages
    }

    /// Takes a block of `order`, splitting a larger one if need be; the lowest order that has one is split.
    pub(super) fn allocate(&mut self, order: u8) -> Option<u32> {
        let found = (order..=MAX_ORDER).find(|&o| self.heads[usize::from(o)] != NIL)?;
        let page = self.heads[usize::from(found)];
        self.unlink(page, found);
        for smaller in (order..found).rev() {
            self.push(page + (1 << smaller), smaller);
        }
        self.state[page as usize] = PageState::Allocated(order);
        self.free_pages -= 1 << order;
        Some(page)
    }

    /// Returns an allocated block and merges it with its free buddies.
    ///
    /// # Panics
    /// If `page` does not head an allocated block of `order`.
    pub(super) fn release(&mut self, page: u32, order: u8) {
        assert_eq!(
            self.state[page as usize],
            PageState::Allocated(order),
            "release of a block that is not allocated"
        );
        self.state[page as usize] = PageState::Inside;
        self.free_pages += 1 << order;
        let (mut page, mut order) = (page, order);
        while order < MAX_ORDER {
            let buddy = page ^ (1 << order);
            if self.state.get(buddy as usize) != Some(&PageState::Free(order)) {
                break;
            }
            self.unlink(buddy, order);
            page = page.min(buddy);
            order += 1;
        }
        self.push(page, order);
    }

    /// Gives back all of an allocated block but its first `1 << to` pages.
    ///
    /// # Panics
    /// If `page` does not head an allocated block of `order`, or `to` is larger.
    pub(super) fn shorten(&mut self, page: u32, order: u8, to: u8) {
        assert!(
            to <= order && self.state[page as usize] == PageState::Allocated(order),
            "shortening of a block that is not allocated"
        );
        self.state[page as usize] = PageState::Allocated(to);
        for half in to..order {
            let upper = page + (1 << half);
            self.state[upper as usize] = PageState::Allocated(half);
            self.release(upper, half);
        }
    }

    /// Takes an allocated block out of use for ever.
    ///
    /// # Panics
    /// If `page` does not head an allocated block of `order`.
    pub(super) fn retire(&mut self, page: u32, order: u8) {
        assert_eq!(
            self.state[page as usize],
            PageState::Allocated(order),
            "retirement of a block not allocated"
        );
        self.state[page as usize] = PageState::Retired(order);
        self.retired_pages += 1 << order;
    }

    /// The largest order that can be free again once every allocated block is back; `None` if all is retired.
    /// Walks the whole region: for construction and after a retirement only.
    pub(super) fn largest_possible_order(&self) -> Option<u8> {
        let mut retired = vec![false; self.state.len()];
        for (page, state) in self.state.iter().enumerate() {
            if let PageState::Retired(order) = state {
                retired[page..page + (1 << order)].fill(true);
            }
        }
        (0..=MAX_ORDER)
            .rev()
            .find(|&order| retired.chunks_exact(1 << order).any(|block| !block.contains(&true)))
    }

    fn push(&mut self, page: u32, order: u8) {
        let head = self.heads[usize::from(order)];
        self.state[page as usize] = PageState::Free(order);
        self.next[page as usize] = head;
        self.prev[page as usize] = NIL;
        if head != NIL {
            self.prev[head as usize] = page;
        }
        self.heads[usize::from(order)] = page;
    }

    fn unlink(&mut self, page: u32, order: u8) {
        debug_assert_eq!(self.state[page as usize], PageState::Free(order));
        let (next, prev) = (self.next[page as usize], self.prev[page as usize]);
        if prev == NIL {
            self.heads[usize::from(order)] = next;
        } else {
            self.next[prev as usize] = next;
        }
        if next != NIL {
            self.prev[next as usize] = prev;
        }
        self.state[page as usize] = PageState::Inside;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn odd_region_is_cut_into_aligned_blocks_and_all_of_it_can_be_used() {
        let mut buddy = Buddy::new(512 + 8 + 1);
        assert_eq!(buddy.largest_possible_order(), Some(9));
        assert_eq!(buddy.allocate(9), Some(0));
        assert_eq!(buddy.allocate(9), None);
        assert_eq!(buddy.allocate(3), Some(512));
        assert_eq!(buddy.allocate(0), Some(520));
        assert_eq!(buddy.allocate(0), None);
        assert_eq!(buddy.free_pages(), 0);
    }

    #[test]
    fn retired_block_lowers_the_largest_possible_order() {
        let mut buddy = Buddy::new(16);
        let page = buddy.allocate(0).unwrap();
        assert_eq!(buddy.largest_possible_order(), Some(4));
        buddy.retire(page, 0);
        assert_eq!(buddy.largest_possible_order(), Some(3));
        assert_eq!(buddy.usable_pages(), 15);
    }

    #[test]
    #[should_panic(expected = "not allocated")]
    fn double_release_is_caught() {
        let mut buddy = Buddy::new(4);
        let page = buddy.allocate(1).unwrap();
        buddy.release(page, 1);
        buddy.release(page, 1);
    }

    proptest! {
        /// Against a bitmap: blocks never overlap, are aligned, the counters agree, and when everything is back the
        /// region is whole again.
        #[test]
        fn blocks_never_overlap_and_always_merge_back(
            pages in 1_usize..1500,
            steps in prop::collection::vec((any::<bool>(), 0_u8..=MAX_ORDER, any::<prop::sample::Index>()), 1..400),
        ) {
            let mut buddy = Buddy::new(pages);
            let mut used = vec![false; pages];
            let mut held: Vec<(u32, u8)> = Vec::new();
            for (allocate, order, pick) in steps {
                if allocate {
                    if let Some(page) = buddy.allocate(order) {
                        prop_assert_eq!(page % (1 << order), 0);
                        for slot in &mut used[page as usize..page as usize + (1 << order)] {
                            prop_assert!(!*slot, "page handed out twice");
                            *slot = true;
                        }
                        held.push((page, order));
                    } else {
                        let whole = used.chunks_exact(1 << order).any(|block| !block.contains(&true));
                        prop_assert!(!whole, "a whole free block of order {} was not found", order);
                    }
                } else if !held.is_empty() {
                    let (page, order) = held.swap_remove(pick.index(held.len()));
                    used[page as usize..page as usize + (1 << order)].fill(false);
                    buddy.release(page, order);
                }
                prop_assert_eq!(buddy.free_pages(), used.iter().filter(|u| !**u).count());
            }
            for (page, order) in held {
                buddy.release(page, order);
            }
            let fresh = Buddy::new(pages);
            prop_assert_eq!(buddy.free_pages(), pages);
            prop_assert_eq!(buddy.state, fresh.state);
        }
    }
}
