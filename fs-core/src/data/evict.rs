//! The memory limit of the page cache.
//!
//! Owns: [`Hand`], the queue in which clean pages wait for their second chance, and the passes over it.
//!
//! A page joins the queue when it becomes clean. The hand takes pages from the front: one that was used since it
//! joined goes to the back once more, one that is dirty or being written leaves the queue (it joins again when it is
//! clean), any other is dropped. Dirty pages are bounded by the dirty budget, not by this limit.
//!
//! Invariant: every clean page is in the queue; a page may be named twice after it was dropped by other means and
//! came back, which costs a step and no more.

use std::collections::VecDeque;
use std::ops::Range;

use crate::shard::Shard;
use crate::types::InodeNr;

use super::file::FileData;
use super::{DataState, add};

/// Names of pages that are no longer there, beyond which the queue is cleaned.
const MAX_STALE: usize = 4096;

/// The queue of pages that may be evicted.
#[derive(Default)]
pub(super) struct Hand {
    queue: VecDeque<(InodeNr, u64)>,
}

impl DataState {
    /// Lets clean pages of `range` join the queue.
    pub(super) fn queue_for_eviction(&self, inode: InodeNr, data: &mut FileData, range: Range<u64>) {
        let mut hand = self.eviction.borrow_mut();
        for (index, page) in data.pages_in_mut(range) {
            if !page.queued && !page.dirty && !page.ordered {
                page.queued = true;
                hand.queue.push_back((inode, index));
            }
        }
    }
}

impl Shard {
    /// Drops clean pages that were not used lately while there are more than the limit allows.
    pub(super) fn relieve_page_memory(&self) {
        let state = &self.data;
        if state.cached_pages.get() <= state.memory_limit {
            self.drop_stale_names();
            return;
        }
        let mut steps = 2 * state.eviction.borrow().queue.len();
        while state.cached_pages.get() > state.memory_limit && steps > 0 {
            steps -= 1;
            let next = state.eviction.borrow_mut().queue.pop_front();
            let Some((nr, index)) = next else { break };
            let Some(inode) = self.inode_in_use(nr) else { continue };
            let mut data = self.data_of(&inode);
            let Some(page) = data.page(index) else { continue };
            if page.dirty || page.ordered {
                page.queued = false;
            } else if page.referenced {
                page.referenced = false;
                state.eviction.borrow_mut().queue.push_back((nr, index));
            } else if data.evict(index) {
                add(&state.figures.evicted, 1);
            }
            drop(data);
            drop(inode);
            self.release_inode(nr);
        }
    }

    /// Forgets names of pages that were dropped by truncation or deletion.
    fn drop_stale_names(&self) {
        let mut hand = self.data.eviction.borrow_mut();
        let cached = usize::try_from(self.data.cached_pages.get()).unwrap_or(usize::MAX);
        if hand.queue.len() <= cached.saturating_add(MAX_STALE) {
            return;
        }
        let mut seen = std::collections::HashSet::new();
        hand.queue.retain(|&(nr, index)| {
            let there =
                self.inode_in_use(nr).is_some_and(|inode| inode.data.borrow_mut().page(index).is_some());
            there && seen.insert((nr, index))
        });
    }
}
