//! `pollux dedupe`: finds what files have in common and lets them share its blocks.
//!
//! Owns: the search, by hashes of blocks. The daemon compares every byte again, under the files' locks, before anything is
//! shared, so neither a collision nor a write in between can do harm. It is not asked for what is shared already.
//!
//! Excludes: two files of which a given range is to be shared (`dedupe/pair.rs`).
//!
//! Zeroes are left alone: they are mostly holes. Memory: some 40 bytes for each block of 4 KiB that is looked at.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::print_json;
use super::scrub::{BLOCK, Shown};
use crate::control::location;
use crate::control::protocol::{Progress, SharedRange};
use crate::device::parse_size;
use crate::failure::{During, Failure};
use crate::output::outln;
use crate::quantity::show_size;

mod pair;
mod places;

use pair::Wanted;
use places::Places;

/// Bytes read at once.
const READ: usize = 1 << 20;

/// Bytes that the daemon is asked to compare and share at once.
const STEP: u64 = 16 << 20;

/// Let files of a mounted volume share what they have in common
#[derive(Args)]
#[command(after_help = "\
Stretches of equal blocks are found anywhere in the files, also within one file, and compared byte by byte before they are
shared; what is shared already is left as it is. What the files hold does not change, nor do their times. Directories are
searched for files. It takes whoever may use the daemon's control socket, and 40 bytes of memory for each 4 KiB looked at.

With an offset or a length, two files (SRC DST) share exactly that range; if it differs, nothing is shared, and the message
says where. Offsets and length are multiples of 4 KiB, but for a range that ends where both files end.

Exit codes: 0 what is the same is shared, 1 it could not run, 2 the range makes no sense, 5 the ranges differ

Examples:
  pollux dedupe ./pollux-mnt/images
  pollux dedupe ./pollux-mnt/one.img ./pollux-mnt/other.img --src-offset 1MiB --dst-offset 0 --length 64MiB")]
pub(super) struct Dedupe {
    /// Files and directories, all on one mount
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,

    /// Shorter stretches are left alone, unless they are a whole file
    #[arg(long, value_name = "SIZE", default_value = "128KiB", value_parser = parse_size,
          conflicts_with_all = ["src_offset", "dst_offset", "length"])]
    min_length: u64,

    /// First byte in the first file of two
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    src_offset: Option<u64>,

    /// First byte in the second file
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    dst_offset: Option<u64>,

    /// Bytes; up to the end of the first file by default
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    length: Option<u64>,

    /// Only tell what would be shared
    #[arg(long)]
    dry_run: bool,

    /// The daemon's control socket, or any path on its mount
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A file that was looked at.
struct Seen {
    path: PathBuf,
    inode: u64,
    size: u64,
    /// Of each block; `None` for zeroes.
    hashes: Vec<Option<u64>>,
    /// Where it lies, once that matters.
    places: OnceCell<Places>,
}

impl Seen {
    fn places(&self) -> &Places {
        // Without them (it was deleted) everything counts as not shared, and the daemon tells.
        self.places.get_or_init(|| Places::of(&self.path).unwrap_or_default())
    }
}

/// Equal blocks of two files.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    source: usize,
    source_block: u64,
    target_block: u64,
    blocks: u64,
}

/// What was done.
#[derive(Default)]
struct Totals {
    read: u64,
    same: u64,
    shared: u64,
    /// Bytes that were shared before.
    already: u64,
    /// Bytes of stretches that the daemon found different: written to or deleted since they were read.
    changed: u64,
    /// Files that could not be read.
    left_out: u64,
}

