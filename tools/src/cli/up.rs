//! `pollux up`: the quick start. Makes what is missing, then is the daemon.
//!
//! Nothing is created before everything that can be refused has been looked at; an image that could not be formatted
//! is removed again.

use std::fs;
use std::io;
use std::path::PathBuf;

use clap::Args;
use fs_core::mkfs::Force;

use crate::config::Config;
use crate::daemon::{Daemon, Ready};
use crate::device::{self, DeviceSpec, Formatting, parse_size};
use crate::failure::{During, Failure};
use crate::fuse::{Absent, MountPoint};
use crate::output::say;
use crate::quantity::{CoreList, parse_cores, show_size};
use crate::signals::Signals;

/// Size of a new image if none is given.
const DEFAULT_SIZE: u64 = 4 << 30;

/// Create what is missing (image, mount point), mount, and serve until Ctrl-C
#[derive(Args)]
#[command(after_help = "\
Runs in the foreground. SIGINT (Ctrl-C) or SIGTERM writes everything and unmounts.

Example:
  pollux up --image ./pollux.img --size 4GiB --mount ./pollux-mnt")]
pub(super) struct Up {
    /// The image; created and formatted if it is missing
    #[arg(long, value_name = "PATH", default_value = "./pollux.img")]
    image: PathBuf,

    /// Size of a new image [default: 4GiB]; that of an existing one is compared
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,

    /// Where to mount; created if it is missing
    #[arg(long, value_name = "DIR", default_value = "./pollux-mnt")]
    mount: PathBuf,

    /// Core ids, one reactor on each [default: all]
    #[arg(long, value_name = "LIST", value_parser = parse_cores)]
    cores: Option<CoreList>,
}

impl Up {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let signals = Signals::block().during("cannot block signals")?;
        let point = MountPoint::prepare(&self.mount, Absent::Create)?;
        let device = self.image()?;
        let daemon =
            Daemon { device, point, cores: self.cores.clone(), socket: None, config: Config::default() };
        daemon.run(&signals, announce)?;
        say!("everything is written; {} is unmounted", self.mount.display());
        Ok(())
    }

    /// The image, formatted if it is new.
    fn image(&self) -> Result<DeviceSpec, Failure> {
        let shown = self.image.display();
        match fs::metadata(&self.image) {
            Ok(metadata) if metadata.is_file() => {
                if let Some(size) = self.size.filter(|size| *size != metadata.len()) {
                    return Err(Failure::new(format!(
                        "image {shown} has {}, not {}",
                        exact(metadata.len()),
                        exact(size)
                    ))
                    .remedy("leave --size out to use it as it is, or name another --image"));
                }
                device::image(&self.image, None)
            }
            Ok(_) => Err(Failure::new(format!("image {shown} is not a regular file"))
                .remedy("name another file with --image")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.create(),
            Err(error) => Err(Failure::new(format!("cannot use image {shown}: {error}"))),
        }
    }

    fn create(&self) -> Result<DeviceSpec, Failure> {
        let size = self.size.unwrap_or(DEFAULT_SIZE);
        let device = device::image(&self.image, Some(size))?;
        eprintln!("creating {} ({}) and formatting it", self.image.display(), show_size(size));
        let formatting = Formatting { shards: None, label: String::new(), force: Force::Refuse };
        device::format(&device, &formatting)?;
        device::image(&self.image, None)
    }
}

fn exact(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", show_size(bytes))
}

fn announce(ready: &Ready<'_>) {
    let mount = ready.mount.display();
    let program = std::env::args().next().unwrap_or_else(|| "pollux".into());
    let volume = &ready.report.volume;
    say!(
        "{} is mounted at {mount}: {} free, {} shards on {} reactors",
        ready.report.daemon.device,
        show_size(volume.available_blocks.saturating_mul(4096)),
        volume.shards.len(),
        ready.report.reactors.len(),
    );
    say!("\nTry in another terminal:");
    say!("  cp -r /usr/share/doc {mount}/");
    say!("  {program} status {mount}");
    say!("  {program} sync {mount}");
    say!("\nCtrl-C writes everything and unmounts.");
}
