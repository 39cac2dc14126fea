//! What the targets that take whole volumes look at without mounting: the check, and where a volume ends.

use fs_core::fsck::{CheckError, CheckReport, DataCheck, Finding, check_with};
use fs_core::superblock::Superblock;
use fs_core::types::{BLOCK_SIZE, BlockNr};
use reactor::Context;
use reactor::sim::{DiskImage, SimDisk};

use fs_core::format::superblock::{RING_SLOTS, RING_STARTS};

use super::images::simulator;
use super::map::read;

/// Checks the volume on `disk`, in a bounded number of rounds.
///
/// # Errors
/// There is nothing that could be checked.
///
/// # Panics
/// If the check does not end, or writes.
pub fn checked(disk: &SimDisk, data: DataCheck) -> Result<CheckReport, CheckError> {
    let writes = disk.write_count();
    let check = async |ctx: Context| check_with(&ctx, data, &mut |_| ()).await;
    let report = simulator(disk).block_on(0, check).expect("a check ends");
    assert_eq!(disk.write_count(), writes, "a check writes nothing");
    report
}

/// The first findings, for a message.
pub fn shown(report: &CheckReport) -> String {
    let lines = report.findings.iter().take(8).map(Finding::to_string);
    format!("{} findings: {}", report.total_findings, lines.collect::<Vec<_>>().join("; "))
}

/// What lies on the device behind every superblock's volume.
pub fn behind(image: &DiskImage) -> Vec<u8> {
    let rings = RING_STARTS.iter().flat_map(|start| start.get()..start.get() + RING_SLOTS);
    let superblocks = rings.filter_map(|block| Superblock::decode(&read(image, BlockNr::new(block), 1)).ok());
    let end = superblocks.map(|superblock| superblock.layout.blocks().get()).max().unwrap_or(0);
    let blocks = image.len() / BLOCK_SIZE;
    read(image, BlockNr::new(end.min(blocks)), blocks.saturating_sub(end))
}