impl Dedupe {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let socket = location::of_path(self.socket.as_ref().unwrap_or(&self.paths[0]))?;
        if self.src_offset.or(self.dst_offset).or(self.length).is_some() {
            let wanted = Wanted {
                source_offset: self.src_offset.unwrap_or(0),
                target_offset: self.dst_offset.unwrap_or(0),
                length: self.length,
                dry_run: self.dry_run,
                json: self.json,
            };
            return pair::run(&socket, &self.paths, &wanted);
        }
        self.search(&socket)
    }

    fn search(&self, socket: &Path) -> Result<(), Failure> {
        let started = Instant::now();
        let files = self.files()?;
        let total = files.iter().map(|(_, size)| size.div_ceil(BLOCK)).sum();
        let mut shown = Shown::new("read");
        let (mut seen, mut first) = (Vec::<Seen>::new(), HashMap::new());
        let mut totals = Totals::default();
        for (path, _) in &files {
            let looked = look_at(path, |read| {
                totals.read += read;
                shown.update(Progress { done: totals.read.div_ceil(BLOCK), total });
            });
            let mut file = match looked {
                Ok(file) => file,
                Err(error) => {
                    // Deleted meanwhile, or somebody else's: no reason to leave the others alone.
                    eprintln!("{}: left out: {error}", path.display());
                    totals.left_out += 1;
                    continue;
                }
            };
            for stretch in stretches(&seen, &file, seen.len(), &mut first) {
                self.share(socket, &seen, &file, stretch, &mut totals)?;
            }
            file.places.take(); // it lies elsewhere by now
            seen.push(file);
        }
        shown.bar.finish_and_clear();
        let took = started.elapsed();
        if self.json {
            return print_json(&json!({
                "files": files.len(),
                "read_bytes": totals.read,
                "same_bytes": totals.same,
                "shared_bytes": totals.shared,
                "already_shared_bytes": totals.already,
                "changed_bytes": totals.changed,
                "left_out": totals.left_out,
                "took_ns": u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
            }));
        }
        if totals.changed > 0 {
            outln!("{} have changed meanwhile and were left alone", show_size(totals.changed));
        }
        outln!(
            "{} files, {} read, {} the same, {} shared and {} already so, in {:.1} s",
            files.len(),
            show_size(totals.read),
            show_size(totals.same),
            show_size(totals.shared),
            show_size(totals.already),
            took.as_secs_f64()
        );
        Ok(())
    }

    /// Every file once, with its size.
    fn files(&self) -> Result<Vec<(PathBuf, u64)>, Failure> {
        let device = |path: &Path| {
            fs::metadata(path).map(|found| found.dev()).during(format!("cannot look at {}", path.display()))
        };
        let mount = device(&self.paths[0])?;
        let (mut files, mut inodes) = (Vec::new(), std::collections::HashSet::new());
        let mut left: Vec<PathBuf> = self.paths.iter().rev().cloned().collect();
        for path in &self.paths {
            if device(path)? != mount {
                return Err(Failure::new(format!("{} lies on another file system", path.display()))
                    .remedy("blocks can only be shared within one volume"));
            }
        }
        while let Some(path) = left.pop() {
            let Ok(found) = fs::symlink_metadata(&path) else { continue }; // deleted meanwhile
            if found.is_dir() && found.dev() == mount {
                let entries = fs::read_dir(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
                let mut entries: Vec<PathBuf> = entries
                    .during(format!("cannot list {}", path.display()))?
                    .into_iter()
                    .map(|entry| entry.path())
                    .collect();
                entries.sort_unstable_by(|one, other| other.cmp(one));
                left.append(&mut entries);
            } else if found.is_file() && found.len() > 0 && inodes.insert(found.ino()) {
                files.push((path, found.len()));
            }
        }
        Ok(files)
    }

    fn share(
        &self,
        socket: &Path,
        seen: &[Seen],
        target: &Seen,
        stretch: Stretch,
        totals: &mut Totals,
    ) -> Result<(), Failure> {
        let source = seen.get(stretch.source).unwrap_or(target);
        let target_start = stretch.target_block * BLOCK;
        let length = (stretch.blocks * BLOCK).min(target.size - target_start);
        if length < self.min_length && length < target.size {
            return Ok(());
        }
        totals.same += length;
        let range = SharedRange {
            source: source.inode,
            source_offset: stretch.source_block * BLOCK,
            target: target.inode,
            target_offset: target_start,
            length,
        };
        let places = (source.places(), target.places());
        if self.dry_run {
            let apart =
                places::apart((places.0, range.source_offset), (places.1, range.target_offset), length);
            totals.already += length - apart.iter().map(|part| part.end - part.start).sum::<u64>();
            return Ok(());
        }
        let shared = pair::share(socket, places, range)?;
        totals.shared += shared.now;
        totals.already += shared.before;
        totals.changed += shared.changed;
        Ok(())
    }
}

