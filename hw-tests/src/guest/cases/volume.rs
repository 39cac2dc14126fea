//! A volume on a controller behind VFIO, mounted by FUSE.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{DRIVE, MOUNT, Part};
use crate::guest::Guest;

pub(super) const PARTS: &[Part] = &[
    ("a_volume_keeps_a_tree_over_unmount_and_remount", keeps),
    ("a_controller_that_polluxd_uses_is_not_taken", held),
];

fn keeps(guest: &mut Guest) -> Result<()> {
    guest.bind(DRIVE)?;
    let device = format!("pci:{DRIVE}");
    guest.keep_a_tree(&device)?;
    guest.refused(&format!("pollux mkfs --device {device}"), &["--force"])?;
    guest.unbind(DRIVE)?;
    guest.quiet_kernel()
}

fn held(guest: &mut Guest) -> Result<()> {
    guest.bind(DRIVE)?;
    let device = format!("pci:{DRIVE}");
    guest.ok(&format!("pollux mkfs --force --device {device}"))?;
    guest.mount(&device)?;
    guest.ok(&format!("echo kept >{MOUNT}/file"))?;
    let status = guest.json(&format!("pollux status --json {MOUNT}"))?;
    ensure!(status["daemon"]["mount"] == MOUNT, "{status}");
    guest.refused(&format!("pollux unbind {DRIVE}"), &["in use", "polluxd"])?;
    guest.refused(&format!("pollux fsck --device {device}"), &["in use"])?;
    ensure!(guest.driver(DRIVE)? == "vfio-pci", "it was taken from polluxd");
    guest.ok(&format!("test $(cat {MOUNT}/file) = kept"))?;
    guest.unmount()?;
    guest.ok_for(Duration::from_secs(120), &format!("pollux fsck --device {device}"))?;
    guest.unbind(DRIVE)?;
    guest.quiet_kernel()
}
