//! Random operations on several files at once, with little memory, compared with byte arrays after every read and
//! after a remount.

use super::*;

/// Where files end, in bytes: a few extents of full length.
const FILE_LIMIT: u64 = 3 << 20;

/// One file, its model, and how often what happened to it.
struct Writer {
    client: Client,
    random: Random,
    inode: InodeNr,
    model: Vec<u8>,
}

impl Writer {
    async fn step(&mut self) {
        let offset = self.random.below(FILE_LIMIT);
        let offset = if self.random.below(3) == 0 { offset - offset % BLOCK_SIZE } else { offset };
        let length = match self.random.below(4) {
            0 => 1 + self.random.below(100),
            1 => 1 + self.random.below(9000),
            2 => BLOCK_SIZE,
            _ => 1 + self.random.below(600_000),
        };
        match self.random.below(23) {
            0..=8 => self.write(offset, length).await,
            9..=13 => self.check(offset, length).await,
            14 => self.truncate(offset).await,
            15 => self.allocate(offset, length, AllocateMode::PunchHole).await,
            16 => self.allocate(offset, length, AllocateMode::ZeroRangeKeepSize).await,
            17 => self.allocate(offset, length, AllocateMode::KeepSize).await,
            18 => self.allocate(offset, length, AllocateMode::Extend).await,
            19 => self.allocate(offset, length, AllocateMode::Unshare).await,
            20 => self.shift(offset, length, AllocateMode::Collapse).await,
            21 => self.shift(offset, length, AllocateMode::Insert).await,
            _ => self.client.sync(self.inode).await.unwrap(),
        }
    }

    async fn write(&mut self, offset: u64, length: u64) {
        let length = if self.random.below(2) == 0 { length.next_multiple_of(BLOCK_SIZE) } else { length };
        let data = pattern(self.random.next(), length as usize);
        let written = match self.random.below(3) {
            0 => self.client.write_direct(self.inode, offset, &data).await,
            _ => self.client.write(self.inode, offset, &data).await,
        };
        assert_eq!(written, Ok(length as u32));
        let end = (offset + length) as usize;
        self.model.resize(self.model.len().max(end), 0);
        self.model[offset as usize..end].copy_from_slice(&data);
    }

    async fn check(&mut self, offset: u64, length: u64) {
        let read = match self.random.below(3) {
            0 => self.client.read_direct(self.inode, offset, length as u32).await.unwrap(),
            _ => self.client.read(self.inode, offset, length as u32).await.unwrap(),
        };
        let from = self.model.len().min(offset as usize);
        let to = self.model.len().min((offset + length) as usize);
        assert!(read == self.model[from..to], "inode {} at {offset} + {length} differs", self.inode);
    }

    async fn truncate(&mut self, size: u64) {
        self.client.truncate(self.inode, size).await.unwrap();
        self.model.resize(size as usize, 0);
    }

    async fn allocate(&mut self, offset: u64, length: u64, mode: AllocateMode) {
        self.client.allocate(self.inode, offset, length, mode).await.unwrap();
        let end = (offset + length) as usize;
        match mode {
            AllocateMode::Extend | AllocateMode::Unshare => self.model.resize(self.model.len().max(end), 0),
            AllocateMode::KeepSize => {}
            AllocateMode::Collapse | AllocateMode::Insert => unreachable!("these move what lies behind"),
            AllocateMode::PunchHole | AllocateMode::ZeroRange | AllocateMode::ZeroRangeKeepSize => {
                let to = self.model.len().min(end);
                let from = to.min(offset as usize);
                self.model[from..to].fill(0);
            }
        }
    }

    async fn shift(&mut self, offset: u64, length: u64, mode: AllocateMode) {
        let (offset, length) = (offset - offset % BLOCK_SIZE, length.next_multiple_of(BLOCK_SIZE));
        let (size, from, end) = (self.model.len(), offset as usize, (offset + length) as usize);
        let done = self.client.allocate(self.inode, offset, length, mode).await;
        match mode {
            AllocateMode::Collapse if end < size => drop(self.model.drain(from..end)),
            AllocateMode::Insert if from < size => {
                drop(self.model.splice(from..from, std::iter::repeat_n(0, length as usize)));
            }
            _ => return assert_eq!(done, Err(FsError::Invalid), "{mode:?} {offset} + {length} of {size}"),
        }
        assert_eq!(done, Ok(()), "{mode:?} {offset} + {length} of {size}");
        if self.model.len() as u64 > FILE_LIMIT {
            self.truncate(FILE_LIMIT).await;
        }
    }

    async fn check_all(&mut self) {
        assert_eq!(self.client.attributes(self.inode).await.size, self.model.len() as u64);
        self.check(0, FILE_LIMIT * 2).await;
    }
}

/// Runs `files` writers with `steps` steps each beside a reader and a syncer; returns the files' final contents.
async fn run_writers(
    ctx: Context,
    client: Client,
    seed: u64,
    files: u64,
    steps: u64,
) -> Vec<(InodeNr, Vec<u8>)> {
    let results = Rc::new(RefCell::new(Vec::new()));
    let running = Rc::new(Cell::new(files));
    let mut inodes = Vec::new();
    for file in 0..files {
        let inode = client.create(&format!("file{file}")).await;
        inodes.push(inode);
        let random = Random::new(seed, file + 1);
        let mut writer = Writer { client: client.clone(), random, inode, model: Vec::new() };
        let (results, running) = (Rc::clone(&results), Rc::clone(&running));
        let task = async move {
            for _ in 0..steps {
                writer.step().await;
            }
            writer.check_all().await;
            results.borrow_mut().push((inode, writer.model));
            running.set(running.get() - 1);
        };
        ctx.spawn(task).unwrap();
    }
    // Reads and flushes from elsewhere get into everybody's way; what they see is nobody's business.
    let random = Random::new(seed, 0);
    while running.get() > 0 {
        let inode = inodes[random.below(files) as usize];
        match random.below(3) {
            0 => drop(client.read(inode, random.below(FILE_LIMIT), 200_000).await.unwrap()),
            1 => client.sync(inode).await.unwrap(),
            _ => ctx.sleep(Duration::from_micros(random.below(2000))).await,
        }
    }
    results.take()
}

fn compare(world: &World, files: Vec<(InodeNr, Vec<u8>)>) {
    world.mounted(|_, client| async move {
        for (inode, model) in files {
            assert_eq!(client.attributes(inode).await.size, model.len() as u64);
            assert!(
                client.read(inode, 0, 8 << 20).await.unwrap() == model,
                "inode {inode} differs after the remount"
            );
        }
    });
}

#[test]
fn files_equal_their_models_under_random_concurrent_operations() {
    for seed in 0..6 {
        let world = World::small(seed);
        let files = world.mounted(|ctx, client| run_writers(ctx, client, seed, 4, 60));
        compare(&world, files);
    }
}

#[test]
fn same_seed_twice_takes_the_same_course() {
    let trace = || {
        let world = World::small(77);
        world.mounted(|ctx, client| run_writers(ctx, client, 77, 3, 25));
        (world.sim.trace_hash(), world.disk.image().content_hash())
    };
    assert_eq!(trace(), trace());
}
