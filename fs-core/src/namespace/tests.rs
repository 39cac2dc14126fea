//! The plans against models, then whole volumes under the simulator.

mod plans;
