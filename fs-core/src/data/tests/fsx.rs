//! The mix of operations that the program fsx makes, on the library: one small file, every operation beside every other
//! one, compared with a byte array as it goes.
//!
//! Owns: the generator and its model.
//! `POLLUX_FSX_OPERATIONS` sets the operations of a seed.

use super::*;
use crate::request::CloneRange;

/// Largest size of the file: small, so that operations meet each other.
const FILE_LIMIT: u64 = 256 << 10;

/// Longest operation.
const LENGTH_LIMIT: u64 = 64 << 10;

/// Operations between two mounts; a mount begins without cached pages.
const OPERATIONS_OF_A_MOUNT: u64 = 2000;

/// Operations of a seed in an ordinary run.
const OPERATIONS: u64 = 20_000;

/// The file and what it should hold.
struct Exerciser {
    client: Client,
    random: Rc<Random>,
    inode: InodeNr,
    model: Vec<u8>,
}

impl Exerciser {
    async fn step(&mut self) {
        let (offset, length) = self.range();
        match self.random.below(21) {
            0..=2 => self.write(offset, length).await,
            3..=4 => self.write_direct(offset, length).await,
            5 => self.write_mapped(offset, length).await,
            6..=7 => self.read(offset, length).await,
            8 => self.read_direct(offset, length).await,
            9 => self.truncate(offset).await,
            10 => self.zero(offset, length, AllocateMode::PunchHole).await,
            11 => self.zero(offset, length, AllocateMode::ZeroRangeKeepSize).await,
            12 => self.zero(offset, length, AllocateMode::ZeroRange).await,
            13 => self.allocate(offset, length).await,
            14 => self.copy(offset, length).await,
            15 => self.clone_blocks(offset, length).await,
            16 => self.deduplicate(offset, length).await,
            17 => self.collapse(offset, length).await,
            18 => self.insert(offset, length).await,
            19 => self.unshare(offset, length).await,
            _ => self.client.sync(self.inode).await.unwrap(),
        }
    }

    fn size(&self) -> u64 {
        self.model.len() as u64
    }

    /// Where an operation happens: any bytes, or whole blocks; at least one byte, within the limit.
    fn range(&self) -> (u64, u64) {
        let (offset, length) = (self.random.below(FILE_LIMIT), 1 + self.random.below(LENGTH_LIMIT));
        if self.random.below(2) == 0 {
            let offset = offset - offset % BLOCK_SIZE;
            return (offset, length.next_multiple_of(BLOCK_SIZE).min(FILE_LIMIT - offset));
        }
        (offset, length.min(FILE_LIMIT - offset))
    }

    fn extend(&mut self, end: u64) {
        self.model.resize(self.model.len().max(end as usize), 0);
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        self.extend(offset + data.len() as u64);
        self.model[offset as usize..][..data.len()].copy_from_slice(data);
    }

    async fn write(&mut self, offset: u64, length: u64) {
        let data = pattern(self.random.next(), length as usize);
        assert_eq!(self.client.write(self.inode, offset, &data).await, Ok(length as u32));
        self.put(offset, &data);
    }

    async fn write_direct(&mut self, offset: u64, length: u64) {
        let data = pattern(self.random.next(), length as usize);
        assert_eq!(self.client.write_direct(self.inode, offset, &data).await, Ok(length as u32));
        self.put(offset, &data);
    }

    /// A mapping is written to within the file only.
    async fn write_mapped(&mut self, offset: u64, length: u64) {
        let length = length.min(self.size().saturating_sub(offset));
        if length == 0 {
            return;
        }
        let data = pattern(self.random.next(), length as usize);
        let written = self.client.write_slow(self.inode, offset, &data, WriteSource::Mapping).await;
        assert_eq!(written, Ok(length as u32));
        self.put(offset, &data);
    }

    fn compare(&self, read: &[u8], offset: u64, length: u64) {
        let (from, to) = (self.size().min(offset), self.size().min(offset + length));
        let wanted = &self.model[from as usize..to as usize];
        assert_eq!(read.len(), wanted.len(), "bytes read at {offset} + {length} of {}", self.size());
        if let Some(at) = read.iter().zip(wanted).position(|(is, should)| is != should) {
            panic!("byte {} differs: a read of {offset} + {length} of {}", offset + at as u64, self.size());
        }
    }

    async fn read(&self, offset: u64, length: u64) {
        let read = self.client.read(self.inode, offset, length as u32).await.unwrap();
        self.compare(&read, offset, length);
    }

    async fn read_direct(&self, offset: u64, length: u64) {
        let read = self.client.read_direct(self.inode, offset, length as u32).await.unwrap();
        self.compare(&read, offset, length);
    }

    async fn truncate(&mut self, size: u64) {
        self.client.truncate(self.inode, size).await.unwrap();
        self.model.resize(size as usize, 0);
    }

    async fn zero(&mut self, offset: u64, length: u64, mode: AllocateMode) {
        self.client.allocate(self.inode, offset, length, mode).await.unwrap();
        if mode == AllocateMode::ZeroRange {
            self.extend(offset + length);
        }
        let to = self.model.len().min((offset + length) as usize);
        let from = to.min(offset as usize);
        self.model[from..to].fill(0);
    }

    async fn collapse(&mut self, offset: u64, length: u64) {
        let done = self.client.allocate(self.inode, offset, length, AllocateMode::Collapse).await;
        if !(offset | length).is_multiple_of(BLOCK_SIZE) || offset + length >= self.size() {
            assert_eq!(done, Err(FsError::Invalid), "a collapse of {offset} + {length} of {}", self.size());
            return;
        }
        assert_eq!(done, Ok(()));
        self.model.drain(offset as usize..(offset + length) as usize);
    }

