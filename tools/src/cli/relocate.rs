//! `pollux relocate`: moves everything out of allocation groups of a mounted volume while it is in use.

use std::time::Instant;

use clap::Args;
use fs_core::relocate::RelocateScope;

use super::scrub::{BLOCK, Shown};
use super::{Daemon, print_json};
use crate::control::client::ask_and_watch;
use crate::control::protocol::Command;
use crate::device::parse_size;
use crate::failure::Failure;
use crate::output::outln;
use crate::quantity::show_size;

/// Move everything out of allocation groups of a mounted volume
#[derive(Args)]
#[command(after_help = "\
The volume stays in use, and what files share stays shared. Ctrl-C ends it after the step at hand: it has simply moved
less. --all empties one group after the other, the emptiest first, which leaves free space in long stretches.
--shrink-to empties what lies behind SIZE, and then the volume ends before it, at the border of a group: the device,
or the image file, may be cut there as soon as the volume is unmounted.

Exit codes: 0 every group was emptied, 1 something was left (it says what and why) or it could not run

Example:
  pollux relocate --all ./pollux-mnt")]
pub(super) struct Relocate {
    #[command(flatten)]
    daemon: Daemon,

    /// Empty this group
    #[arg(long, value_name = "N", required_unless_present_any = ["all", "shrink_to"], conflicts_with = "all")]
    group: Option<u64>,

    /// Empty every group that holds something, one after the other
    #[arg(long)]
    all: bool,

    /// Make the volume smaller: at most this size, like 20GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with_all = ["all", "group"])]
    shrink_to: Option<u64>,

    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl Relocate {
    pub(super) fn run(&self) -> Result<(), Failure> {
        self.shrink_to.map_or_else(|| self.empty(), |bytes| self.shrink(bytes))
    }

    fn shrink(&self, bytes: u64) -> Result<(), Failure> {
        let mut shown = Shown::new("moved");
        let started = Instant::now();
        let socket = self.daemon.socket()?;
        let result = ask_and_watch(&socket, Command::Shrink(bytes), &mut |progress| shown.update(progress));
        shown.bar.finish_and_clear();
        let result = result?;
        if self.json {
            return print_json(&result);
        }
        let number = |key: &str| result[key].as_u64().unwrap_or(0);
        let moved = &result["relocated"];
        outln!(
            "the volume has {} ({} bytes) in {} groups now, {} before: {} of data and {} tree nodes moved in {:.1} s",
            show_size(number("bytes")),
            number("bytes"),
            number("groups"),
            show_size(number("bytes_before")),
            show_size(moved["blocks"].as_u64().unwrap_or(0).saturating_mul(BLOCK)),
            moved["nodes"].as_u64().unwrap_or(0),
            started.elapsed().as_secs_f64()
        );
        Ok(())
    }

    fn empty(&self) -> Result<(), Failure> {
        let scope = self.group.map_or(RelocateScope::All, RelocateScope::Group);
        let mut shown = Shown::new("moved");
        let started = Instant::now();
        let socket = self.daemon.socket()?;
        let result = ask_and_watch(&socket, Command::Relocate(scope), &mut |progress| shown.update(progress));
        shown.bar.finish_and_clear();
        let result = result?;
        let number = |key: &str| result[key].as_u64().unwrap_or(0);
        let left: Vec<&str> =
            result["left"].as_array().into_iter().flatten().filter_map(|one| one.as_str()).collect();
        if self.json {
            print_json(&result)?;
        } else {
            left.iter().for_each(|one| outln!("left: {one}"));
            outln!(
                "{} groups emptied: {} of data and {} tree nodes moved in {:.1} s",
                number("groups_emptied"),
                show_size(number("blocks").saturating_mul(BLOCK)),
                number("nodes"),
                started.elapsed().as_secs_f64()
            );
        }
        match number("groups_left") {
            0 => Ok(()),
            groups => Err(Failure::new(format!("{groups} groups still hold something"))
                .remedy("what is in the way is named above: free space, or delete damaged or lent files, and try again")),
        }
    }
}