/// Reads a file and hashes its blocks; `progress` is told of the bytes as they come.
fn look_at(path: &Path, mut progress: impl FnMut(u64)) -> io::Result<Seen> {
    let mut file = File::open(path)?;
    let inode = file.metadata()?.ino();
    let seen = |size, hashes| Seen { path: path.to_owned(), inode, size, hashes, places: OnceCell::new() };
    let (mut size, mut hashes) = (0, Vec::new());
    let mut buffer = vec![0; READ];
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match file.read(&mut buffer[filled..])? {
                0 => break,
                bytes => filled += bytes,
            }
        }
        if filled == 0 {
            return Ok(seen(size, hashes));
        }
        hashes.extend(buffer[..filled].chunks(BLOCK as usize).map(hash));
        size += filled as u64;
        progress(filled as u64);
        if filled < buffer.len() {
            return Ok(seen(size, hashes));
        }
    }
}

/// The hash of a block, which is shorter at the end of its file; `None` for zeroes.
fn hash(block: &[u8]) -> Option<u64> {
    if block.iter().all(|byte| *byte == 0) {
        return None;
    }
    let mut hasher = DefaultHasher::new();
    hasher.write(block);
    hasher.write_usize(block.len());
    Some(hasher.finish())
}

/// What `file`, the one after `seen`, has in common with those and with what it has before. `first` says where each block was
/// seen first, and learns.
fn stretches(
    seen: &[Seen],
    file: &Seen,
    number: usize,
    first: &mut HashMap<u64, (usize, u64)>,
) -> Vec<Stretch> {
    let hashes_of = |source: usize| seen.get(source).map_or(&file.hashes, |seen| &seen.hashes);
    let mut found: Vec<Stretch> = Vec::new();
    let mut open: Option<Stretch> = None;
    for (block, hash) in (0..).zip(&file.hashes) {
        if let (Some(stretch), Some(_)) = (&mut open, hash) {
            let next = stretch.source_block + stretch.blocks;
            // Within one file, a stretch ends before it would overlap what it is the same as.
            let apart = stretch.source != number || next < stretch.target_block;
            if apart && hashes_of(stretch.source).get(next as usize) == Some(hash) {
                stretch.blocks += 1;
                continue;
            }
        }
        found.extend(open.take());
        let Some(hash) = hash else { continue };
        match first.get(hash) {
            Some(&(source, source_block)) => {
                open = Some(Stretch { source, source_block, target_block: block, blocks: 1 });
            }
            None => drop(first.insert(*hash, (number, block))),
        }
    }
    found.extend(open);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(inode: u64, blocks: &[u64]) -> Seen {
        let hashes = blocks.iter().map(|block| (*block != 0).then_some(*block)).collect();
        Seen {
            path: PathBuf::new(),
            inode,
            size: blocks.len() as u64 * BLOCK,
            hashes,
            places: OnceCell::new(),
        }
    }

    fn found(files: &[Seen]) -> Vec<Vec<(usize, u64, u64, u64)>> {
        let mut first = HashMap::new();
        (0..files.len())
            .map(|number| {
                let found = stretches(&files[..number], &files[number], number, &mut first);
                found.iter().map(|one| (one.source, one.source_block, one.target_block, one.blocks)).collect()
            })
            .collect()
    }

    #[test]
    fn equal_stretches_are_found_wherever_they_lie() {
        let files = [file(1, &[1, 2, 3, 4, 5]), file(2, &[9, 3, 4, 5, 8, 1, 2])];
        assert_eq!(found(&files), [vec![], vec![(0, 2, 1, 3), (0, 0, 5, 2)]]);
    }

    #[test]
    fn zeroes_are_no_part_of_a_stretch() {
        let files = [file(1, &[1, 0, 2]), file(2, &[1, 0, 2])];
        assert_eq!(found(&files), [vec![], vec![(0, 0, 0, 1), (0, 2, 2, 1)]]);
    }

    #[test]
    fn stretches_within_a_file_do_not_overlap_what_they_are_the_same_as() {
        let files = [file(1, &[7, 7, 7, 7, 7])];
        for (_, source, target, blocks) in found(&files).remove(0) {
            assert!(source + blocks <= target, "{source} + {blocks} reaches into {target}");
        }
    }

    #[test]
    fn a_shorter_block_is_another_one() {
        assert_ne!(hash(&[1; 100]), hash(&[1; 101]));
        assert_eq!(hash(&[0; 4096]), None);
    }
}
