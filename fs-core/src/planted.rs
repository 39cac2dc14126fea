//! Bugs that tests plant in the filesystem: [`is_planted`], which the code with the bug asks.
//!
//! Excludes: the list of bugs and what else plants them (crate `planted`). In an ordinary build the answer is a constant.

pub(crate) use ::planted::Bug;

/// Whether `bug` is to be made.
#[inline(always)]
pub(crate) fn is_planted(bug: Bug) -> bool {
    #[cfg(test)]
    if SPOT.with(|spot| spot.holds(bug)) {
        return true;
    }
    ::planted::is_planted(bug)
}

#[cfg(test)]
thread_local! {
    /// The bug of the tests on this thread.
    pub(crate) static SPOT: ::planted::Spot = const { ::planted::Spot::new() };
}
