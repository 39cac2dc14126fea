//! `pollux list`, `bind` and `unbind` on a kernel that has an IOMMU.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{DRIVE, NEIGHBOUR, NEIGHBOURED, Part, SERIAL};
use crate::guest::Guest;

pub(super) const PARTS: &[Part] = &[
    ("controllers_are_listed", listed),
    ("a_controller_goes_to_vfio_and_back", there_and_back),
    ("each_driver_reads_what_the_other_wrote", same_bytes),
    ("a_mounted_drive_is_not_taken", mounted),
    ("a_drive_swapped_to_is_not_taken", swapped_to),
    ("a_drive_in_an_array_is_not_taken", in_an_array),
    ("a_drive_with_a_logical_volume_is_not_taken", mapped),
    ("a_drive_that_a_program_has_open_is_not_taken", held_open),
    ("a_group_that_is_not_viable_is_refused", not_viable),
];

/// What `pollux list --json` says of a controller.
fn entry(guest: &mut Guest, address: &str) -> Result<Value> {
    let listing = guest.json("pollux list --json")?;
    let found = listing["controllers"].as_array().context("an array `controllers`")?;
    let entry = found.iter().find(|entry| entry["address"] == address);
    entry.cloned().with_context(|| format!("{address} is not listed: {listing}"))
}

fn listed(guest: &mut Guest) -> Result<()> {
    let drive = entry(guest, DRIVE)?;
    ensure!(drive["driver"] == "nvme" && drive["serial"] == SERIAL, "{drive}");
    ensure!(drive["iommu_group"].is_u64() && drive["in_use"] == false, "{drive}");
    ensure!(drive["block_devices"][0]["bytes"] == super::GIB, "{drive}");
    entry(guest, NEIGHBOURED)?;
    let text = guest.ok("pollux list")?;
    let line = text.lines().find(|line| line.starts_with(DRIVE)).with_context(|| text.clone())?;
    ensure!(line.contains("QEMU NVMe Ctrl") && line.contains("1.00 GiB"), "{text}");
    Ok(())
}

fn there_and_back(guest: &mut Guest) -> Result<()> {
    guest.ok(&format!("pollux bind --dry-run {DRIVE}"))?;
    ensure!(guest.driver(DRIVE)? == "nvme", "--dry-run has bound it");
    guest.refused(
        &format!("pollux identify --device pci:{DRIVE}"),
        &["bound to the driver nvme", "pollux bind"],
    )?;
    guest.bind(DRIVE)?;
    guest.ok(&format!("pollux bind {DRIVE}")).context("a second time")?;
    ensure!(entry(guest, DRIVE)?["driver"] == "vfio-pci", "list does not show vfio-pci");
    let identity = guest.json(&format!("pollux identify --json --device pci:{DRIVE}"))?;
    ensure!(identity.to_string().contains(SERIAL), "{identity}");
    let health = guest.json(&format!("pollux smart --json --device pci:{DRIVE}"))?;
    ensure!(health["temperature"] == 323, "{health}");
    let load = format!("pollux perf --json --device pci:{DRIVE} --bs 4k --iodepth 32 --runtime 1");
    let reads = guest.json(&format!("{load} --rw randread"))?;
    ensure!(reads["errors"] == 0 && reads["iops"].as_f64().is_some_and(|iops| iops > 0.0), "{reads}");
    guest.refused(&format!("{load} --rw randwrite"), &["--destroy-data"])?;
    let writes = guest.json(&format!("{load} --rw randwrite --destroy-data"))?;
    ensure!(writes["errors"] == 0 && writes["iops"].as_f64().is_some_and(|iops| iops > 0.0), "{writes}");
    guest.ok(&format!("pollux unbind --dry-run {DRIVE}"))?;
    ensure!(guest.driver(DRIVE)? == "vfio-pci", "--dry-run has unbound it");
    guest.unbind(DRIVE)?;
    guest.ok(&format!("pollux unbind {DRIVE}")).context("a second time")?;
    guest.quiet_kernel()
}

/// 3 MiB at 5 MiB, then others in the other direction.
fn same_bytes(guest: &mut Guest) -> Result<()> {
    guest.ok("head -c 3145728 /dev/urandom >/tmp/ours; head -c 3145728 /dev/urandom >/tmp/theirs")?;
    guest.bind(DRIVE)?;
    guest.ok(&format!("hw-probe write pci:{DRIVE} 5242880 </tmp/ours"))?;
    let device = guest.unbind(DRIVE)?;
    guest.ok(&format!("dd if={device} bs=1M skip=5 count=3 | cmp - /tmp/ours"))?;
    guest.ok(&format!("dd if=/tmp/theirs of={device} bs=1M seek=5 conv=fsync"))?;
    guest.bind(DRIVE)?;
    guest.ok(&format!("hw-probe read pci:{DRIVE} 5242880 3145728 | cmp - /tmp/theirs"))?;
    guest.unbind(DRIVE)?;
    guest.ok("rm /tmp/ours /tmp/theirs")?;
    guest.quiet_kernel()
}

