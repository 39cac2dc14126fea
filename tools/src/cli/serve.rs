//! `pollux serve`: an embedded controller for other programs, over a vfio-user socket.
//!
//! Owns: the choice of controller and socket, and the end on a signal. How it is served is in `nvme_emulator::serve`.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use clap::Args;
use nvme::open::emulator_config;
use nvme::spec_string::Target;
use nvme_emulator::EmulatedController;
use nvme_emulator::serve::{ClientMemory, ServeError, Server, ServerOptions};

use crate::device::{self, DeviceSpec};
use crate::failure::{During, Failure};
use crate::output::say;
use crate::signals::Signals;

/// Serve an embedded controller to other programs over a vfio-user socket until Ctrl-C
#[derive(Args)]
#[command(after_help = "\
One client at a time; the next has its turn when the last one leaves. Between two clients the controller is reset;
what they wrote stays. SIGINT (Ctrl-C) or SIGTERM removes the socket.

What initiators are offered, as options of the device:
  sgls=on|dword|off      SGLs                              (on)
  shadow=on|off          shadow doorbells                  (off)
  cache=on|off           volatile write cache              (on)
  mpsmin=4KiB..64KiB     smallest memory page              (4KiB)
  dstrd=0..10            doorbells are 4 << N bytes apart  (0)
  mdts=N                 largest transfer, 4096 << N       (8)
  meta=BYTES             metadata of each block            (0)
  nsID=SIZE              a further namespace; of a file in PATH.nsID

Clients share memory with this process. One that shrinks what it shared loses its data; --sealed refuses memory that
could shrink (and huge pages), which some clients cannot do without.

Example:
  pollux serve --device emu:./disk.img,size=4GiB --socket /tmp/pollux/cntrl
  pollux serve --device emu:mem,size=1GiB,ns7=64MiB,shadow=on,mpsmin=16KiB --socket /tmp/pollux/cntrl
  pollux perf --device vfio-user:/tmp/pollux/cntrl --rw randread --bs 4k --iodepth 32    (in another terminal)")]
pub(super) struct Serve {
    /// The controller: an `emu:` device
    #[arg(long, value_name = "SPEC", value_parser = device::parse)]
    device: DeviceSpec,

    /// The socket; a dead one is replaced. SPDK's programs look for one named `cntrl` in the directory they are given
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Refuse memory that a client could shrink under the server
    #[arg(long)]
    sealed: bool,
}

impl Serve {
    pub(super) fn run(&self) -> Result<(), Failure> {
        // Before the controller has threads.
        let signals = Signals::block().during("cannot block signals")?;
        let Target::Emulated(emulated) = &self.device.target else {
            return Err(Failure::usage(format!("{}: only embedded controllers can be served", self.device))
                .remedy("name an emu: device, as in --device emu:mem,size=1GiB"));
        };
        let controller = EmulatedController::new(emulator_config(emulated, &self.device))
            .during(format!("cannot make {}", self.device))?;
        let memory = if self.sealed { ClientMemory::Sealed } else { ClientMemory::Any };
        let options = ServerOptions { memory, ..ServerOptions::default() };
        let server = Server::bind(controller, &self.socket, options).map_err(|error| self.refused(&error))?;
        announce(&self.device, &self.socket);
        server.run(signals.as_fd()).map_err(|error| self.refused(&error))?;
        drop(server);
        say!("{} is removed; what was written is in {}", self.socket.display(), self.device);
        Ok(())
    }

    fn refused(&self, error: &ServeError) -> Failure {
        let failure = Failure::new(error.to_string());
        match self.socket.parent().filter(|parent| !parent.as_os_str().is_empty() && !parent.exists()) {
            Some(parent) => failure.remedy(format!("create its directory: mkdir -p {}", parent.display())),
            None => failure,
        }
    }
}

fn announce(device: &DeviceSpec, socket: &Path) {
    let program = std::env::args().next().unwrap_or_else(|| "pollux".into());
    let shown = socket.display();
    say!("{device} is served at {shown}");
    say!("\nTry in another terminal:");
    say!("  {program} identify --device vfio-user:{shown}");
    say!("  {program} perf --device vfio-user:{shown} --rw randread --bs 4k --iodepth 32");
    if socket.file_name().is_some_and(|name| name == "cntrl")
        && let Some(folder) = socket.parent()
    {
        let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        say!(
            "  spdk_nvme_perf -r 'trtype:VFIOUSER traddr:{} subnqn:nqn.x' -q 32 -o 4096 -w randread -t 5",
            folder.display()
        );
    }
    say!("\nCtrl-C ends it.");
}
