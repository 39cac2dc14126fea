//! Operations on a file system: which there are, how one is chosen, how one is carried out.
//!
//! Owns: [`Operation`], its generator, and [`Place`], a mounted file system with some open files that takes operations.
//!
//! Invariant: an operation is data: it is the same on each file system, and says what happened in terms that may be compared.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use hw_tests::Random;
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

pub(crate) const BLOCK: u64 = 4096;

/// Open files of a place.
const SLOTS: u64 = 8;

/// Where most writes end.
const USUAL: u64 = 300_000;

/// Where a few lie: behind what 32 bits can tell.
const FAR: u64 = 5 << 30;

#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Open {
        slot: usize,
        path: String,
        flags: OFlags,
    },
    Close {
        slot: usize,
    },
    MakeDirectory {
        path: String,
        mode: u32,
    },
    RemoveDirectory {
        path: String,
    },
    Unlink {
        path: String,
    },
    Symlink {
        target: String,
        path: String,
    },
    Link {
        from: String,
        to: String,
    },
    Rename {
        from: String,
        to: String,
        flags: RenameFlags,
    },
    Write {
        slot: usize,
        offset: u64,
        length: usize,
        seed: u64,
    },
    DirectWrite {
        path: String,
        block: u64,
        blocks: usize,
        seed: u64,
    },
    MappedStore {
        slot: usize,
        offset: u64,
        length: usize,
        seed: u64,
    },
    Read {
        slot: usize,
        offset: u64,
        length: usize,
    },
    Truncate {
        path: String,
        size: u64,
    },
    TruncateOpen {
        slot: usize,
        size: u64,
    },
    Allocate {
        slot: usize,
        mode: FallocateFlags,
        offset: u64,
        length: u64,
    },
    Copy {
        from: usize,
        offset: u64,
        to: usize,
        at: u64,
        length: usize,
    },
    Clone {
        from: usize,
        to: usize,
    },
    /// Only whether there is data or a hole behind `offset`; where it begins depends on the file system.
    Seek {
        slot: usize,
        data: bool,
        offset: u64,
    },
    SetAttribute {
        path: String,
        name: String,
        length: usize,
        flags: XattrFlags,
    },
    GetAttribute {
        path: String,
        name: String,
    },
    RemoveAttribute {
        path: String,
        name: String,
    },
    Mode {
        path: String,
        mode: u32,
    },
    Times {
        path: String,
        seconds: i64,
        nanoseconds: i64,
    },
    List {
        path: String,
    },
    Stat {
        path: String,
    },
    Sync {
        slot: usize,
        data: bool,
    },
}

/// What an operation gave: a value, or an errno.
pub(crate) type Outcome = Result<Value, i32>;

#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Value {
    Nothing,
    Number(u64),
    Bytes(Vec<u8>),
    Text(String),
}

impl std::fmt::Debug for Value {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing => formatter.write_str("done"),
            Self::Number(number) => write!(formatter, "{number}"),
            Self::Bytes(bytes) => {
                write!(formatter, "{} bytes, {:02x?}…", bytes.len(), &bytes[..bytes.len().min(16)])
            }
            Self::Text(text) => formatter.write_str(text),
        }
    }
}

/// A path of few, so that operations meet each other.
fn path(random: &mut Random) -> String {
    let mut path = String::new();
    for _ in 0..[0, 0, 0, 1, 1, 2][random.below(6) as usize] {
        path.push_str(&format!("d{}/", random.below(3)));
    }
    match random.below(16) {
        0..4 => path.push_str(&format!("d{}", random.below(3))),
        4 => path.push_str(&format!("s{}", random.below(3))),
        5 if random.below(8) == 0 => path.push_str(&"n".repeat(250 + random.below(10) as usize)),
        6 if random.below(8) == 0 => path.push_str("f0/"),
        _ => path.push_str(&format!("f{}", random.below(6))),
    }
    path
}

fn offset(random: &mut Random) -> u64 {
    let near = random.below(USUAL);
    match random.below(20) {
        0..6 => near / BLOCK * BLOCK,
        6 => FAR + near,
        7 => 0,
        _ => near,
    }
}

fn length(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.below(16),
        1..4 => BLOCK * random.below(16),
        _ => random.below(60_000),
    }
}

