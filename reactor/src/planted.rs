//! Bugs that tests plant in the reactor: [`is_planted`], which the code with the bug asks.
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

/// Asserts that `model`, which passes as the code is, fails with `bug` planted.
#[cfg(all(test, loom))]
pub(crate) fn assert_caught(bug: Bug, model: fn()) {
    let planted = ::planted::Planted::new(&SPOT, bug);
    let outcome = std::panic::catch_unwind(model);
    drop(planted);
    assert!(outcome.is_err(), "the model passes although {} is planted: {}", bug.name(), bug.about());
}
