//! `pollux dedupe SRC DST` with a range: two files that are to share exactly that, or not at all.
//!
//! Owns: the check of the range, the comparison that tells where two ranges differ, and [`share`], which asks the daemon
//! piece by piece.
//!
//! The comparison here is for the message, and so that nothing is shared if the ranges differ somewhere. What counts is the
//! daemon's own, under the files' locks.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use super::super::print_json;
use super::super::scrub::BLOCK;
use super::places::{Places, apart};
use super::{READ, STEP};
use crate::control::client::ask;
use crate::control::protocol::{Command, SharedRange};
use crate::failure::{During, Exit, Failure};
use crate::output::outln;
use crate::quantity::{show_nanos, show_size};

/// What is to be shared, as the command line says it.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) source_offset: u64,
    pub(super) target_offset: u64,
    /// Up to the source's end without.
    pub(super) length: Option<u64>,
    /// Compare only.
    pub(super) dry_run: bool,
    pub(super) json: bool,
}

/// Bytes that share blocks now, and those that did before; those that the daemon found different.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shared {
    pub(super) now: u64,
    pub(super) before: u64,
    pub(super) changed: u64,
}

/// An open file.
struct Side<'a> {
    path: &'a Path,
    file: File,
    metadata: Metadata,
    offset: u64,
}

/// The whole command.
///
/// # Errors
/// The range makes no sense, a file cannot be read, or the ranges differ ([`Exit::Different`]).
pub(super) fn run(socket: &Path, paths: &[PathBuf], wanted: &Wanted) -> Result<(), Failure> {
    let [source, target] = paths else {
        return Err(Failure::usage(format!("{} paths with an offset or a length", paths.len()))
            .remedy("give two files: pollux dedupe SRC DST --length SIZE"));
    };
    let source = Side::open(source, wanted.source_offset)?;
    let target = Side::open(target, wanted.target_offset)?;
    let length = check(&source, &target, wanted.length)?;
    let started = Instant::now();
    let mut shared = Shared::default();
    let mut different = difference(&source, &target, length)?;
    if different.is_none() && !wanted.dry_run {
        let range = SharedRange {
            source: source.metadata.ino(),
            source_offset: source.offset,
            target: target.metadata.ino(),
            target_offset: target.offset,
            length,
        };
        let places = (Places::of(source.path)?, Places::of(target.path)?);
        shared = share(socket, (&places.0, &places.1), range)?;
        if shared.changed > 0 {
            different = difference(&source, &target, length)?;
        }
    }
    if wanted.json {
        print_json(&json!({
            "same": different.is_none() && shared.changed == 0,
            "different_at": different,
            "bytes": length,
            "shared_bytes": shared.now,
            "already_shared_bytes": shared.before,
            "took_ns": u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX),
        }))?;
    }
    if different.is_some() || shared.changed > 0 {
        return Err(not_the_same(&source, &target, different, shared));
    }
    if !wanted.json {
        outln!(
            "{}: {} the same as in {}, {} shared and {} already so, in {}",
            target.path.display(),
            show_size(length),
            source.path.display(),
            show_size(shared.now),
            show_size(shared.before),
            show_nanos(u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX))
        );
    }
    Ok(())
}

fn not_the_same(source: &Side, target: &Side, different: Option<u64>, shared: Shared) -> Failure {
    let (one, other) = (source.path.display(), target.path.display());
    let message = match different {
        Some(at) => format!(
            "{other} differs from {one}: byte {} of {other} is not byte {} of {one}",
            target.offset + at,
            source.offset + at
        ),
        None => format!("{one} or {other} was written to meanwhile"),
    };
    Failure::new(message).exit(Exit::Different).remedy(match shared.now {
        0 => "nothing was shared".to_owned(),
        bytes => format!("{} were the same and are shared", show_size(bytes)),
    })
}

