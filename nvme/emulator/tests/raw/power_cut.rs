//! The modelled write cache against a model of its own: which contents may a power cut leave?

use nvme_emulator::{ControllerConfig, CutPolicy, EmulatedController, Tear, WriteCache};
use nvme_spec::command::{DeallocateZeroes, ForceUnitAccess};
use nvme_spec::feature::FeatureId;
use nvme_spec::{SubmissionEntry, registers};
use proptest::prelude::*;
use std::sync::Arc;

use crate::initiator::{Buffer, Host, NS1, memory_config, pattern};

const BLOCK: usize = 512;
const BLOCKS: usize = 64;

fn config(lba: u32) -> ControllerConfig {
    ControllerConfig { write_cache: WriteCache::MODELLED, ..memory_config((BLOCKS * BLOCK) as u64, lba) }
}

#[derive(Clone, Debug)]
enum Step {
    Write { at: usize, blocks: usize, fua: ForceUnitAccess },
    Zero { at: usize, blocks: usize },
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..BLOCKS, 1..=8usize).prop_map(|(at, n)| (at, n.min(BLOCKS - at)));
    prop_oneof![
        6 => range.clone().prop_map(|(at, blocks)| Step::Write { at, blocks, fua: ForceUnitAccess::No }),
        2 => range.clone().prop_map(|(at, blocks)| Step::Write { at, blocks, fua: ForceUnitAccess::Yes }),
        1 => range.prop_map(|(at, blocks)| Step::Zero { at, blocks }),
        1 => Just(Step::Flush),
    ]
}

fn policy() -> impl Strategy<Value = CutPolicy> {
    prop_oneof![
        Just(CutPolicy::DropAll),
        Just(CutPolicy::KeepAll),
        (0..30usize, 0..4096u64).prop_map(|(writes, torn_bytes)| CutPolicy::Prefix { writes, torn_bytes }),
        prop::collection::vec(any::<bool>(), 0..40).prop_map(CutPolicy::Subset),
        (any::<u64>(), prop_oneof![Just(Tear::Never), Just(Tear::Sectors), Just(Tear::Blocks4K)])
            .prop_map(|(seed, tear)| CutPolicy::Random { seed, tear }),
    ]
}

/// One unflushed write of the reference model: new bytes, and for each block whether it still matters.
struct Pending {
    at: usize,
    data: Vec<u8>,
    live: Vec<bool>,
}

/// The reference: durable contents and the writes after them, kept as plainly as possible.
struct Model {
    durable: Vec<u8>,
    pending: Vec<Pending>,
}

impl Model {
    fn new() -> Self {
        Self { durable: vec![0; BLOCK * BLOCKS], pending: Vec::new() }
    }

    fn write(&mut self, at: usize, data: Vec<u8>, fua: ForceUnitAccess) {
        let blocks = data.len() / BLOCK;
        if fua == ForceUnitAccess::Yes {
            self.durable[at * BLOCK..][..data.len()].copy_from_slice(&data);
            for earlier in &mut self.pending {
                for (i, live) in earlier.live.iter_mut().enumerate() {
                    *live &= !(at..at + blocks).contains(&(earlier.at + i));
                }
            }
            self.pending.retain(|p| p.live.contains(&true));
        } else {
            self.pending.push(Pending { at, live: vec![true; blocks], data });
        }
    }

    /// Applies the pending writes whose blocks `keeps` says survive.
    fn after(&self, keeps: impl Fn(usize, usize) -> bool) -> Vec<u8> {
        let mut contents = self.durable.clone();
        for (index, write) in self.pending.iter().enumerate() {
            for (i, live) in write.live.iter().enumerate() {
                if *live && keeps(index, i) {
                    let block = &write.data[i * BLOCK..][..BLOCK];
                    contents[(write.at + i) * BLOCK..][..BLOCK].copy_from_slice(block);
                }
            }
        }
        contents
    }

    fn flush(&mut self) {
        self.durable = self.after(|_, _| true);
        self.pending.clear();
    }