    async fn insert(&mut self, offset: u64, length: u64) {
        let whole = (offset | length).is_multiple_of(BLOCK_SIZE);
        if whole && offset < self.size() && self.size() + length > FILE_LIMIT {
            return;
        }
        let done = self.client.allocate(self.inode, offset, length, AllocateMode::Insert).await;
        if !whole || offset >= self.size() {
            assert_eq!(done, Err(FsError::Invalid), "an insertion at {offset} + {length} of {}", self.size());
            return;
        }
        assert_eq!(done, Ok(()));
        self.model.splice(offset as usize..offset as usize, std::iter::repeat_n(0, length as usize));
    }

    async fn unshare(&mut self, offset: u64, length: u64) {
        self.client.allocate(self.inode, offset, length, AllocateMode::Unshare).await.unwrap();
        self.extend(offset + length);
    }

    async fn allocate(&mut self, offset: u64, length: u64) {
        if self.random.below(2) == 0 {
            self.client.allocate(self.inode, offset, length, AllocateMode::KeepSize).await.unwrap();
        } else {
            self.client.allocate(self.inode, offset, length, AllocateMode::Extend).await.unwrap();
            self.extend(offset + length);
        }
    }

    /// A range whose source is within the file, its target within the limit, and which does not meet itself.
    fn two_ranges(&self, from: u64, length: u64, unit: u64) -> Option<CloneRange> {
        let to = self.random.below(FILE_LIMIT);
        let (from, to) = (from - from % unit, to - to % unit);
        let length = length.min(self.size().saturating_sub(from)).min(FILE_LIMIT - to).min(from.abs_diff(to));
        let length = length - length % unit;
        let (source_offset, target_offset) = (FileOffset::new(from), FileOffset::new(to));
        let range =
            CloneRange { source: self.inode, source_offset, target: self.inode, target_offset, length };
        (length > 0).then_some(range)
    }

    fn take_over(&mut self, range: &CloneRange) {
        let from = range.source_offset.get() as usize;
        let bytes = self.model[from..][..range.length as usize].to_vec();
        self.put(range.target_offset.get(), &bytes);
    }

    async fn copy(&mut self, from: u64, length: u64) {
        let Some(mut range) = self.two_ranges(from, length, 1) else { return };
        self.take_over(&range);
        while range.length > 0 {
            let copied = match self.client.volume.call(Request::CopyRange(range)).await.unwrap() {
                Reply::Cloned(copied) => copied.bytes,
                other => panic!("{other:?}"),
            };
            assert!(copied > 0 && copied <= range.length, "{copied} bytes copied of {range:?}");
            range.length -= copied;
            range.source_offset = FileOffset::new(range.source_offset.get() + copied);
            range.target_offset = FileOffset::new(range.target_offset.get() + copied);
        }
    }

    async fn clone_blocks(&mut self, from: u64, length: u64) {
        let Some(range) = self.two_ranges(from, length, BLOCK_SIZE) else { return };
        match self.client.volume.call(Request::Clone(range)).await.unwrap() {
            Reply::Cloned(cloned) => assert_eq!(cloned.bytes, range.length),
            other => panic!("{other:?}"),
        }
        self.take_over(&range);
    }

    /// Of ranges that are equal, as often as not: random ones hardly ever are.
    async fn deduplicate(&mut self, from: u64, length: u64) {
        let Some(range) = self.two_ranges(from, length, BLOCK_SIZE) else { return };
        let (source, target) = (range.source_offset.get() as usize, range.target_offset.get() as usize);
        let length = range.length as usize;
        if target + length > self.model.len() {
            return;
        }
        if self.random.below(2) == 0 {
            let bytes = self.model[source..][..length].to_vec();
            assert_eq!(self.client.write(self.inode, target as u64, &bytes).await, Ok(length as u32));
            self.put(target as u64, &bytes);
        }
        let equal = self.model[source..][..length] == self.model[target..][..length];
        match self.client.volume.call(Request::Deduplicate(range)).await.unwrap() {
            Reply::Deduplicated(outcome) => assert_eq!(outcome.is_some(), equal, "{range:?}"),
            other => panic!("{other:?}"),
        }
    }

    async fn check_all(&self) {
        assert_eq!(self.client.attributes(self.inode).await.size, self.size());
        self.read(0, FILE_LIMIT * 2).await;
    }
}

/// Runs `operations` with mounts, and a check of the whole volume, in between.
fn exercise(seed: u64, operations: u64) {
    let world = World::small(seed);
    let random = Rc::new(Random::new(seed, 1));
    let mut inode = world.mounted(|_, client| async move { client.create("a").await });
    let mut model = Vec::new();
    let mut left = operations;
    while left > 0 {
        let now = left.min(OPERATIONS_OF_A_MOUNT);
        let random = Rc::clone(&random);
        (inode, model) = world.mounted(|_, client| async move {
            let mut file = Exerciser { client, random, inode, model };
            file.check_all().await;
            for _ in 0..now {
                file.step().await;
            }
            file.check_all().await;
            (file.inode, file.model)
        });
        left -= now;
    }
}

#[test]
fn one_file_equals_its_model_under_the_operations_of_fsx() {
    let asked = std::env::var("POLLUX_FSX_OPERATIONS").ok();
    let operations = asked.map_or(OPERATIONS, |text| text.parse().expect("a number of operations"));
    for seed in 1..=3 {
        eprintln!("seed {seed}");
        exercise(seed, operations);
    }
}
