//! Dropping nodes from memory: a clock over the links of the tree.
//!
//! Owns: [`Tree::evict`]. The hand is a key; it moves in key order, children before parents, and goes round. A link
//! that was used since the hand last passed is spared once.
//!
//! Invariants: dirty and sealed nodes stay, and so do nodes that somebody holds and the root; one call looks at no
//! more than [`EVICT_VISITS`] links beyond the node it is in.

use super::node::{Body, Inner};
use super::{Key, Tree};
use crate::format::node::KeyBounds;

/// Links that one call looks at, at most.
pub const EVICT_VISITS: usize = 4096;

/// How an eviction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eviction {
    /// No more than the target is in memory.
    Enough,
    /// The call has looked at as much as one call may: call again, after others have had their turn.
    More,
    /// Two rounds have found nothing more to drop.
    Exhausted,
}

/// State of a call.
struct Sweep<'tree> {
    tree: &'tree Tree,
    target: usize,
    visits: usize,
    dropped: usize,
    /// Where to go on, once the call is over.
    stopped: Option<Key>,
}

impl Tree {
    /// Drops clean nodes that have not been used lately until [`Tree::resident_bytes`] is at most `target` bytes.
    pub fn evict(&self, target: usize) -> Eviction {
        self.forget_recent();
        let mut sweep = Sweep { tree: self, target, visits: EVICT_VISITS, dropped: 0, stopped: None };
        let mut hand = self.hand.get();
        let mut fruitless = 0;
        let end = loop {
            if sweep.reached() {
                break Eviction::Enough;
            }
            let Some(root) = self.root.peek() else { break Eviction::Exhausted };
            let Body::Inner(inner) = &root.body else { break Eviction::Exhausted };
            let dropped = sweep.dropped;
            // A round from the middle is no whole one.
            let whole = hand == Key::MIN;
            sweep.pass(inner, &KeyBounds::ALL, &hand);
            if let Some(stopped) = sweep.stopped.take() {
                hand = stopped;
                break if sweep.reached() { Eviction::Enough } else { Eviction::More };
            }
            hand = Key::MIN;
            fruitless = if sweep.dropped > dropped || !whole { 0 } else { fruitless + 1 };
            if fruitless == 2 {
                break Eviction::Exhausted;
            }
        };
        self.hand.set(hand);
        end
    }
}

impl Sweep<'_> {
    fn reached(&self) -> bool {
        self.tree.resident_bytes() <= self.target
    }

    fn pass(&mut self, inner: &Inner, bounds: &KeyBounds, from: &Key) {
        for index in inner.route(from)..inner.len() {
            let bounds = inner.child_bounds(index, bounds);
            if self.visits == 0 || self.reached() {
                self.stopped = Some(bounds.low.max(*from));
                return;
            }
            self.visits -= 1;
            let child = inner.child(index);
            if inner.level > 1
                && let Some(node) = child.peek()
                && let Body::Inner(below) = &node.body
            {
                self.pass(below, &bounds, &bounds.low.max(*from));
                if self.stopped.is_some() {
                    return;
                }
            }
            if !child.take_hot() && child.evict() {
                self.dropped += 1;
            }
        }
    }
}
