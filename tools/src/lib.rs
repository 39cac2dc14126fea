//! The tools around Pollux: the command line, the daemon, and the front ends they put before a volume.
//!
//! Owns: what the binaries `pollux` and `polluxd` do. Each binary is a few lines over this library, so that tests can
//! reach all of it.
//!
//! | module | owns |
//! |---|---|
//! | [`cli`], [`polluxd`] | the command lines |
//! | [`config`] | the configuration file |
//! | [`control`] | the control socket: protocol, where it lies, both sides |
//! | [`daemon`] | volume, mount and control socket in one process, from start to end |
//! | [`device`] | device specs, controllers and reactors on them |
//! | [`failure`] | how a command fails: message, remedy, exit code |
//! | [`fuse`] | the FUSE front end: mount points, session, translation of requests |
//! | [`load`] | a synthetic load on a raw device |
//! | `output` | standard output whose reader may have gone |
//! | [`report`] | what `pollux status` shows |
//! | [`scratch`] | the marker of drives that tests may overwrite |
//!
//! Excludes: the filesystem ([`fs_core`]), the driver ([`nvme`]), the reactors ([`reactor`]).

/// A page of a file is 4 KiB, which the C library's allocator serves the slow way: pages of the cache come and go at the rate of
/// requests. Random reads past the cache are a sixth faster with this one (docs/benchmarks.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod device;
mod extents;
pub mod failure;
pub mod fuse;
pub mod load;
pub mod logging;
mod output;
pub mod polluxd;
pub mod quantity;
pub mod report;
pub mod scratch;
pub mod signals;