    /// Every version a block may have after an arbitrary cut.
    fn possible(&self, block: usize) -> Vec<&[u8]> {
        let mut versions = vec![&self.durable[block * BLOCK..][..BLOCK]];
        for write in &self.pending {
            if let Some(i) = block.checked_sub(write.at).filter(|i| write.live.get(*i) == Some(&true)) {
                versions.push(&write.data[i * BLOCK..][..BLOCK]);
            }
        }
        versions
    }
}

fn contents(ctrl: &Arc<EmulatedController>) -> Vec<u8> {
    let mut host = Host::enabled(Arc::clone(ctrl));
    let mut io = host.io_pair(1, 8);
    let target = Buffer::new(&host, BLOCK * BLOCKS);
    io.ok(target.attach(SubmissionEntry::read(NS1, 0, (BLOCKS - 1) as u16)));
    let bytes = target.bytes();
    host.ctrl.write32(registers::CC, 0);
    bytes
}

fn check(model: &Model, policy: &CutPolicy, after: &[u8]) {
    match policy {
        CutPolicy::DropAll => assert!(after == model.durable),
        CutPolicy::KeepAll => assert!(after == model.after(|_, _| true)),
        CutPolicy::Prefix { writes, torn_bytes } => {
            let torn = *torn_bytes as usize / BLOCK;
            assert!(after == model.after(|w, block| w < *writes || (w == *writes && block < torn)));
        }
        CutPolicy::Subset(kept) => {
            assert!(after == model.after(|w, _| kept.get(w).copied().unwrap_or(false)));
        }
        CutPolicy::Random { .. } => {
            for block in 0..BLOCKS {
                let found = &after[block * BLOCK..][..BLOCK];
                assert!(model.possible(block).contains(&found), "block {block} holds foreign bytes");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn power_cut_leaves_what_the_model_allows(
        runs in prop::collection::vec((prop::collection::vec(step(), 1..30), policy()), 1..4)
    ) {
        let mut host = Host::new(config(BLOCK as u32));
        let mut model = Model::new();
        let mut seed = 0;
        for (steps, policy) in runs {
            let mut io = host.io_pair(1, 8);
            for step in steps {
                seed += 1;
                match step {
                    Step::Write { at, blocks, fua } => {
                        let data = pattern(seed, blocks * BLOCK);
                        let source = Buffer::filled(&host, &data);
                        let command = SubmissionEntry::write(NS1, at as u64, (blocks - 1) as u16, fua);
                        io.ok(source.attach(command));
                        model.write(at, data, fua);
                    }
                    Step::Zero { at, blocks } => {
                        let no = DeallocateZeroes::No;
                        io.ok(SubmissionEntry::write_zeroes(NS1, at as u64, (blocks - 1) as u16, no));
                        model.write(at, vec![0; blocks * BLOCK], ForceUnitAccess::No);
                    }
                    Step::Flush => {
                        io.ok(SubmissionEntry::flush(NS1));
                        model.flush();
                    }
                }
                assert_eq!(host.ctrl.unflushed_writes(), model.pending.len());
            }
            let unflushed = host.ctrl.unflushed_writes();
            let report = host.ctrl.power_cut(policy.clone());
            assert_eq!(report.unflushed(), unflushed);
            assert_eq!(host.ctrl.unflushed_writes(), 0);
            let after = contents(&host.ctrl);
            check(&model, &policy, &after);
            model = Model { durable: after, pending: Vec::new() };
            host = Host::enabled(host.ctrl);
        }
        assert_eq!(host.ctrl.memory().fault_count(), 0);
    }
}

fn written(host: &mut Host, count: u64) {
    let mut io = host.io_pair(1, 8);
    for i in 0..count {
        let source = Buffer::filled(host, &pattern(i, 4096));
        io.ok(source.attach(SubmissionEntry::write(NS1, i * 8, 7, ForceUnitAccess::No)));
    }
}

#[test]
fn same_seed_gives_the_same_outcome_and_seeds_differ() {
    let outcome = |seed, tear| {
        let mut host = Host::new(config(512));
        written(&mut host, 8);
        let report = host.ctrl.power_cut(CutPolicy::Random { seed, tear });
        (report, contents(&host.ctrl))
    };
    assert!(outcome(1, Tear::Sectors) == outcome(1, Tear::Sectors));
    let all: Vec<_> = (0..32).map(|seed| outcome(seed, Tear::Sectors)).collect();
    assert!(all.iter().any(|o| o.0 != all[0].0));
    assert!(all.iter().any(|o| o.0.torn > 0) && all.iter().any(|o| o.0.kept > 0 && o.0.dropped > 0));
    assert!((0..32).all(|seed| outcome(seed, Tear::Never).0.torn == 0));
}

#[test]
fn power_cut_returns_registers_and_features_to_power_on() {
    let mut host = Host::new(config(512));
    host.admin.ok(SubmissionEntry::set_features(FeatureId::WRITE_ATOMICITY_NORMAL, 1));
    written(&mut host, 3);
    let report = host.ctrl.power_cut(CutPolicy::Prefix { writes: 1, torn_bytes: 1024 });
    assert_eq!((report.kept, report.torn, report.dropped), (1, 1, 1));
    for register in [registers::CC, registers::CSTS, registers::AQA, registers::ASQ, registers::ACQ] {
        assert_eq!(host.ctrl.read32(register), 0);
    }
}

#[test]
fn disabled_write_cache_makes_every_write_durable() {
    let mut host = Host::new(config(512));
    written(&mut host, 2);
    assert_eq!(host.ctrl.unflushed_writes(), 2);
    host.admin.ok(SubmissionEntry::set_features(FeatureId::VOLATILE_WRITE_CACHE, 0));
    assert_eq!(host.ctrl.unflushed_writes(), 0, "disabling writes back");
    host.admin.ok(SubmissionEntry::delete_io_sq(nvme_spec::QueueId::new(1)));
    host.admin.ok(SubmissionEntry::delete_io_cq(nvme_spec::QueueId::new(1)));
    written(&mut host, 4);
    assert_eq!(host.ctrl.unflushed_writes(), 0);
}

#[test]
fn cache_that_overflows_writes_its_oldest_back() {
    let cache = WriteCache::Modelled { capacity: 4096 * 3 };
    let mut host = Host::new(ControllerConfig { write_cache: cache, ..config(512) });
    written(&mut host, 5);
    assert_eq!(host.ctrl.unflushed_writes(), 3);
    host.ctrl.power_cut(CutPolicy::DropAll);
    let after = contents(&host.ctrl);
    for i in 0..5 {
        let expected = if i < 2 { pattern(i, 4096) } else { vec![0; 4096] };
        assert!(after[i as usize * 4096..][..4096] == expected, "write {i}");
    }
}

#[test]
fn read_or_compare_with_fua_makes_what_it_sees_durable() {
    for opcode in [nvme_spec::NvmOpcode::READ, nvme_spec::NvmOpcode::COMPARE] {
        let mut host = Host::new(config(512));
        let mut io = host.io_pair(1, 8);
        let data = pattern(1, 512);
        let buffer = Buffer::filled(&host, &data);
        io.ok(buffer.attach(SubmissionEntry::write(NS1, 0, 0, ForceUnitAccess::No)));
        let mut command = buffer.attach(SubmissionEntry::read(NS1, 0, 0));
        command.opcode = opcode.0;
        io.ok(command);
        assert_eq!(host.ctrl.unflushed_writes(), 1);
        command.cdw12.set(1 << 30);
        io.ok(command);
        host.ctrl.power_cut(CutPolicy::DropAll);
        assert!(contents(&host.ctrl)[..512] == data);
    }
}

#[test]
fn unsafe_shutdowns_are_counted() {
    use nvme_spec::command::GetLogPage;
    use nvme_spec::log::{LogPageId, SmartLog};
    use zerocopy::FromBytes;
    let mut host = Host::new(config(512));
    host.ctrl.power_cut(CutPolicy::KeepAll);
    host = Host::enabled(host.ctrl);
    let page = GetLogPage { lid: LogPageId::SMART, dwords_z: 127, offset: 0, retain_event: false };
    let data = host.admin_data(SubmissionEntry::get_log_page(nvme_spec::NamespaceId::NONE, page));
    let smart = SmartLog::read_from_bytes(&data[..512]).unwrap();
    assert_eq!((smart.power_cycles.get(), smart.unsafe_shutdowns.get()), (2, 1));
}
