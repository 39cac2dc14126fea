//! The plans against models, then whole volumes under the simulator.

mod harness;
mod model;
mod operations;
mod plans;
mod races;
