//! Controllers that differ in what they offer, each in a guest of its own.

use anyhow::Result;

use super::{DRIVE, MIB, drives, image, suite};
use crate::guest::machine::{GuestOptions, boot, missing};
use crate::suite::{Environment, Verdict};

/// A controller for the generic suite.
#[derive(Clone, Copy, Debug)]
pub struct Configuration {
    /// Its name in reports.
    pub name: &'static str,
    /// Options of QEMU's `nvme` device.
    controller: &'static str,
    /// Options of its namespaces, each with an image of its own; none if the controller has the image itself.
    namespaces: &'static [&'static str],
    /// What follows the address in the device's spec.
    suffix: &'static str,
    /// The parts of the suite that it is about.
    parts: &'static [&'static str],
    /// Whether another controller stands beside it.
    second: bool,
}

pub(super) const LARGE_BLOCKS: Configuration = Configuration {
    name: "4096-byte blocks, transfers of 8 KiB",
    controller: "drive=image0,logical_block_size=4096,physical_block_size=4096,mdts=1",
    namespaces: &[],
    suffix: "",
    parts: &["io/", "commands/"],
    second: false,
};

pub(super) const NAMESPACES: Configuration = Configuration {
    name: "two namespaces with a gap, two queues",
    controller: "max_ioqpairs=2",
    namespaces: &["nsid=2", "nsid=7,logical_block_size=4096,physical_block_size=4096"],
    suffix: ",ns=7",
    parts: &["identify/", "io/", "queues/"],
    second: false,
};

pub(super) const BARS: Configuration = Configuration {
    name: "MSI-X and a controller memory buffer in other BARs, a second controller",
    controller: "drive=image0,msix-exclusive-bar=on,cmb_size_mb=16,mdts=0",
    namespaces: &[],
    suffix: "",
    parts: &["bring-up/", "queues/", "admin/"],
    second: true,
};

/// The controllers that the generic suite runs on.
pub fn matrix() -> Vec<Configuration> {
    vec![LARGE_BLOCKS, NAMESPACES, BARS]
}

impl Configuration {
    /// The machine, with its images in `directory`.
    fn options(&self, directory: &std::path::Path) -> Result<GuestOptions> {
        let mut options = GuestOptions::new(self.name);
        for index in 0..self.namespaces.len().max(1) {
            let name = format!("image{index}");
            options = options.drive(&name, &image(directory, &name, 256 * MIB)?);
        }
        options = options
            .with("-device", "pcie-root-port,id=slot0,slot=1,chassis=1")
            .with("-device", format!("nvme,id=ctrl0,serial=matrix,bus=slot0,{}", self.controller));
        for (index, namespace) in self.namespaces.iter().enumerate() {
            options = options.with("-device", format!("nvme-ns,bus=ctrl0,drive=image{index},{namespace}"));
        }
        if self.second {
            let other = image(directory, "other", 64 * MIB)?;
            options = options.drive("other", &other).with("-device", "nvme,serial=other,drive=other");
        }
        Ok(options)
    }
}

/// Runs its parts of the suite, and a file tree, on one of them.
pub(super) fn passes(environment: &Environment, configuration: &Configuration) -> Result<Verdict> {
    if let Some(reason) = missing(environment).or_else(|| suite::absent(environment)) {
        return Ok(Verdict::Skipped(reason));
    }
    let directory = drives(environment)?;
    let mut guest = boot(environment, &configuration.options(directory.path())?)?;
    guest.bind(DRIVE)?;
    let device = format!("pci:{DRIVE}{}", configuration.suffix);
    suite::run(&mut guest, &device, "matrix", configuration.parts)?;
    guest.keep_a_tree(&device)?;
    guest.unbind(DRIVE)?;
    guest.quiet_kernel()?;
    Ok(Verdict::Passed)
}