fn one_of<T: Copy>(random: &mut Random, values: &[T]) -> T {
    values[random.below(values.len() as u64) as usize]
}

impl Operation {
    /// The next one that follows from the seed.
    pub(crate) fn choose(random: &mut Random) -> Self {
        match random.below(100) {
            0..35 => Self::choose_of_names(random),
            35..90 => Self::choose_of_contents(random),
            _ => Self::choose_of_attributes(random),
        }
    }

    /// Its name without what it is about.
    pub(crate) fn kind(&self) -> String {
        format!("{self:?}").split(' ').next().unwrap_or_default().to_owned()
    }

    fn choose_of_names(random: &mut Random) -> Self {
        let kept = RenameFlags::empty();
        let how = [kept, kept, kept, RenameFlags::NOREPLACE, RenameFlags::EXCHANGE, RenameFlags::WHITEOUT];
        match random.below(20) {
            0..4 => Self::MakeDirectory { path: path(random), mode: one_of(random, &[0o755, 0o700, 0o1777]) },
            4 => Self::RemoveDirectory { path: path(random) },
            5..8 => Self::Unlink { path: path(random) },
            8..10 => Self::Symlink { target: path(random), path: path(random).replace('f', "s") },
            10..13 => Self::Link { from: path(random), to: path(random) },
            13..18 => Self::Rename { from: path(random), to: path(random), flags: one_of(random, &how) },
            18 => Self::List { path: path(random) },
            _ => Self::Stat { path: path(random) },
        }
    }

    fn choose_of_contents(random: &mut Random) -> Self {
        let slot = random.below(SLOTS) as usize;
        let (offset, length, seed) = (offset(random), length(random), random.next_u64());
        match random.below(64) {
            0..10 => {
                let write = OFlags::RDWR | OFlags::CREATE;
                let flags = [
                    write,
                    write,
                    write,
                    write | OFlags::EXCL,
                    write | OFlags::TRUNC,
                    write | OFlags::APPEND,
                    OFlags::RDONLY,
                    OFlags::WRONLY,
                    write | OFlags::NOFOLLOW,
                    OFlags::RDONLY | OFlags::DIRECTORY,
                ];
                Self::Open { slot, path: path(random), flags: one_of(random, &flags) }
            }
            10 => Self::Close { slot },
            11..26 => Self::Write { slot, offset, length: length as usize, seed },
            26..29 => {
                let (block, blocks) = (offset / BLOCK, 1 + random.below(8) as usize);
                Self::DirectWrite { path: path(random), block, blocks, seed }
            }
            29..33 => Self::MappedStore { slot, offset: offset % USUAL, length: length as usize, seed },
            33..38 => Self::Read { slot, offset, length: length as usize },
            38 => Self::Truncate { path: path(random), size: offset },
            39..42 => Self::TruncateOpen { slot, size: offset },
            42..49 => Self::Allocate { slot, mode: allocation(random), offset, length },
            49..54 => {
                let (to, at) = (random.below(SLOTS) as usize, self::offset(random));
                Self::Copy { from: slot, offset, to, at, length: length as usize }
            }
            54 => Self::Clone { from: slot, to: random.below(SLOTS) as usize },
            55..59 => Self::Seek { slot, data: random.below(2) == 0, offset },
            _ => Self::Sync { slot, data: random.below(2) == 0 },
        }
    }

    fn choose_of_attributes(random: &mut Random) -> Self {
        let path = path(random);
        let name =
            one_of(random, &["user.one", "user.two", "user.three", "user.", "odd", "trusted.t"]).to_owned();
        let kept = XattrFlags::empty();
        match random.below(10) {
            0..4 => {
                let length = one_of(random, &[0, 1, 20, 255, 3_000]);
                let flags = one_of(random, &[kept, kept, XattrFlags::CREATE, XattrFlags::REPLACE]);
                Self::SetAttribute { path, name, length, flags }
            }
            4..6 => Self::GetAttribute { path, name },
            6 => Self::RemoveAttribute { path, name },
            7..9 => Self::Mode { path, mode: random.below(0o10000) as u32 },
            _ => Self::Times {
                path,
                seconds: random.below(1 << 31) as i64,
                nanoseconds: random.below(1_000_000_000) as i64,
            },
        }
    }
}

