//! The controller driven through its registers and queues alone, by a small initiator of the tests' own.
#![allow(clippy::unwrap_used)] // helpers of tests: a failed unwrap is a failed test

mod admin;
mod commands;
mod concurrency;
mod fault_data;
mod fault_storm;
mod faults;
mod fused;
mod image;
mod initiator;
mod io;
mod keep_alive;
mod latency;
mod namespaces;
mod power_cut;
mod queues;
mod removal;
mod reset;
mod sgl;
mod shadow;