fn mounted(guest: &mut Guest) -> Result<()> {
    let device = guest.block_device(NEIGHBOURED)?;
    guest.ok(&format!("mke2fs {device} && mkdir -p /mnt/kernel && mount -t ext2 {device} /mnt/kernel"))?;
    let drive = entry(guest, NEIGHBOURED)?;
    ensure!(drive["in_use"] == true, "list does not say that it is in use: {drive}");
    for dry in ["", "--dry-run"] {
        guest.refused(&format!("pollux bind {dry} {NEIGHBOURED}"), &["is mounted on /mnt/kernel"])?;
    }
    ensure!(guest.driver(NEIGHBOURED)? == "nvme", "it was taken from the kernel");
    guest.ok("echo still there >/mnt/kernel/file && sync && umount /mnt/kernel")?;
    guest.quiet_kernel()
}

fn swapped_to(guest: &mut Guest) -> Result<()> {
    let device = guest.block_device(NEIGHBOURED)?;
    guest.ok(&format!("mkswap {device} && swapon {device}"))?;
    guest.refused(&format!("pollux bind {NEIGHBOURED}"), &["swap"])?;
    ensure!(guest.driver(NEIGHBOURED)? == "nvme", "it was taken from the kernel");
    guest.ok(&format!("swapoff {device}"))?;
    guest.quiet_kernel()
}

/// An array without metadata, of this drive alone, as the kernel's files make it.
fn in_an_array(guest: &mut Guest) -> Result<()> {
    let device = guest.block_device(NEIGHBOURED)?;
    guest.ok("insmod /modules/md_mod.ko && insmod /modules/raid1.ko && echo md_pollux >/sys/module/md_mod/parameters/new_array")?;
    let name = device.trim_start_matches("/dev/");
    guest.ok(&format!(
        "set -e; cd /sys/block/md_pollux/md; echo none >metadata_version; echo raid1 >level; echo 2 >raid_disks; \
         cat /sys/class/block/{name}/dev >new_dev; echo 65536 >component_size; echo 0 >dev-{name}/slot; echo active >array_state"
    ))?;
    guest.ok("dd if=/dev/zero of=/dev/md_pollux bs=64k count=1 conv=fsync")?;
    let drive = entry(guest, NEIGHBOURED)?;
    ensure!(drive["in_use"] == true, "list does not say that it is in use: {drive}");
    guest.refused(&format!("pollux bind {NEIGHBOURED}"), &["held by md_pollux"])?;
    ensure!(guest.driver(NEIGHBOURED)? == "nvme", "it was taken from the kernel");
    guest.ok("echo clear >/sys/block/md_pollux/md/array_state && rmmod raid1")?;
    guest.until(Duration::from_secs(30), &format!("test -z \"$(ls /sys/class/block/{name}/holders)\""))?;
    guest.ok("rmmod md_mod")?;
    Ok(())
}

/// The device mapper's table is what LVM would load; mounted, too, which is the use at the top of the stack.
fn mapped(guest: &mut Guest) -> Result<()> {
    let device = guest.block_device(NEIGHBOURED)?;
    guest.ok("insmod /modules/dm_mod.ko && mkdir -p /dev/mapper /mnt/kernel")?;
    guest.ok(&format!(
        "dmsetup --noudevsync create pollux-home -u LVM-pollux --table '0 65536 linear {device} 2048' && \
         dmsetup --noudevsync mknodes && mke2fs /dev/mapper/pollux-home"
    ))?;
    guest.refused(&format!("pollux bind {NEIGHBOURED}"), &["held by dm-0", "LVM volume"])?;
    guest.ok("mount -t ext2 /dev/mapper/pollux-home /mnt/kernel")?;
    guest.refused(&format!("pollux bind {NEIGHBOURED}"), &["LVM volume", "is mounted on /mnt/kernel"])?;
    ensure!(guest.driver(NEIGHBOURED)? == "nvme", "it was taken from the kernel");
    guest.ok("umount /mnt/kernel && dmsetup --noudevsync remove pollux-home && rmmod dm_mod")?;
    guest.quiet_kernel()
}

fn held_open(guest: &mut Guest) -> Result<()> {
    let device = guest.block_device(NEIGHBOURED)?;
    guest.ok(&format!("sleep 1000 <{device} >/dev/null 2>&1 & echo $! >/tmp/holder"))?;
    let pid = guest.ok("cat /tmp/holder")?;
    let words = format!("{device} is open in process {}", pid.trim());
    guest.refused(&format!("pollux bind {NEIGHBOURED}"), &[&words])?;
    ensure!(guest.driver(NEIGHBOURED)? == "nvme", "it was taken from the kernel");
    guest.ok("kill $(cat /tmp/holder); rm /tmp/holder")?;
    guest.bind(NEIGHBOURED).context("after the program ended")?;
    guest.unbind(NEIGHBOURED)?;
    guest.quiet_kernel()
}

fn not_viable(guest: &mut Guest) -> Result<()> {
    guest.ok("insmod /modules/e1000.ko")?;
    ensure!(guest.driver(NEIGHBOUR)? == "e1000", "the neighbour has no driver");
    for dry in ["", "--dry-run"] {
        guest.refused(&format!("pollux bind {dry} {NEIGHBOURED}"), &[NEIGHBOUR, "e1000"])?;
    }
    ensure!(guest.driver(NEIGHBOURED)? == "nvme", "it was taken from the kernel");
    guest.ok("rmmod e1000")?;
    guest.bind(NEIGHBOURED).context("with a neighbour that has no driver")?;
    guest.json(&format!("pollux identify --json --device pci:{NEIGHBOURED}"))?;
    guest.unbind(NEIGHBOURED)?;
    guest.quiet_kernel()
}