fn allocation(random: &mut Random) -> FallocateFlags {
    let (keep, zero) = (FallocateFlags::KEEP_SIZE, FallocateFlags::ZERO_RANGE);
    let hole = FallocateFlags::PUNCH_HOLE | keep;
    let modes = [
        FallocateFlags::empty(),
        keep,
        hole,
        hole,
        hole,
        zero,
        zero | keep,
        FallocateFlags::COLLAPSE_RANGE,
        FallocateFlags::INSERT_RANGE,
        FallocateFlags::UNSHARE_RANGE,
        FallocateFlags::PUNCH_HOLE,
    ];
    one_of(random, &modes)
}

/// A mounted file system, and the open files that operations use.
pub(crate) struct Place {
    pub(crate) root: PathBuf,
    open: Vec<Option<File>>,
}

impl Place {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root, open: (0..SLOTS).map(|_| None).collect() }
    }

    /// So that it can be unmounted.
    pub(crate) fn close_all(&mut self) {
        self.open.iter_mut().for_each(|file| *file = None);
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn file(&self, slot: usize) -> Result<&File, Errno> {
        self.open[slot].as_ref().ok_or(Errno::BADF)
    }

    pub(crate) fn apply(&mut self, operation: &Operation) -> Outcome {
        if let Operation::Open { slot, path, flags } = operation {
            let opened =
                rustix::fs::open(self.at(path), *flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o640));
            return match opened {
                Ok(file) => {
                    self.open[*slot] = Some(file.into());
                    Ok(Value::Nothing)
                }
                Err(error) => Err(error.raw_os_error()),
            };
        }
        if let Operation::Close { slot } = operation {
            self.open[*slot] = None;
            return Ok(Value::Nothing);
        }
        let of_names = self.apply_to_names(operation);
        let done = of_names
            .or_else(|| self.apply_to_contents(operation))
            .or_else(|| self.apply_to_attributes(operation));
        done.unwrap_or(Err(Errno::NOSYS)).map_err(Errno::raw_os_error)
    }

    fn apply_to_names(&self, operation: &Operation) -> Option<Result<Value, Errno>> {
        use rustix::fs::{linkat, mkdir, renameat_with, rmdir, symlink, unlink};
        let done = match operation {
            Operation::MakeDirectory { path, mode } => mkdir(self.at(path), Mode::from_raw_mode(*mode)),
            Operation::RemoveDirectory { path } => rmdir(self.at(path)),
            Operation::Unlink { path } => unlink(self.at(path)),
            Operation::Symlink { target, path } => symlink(target.as_str(), self.at(path)),
            Operation::Link { from, to } => linkat(CWD, self.at(from), CWD, self.at(to), AtFlags::empty()),
            Operation::Rename { from, to, flags } => {
                renameat_with(CWD, self.at(from), CWD, self.at(to), *flags)
            }
            Operation::List { path } => return Some(list(&self.at(path))),
            Operation::Stat { path } => return Some(stat(&self.at(path))),
            _ => return None,
        };
        Some(done.map(|()| Value::Nothing))
    }

    fn apply_to_contents(&self, operation: &Operation) -> Option<Result<Value, Errno>> {
        Some(match operation {
            Operation::Write { slot, offset, length, seed } => self.file(*slot).and_then(|file| {
                let bytes = Random(*seed).bytes(*length);
                Ok(Value::Number(rustix::io::pwrite(file, &bytes, *offset)? as u64))
            }),
            Operation::DirectWrite { path, block, blocks, seed } => {
                direct_write(&self.at(path), *block, &Random(*seed).bytes(blocks * BLOCK as usize))
            }
            Operation::MappedStore { slot, offset, length, seed } => {
                self.file(*slot).and_then(|file| mapped_store(file, *offset, &Random(*seed).bytes(*length)))
            }
            Operation::Read { slot, offset, length } => self.file(*slot).and_then(|file| {
                let mut bytes = vec![0; *length];
                let count = rustix::io::pread(file, &mut bytes, *offset)?;
                bytes.truncate(count);
                Ok(Value::Bytes(bytes))
            }),
            Operation::Truncate { path, size } => {
                let done = nix::unistd::truncate(&self.at(path), i64::try_from(*size).unwrap_or(i64::MAX));
                done.map(|()| Value::Nothing).map_err(|error| Errno::from_raw_os_error(error as i32))
            }
            Operation::TruncateOpen { slot, size } => {
                self.file(*slot).and_then(|file| rustix::fs::ftruncate(file, *size)).map(|()| Value::Nothing)
            }
            Operation::Allocate { slot, mode, offset, length } => self
                .file(*slot)
                .and_then(|file| rustix::fs::fallocate(file, *mode, *offset, *length))
                .map(|()| Value::Nothing),
            Operation::Copy { from, offset, to, at, length } => self.copy(*from, *offset, *to, *at, *length),
            Operation::Clone { from, to } => self
                .file(*from)
                .and_then(|source| rustix::fs::ioctl_ficlone(self.file(*to)?, source))
                .map(|()| Value::Nothing),
            Operation::Seek { slot, data, offset } => {
                let wanted = if *data { SeekFrom::Data(*offset) } else { SeekFrom::Hole(*offset) };
                self.file(*slot).and_then(|file| seek(file, wanted, *offset))
            }
            Operation::Sync { slot, data: true } => {
                self.file(*slot).and_then(rustix::fs::fdatasync).map(|()| Value::Nothing)
            }
            Operation::Sync { slot, data: false } => {
                self.file(*slot).and_then(rustix::fs::fsync).map(|()| Value::Nothing)
            }
            _ => return None,
        })
    }

    fn apply_to_attributes(&self, operation: &Operation) -> Option<Result<Value, Errno>> {
        use rustix::fs::{Timespec, Timestamps, chmod, lgetxattr, lremovexattr, lsetxattr, utimensat};
        Some(match operation {
            Operation::SetAttribute { path, name, length, flags } => {
                let value = Random(*length as u64).bytes(*length);
                lsetxattr(self.at(path), name.as_str(), &value, *flags).map(|()| Value::Nothing)
            }
            Operation::GetAttribute { path, name } => {
                let mut value = vec![0; 65_536];
                lgetxattr(self.at(path), name.as_str(), &mut value[..]).map(|length| {
                    value.truncate(length);
                    Value::Bytes(value)
                })
            }
            Operation::RemoveAttribute { path, name } => {
                lremovexattr(self.at(path), name.as_str()).map(|()| Value::Nothing)
            }
            Operation::Mode { path, mode } => {
                chmod(self.at(path), Mode::from_raw_mode(*mode)).map(|()| Value::Nothing)
            }
            Operation::Times { path, seconds, nanoseconds } => {
                let time = |offset| Timespec { tv_sec: *seconds + offset, tv_nsec: *nanoseconds };
                let times = Timestamps { last_access: time(0), last_modification: time(7) };
                let path = self.at(path);
                utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW).and_then(|()| {
                    let found = rustix::fs::lstat(&path)?;
                    Ok(Value::Text(format!("modified {}.{:09}", found.st_mtime, found.st_mtime_nsec)))
                })
            }
            _ => return None,
        })
    }

    fn copy(&self, from: usize, offset: u64, to: usize, at: u64, length: usize) -> Result<Value, Errno> {
        let (source, target) = (self.file(from)?, self.file(to)?);
        let (mut offset, mut at, mut done) = (offset, at, 0);
        // How much one call copies is the file system's affair.
        loop {
            match rustix::fs::copy_file_range(
                source,
                Some(&mut offset),
                target,
                Some(&mut at),
                length - done,
            )? {
                0 => return Ok(Value::Number(done as u64)),
                copied => done += copied,
            }
            if done == length {
                return Ok(Value::Number(done as u64));
            }
        }
    }
}

