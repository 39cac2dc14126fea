//! How commands point to their data: PRPs and SGLs, seen from the controller.

use super::*;
use crate::sgl::DataPointers;
use nvme_spec::sgl::{Psdt, SglType};
use nvme_spec::{SglDescriptor, SubmissionEntry};
use reactor::block::LbaRange;
use zerocopy::FromBytes;

fn with_sgls(sgls: u32) -> Script {
    let mut script = Script::default();
    script.controller.sgls.set(sgls);
    script
}

fn pointing(data_pointers: DataPointers) -> QueueOptions {
    QueueOptions { data_pointers, ..options(8) }
}

impl Bench {
    /// Sends a read of so many blocks and returns its command and its buffer's address.
    fn read_command(&mut self, blocks: usize) -> (SubmissionEntry, u64) {
        let buffer = self.buffer(blocks * BLOCK);
        let iova = buffer.iova();
        self.queue.submit(OpTag(0), Request::Read { lba: Lba::new(0), buffer }).unwrap();
        self.queue.ring();
        let command = self.commands()[0];
        self.fake.complete_all(1);
        self.poll();
        (command, iova)
    }

    fn zero_command(&mut self, blocks: u64) -> SubmissionEntry {
        let range = LbaRange { start: Lba::new(0), count: LbaCount::new(blocks) };
        self.queue.submit(OpTag(0), Request::WriteZeroes(range)).unwrap();
        self.queue.ring();
        let command = self.commands()[0];
        self.fake.complete_all(1);
        self.poll();
        command
    }
}

#[test]
fn an_sgl_replaces_a_prp_list_and_nothing_else() {
    let mut bench = Bench::new(with_sgls(1), &pointing(DataPointers::Automatic));
    for blocks in [1, 2] {
        let (command, iova) = bench.read_command(blocks);
        assert_eq!((command.psdt(), command.prp1.get()), (Psdt::PRP, iova));
    }
    let (command, iova) = bench.read_command(3);
    assert_eq!(command.psdt(), Psdt::SGL);
    assert_eq!(command.sgl(), SglDescriptor::data_block(iova, 3 * BLOCK as u32));
}

#[test]
fn prps_are_used_where_they_are_asked_for_or_nothing_else_is_offered() {
    for (sgls, data_pointers) in [
        (1, DataPointers::Prp),
        (0, DataPointers::Automatic),
        (0, DataPointers::Prp),
        (3, DataPointers::Automatic),
    ] {
        let mut bench = Bench::new(with_sgls(sgls), &pointing(data_pointers));
        let (command, iova) = bench.read_command(3);
        assert_eq!((command.psdt(), command.prp1.get()), (Psdt::PRP, iova));
        let list = bench.fake.read(command.prp2.get(), 16);
        assert_eq!(list[..8], (iova + 4096).to_le_bytes());
        assert_eq!(list[8..], (iova + 8192).to_le_bytes());
    }
}

#[test]
fn sgls_that_are_asked_for_are_used_always_or_refused() {
    let mut bench = Bench::new(with_sgls(2), &pointing(DataPointers::Sgl));
    let (command, iova) = bench.read_command(1);
    assert_eq!((command.psdt(), command.sgl()), (Psdt::SGL, SglDescriptor::data_block(iova, 4096)));
    let range = LbaRange { start: Lba::new(3), count: LbaCount::new(5) };
    bench.queue.submit(OpTag(1), Request::Deallocate(range)).unwrap();
    bench.queue.ring();
    let deallocate = bench.commands()[0];
    assert_eq!((deallocate.psdt(), deallocate.sgl().length.get()), (Psdt::SGL, 16));

    let fake = Fake::new(with_sgls(0));
    let (transport, timing) = (Arc::clone(&fake), Arc::clone(&fake.timing));
    let controller = Controller::bring_up(transport, timing, &ControllerOptions::default()).unwrap();
    let error = controller.create_queue(&pointing(DataPointers::Sgl)).err().unwrap();
    assert!(matches!(error, QueueError::Option(text) if text.contains("SGLs")), "{error}");
}

#[test]
fn zeroes_without_write_zeroes_are_a_segment_of_one_page_over_and_over() {
    let mut script = with_sgls(2);
    script.controller.oncs.set(0);
    let mut bench = Bench::new(script, &pointing(DataPointers::Automatic));
    let command = bench.zero_command(5);
    let segment = command.sgl();
    assert_eq!((segment.kind(), segment.length.get()), (SglType::LAST_SEGMENT, 5 * 16));
    let bytes = bench.fake.read(segment.address.get(), 5 * 16);
    let descriptors: Vec<_> =
        bytes.chunks(16).map(|chunk| SglDescriptor::read_from_bytes(chunk).unwrap()).collect();
    assert!(descriptors.iter().all(|found| *found == descriptors[0]));
    assert_eq!((descriptors[0].kind(), descriptors[0].length.get()), (SglType::DATA_BLOCK, 4096));
    assert_eq!(bench.fake.read(descriptors[0].address.get(), 4096), [0; 4096]);
}

#[test]
fn memory_pages_of_any_size_are_used_as_they_are() {
    for mpsmin in 0..=4 {
        let page = 4096u64 << mpsmin;
        let mut script = Script::default();
        script.cap = script.cap.with_mpsmin(mpsmin).with_mpsmax(4);
        script.controller.mdts = 7;
        script.controller.oncs.set(0);
        let mut bench = Bench::new(script, &options(8));
        for blocks in [1, 2, 3, 64] {
            let (command, iova) = bench.read_command(blocks);
            let end = iova + (blocks * BLOCK) as u64;
            let second = iova - iova % page + page;
            assert_eq!(command.prp1.get(), iova);
            if end <= second {
                assert_eq!(command.prp2.get(), 0);
            } else if end <= second + page {
                assert_eq!(command.prp2.get(), second);
            } else {
                let pages = (end - second).div_ceil(page);
                let list = command.prp2.get();
                assert_eq!(list / page, (list + pages * 8 - 1) / page, "the list lies within a page");
                let entries = bench.fake.read(list, pages as usize * 8);
                for (n, entry) in entries.chunks(8).enumerate() {
                    assert_eq!(entry, (second + n as u64 * page).to_le_bytes());
                }
            }
        }
        let zeroes = bench.zero_command(1);
        assert_eq!(zeroes.prp1.get() % page, 0);
    }
}
