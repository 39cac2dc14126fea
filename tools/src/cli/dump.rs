//! `pollux dump`: a volume in readable form, read-only.

use std::io::{self, BufWriter, Write};

use clap::{Args, ValueEnum};
use fs_core::dump::{self, DumpError, DumpSummary, Part, Selection};
use fs_core::format::node::ItemKind;
use fs_core::types::{InodeNr, ShardId};

use crate::device::{self, DeviceSpec, superblock_failure};
use crate::failure::Failure;

/// Show superblock, groups, tree nodes or items of a volume that is not mounted; changes nothing
#[derive(Args)]
#[command(after_help = "\
One line is one thing; damage is a line that begins with `!` (then the exit code is 1).

Example:
  pollux dump --device emu:./pollux.img
  pollux dump --device emu:./pollux.img --part items --inode 1 --kind dir-seq")]
pub(super) struct Dump {
    /// The device
    #[arg(long, value_name = "SPEC", value_parser = device::parse)]
    device: DeviceSpec,

    /// What to show
    #[arg(long, value_enum, default_value = "superblock")]
    part: Shown,

    /// Nodes and items of this shard only
    #[arg(long, value_name = "N", value_parser = parse_shard)]
    shard: Option<ShardId>,

    /// Items of this inode only: a number as `ls -i` shows it
    #[arg(long, value_name = "N", value_parser = parse_inode)]
    inode: Option<InodeNr>,

    /// Items of this kind only, such as inode, dir-seq, extent, run
    #[arg(long, value_name = "KIND", value_parser = parse_kind)]
    kind: Option<ItemKind>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shown {
    Superblock,
    Groups,
    Nodes,
    Items,
}

fn parse_shard(text: &str) -> Result<ShardId, String> {
    text.parse().ok().and_then(ShardId::new).ok_or_else(|| "a shard is a number below 64".to_owned())
}

/// The root directory is 1 on a mount.
fn parse_inode(text: &str) -> Result<InodeNr, String> {
    match text.parse::<u64>() {
        Ok(1) => Ok(InodeNr::ROOT),
        Ok(number) => Ok(InodeNr::new(number)),
        Err(_) => Err("an inode is a number".to_owned()),
    }
}

fn parse_kind(text: &str) -> Result<ItemKind, String> {
    dump::kind_named(text).ok_or_else(|| {
        let known: Vec<&str> = dump::kind_names().collect();
        format!("the kinds are {}", known.join(", "))
    })
}

impl Dump {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let selection = Selection {
            part: match self.part {
                Shown::Superblock => Part::Superblock,
                Shown::Groups => Part::Groups,
                Shown::Nodes => Part::Nodes,
                Shown::Items => Part::Items,
            },
            shard: self.shard,
            inode: self.inode,
            kind: self.kind,
        };
        let dumped = device::on_one_reactor(&self.device, |ctx| async move {
            let mut out = BufWriter::new(io::stdout().lock());
            let summary = dump::dump(&ctx, &selection, &mut out).await?;
            out.flush()?;
            Ok::<DumpSummary, DumpError>(summary)
        })?;
        match dumped {
            Ok(summary) if summary.damaged == 0 => Ok(()),
            Ok(summary) => {
                Err(Failure::new(format!("{}: {} things are damaged", self.device, summary.damaged))
                    .remedy(format!("pollux fsck --device {} tells more", self.device)))
            }
            // Whoever reads has seen enough.
            Err(DumpError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Err(DumpError::Superblock(error)) => Err(superblock_failure(&self.device, &error)),
            Err(error) => Err(Failure::new(format!("cannot dump {}: {error}", self.device))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_has_the_number_that_the_mount_shows() {
        assert_eq!(parse_inode("1"), Ok(InodeNr::ROOT));
        assert_eq!(parse_inode("4160"), Ok(InodeNr::new(4160)));
        assert!(parse_inode("root").is_err());
    }

    #[test]
    fn unknown_kind_is_told_the_known_ones() {
        assert!(parse_kind("inode").is_ok());
        assert!(parse_kind("colour").unwrap_err().contains("dir-seq"));
        assert!(parse_shard("64").is_err());
    }
}