fn seek(file: &File, wanted: SeekFrom, offset: u64) -> Result<Value, Errno> {
    let about = rustix::fs::fstat(file)?;
    // What a directory's bytes are is the file system's affair.
    if about.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(Value::Nothing);
    }
    let size = about.st_size.unsigned_abs();
    let found = match rustix::fs::seek(file, wanted) {
        // Whether blocks that were allocated and never written are data differs; trees are compared for what must be a hole.
        Err(Errno::NXIO) if offset < size && matches!(wanted, SeekFrom::Data(_)) => offset,
        found => found?,
    };
    Ok(Value::Text(if (offset..=size).contains(&found) {
        "in the file".into()
    } else {
        format!("at {found}")
    }))
}

fn direct_write(path: &Path, block: u64, bytes: &[u8]) -> Result<Value, Errno> {
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let mut memory = vec![0; bytes.len() + BLOCK as usize];
    let start = memory.as_ptr().align_offset(BLOCK as usize);
    let aligned = &mut memory[start..start + bytes.len()];
    aligned.copy_from_slice(bytes);
    Ok(Value::Number(rustix::io::pwrite(&file, aligned, block * BLOCK)? as u64))
}

/// Stores inside of the file: behind its end a store is a signal.
fn mapped_store(file: &File, offset: u64, bytes: &[u8]) -> Result<Value, Errno> {
    let found = rustix::fs::fstat(file)?;
    let size = found.st_size.unsigned_abs();
    if found.st_mode & libc::S_IFMT != libc::S_IFREG || offset + bytes.len() as u64 > size || bytes.is_empty()
    {
        return Ok(Value::Nothing);
    }
    let length = usize::try_from(offset).unwrap_or(usize::MAX) + bytes.len();
    let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let copy = file.try_clone().map_err(errno)?;
    let mapping =
        MmapRegion::<()>::from_file(FileOffset::new(copy, 0), length).map_err(|error| match error {
            vm_memory::mmap::MmapRegionError::Mmap(error) => errno(error),
            _ => Errno::IO,
        })?;
    mapping.as_volatile_slice().write_slice(bytes, offset as usize).map_err(|_| Errno::FAULT)?;
    Ok(Value::Number(bytes.len() as u64))
}

