//! A volume on a controller behind VFIO, mounted by FUSE.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{DRIVE, MOUNT, Part};
use crate::guest::Guest;

pub(super) const PARTS: &[Part] = &[
    ("a_volume_keeps_a_tree_over_unmount_and_remount", keeps),
    ("clones_share_their_blocks_and_survive_a_remount", clones),
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

/// 16 MiB of data in a volume that would not hold it another seventy times.
fn clones(guest: &mut Guest) -> Result<()> {
    guest.bind(DRIVE)?;
    let device = format!("pci:{DRIVE}");
    guest.ok(&format!("pollux mkfs --force --device {device}"))?;
    guest.mount(&device)?;
    guest.ok(&format!("head -c 16777216 /dev/urandom >{MOUNT}/original && sync {MOUNT}/original"))?;
    guest.ok(&format!("pollux clone {MOUNT}/original {MOUNT}/clone"))?;
    guest.ok(&format!(
        "n=0; while [ $n -lt 70 ]; do gnu-cp {MOUNT}/original {MOUNT}/copy$n || exit 1; n=$((n+1)); done"
    ))?;
    // What is written to one of them is seen in no other.
    guest.ok(&format!(
        "cp {MOUNT}/original /tmp/original && echo other | dd of={MOUNT}/clone bs=1 seek=5000 conv=notrunc,fsync && pollux sync {MOUNT}"
    ))?;
    guest.unmount()?;
    guest.ok_for(Duration::from_secs(120), &format!("pollux fsck --device {device}"))?;
    guest.mount(&device)?;
    guest.ok(&format!(
        "set -e; cmp /tmp/original {MOUNT}/original; cmp /tmp/original {MOUNT}/copy0; cmp /tmp/original {MOUNT}/copy69; \
         if cmp -s /tmp/original {MOUNT}/clone; then exit 1; fi; test \"$(dd if={MOUNT}/clone bs=1 skip=5000 count=5)\" = other; rm /tmp/original"
    ))?;
    guest.unmount()?;
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