/// Asks the daemon to share what is not shared yet of a range.
///
/// # Errors
/// The daemon could not.
pub(super) fn share(
    socket: &Path,
    places: (&Places, &Places),
    range: SharedRange,
) -> Result<Shared, Failure> {
    let mut shared = Shared { before: range.length, ..Shared::default() };
    for part in apart((places.0, range.source_offset), (places.1, range.target_offset), range.length) {
        let mut at = part.start;
        while at < part.end {
            let step = SharedRange {
                source_offset: range.source_offset + at,
                target_offset: range.target_offset + at,
                length: STEP.min(part.end - at),
                ..range
            };
            let answer = ask(socket, Command::Dedupe(step))?;
            let same = answer["same"].as_bool() == Some(true);
            *(if same { &mut shared.now } else { &mut shared.changed }) += step.length;
            shared.before -= step.length;
            at += step.length;
        }
    }
    Ok(shared)
}

impl<'a> Side<'a> {
    fn open(path: &'a Path, offset: u64) -> Result<Self, Failure> {
        let opened = File::open(path).and_then(|file| file.metadata().map(|metadata| (file, metadata)));
        let (file, metadata) = opened.during(format!("cannot open {}", path.display()))?;
        if !metadata.is_file() {
            return Err(Failure::new(format!("{} is not a regular file", path.display()))
                .remedy("an offset or a length needs two files; without them directories are searched"));
        }
        Ok(Self { path, file, metadata, offset })
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<usize, Failure> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.file.read_at(&mut buffer[filled..], self.offset + at + filled as u64) {
                Ok(0) => break,
                Ok(bytes) => filled += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(error).during(format!("cannot read {}", self.path.display()));
                }
            }
        }
        Ok(filled)
    }

    /// The range's end, if it lies in the file.
    fn end(&self, length: u64) -> Result<u64, Failure> {
        let size = self.metadata.len();
        let end = self.offset.checked_add(length).filter(|end| *end <= size);
        end.ok_or_else(|| {
            Failure::usage(format!(
                "{} has {size} bytes, no {length} from byte {} on",
                self.path.display(),
                self.offset
            ))
        })
    }
}

/// The length of a range that both files have, and in whole blocks as far as it does not end with both of them.
fn check(source: &Side, target: &Side, length: Option<u64>) -> Result<u64, Failure> {
    if source.metadata.dev() != target.metadata.dev() {
        return Err(Failure::new(format!("{} lies on another file system", target.path.display()))
            .remedy("blocks can only be shared within one volume"));
    }
    let length = length.unwrap_or_else(|| source.metadata.len().saturating_sub(source.offset));
    let (source_end, target_end) = (source.end(length)?, target.end(length)?);
    let at_end = source_end == source.metadata.len() && target_end == target.metadata.len();
    for number in [source.offset, target.offset, if at_end { 0 } else { length }] {
        if !number.is_multiple_of(BLOCK) {
            return Err(Failure::usage(format!("{number} is no multiple of {BLOCK}")).remedy(
                "offsets and length are in whole blocks, but for a range that ends where both files end",
            ));
        }
    }
    let one_file = source.metadata.ino() == target.metadata.ino();
    if one_file && source.offset < target_end && target.offset < source_end {
        return Err(Failure::usage(format!("both ranges of {} overlap", source.path.display())));
    }
    Ok(length)
}

/// The first byte, counted from the beginning of the ranges, in which they differ.
fn difference(source: &Side, target: &Side, length: u64) -> Result<Option<u64>, Failure> {
    let (mut left, mut right) = (vec![0; READ], vec![0; READ]);
    let mut at = 0;
    while at < length {
        let step = usize::try_from(length - at).map_or(READ, |left| left.min(READ));
        let (one, other) = (source.read(at, &mut left[..step])?, target.read(at, &mut right[..step])?);
        let both = one.min(other);
        if let Some(place) = left[..both].iter().zip(&right[..both]).position(|(one, other)| one != other) {
            return Ok(Some(at + place as u64));
        }
        if both < step {
            return Ok(Some(at + both as u64)); // cut off since it was opened
        }
        at += step as u64;
    }
    Ok(None)
}
