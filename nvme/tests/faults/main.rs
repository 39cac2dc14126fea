//! The fault table: everything that a device can do wrong, at every kind of command, load and moment, and what must come
//! of it. How to add a row: docs/testing.md.
//!
//! Each case runs the driver against the embedded controller with fault rules. Time is virtual and everything happens on
//! one thread, but for `threads`, where controller, keeper and queue have a thread each.
//!
//! What must hold in every case, whatever is expected of it: each request is answered once, in bounded time; no operation,
//! slot, buffer, queue or mapping is leaked; no buffer is written to after it was handed back; what was answered with
//! success is right on the medium.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

mod bench;
mod case;
mod commands;
mod registers;
mod stages;
mod statuses;
mod threads;
