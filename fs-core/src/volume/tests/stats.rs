//! What a campaign went through, by kind.
//!
//! Owns: the counts of this thread. Excludes: adding those of several threads up (`campaign`).

use std::cell::RefCell;
use std::collections::BTreeMap;

/// Counts by group and name.
pub(super) type Counts = BTreeMap<(&'static str, String), u64>;

thread_local! {
    static COUNTS: RefCell<Counts> = const { RefCell::new(BTreeMap::new()) };
}

/// Counts one more of `name`.
pub(super) fn count(group: &'static str, name: impl Into<String>) {
    add(group, name, 1);
}

/// Counts `more` of `name`.
pub(super) fn add(group: &'static str, name: impl Into<String>, more: u64) {
    COUNTS.with_borrow_mut(|counts| *counts.entry((group, name.into())).or_default() += more);
}

/// The counts of this thread since it was asked last.
pub(super) fn take() -> Counts {
    let conflicts = crate::locks::CONFLICTS.take();
    if conflicts > 0 {
        add("locks", "requests that had to wait", conflicts);
    }
    COUNTS.take()
}

/// One line for each group.
pub(super) fn print(counts: &Counts) {
    let mut group = "";
    for ((of, name), number) in counts {
        if *of != group {
            print!("{}{of:<12}", if group.is_empty() { "" } else { "\n" });
            group = of;
        }
        print!(" {name} {number},");
    }
    println!();
}
