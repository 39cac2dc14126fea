//! Groups that join a shard, or leave it, because the volume's end moves.
//!
//! Owns: the allocator's part of growing and shrinking. A group that leaves is taken out of hands first, and gone only when every
//! shard has done so: until then it can come back.
//!
//! Excludes: when the new end becomes true (`crate::volume::resize`), emptying groups (`crate::relocate`).

use crate::format::group::VolumeLayout;

use super::super::load::fresh;
use super::Allocator;

impl Allocator {
    /// The volume ends further behind from the next superblock on. The groups `added` are this shard's, and so is what the last
    /// group has gained, if that is this shard's. All of it may be allocated from at once.
    ///
    /// # Panics
    /// If a group has an owner already.
    pub fn grow(&mut self, layout: VolumeLayout, added: impl Iterator<Item = u64>) {
        let before = std::mem::replace(&mut self.layout, layout);
        let last = before.groups() - 1;
        let (end, new_end) = (before.group_blocks(last), layout.group_blocks(last));
        if let Some(group) = self.groups.get_mut(&last).filter(|_| end < new_end) {
            let clusters = group.free_clusters;
            group.extend(end as usize, new_end as usize);
            let clusters = (group.free_clusters - clusters) as u64;
            if !self.closed.contains_key(&last) {
                self.counter.join(new_end - end, new_end - end, clusters);
            }
            self.index(last);
        }
        for number in added {
            self.insert(fresh(&self.layout, number, self.shard).group);
        }
    }

    /// Takes the groups from `first` on out of hands: `None`, and nothing has changed, if any of them is open or holds something.
    /// Else how many they are.
    pub fn detach(&mut self, first: u64) -> Option<u64> {
        let closed = &self.closed;
        let ready = |(number, group): (&u64, &super::Group)| group.is_empty() && closed.contains_key(number);
        if !self.groups.range(first..).all(ready) {
            return None;
        }
        let leaving = self.groups.split_off(&first);
        for number in leaving.keys() {
            self.closed.remove(number);
            self.with_clusters.remove(number);
            self.with_broken.remove(number);
        }
        self.leaving.extend(leaving.into_values());
        Some(self.leaving.len() as u64)
    }

    /// Takes back what was [detached](Self::detach), open.
    pub fn reattach(&mut self) {
        std::mem::take(&mut self.leaving).into_iter().for_each(|group| self.insert(group));
    }

    /// The volume ends before the groups that were [detached](Self::detach). Returns their part in the digest of all groups.
    pub fn shrink(&mut self, layout: VolumeLayout) -> u64 {
        self.layout = layout;
        let leaving = std::mem::take(&mut self.leaving);
        leaving.iter().fold(0, |sum, group| sum.wrapping_add(group.contribution()))
    }
}
