//! `pollux grow`: makes a mounted volume as large as its device, while it is in use.

use clap::Args;

use super::{Daemon, print_json};
use crate::control::{client, protocol::Command};
use crate::device::parse_size;
use crate::failure::Failure;
use crate::output::outln;
use crate::quantity::show_size;

/// Make a mounted volume larger, up to the size of its device
#[derive(Args)]
#[command(after_help = "\
The volume stays in use. Its groups keep the size that they have; what is too short for one at the end is left over.
An image file is made larger before: unmount, `truncate --size SIZE FILE`, mount, grow.

Example:
  pollux grow ./pollux-mnt")]
pub(super) struct Grow {
    #[command(flatten)]
    daemon: Daemon,

    /// Not the whole device, but this size, like 20GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    to: Option<u64>,

    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl Grow {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let result = client::ask(&self.daemon.socket()?, Command::Grow(self.to))?;
        if self.json {
            return print_json(&result);
        }
        let number = |key: &str| result[key].as_u64().unwrap_or(0);
        let (now, before) = (number("bytes"), number("bytes_before"));
        if now == before {
            outln!("the volume has {} already, as much as it can: nothing was changed", show_size(now));
        } else {
            let groups = number("groups");
            outln!("the volume has {} in {groups} groups now, {} before", show_size(now), show_size(before));
        }
        Ok(())
    }
}
