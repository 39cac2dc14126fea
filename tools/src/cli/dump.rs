//! `pollux dump`: a volume in readable form, read-only; and how a file lies on the device, on a mount too.

use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use fs_core::dump::{self, DumpError, DumpSummary, ExtentsError, Part, Selection};
use fs_core::format::node::ItemKind;
use fs_core::request::{ExtentList, ExtentRow};
use fs_core::types::{InodeNr, ShardId};
use rustix::io::Errno;

use crate::device::{self, DeviceSpec, superblock_failure};
use crate::extents::{self, LIST_ATTRIBUTE, Table, VALUE_LIMIT};
use crate::failure::Failure;

/// Show superblock, groups, tree nodes, items, or a file's extents; changes nothing
#[derive(Args)]
#[command(after_help = "\
The volume is not mounted, but for --extents, which takes a file on a mount, or with --device the path of one from the
volume's root (then as the next mount is going to find it, the intent log replayed).

One line is one thing; damage is a line that begins with `!` (then the exit code is 1). Extents are shown in bytes; their
flags are shared (blocks that another extent has too), lent (they lie in a group of another shard), prealloc (never
written), hole, queued (accepted, and not on the device yet).

Example:
  pollux dump --device emu:./pollux.img
  pollux dump --device emu:./pollux.img --part items --inode 1 --kind dir-seq
  pollux dump --device emu:./pollux.img --extents /disk.img
  pollux dump --extents ./pollux-mnt/disk.img")]
pub(super) struct Dump {
    /// The device
    #[arg(long, value_name = "SPEC", value_parser = device::parse, required_unless_present = "extents")]
    device: Option<DeviceSpec>,

    /// Show how this file lies on the device
    #[arg(long, value_name = "PATH", conflicts_with_all = ["part", "shard", "inode", "kind"])]
    extents: Option<PathBuf>,

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
        match (&self.extents, &self.device) {
            (Some(path), Some(device)) => list_on_device(device, path),
            (Some(path), None) => list_on_mount(path),
            (None, Some(device)) => self.dump(device),
            (None, None) => Err(Failure::new("no device").remedy("give one with --device SPEC")),
        }
    }

    fn dump(&self, device: &DeviceSpec) -> Result<(), Failure> {
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
        let dumped = device::on_one_reactor(device, |ctx| async move {
            let mut out = BufWriter::new(io::stdout().lock());
            let summary = dump::dump(&ctx, &selection, &mut out).await?;
            out.flush()?;
            Ok::<DumpSummary, DumpError>(summary)
        })?;
        match dumped {
            Ok(summary) if summary.damaged == 0 => Ok(()),
            Ok(summary) => Err(Failure::new(format!("{device}: {} things are damaged", summary.damaged))
                .remedy(format!("pollux fsck --device {device} tells more"))),
            // Whoever reads has seen enough.
            Err(DumpError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Err(DumpError::Superblock(error)) => Err(superblock_failure(device, &error)),
            Err(error) => Err(Failure::new(format!("cannot dump {device}: {error}"))),
        }
    }
}

fn list_on_device(device: &DeviceSpec, path: &Path) -> Result<(), Failure> {
    let wanted = path.as_os_str().as_bytes();
    let listed = device::on_one_reactor(device, |ctx| async move {
        let mut table = Table::new(BufWriter::new(io::stdout().lock()))?;
        dump::extents(&ctx, wanted, &mut |row| table.row(&row)).await?;
        Ok::<(), ExtentsError>(table.finish()?)
    })?;
    match listed {
        Ok(()) => Ok(()),
        Err(ExtentsError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(ExtentsError::Superblock(error)) => Err(superblock_failure(device, &error)),
        Err(error @ (ExtentsError::NotFound(_) | ExtentsError::WrongKind { .. })) => {
            Err(Failure::new(format!("{device}: {error}"))
                .remedy("give the path of a regular file from the volume's root on"))
        }
        Err(error) => Err(Failure::new(format!("{device}: {error}"))
            .remedy(format!("pollux fsck --device {device} tells more"))),
    }
}

fn list_on_mount(path: &Path) -> Result<(), Failure> {
    let mut table = None;
    extents_on_mount(path, |rows| {
        let open = table.take().unwrap_or_else(|| Table::new(BufWriter::new(io::stdout().lock())));
        let printed = open.and_then(|mut table| {
            rows.iter().try_for_each(|row| table.row(row))?;
            Ok(table)
        });
        let go_on = if printed.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
        table = Some(printed);
        go_on
    })?;
    match table.map_or(Ok(()), |table| table?.finish()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Hands the extents of a file on a mount to `each`, some at a time, until they end or it has enough.
///
/// # Errors
/// It is no such file, or it has gone.
pub(super) fn extents_on_mount(
    path: &Path,
    mut each: impl FnMut(&[ExtentRow]) -> ControlFlow<()>,
) -> Result<(), Failure> {
    let mut value = vec![0; VALUE_LIMIT];
    let mut next = Some(0);
    while let Some(offset) = next {
        let list = part_on_mount(path, offset, &mut value)?;
        if each(&list.rows).is_break() {
            return Ok(());
        }
        if list.next.is_some_and(|next| next <= offset) {
            return Err(Failure::new(format!("{}: the list does not end", path.display())));
        }
        next = list.next;
    }
    Ok(())
}

fn part_on_mount(path: &Path, offset: u64, value: &mut [u8]) -> Result<ExtentList, Failure> {
    let attribute = format!("{LIST_ATTRIBUTE}{offset}");
    let failed = |why: String| Failure::new(format!("{}: {why}", path.display()));
    match rustix::fs::getxattr(path, attribute.as_str(), &mut *value) {
        Ok(length) => extents::decode(&value[..length]).map_err(failed),
        Err(Errno::OPNOTSUPP | Errno::NODATA) => Err(failed("not on a Pollux volume".to_owned()).remedy(
            "give a file on a mount, or with --device SPEC the path of one from the volume's root on",
        )),
        Err(error) => Err(failed(io::Error::from(error).to_string())
            .remedy("give a regular file on a mounted Pollux volume")),
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
