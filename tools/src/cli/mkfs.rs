//! `pollux mkfs`: an empty volume on a device.

use clap::Args;
use fs_core::mkfs::Force;

use crate::device::{self, DeviceSpec, Formatting};
use crate::failure::Failure;
use crate::output::outln;
use crate::quantity::show_size;

/// Make an empty volume on a device
#[derive(Args)]
#[command(after_help = "\
Refuses a device that holds a file system, a partition table, a member of a RAID array or of LVM, swap space or a Pollux volume,
without --force. Everything on it is deallocated. A scratch marker (`pollux mkscratch`) stays.

Example:
  pollux mkfs --device emu:/var/lib/p.img,size=8GiB --label data
  pollux mkfs --device pci:0000:01:00.0 --shards 8")]
pub(super) struct Mkfs {
    /// The device
    #[arg(long, value_name = "SPEC", value_parser = device::parse)]
    device: DeviceSpec,

    /// Shards: units of parallelism, fixed for the life of the volume [default: by the number of cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    shards: Option<u8>,

    /// Label of the volume
    #[arg(long, value_name = "L", default_value = "")]
    label: String,

    /// Format a device that holds a filesystem: its contents are lost
    #[arg(long)]
    force: bool,
}

impl Mkfs {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let force = if self.force { Force::Overwrite } else { Force::Refuse };
        let formatting = Formatting { shards: self.shards, label: self.label.clone(), force };
        let device::Formatted { report, scratch } = device::format(&self.device, &formatting)?;
        outln!("{} is an empty volume now", self.device);
        outln!("  uuid    {}", report.uuid);
        outln!("  label   {}", report.label);
        outln!(
            "  size    {} in {} groups of {}",
            show_size(report.bytes),
            report.groups,
            show_size(report.group_bytes)
        );
        outln!("  shards  {}", report.shards);
        if let Some(overwritten) = &report.overwritten {
            outln!("  overwritten: {overwritten}");
        }
        if scratch.is_some() {
            outln!(
                "  it is still marked as a scratch drive, which tests may overwrite; to use it in earnest:"
            );
            outln!("  pollux mkscratch --remove --device {}", self.device);
        }
        Ok(())
    }
}
