//! The IOMMU stands between the controller and memory that it was not given.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{DRIVE, Part};
use crate::guest::Guest;

pub(super) const PARTS: &[Part] = &[("a_dma_outside_of_the_mappings_is_stopped", stopped)];

/// How long the kernel may take to report a fault.
const REPORT_LIMIT: Duration = Duration::from_secs(10);

/// QEMU answers such a command with success, so the proof is in the kernel's log, in memory and on the medium.
fn stopped(guest: &mut Guest) -> Result<()> {
    guest.bind(DRIVE)?;
    for (way, fault) in [("read", "DMA Write"), ("write", "DMA Read")] {
        let told = guest.ok(&format!("hw-probe stray-{way} pci:{DRIVE}"))?;
        let address = told.lines().find_map(|line| line.strip_prefix("stray address "));
        let address = address.with_context(|| format!("no address in:\n{told}"))?;
        let reported =
            format!("dmesg | grep 'DMAR: .{fault}' | grep -F '[01:00.0]' | grep -F 'fault addr {address} '");
        guest
            .until(REPORT_LIMIT, &reported)
            .with_context(|| format!("no {fault} fault reported:\n{told}"))?;
    }
    guest.json(&format!("pollux identify --json --device pci:{DRIVE}")).context("afterwards")?;
    let device = guest.unbind(DRIVE)?;
    guest.ok(&format!("dd if={device} of=/dev/null bs=1M count=4"))?;
    Ok(())
}
