//! The command line of `polluxd`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::config::Config;
use crate::daemon::{Daemon, Ready};
use crate::device::{self, DeviceSpec};
use crate::failure::{During, Failure};
use crate::fuse::{Absent, MountPoint};
use crate::output::say;
use crate::quantity::{CoreList, parse_cores};
use crate::signals::Signals;

const AFTER_HELP: &str = "\
Runs in the foreground. SIGINT or SIGTERM writes everything and unmounts; so does umount(8) of the mount.

Configuration (TOML, every key optional):
  idle_spin_us = 50   how long a reactor without work spins before it sleeps
  suid = false        honour set-uid and set-gid bits of programs on the mount
  dev = false         honour device nodes on the mount

Exit codes:
  0  asked to stop, and everything was written
  1  failed; standard error says what, on which device or path, and what to do
  2  the command line or the configuration makes no sense

Example:
  polluxd --device emu:/var/lib/p.img --mount /mnt/p --cores 0-1";

/// Mount a Pollux volume and serve it.
#[derive(Parser)]
#[command(name = "polluxd", version, after_help = AFTER_HELP)]
pub struct Polluxd {
    /// The device, formatted with `pollux mkfs`
    #[arg(long, value_name = "SPEC", value_parser = device::parse)]
    device: DeviceSpec,

    /// Where to mount: an empty directory
    #[arg(long, value_name = "DIR")]
    mount: PathBuf,

    /// Core ids, one reactor on each [default: all]
    #[arg(long, value_name = "LIST", value_parser = parse_cores)]
    cores: Option<CoreList>,

    /// Configuration file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Control socket [default: found from any path on the mount]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl Polluxd {
    /// Runs the daemon and reports how it went.
    pub fn run(&self) -> ExitCode {
        self.serve().map_or_else(|failure| failure.report("polluxd"), |()| ExitCode::SUCCESS)
    }

    fn serve(&self) -> Result<(), Failure> {
        let signals = Signals::block().during("cannot block signals")?;
        let config = self.config.as_deref().map_or_else(|| Ok(Config::default()), Config::read)?;
        let point = MountPoint::prepare(&self.mount, Absent::Refuse)?;
        let daemon = Daemon {
            device: self.device.clone(),
            point,
            cores: self.cores.clone(),
            socket: self.socket.clone(),
            config,
        };
        daemon.run(&signals, announce)
    }
}

fn announce(ready: &Ready<'_>) {
    say!(
        "{} is mounted at {}; control socket {}",
        ready.report.daemon.device,
        ready.mount.display(),
        ready.socket.display()
    );
}
