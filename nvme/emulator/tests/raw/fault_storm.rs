//! Many rules at once on a busy controller: whatever they do, a reset ends it, and nothing but what a rule asks for leaves
//! the mappings.

use std::time::Duration;

use nvme_emulator::{
    CidFault, CommandMatch, ControllerConfig, Effect, FaultRule, HeldAbort, LatencyModel, Mode, QueueMatch,
    Times, When,
};
use nvme_spec::command::{DeallocateZeroes, ForceUnitAccess};
use nvme_spec::{CommandId, QueueId, Status, StatusCode, SubmissionEntry, registers};

use crate::initiator::{Buffer, Host, NS1, Pair, memory_config, pattern, threaded};

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// Any effect but those that are DMA faults on purpose, or end the controller.
fn effect(dice: &mut Dice) -> Effect {
    match dice.roll(20) {
        0 => Effect::Drop,
        1 => Effect::LoseCompletion,
        2 => Effect::Hold { abort: HeldAbort::Obeyed },
        3 => Effect::Hold { abort: HeldAbort::Ignored },
        4 => Effect::Delay(Duration::from_micros(dice.roll(200))),
        5 => {
            let status = Status::from_code(StatusCode::INTERNAL_ERROR);
            let when = if dice.roll(2) == 0 { When::BeforeExecution } else { When::AfterExecution };
            Effect::Status { status, when }
        }
        6 => Effect::CompletionCid(CidFault::Stale),
        7 => Effect::CompletionCid(CidFault::NotInFlight),
        8 => Effect::CompletionSqId(9),
        9 => Effect::CompletionSqHead(0xffff),
        10 => Effect::StalePhase,
        11 => Effect::Duplicate,
        12 => Effect::Extra(dice.roll(40) as u32),
        13 => Effect::ShortTransfer { bytes: dice.roll(5000) as usize },
        14 => Effect::CorruptData { byte: dice.roll(9000) as usize, bit: dice.roll(9) as u8 },
        15 => Effect::PatchData { offset: dice.roll(9000) as usize, bytes: vec![0xff; 64] },
        16 => Effect::TearWrite { sectors: dice.roll(20) },
        17 => Effect::MisdirectWrite { lba_delta: dice.roll(4000) as i64 - 2000 },
        18 => Effect::StaleRead,
        _ => Effect::LyingFlush,
    }
}

fn command(dice: &mut Dice, buffer: &Buffer) -> SubmissionEntry {
    let (slba, blocks_z) = (dice.roll(64), dice.roll(16) as u16);
    match dice.roll(5) {
        0 | 1 => buffer.attach(SubmissionEntry::read(NS1, slba, blocks_z)),
        2 => buffer.attach(SubmissionEntry::write(NS1, slba, blocks_z, ForceUnitAccess::Yes)),
        3 => SubmissionEntry::write_zeroes(NS1, slba, blocks_z, DeallocateZeroes::Yes),
        _ => SubmissionEntry::flush(NS1),
    }
}

/// Sends commands under random rules for a while; completions are taken as they come and not believed.
fn storm(dice: &mut Dice, host: &mut Host, io: &mut Pair, buffer: &Buffer) {
    let plan = host.ctrl.faults();
    let mut rules = Vec::new();
    for _ in 0..=dice.roll(5) {
        let times = [Times::Once, Times::N(3), Times::Forever][dice.roll(3) as usize];
        let on = CommandMatch::any().on_queue(QueueMatch::Io);
        rules.push(plan.add(FaultRule::new(on, effect(dice)).skip(dice.roll(10)).times(times)));
    }
    for round in 0..20 {
        let mut last = 0;
        for _ in 0..=dice.roll(12) {
            last = io.push(command(dice, buffer));
        }
        io.ring();
        host.ctrl.step();
        host.ctrl.advance(Duration::from_micros(dice.roll(100)));
        let mut taken = 0;
        while taken < 64 && io.peek().is_some() {
            taken += 1;
        }
        io.free();
        if round % 5 == 4 {
            plan.release(rules[dice.roll(rules.len() as u64) as usize]);
            let abort = SubmissionEntry::abort(QueueId::new(io.sqid), CommandId::new(last));
            host.admin.ok(abort);
        }
    }
}

fn survives(mode: Mode, latency: Option<LatencyModel>, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let mut dice = Dice(seed);
        let mut host = Host::new(ControllerConfig { mode, latency, ..memory_config(1 << 20, 512) });
        for _ in 0..3 {
            let mut io = host.io_pair(1, 64);
            let buffer = Buffer::new(&host, 16 * 512);
            storm(&mut dice, &mut host, &mut io, &buffer);
            host.ctrl.write32(registers::CC, 0);
            host.wait_csts(|csts| !csts.rdy());
            if dice.roll(2) == 0 {
                host.ctrl.remove();
                host.ctrl.reinsert();
            }
            host.ctrl.faults().clear();
            host = Host::enabled(host.ctrl);
        }
        assert_eq!(host.ctrl.memory().fault_count(), 0, "seed {seed}");
        if latency.is_none() {
            let mut io = host.io_pair(1, 64);
            let data = pattern(seed, 8192);
            let target = Buffer::new(&host, 8192);
            io.ok(Buffer::filled(&host, &data).attach(SubmissionEntry::write(
                NS1,
                0,
                15,
                ForceUnitAccess::No,
            )));
            io.ok(target.attach(SubmissionEntry::read(NS1, 0, 15)));
            assert!(target.bytes() == data, "seed {seed}");
        }
    }
}

#[test]
fn controller_survives_any_mixture_of_rules_inline() {
    survives(Mode::Inline, None, 0..150);
}

#[test]
fn controller_survives_any_mixture_of_rules_stepped_with_latency() {
    survives(Mode::Stepped, None, 150..250);
    survives(Mode::Stepped, Some(LatencyModel::uniform(Duration::from_micros(50))), 250..300);
}

#[test]
fn controller_survives_any_mixture_of_rules_with_threads() {
    survives(threaded(2), None, 300..340);
    survives(threaded(1), Some(LatencyModel::uniform(Duration::from_micros(50))), 340..370);
}
