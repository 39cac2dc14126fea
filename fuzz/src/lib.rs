//! Fuzz targets: functions of bytes that must neither panic nor hang, whatever the bytes are.
//!
//! Owns: [`TARGETS`], the list of them, and [`campaign`], which makes up inputs and runs them.
//!
//! Invariants: a target is a function of its bytes alone (no clock decides, no file is touched), so an input that failed fails
//! again; what a target checks beyond panics is said in its module.
//!
//! Excludes: judging what is merely an odd answer.

pub mod campaign;
pub mod control;
pub mod driver;
pub mod edit;
pub mod fsck;
pub mod log;
pub mod mount;
pub mod node;
pub mod script;
pub mod spec;
pub mod superblock;
pub mod vfio_user;
pub mod volume;

/// A target and its name.
pub struct Target {
    /// Name on the command line, and of its corpus folder.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "control", run: control::run },
    Target { name: "driver", run: driver::run },
    Target { name: "fsck", run: fsck::run },
    Target { name: "log", run: log::run },
    Target { name: "mount", run: mount::run },
    Target { name: "node", run: node::run },
    Target { name: "spec", run: spec::run },
    Target { name: "superblock", run: superblock::run },
    Target { name: "vfio_user", run: vfio_user::run },
];

/// The target of that name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
