//! The tiers: which devices the suite runs on, and which cases bring a machine of their own.
//!
//! Owns: [`Tier`], [`Target`] (a device that is there for as long as it is held) and the lists of both kinds.
//!
//! Excludes: running them (`hw-tests`), the machines themselves.

mod served;

use std::fmt;
use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;

use crate::guest;
use crate::qemu::{self, Configuration, Machine, Runs};
use crate::suite::{Environment, MachineCase};
pub use served::Server;

/// A kind of device to run on, by what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tier {
    /// The embedded controller, in this process and behind a socket: needs nothing
    Emu,
    /// QEMU's controller without a guest: needs QEMU
    Qtest,
    /// A guest under QEMU with Linux, its IOMMU and its VFIO: needs QEMU and a kernel package
    Guest,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tier::Emu => "emu",
            Tier::Qtest => "qtest",
            Tier::Guest => "guest",
        })
    }
}

/// A device that the whole suite, or a part of it, runs on.
pub struct Target {
    /// What the table calls it.
    pub name: String,
    /// Which cases: those whose names contain one of these; all if there are none.
    pub parts: Vec<String>,
    /// Makes it, in a directory of its own.
    pub make: Make,
}

/// Makes a device in a directory of its own.
pub type Make = Box<dyn Fn(&Environment, &Path) -> Result<Made>>;

/// A device that is there.
pub struct Made {
    /// Its spec.
    pub spec: String,
    /// What ends it when dropped.
    pub holder: Box<dyn std::any::Any>,
}

impl Made {
    fn plain(spec: String) -> Self {
        Self { spec, holder: Box::new(()) }
    }
}

impl Tier {
    /// All of them, the fastest first.
    pub const ALL: [Tier; 3] = [Tier::Emu, Tier::Qtest, Tier::Guest];

    /// Why the tier cannot run here, and what to install; `None` if it can.
    pub fn missing(self, environment: &Environment) -> Option<String> {
        match self {
            Tier::Emu => None,
            Tier::Qtest => qemu::missing(),
            Tier::Guest => guest::missing(environment),
        }
    }

    /// Its devices.
    pub fn targets(self) -> Vec<Target> {
        match self {
            Tier::Emu => embedded(),
            Tier::Qtest => qemu::matrix().into_iter().filter_map(on_qemu).collect(),
            Tier::Guest => Vec::new(),
        }
    }

    /// Its cases that bring a machine of their own.
    pub fn machine_cases(self) -> Vec<MachineCase> {
        match self {
            Tier::Emu => served::CASES.to_vec(),
            Tier::Qtest => qemu::cases(),
            Tier::Guest => guest::cases(),
        }
    }
}

/// A configuration that the suite runs on; `None` for those whose refusal is a case.
fn on_qemu(configuration: Configuration) -> Option<Target> {
    let parts = match configuration.runs {
        Runs::Everything => Vec::new(),
        Runs::Only(part) => vec![part.to_owned()],
        Runs::Refused(_) => return None,
    };
    let name = format!("qtest {}", configuration.name);
    let make = Box::new(move |_: &Environment, _: &Path| {
        let machine = Machine::start(&configuration)?;
        Ok(Made { spec: machine.spec(), holder: Box::new(machine) })
    });
    Some(Target { name, parts, make })
}

/// Size of the devices: room for a volume and a tree.
const SIZE: &str = "256MiB";

fn embedded() -> Vec<Target> {
    let file = |name: &str, options: &'static str| Target {
        name: name.to_owned(),
        parts: Vec::new(),
        make: Box::new(move |_, directory| {
            let image = directory.join("disk.img");
            Ok(Made::plain(format!("emu:{},size={SIZE},{options}", image.display())))
        }),
    };
    vec![
        Target {
            name: "emu:mem".to_owned(),
            parts: Vec::new(),
            make: Box::new(|_, _| Ok(Made::plain(format!("emu:mem,size={SIZE}")))),
        },
        file("emu:FILE lba=512", "lba=512"),
        // What the others leave at its usual: lists of pages in place of SGLs, small transfers, wide doorbells, no cache, a second namespace.
        file("emu:FILE plain", "lba=512,sgls=off,mdts=4,dstrd=2,cache=off,ns7=64MiB"),
        file("emu:FILE shadow", "lba=4096,shadow=on,sgls=dword,mpsmin=16KiB"),
        file("emu:FILE lba=4096", "lba=4096"),
        Target {
            name: "vfio-user".to_owned(),
            parts: Vec::new(),
            make: Box::new(|environment, directory| {
                let device = format!("emu:{},size={SIZE}", directory.join("disk.img").display());
                let server = Server::start(environment, &device, directory)?;
                Ok(Made { spec: server.spec(), holder: Box::new(server) })
            }),
        },
    ]
}
