//! Tier 3: a guest under QEMU with Debian's kernel, its IOMMU and its VFIO.
//!
//! Owns: [`boot`] and [`Guest`] (a machine that takes steps), [`cases`] (what must hold in it) and [`matrix`] (the controllers
//! that the generic suite runs on there). No KVM and no root are needed.
//!
//! | module | owns |
//! |---|---|
//! | `kernel` | Debian's kernel package, unpacked into a cache; which modules are loaded |
//! | `initramfs` | the root filesystem: busybox, our binaries, their libraries |
//! | `init.sh` | the first process of the guest: the agent that runs steps |
//! | `process`, `channel` | QEMU, its monitor; the way to the agent |
//! | `machine` | a booted guest |
//! | `write_log` | the log of writes that QEMU keeps for a drive |
//! | `cases` | the cases, most of them in one boot |
//!
//! Excludes: what the generic suite checks (`suite`), QEMU without a guest (`qemu`).

mod cases;
mod channel;
mod initramfs;
mod kernel;
mod machine;
mod process;
mod write_log;

pub use cases::{cases, matrix};
pub use channel::{Events, Output};
pub use machine::{Guest, GuestOptions, USER, boot, missing};
