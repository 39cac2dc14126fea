//! A drive that is pulled out while it is used.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{DRIVE, MOUNT, Part, SERIAL};
use crate::guest::Guest;

pub(super) const PARTS: &[Part] = &[
    ("a_drive_removed_under_load_ends_the_load_with_an_error", loaded),
    ("a_drive_removed_under_a_mount_gives_errors_and_no_hang", mounted),
];

/// How long a program may go on without its drive.
const END_LIMIT: Duration = Duration::from_secs(60);

/// The kernel waits for the owner of the device to let go: that QEMU can take it away shows that the owner was told.
fn unplug(guest: &mut Guest) -> Result<()> {
    guest.unplug("ctrl0").context("whoever uses it does not let it go")?;
    guest.until(END_LIMIT, &format!("! test -e /sys/bus/pci/devices/{DRIVE}"))
}

fn plug_again(guest: &mut Guest) -> Result<()> {
    guest.plug(
        &json!({ "driver": "nvme", "id": "ctrl0", "serial": SERIAL, "drive": "first", "bus": "slot0" }),
    )?;
    guest.block_device(DRIVE).context("after it was plugged in again")?;
    Ok(())
}

fn loaded(guest: &mut Guest) -> Result<()> {
    guest.bind(DRIVE)?;
    guest.ok(&format!(
        "rm -f /tmp/perf.code; {{ pollux perf --device pci:{DRIVE} --rw randread --bs 4k --iodepth 32 --runtime 600; \
         echo $? >/tmp/perf.code; }} >/tmp/perf.out 2>/tmp/perf.log &"
    ))?;
    guest.until(END_LIMIT, "grep -q IOPS /tmp/perf.log")?;
    unplug(guest)?;
    guest.until(END_LIMIT, "test -f /tmp/perf.code")?;
    let said = guest.ok("cat /tmp/perf.code /tmp/perf.log /tmp/perf.out")?;
    ensure!(
        said.starts_with('1') && said.contains("removed"),
        "perf does not say that the device is gone:\n{said}"
    );
    plug_again(guest)
}

fn mounted(guest: &mut Guest) -> Result<()> {
    guest.bind(DRIVE)?;
    let device = format!("pci:{DRIVE}");
    guest.ok(&format!("pollux mkfs --force --device {device}"))?;
    guest.mount(&device)?;
    guest.ok("head -c 262144 /dev/urandom >/tmp/expected")?;
    guest.ok(&format!("echo durable >{MOUNT}/before && pollux sync {MOUNT}"))?;
    // It stops when its fsync fails, or when polluxd has taken the mount away.
    guest.ok(&format!(
        "rm -f /tmp/writer.code; {{ n=0; while grep -q ' {MOUNT} ' /proc/mounts && \
         dd if=/tmp/expected of={MOUNT}/f$n bs=64k count=4 conv=fsync; do n=$((n+1)); done; \
         echo $n >/tmp/writer.code; }} >/tmp/writer.log 2>&1 &"
    ))?;
    guest.until(END_LIMIT, &format!("test -e {MOUNT}/f3"))?;
    unplug(guest)?;
    guest.until(END_LIMIT, "test -f /tmp/polluxd.code && test -f /tmp/writer.code")?;
    guest.ok(&format!("! grep ' {MOUNT} ' /proc/mounts"))?;
    let said = guest.ok("cat /tmp/polluxd.log")?;
    ensure!(said.contains("wanted back"), "polluxd does not say why it has ended:\n{said}");
    // What the writer left in the directory under the mount is not meant.
    guest.ok(&format!("rm -f {MOUNT}/*"))?;
    plug_again(guest)?;
    guest.bind(DRIVE)?;
    guest.ok(&format!("pollux fsck --device {device}"))?;
    guest.mount(&device)?;
    // The last one may have gone to that directory.
    guest.ok(&format!(
        "set -e; test $(cat {MOUNT}/before) = durable; last=$(($(cat /tmp/writer.code) - 1)); n=0; \
         test $last -gt 2; \
         while [ $n -lt $last ]; do cmp /tmp/expected {MOUNT}/f$n; n=$((n+1)); done"
    ))?;
    guest.unmount()?;
    guest.unbind(DRIVE)?;
    Ok(())
}
