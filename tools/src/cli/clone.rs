//! `pollux clone`: a file, or a range of one, that shares its blocks with another.
//!
//! Owns: the loop of copy_file_range(2) around which the command is built, so that it works for whoever may read the one
//! file and write the other, on any mount, without the daemon's control socket.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use rustix::fs::copy_file_range;
use rustix::io::Errno;

use crate::device::parse_size;
use crate::failure::{During, Failure};
use crate::fuse::EXTENTS_ATTRIBUTE;
use crate::output::outln;
use crate::quantity::{show_nanos, show_size};

/// Make a file, or a range of it, share its blocks with another (reflink)
#[derive(Args)]
#[command(after_help = "\
DST is created if it is missing; without offsets and length it becomes a copy of SRC. Offsets and length are multiples of
4 KiB, but for a range that ends where SRC ends. Both files must lie on the same Pollux volume. The output says how much is
shared.

Example:
  pollux clone ./pollux-mnt/disk.img ./pollux-mnt/snapshot.img")]
pub(super) struct Clone {
    /// File whose contents are wanted
    #[arg(value_name = "SRC")]
    source: PathBuf,

    /// File that gets them
    #[arg(value_name = "DST")]
    target: PathBuf,

    /// First byte of SRC
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = parse_size)]
    src_offset: u64,

    /// First byte of DST
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = parse_size)]
    dst_offset: u64,

    /// Bytes; up to the end of SRC by default
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    length: Option<u64>,
}

impl Clone {
    pub(super) fn run(&self) -> Result<(), Failure> {
        self.check()?;
        let source = File::open(&self.source).during(format!("cannot open {}", self.source.display()))?;
        let target = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&self.target)
            .during(format!("cannot open {}", self.target.display()))?;
        let whole = (self.src_offset, self.dst_offset, self.length) == (0, 0, None);
        let started = Instant::now();
        let bytes = self.copy(&source, &target)?;
        if whole {
            target.set_len(bytes).during(format!("cannot set the size of {}", self.target.display()))?;
        }
        let took = started.elapsed();
        let (extents, shared) = extents_of(&self.target)?;
        outln!(
            "{}: {} in {}; {shared} of its {extents} extents shared",
            self.target.display(),
            show_size(bytes),
            show_nanos(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)),
        );
        Ok(())
    }

    /// Looks before anything is created.
    fn check(&self) -> Result<(), Failure> {
        let device = |path: &Path| {
            std::fs::metadata(path)
                .map(|found| found.dev())
                .during(format!("cannot look at {}", path.display()))
        };
        let place = match self.target.parent() {
            _ if self.target.exists() => &*self.target,
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        if device(&self.source)? != device(place)? {
            return Err(Failure::new(format!(
                "{} and {} lie on different file systems: blocks can only be shared within one",
                self.source.display(),
                self.target.display()
            ))
            .remedy("use cp to copy"));
        }
        extents_of(&self.source).map(|_| ())
    }

    fn copy(&self, source: &File, target: &File) -> Result<u64, Failure> {
        let (mut from, mut to) = (self.src_offset, self.dst_offset);
        let mut done = 0;
        loop {
            let left = self.length.map_or(u64::MAX, |length| length - done);
            let step = usize::try_from(left.min(1 << 40)).unwrap_or(usize::MAX);
            if step == 0 {
                return Ok(done);
            }
            let copied = copy_file_range(source, Some(&mut from), target, Some(&mut to), step);
            match copied {
                Ok(0) => return Ok(done),
                Ok(bytes) => done += bytes as u64,
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(Failure::new(format!(
                        "cannot clone {} to {}: {}; {} done",
                        self.source.display(),
                        self.target.display(),
                        io::Error::from(error),
                        show_size(done)
                    )));
                }
            }
        }
    }
}

/// Extents of a file, and how many are shared.
fn extents_of(path: &Path) -> Result<(u64, u64), Failure> {
    let not_ours = |why: String| {
        Failure::new(format!("{}: {why}", path.display()))
            .remedy("`pollux clone` needs files on a mounted Pollux volume")
    };
    let mut value = [0; 256];
    let length = rustix::fs::getxattr(path, EXTENTS_ATTRIBUTE, &mut value[..])
        .map_err(|error| not_ours(format!("not on a Pollux volume ({error})")))?;
    let json: serde_json::Value =
        serde_json::from_slice(&value[..length]).map_err(|error| not_ours(error.to_string()))?;
    Ok((json["extents"].as_u64().unwrap_or(0), json["shared"].as_u64().unwrap_or(0)))
}
