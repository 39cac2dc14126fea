//! A volume in memory, mounted: `pollux up` without a file.
//!
//! Excludes: everything about how a daemon lives, which is [`Daemon`]'s.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use nvme::QueueOptions;
use pollux::config::Config;
use pollux::daemon::Daemon;
use pollux::device::{self, Device, DeviceSpec};
use pollux::fuse::{Absent, MountPoint};
use pollux::quantity::{CoreList, parse_cores};
use pollux::signals::Signals;

use crate::library::format_on;

/// Options of `serve`.
#[derive(Args)]
pub(crate) struct Serve {
    /// The device; in memory it is formatted first
    #[arg(long, value_parser = device::parse)]
    device: DeviceSpec,
    /// Where to mount
    #[arg(long)]
    mount: PathBuf,
    /// Cores of the reactors
    #[arg(long, value_parser = parse_cores)]
    cores: CoreList,
}

impl Serve {
    pub(crate) fn run(&self) -> Result<()> {
        let signals = Signals::block()?;
        let point = MountPoint::prepare(&self.mount, Absent::Create)?;
        let controller = device::open(&self.device)?;
        let cores = self.cores.ids().to_vec();
        format_on(&controller, u8::try_from(cores.len())?)?;
        let config = Config::default();
        let name = self.device.to_string();
        let device = Device::over(controller, &name, &cores, config.reactor(), QueueOptions::default())?;
        let daemon = Daemon {
            device: self.device.clone(),
            point,
            cores: Some(self.cores.clone()),
            socket: Some(self.mount.with_extension("sock")),
            config,
        };
        daemon.run_on(device, &signals, |_ready| println!("{{}}"))?;
        Ok(())
    }
}
