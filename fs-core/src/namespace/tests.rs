//! The plans against models, then whole volumes under the simulator.

mod harness;
mod operations;
mod plans;