fn list(path: &Path) -> Result<Value, Errno> {
    let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(path).map_err(errno)? {
        let entry = entry.map_err(errno)?;
        found.insert(format!("{:?} {:?}", entry.file_name(), entry.file_type().map_err(errno)?.is_dir()));
    }
    Ok(Value::Text(found.into_iter().collect::<Vec<_>>().join(", ")))
}

fn stat(path: &Path) -> Result<Value, Errno> {
    let found = std::fs::symlink_metadata(path);
    let found = found.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(Value::Text(attributes(&found)))
}

/// What file systems agree about: of a directory neither size nor link count.
pub(crate) fn attributes(found: &std::fs::Metadata) -> String {
    let kind = found.file_type();
    let odd = kind.is_char_device() || kind.is_fifo() || kind.is_socket() || kind.is_block_device();
    let (links, size) = if found.is_dir() { (0, 0) } else { (found.nlink(), found.len()) };
    let device = if odd { found.rdev() } else { 0 };
    format!(
        "mode {:o}, {links} links, {size} bytes, owner {}:{}, device {device}",
        found.mode(),
        found.uid(),
        found.gid()
    )
}

/// Which blocks of a file are data, by its holes.
pub(crate) fn data_blocks(file: &File) -> Result<BTreeSet<u64>, Errno> {
    let (mut found, mut place) = (BTreeSet::new(), 0);
    loop {
        match rustix::fs::seek(file, SeekFrom::Data(place)) {
            Err(Errno::NXIO) => return Ok(found),
            Err(error) => return Err(error),
            Ok(start) => {
                place = rustix::fs::seek(file, SeekFrom::Hole(start))?;
                found.extend(start / BLOCK..place.div_ceil(BLOCK));
            }
        }
    }
}

/// The blocks of a file that are not all zeroes, of those in `blocks`.
pub(crate) fn blocks_with_contents(
    file: &File,
    blocks: &BTreeSet<u64>,
) -> std::io::Result<Vec<(u64, Vec<u8>)>> {
    let mut found = Vec::new();
    for block in blocks {
        let mut bytes = vec![0; BLOCK as usize];
        let length = file.read_at(&mut bytes, block * BLOCK)?;
        bytes.truncate(length);
        if bytes.iter().any(|byte| *byte != 0) {
            found.push((*block, bytes));
        }
    }
    Ok(found)
}
