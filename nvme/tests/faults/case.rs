//! A case of the table: what is asked of the driver, what goes wrong meanwhile, and the checks afterwards.

use std::time::Duration;

use nvme::{AdminError, Fault, Life};
use nvme_emulator::{CommandMatch, Effect, FaultRule, QueueMatch, RegisterFault, RuleId, Times};
use nvme_spec::{AdminOpcode, NvmOpcode};
use reactor::block::{BlockDevice, Completion, Durability, IoError, Lba, LbaCount, LbaRange, OpTag, Request};
use reactor::dma::DmaBuffer;

use crate::bench::{BLOCK, Bench, DEPTH, Means, World, device, queue_options};

/// The kind of command that a fault meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Admin,
    Read,
    Write,
    Flush,
    Deallocate,
}

pub(crate) const COMMANDS: [Command; 5] =
    [Command::Admin, Command::Read, Command::Write, Command::Flush, Command::Deallocate];
pub(crate) const IO_COMMANDS: [Command; 4] =
    [Command::Read, Command::Write, Command::Flush, Command::Deallocate];

impl Command {
    pub(crate) fn is_admin(self) -> bool {
        self == Command::Admin
    }

    /// The commands of this kind, for a rule.
    pub(crate) fn matched(self) -> CommandMatch {
        match self {
            Command::Admin => CommandMatch::admin(AdminOpcode::GET_LOG_PAGE),
            Command::Read => CommandMatch::io(NvmOpcode::READ),
            Command::Write => CommandMatch::io(NvmOpcode::WRITE),
            Command::Flush => CommandMatch::io(NvmOpcode::FLUSH),
            Command::Deallocate => CommandMatch::io(NvmOpcode::DATASET_MANAGEMENT),
        }
    }
}

/// What else is on the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    DepthOne,
    FullQueue,
    /// A full queue whose completions cross the end of the completion queue.
    PhaseWrap,
}

pub(crate) const LOADS: [Load; 3] = [Load::DepthOne, Load::FullQueue, Load::PhaseWrap];

/// What the controller is going through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    Running,
    /// The fault meets the command when it is repeated after a reset (an admin command: during the reset).
    Resetting,
    /// The controller is shut down while the fault does its work.
    ShuttingDown,
    /// The same, once the driver has noticed the fault.
    ShuttingDownLate,
    /// Queue and controller are dropped after so many rounds.
    Dropping(u32),
}

pub(crate) const MOMENTS: [Moment; 6] = [
    Moment::Running,
    Moment::Resetting,
    Moment::ShuttingDown,
    Moment::ShuttingDownLate,
    Moment::Dropping(0),
    Moment::Dropping(30),
];

/// What must come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    /// Every request succeeds and everything is right.
    Recovers,
    /// The request that was met fails so, the others succeed, the controller goes on.
    Fails(Error),
    /// The controller ends with such a fault: requests succeeded before, or fail with it.
    Ends(End),
    /// All succeed; the data of the request that was met cannot be known.
    Unnoticed,
    /// All succeed; no data can be known.
    Garbled,
    /// What succeeds is right, what does not succeed has failed with the controller or for want of time.
    Bounded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Error {
    Medium,
    Command,
    Timeout,
    /// For admin commands: a status.
    Status,
    /// For admin commands: a failure of the controller that a reset cured.
    Reset,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Protocol,
    Removed,
    ResetFailed,
    Any,
}

impl End {
    fn is(self, fault: &Fault) -> bool {
        match self {
            End::Protocol => matches!(fault, Fault::Protocol { .. }),
            End::Removed => matches!(fault, Fault::Removed),
            End::ResetFailed => matches!(fault, Fault::ResetFailed { .. }),
            End::Any => true,
        }
    }
}

/// A row of the table.
pub(crate) struct Row {
    pub(crate) effect: Effect,
    pub(crate) times: Times,
    /// Goes wrong besides, from the beginning of the case on.
    pub(crate) besides: Vec<FaultRule>,
    pub(crate) registers: Vec<RegisterFault>,
    pub(crate) means: Means,
    pub(crate) io: Expect,
    pub(crate) admin: Expect,
    /// Accesses outside of the mappings are a part of the fault.
    pub(crate) dma_faults: bool,
}

impl Row {
    pub(crate) fn new(effect: Effect, io: Expect, admin: Expect) -> Self {
        Self {
            effect,
            times: Times::Once,
            besides: Vec::new(),
            registers: Vec::new(),
            means: Means::default(),
            io,
            admin,
            dma_faults: false,
        }
    }
}

/// One request and what became of it.
struct Ask {
    command: Command,
    lba: u64,
    blocks: usize,
    result: Option<Result<(), IoError>>,
    buffer: Option<DmaBuffer>,
}

/// Where a row meets the driver.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) world: World,
    pub(crate) command: Command,
    pub(crate) load: Load,
    pub(crate) moment: Moment,
    /// With [`Moment::Resetting`] and [`Command::Admin`]: the command of the reset that is met.
    pub(crate) during: AdminOpcode,
}

/// Longest (virtual) time that anything may take.
const BOUND: Duration = Duration::from_secs(400);
/// The request of a full queue that the fault meets.
const VICTIM: usize = 1;
const HANDED_BACK: u8 = 0xa5;

fn pattern(lba: u64, generation: u8, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (lba as usize * 7 + i / 64 + i % 13 + usize::from(generation) * 101) as u8).collect()
}

struct Run<'a> {
    bench: Bench,
    row: &'a Row,
    place: Place,
    asks: Vec<Ask>,
    answer: Option<Result<(), AdminError>>,
    rule: Option<RuleId>,
}

/// Runs one case.
pub(crate) fn run(row: &Row, place: Place) {
    let device = device(place.world);
    let run = Run {
        bench: Bench::over(device, place.world, row.means),
        row,
        place,
        asks: Vec::new(),
        answer: None,
        rule: None,
    };
    run.whole();
}

impl Run<'_> {
    fn whole(mut self) {
        self.fill();
        self.warm_up();
        self.inject();
        self.submit();
        if self.place.command.is_admin() && self.place.moment != Moment::Resetting {
            self.answer = Some(self.bench.controller.smart_log().map(drop));
        }
        match self.place.moment {
            Moment::Running | Moment::Resetting => {}
            Moment::ShuttingDown => drop(self.bench.controller.shutdown()),
            Moment::ShuttingDownLate => {
                self.until_noticed();
                drop(self.bench.controller.shutdown());
            }
            Moment::Dropping(rounds) => {
                for _ in 0..rounds {
                    self.round();
                }
                return self.drop_all();
            }
        }
        self.drive();
        self.judge();
        self.check_late_transfers();
        self.check_leaks();
        self.close();
    }

    fn fail(&self, text: &str) -> ! {
        let results: Vec<_> = self.asks.iter().map(|ask| &ask.result).collect();
        panic!(
            "{text}\n  row: {:?}, times {:?}, besides {:?}, {:?}\n  place: {:?}\n  requests: {results:?}\n  \
             admin: {:?}\n  life {:?}, resets {}, fault {:?}, counts {:?}",
            self.row.effect,
            self.row.times,
            self.row.besides,
            self.row.registers,
            self.place,
            self.answer,
            self.bench.controller.life(),
            self.bench.controller.resets(),
            self.bench.controller.fault(),
            self.bench.queue.counters().read(),
        )
    }

    fn check(&self, holds: bool, text: &str) {
        if !holds {
            self.fail(text);
        }
    }

    /// Every block that the case uses has contents of its own.
    fn fill(&mut self) {
        for index in 0..DEPTH {
            let lba = lba_of(usize::from(index));
            let result = self.bench.write(lba, &pattern(lba, 0, 4 * BLOCK));
            self.check(result == Ok(()), "the blocks cannot be filled");
        }
    }

    fn warm_up(&mut self) {
        if self.place.load != Load::PhaseWrap {
            return;
        }
        if self.place.command.is_admin() {
            // Up to two entries before the end of the admin completion queue, whatever was needed before.
            for _ in 0..23 {
                self.bench.controller.smart_log().unwrap();
            }
        }
        // 13 entries; `fill` took some. Now the next is the last but one.
        let taken = usize::from(DEPTH);
        for _ in taken..11 {
            let result = self.bench.read(3, BLOCK).map(drop);
            self.check(result == Ok(()), "warming up");
        }
    }

    fn victim(&self) -> usize {
        if self.place.load == Load::DepthOne { 0 } else { VICTIM }
    }

    fn inject(&mut self) {
        let faults = self.bench.device.faults();
        let Place { command, moment, .. } = self.place;
        let victim = if command.is_admin() { 0 } else { self.victim() as u64 };
        let rule = |on, skip| FaultRule::new(on, self.row.effect.clone()).skip(skip).times(self.row.times);
        match moment {
            Moment::Resetting => {
                let trigger = if command.is_admin() { Command::Read } else { command };
                faults.add(FaultRule::new(trigger.matched(), Effect::FatalStatus).skip(victim));
                let met = if command.is_admin() {
                    rule(CommandMatch::admin(self.place.during), 0)
                } else {
                    rule(command.matched(), victim + 1)
                };
                self.rule = Some(faults.add(met));
            }
            _ => self.rule = Some(faults.add(rule(command.matched(), victim))),
        }
        for besides in &self.row.besides {
            faults.add(besides.clone());
        }
        for register in &self.row.registers {
            faults.add_register(*register);
        }
    }

    fn submit(&mut self) {
        let Place { command, load, moment, .. } = self.place;
        let (command, count) = match (command, load) {
            (Command::Admin, Load::DepthOne) if moment != Moment::Resetting => (Command::Read, 0),
            (Command::Admin, Load::DepthOne) => (Command::Read, 1),
            (Command::Admin, _) => (Command::Read, usize::from(DEPTH)),
            (command, Load::DepthOne) => (command, 1),
            (command, _) => (command, usize::from(DEPTH)),
        };
        for index in 0..count {
            let (lba, blocks) = (lba_of(index), index % 3 + 1);
            let mut ask = Ask { command, lba, blocks, result: None, buffer: None };
            let request = self.bench.request(&ask);
            if let Err(rejected) = self.bench.queue.submit(OpTag(index as u64), request) {
                self.fail(&format!("not accepted: {rejected:?}"));
            }
            ask.result = None;
            self.asks.push(ask);
        }
        self.bench.queue.ring();
    }

    fn round(&mut self) {
        let mut done = Vec::new();
        self.bench.round(&mut |completion| done.push(completion));
        for completion in done {
            self.answered(completion);
        }
    }

    fn answered(&mut self, completion: Completion) {
        let Some(ask) = self.asks.get_mut(completion.tag.0 as usize) else {
            self.fail(&format!("an answer to nothing: {:?}", completion.tag));
        };
        let again = ask.result.is_some();
        ask.result = Some(completion.result);
        ask.buffer = completion.buffer;
        self.check(!again, "answered twice");
    }

    fn until_noticed(&mut self) {
        let resets = self.bench.controller.resets();
        let start = self.bench.now();
        while self.bench.controller.life() == Life::Running
            && self.bench.controller.resets() == resets
            && self.bench.queue.counters().read().timeouts == 0
            && self.asks.iter().any(|ask| ask.result.is_none())
        {
            self.round();
            self.check(self.bench.now().duration_since(start) < BOUND, "never noticed");
        }
    }

    fn drive(&mut self) {
        let start = self.bench.now();
        while self.asks.iter().any(|ask| ask.result.is_none()) || self.unsettled() {
            self.round();
            self.check(self.bench.now().duration_since(start) < BOUND, "hangs");
        }
        for _ in 0..3 {
            self.round();
        }
        self.check(self.bench.queue.in_flight() == 0, "something is in flight");
    }

    /// What was said by the last completion may still have to take effect.
    fn unsettled(&self) -> bool {
        matches!(self.bench.controller.life(), Life::Stopping | Life::Resetting)
    }

    fn expect(&self) -> Expect {
        match self.place.moment {
            Moment::ShuttingDown | Moment::ShuttingDownLate => Expect::Ends(End::Any),
            Moment::Resetting if self.place.command.is_admin() => Expect::Bounded,
            _ if self.place.command.is_admin() => self.row.admin,
            _ => self.row.io,
        }
    }

    fn judge(&mut self) {
        let victim = (!self.place.command.is_admin()).then(|| self.victim());
        let (expect, life) = (self.expect(), self.bench.controller.life());
        let may_come_too_late = matches!(self.place.moment, Moment::ShuttingDown | Moment::ShuttingDownLate);
        let met = self.rule.is_some_and(|rule| self.bench.device.faults().fired(rule) > 0);
        let needs_reads = self.row.effect == Effect::StaleRead;
        self.check(met || may_come_too_late || needs_reads, "nothing went wrong");
        for (index, ask) in self.asks.iter().enumerate() {
            let result = ask.result.as_ref().unwrap_or_else(|| self.fail("not answered"));
            let right = match expect {
                Expect::Recovers | Expect::Unnoticed | Expect::Garbled => result.is_ok(),
                Expect::Fails(error) if victim == Some(index) => error.is(result),
                Expect::Fails(_) => result.is_ok(),
                Expect::Ends(_) => {
                    // Before the end the fault may have had its effect.
                    let own = matches!(self.row.io, Expect::Fails(error) if error.is(result));
                    own || matches!(result, Ok(()) | Err(IoError::DeviceFailed { .. }))
                }
                Expect::Bounded => {
                    matches!(result, Ok(()) | Err(IoError::DeviceFailed { .. } | IoError::Timeout))
                }
            };
            self.check(right, &format!("request {index} is not answered as expected ({expect:?})"));
        }
        match expect {
            Expect::Ends(end) => {
                let abandoned = self.row.means == Means::None;
                let final_life = life == Life::Quiet || abandoned && life == Life::Abandoned;
                self.check(final_life, "the controller should have ended");
                let fault = self.bench.controller.fault();
                self.check(
                    fault.is_some_and(|fault| end.is(fault)),
                    &format!("ended otherwise than {end:?}"),
                );
            }
            Expect::Bounded => {
                self.check(matches!(life, Life::Running | Life::Quiet), "neither here nor there");
            }
            _ => self.check(life == Life::Running, "the controller should be in use"),
        }
        if let Some(answer) = &self.answer {
            let right = match expect {
                Expect::Recovers | Expect::Unnoticed | Expect::Garbled => answer.is_ok(),
                Expect::Fails(Error::Status) => matches!(answer, Err(AdminError::Status { .. })),
                Expect::Fails(_) => matches!(answer, Err(AdminError::Failed(_))),
                Expect::Ends(_) | Expect::Bounded => true,
            };
            self.check(right, "the admin command is not answered as expected");
        }
        let wrong_dma = self.bench.device.memory().fault_count();
        self.check(self.row.dma_faults || wrong_dma == 0, "accesses outside of the mappings");
        self.check_reads(expect);
    }

    fn data_known(&self, index: usize, expect: Expect) -> bool {
        let is_victim = !self.place.command.is_admin() && index == self.victim();
        let spoils = matches!(self.row.io, Expect::Unnoticed) && is_victim || self.row.io == Expect::Garbled;
        !spoils && expect != Expect::Garbled
    }

    fn check_reads(&self, expect: Expect) {
        for (index, ask) in self.asks.iter().enumerate() {
            if ask.command != Command::Read || ask.result != Some(Ok(())) || !self.data_known(index, expect) {
                continue;
            }
            let mut data = vec![0; ask.blocks * BLOCK];
            ask.buffer.as_ref().unwrap().read_at(0, &mut data);
            let right = data == pattern(ask.lba, 0, 4 * BLOCK)[..data.len()];
            self.check(right, &format!("request {index} read something else"));
        }
    }

    /// Buffers that were handed back belong to their owner: nothing that the controller still has to do reaches them.
    fn check_late_transfers(&mut self) {
        for buffer in self.asks.iter_mut().filter_map(|ask| ask.buffer.as_mut()) {
            let len = buffer.len();
            buffer.fill(0, len, HANDED_BACK);
        }
        self.bench.device.faults().clear();
        self.bench.clock.pass(Duration::from_secs(100).min(match self.bench.world {
            World::Threads => Duration::from_millis(20),
            _ => Duration::MAX,
        }));
        for index in 0..self.asks.len() {
            let Some(buffer) = &self.asks[index].buffer else { continue };
            let mut data = vec![0; buffer.len()];
            buffer.read_at(0, &mut data);
            let untouched = data.iter().all(|&byte| byte == HANDED_BACK);
            self.check(untouched, &format!("the buffer of request {index} was written to after its return"));
        }
    }

    fn check_leaks(&mut self) {
        for ask in &mut self.asks {
            ask.buffer = None;
        }
        if self.bench.controller.life() == Life::Running {
            let data = pattern(900, 3, 3 * BLOCK);
            let written = self.bench.write(900, &data);
            self.check(written == Ok(()), "it does not work any more");
            let read = self.bench.read(900, data.len());
            self.check(read == Ok(data), "it does not read any more");
            let options = queue_options(self.bench.world);
            self.check(self.bench.controller.create_queue(&options).is_ok(), "no other queue can be made");
        }
        let pool = self.bench.queue.pool();
        let free = pool.available() == pool.capacity();
        self.check(free || self.bench.controller.life() == Life::Abandoned, "buffers are missing");
    }

    /// Drops the driver, and looks at the medium through another.
    fn close(self) {
        let expect = self.expect();
        let known: Vec<_> = (0..self.asks.len()).map(|index| self.data_known(index, expect)).collect();
        let Run { bench, asks, row, place, .. } = self;
        let abandoned = bench.controller.life() == Life::Abandoned;
        let Bench { world, way, controller, queue, device, .. } = bench;
        drop(queue);
        drop(controller);
        assert!(abandoned || way.regions_alive() == 0, "memory is leaked: {:?}, {place:?}", row.effect);
        device.faults().clear();
        device.reinsert();
        let mut bench = Bench::over(device, world, Means::default());
        for (ask, _) in asks.iter().zip(known).filter(|(_, known)| *known) {
            let contents = bench.read(ask.lba, 4 * BLOCK).unwrap();
            let (head, rest) = contents.split_at(ask.blocks * BLOCK);
            let old = pattern(ask.lba, 0, 4 * BLOCK);
            let new = match ask.command {
                Command::Write => pattern(ask.lba, 1, ask.blocks * BLOCK),
                Command::Deallocate => vec![0; ask.blocks * BLOCK],
                _ => old[..head.len()].to_vec(),
            };
            let what = format!("block {} and after it: {:?}, {place:?}", ask.lba, row.effect);
            assert!(rest == &old[head.len()..], "{what}: what nobody wrote to has changed");
            for (at, block) in head.chunks(BLOCK).enumerate() {
                let range = at * BLOCK..(at + 1) * BLOCK;
                let is_new = block == &new[range.clone()];
                let may_be_old = ask.result != Some(Ok(())) && block == &old[range];
                assert!(is_new || may_be_old, "{what}: {:?}, but the data is wrong", ask.result);
            }
        }
    }

    /// Drops everything in the middle of it.
    fn drop_all(self) {
        let Run { bench, row, place, asks, .. } = self;
        drop(asks);
        let Bench { way, controller, queue, device, .. } = bench;
        drop(queue);
        let life = controller.life();
        drop(controller);
        let stuck = row.means == Means::None;
        assert!(stuck || way.regions_alive() == 0, "memory is leaked: {:?}, {place:?}, {life:?}", row.effect);
        // What was held has nowhere to go to.
        device.faults().clear();
        let wrong = device.memory().fault_count();
        assert!(
            row.dma_faults || wrong == 0,
            "accesses outside of the mappings: {:?}, {place:?}",
            row.effect
        );
    }
}

impl Error {
    fn is(self, result: &Result<(), IoError>) -> bool {
        match self {
            Error::Medium => matches!(result, Err(IoError::Medium { .. })),
            Error::Command => matches!(result, Err(IoError::Command { .. })),
            Error::Timeout => *result == Err(IoError::Timeout),
            Error::Status | Error::Reset => result.is_ok(),
        }
    }
}

fn lba_of(index: usize) -> u64 {
    16 * (index as u64 + 1)
}

impl Bench {
    fn now(&self) -> reactor::clock::Instant {
        nvme::transport::Timing::now(&*self.clock)
    }

    fn request(&self, ask: &Ask) -> Request {
        let bytes = ask.blocks * BLOCK;
        let buffer = || self.queue.pool().try_alloc(bytes).unwrap();
        let lba = Lba::new(ask.lba);
        match ask.command {
            Command::Read | Command::Admin => Request::Read { lba, buffer: buffer() },
            Command::Write => {
                let mut buffer = buffer();
                buffer.write_at(0, &pattern(ask.lba, 1, bytes));
                Request::Write { lba, buffer, durability: Durability::Cached }
            }
            Command::Flush => Request::Flush,
            Command::Deallocate => {
                Request::Deallocate(LbaRange { start: lba, count: LbaCount::new(ask.blocks as u64) })
            }
        }
    }

    /// One request, to its end.
    pub(crate) fn execute(&mut self, request: Request) -> (Result<(), IoError>, Option<DmaBuffer>) {
        self.queue.submit(OpTag(77), request).unwrap();
        self.queue.ring();
        let mut done = Vec::new();
        let start = self.now();
        while done.is_empty() {
            self.queue.process_completions(8, &mut |completion| done.push(completion));
            self.queue.ring();
            if done.is_empty() {
                self.round(&mut |completion| done.push(completion));
            }
            assert!(self.now().duration_since(start) < BOUND, "hangs");
        }
        let done = done.pop().unwrap();
        (done.result, done.buffer)
    }

    pub(crate) fn write(&mut self, lba: u64, data: &[u8]) -> Result<(), IoError> {
        let mut buffer = self.queue.pool().try_alloc(data.len()).unwrap();
        buffer.write_at(0, data);
        self.execute(Request::Write { lba: Lba::new(lba), buffer, durability: Durability::Cached }).0
    }

    pub(crate) fn read(&mut self, lba: u64, bytes: usize) -> Result<Vec<u8>, IoError> {
        let buffer = self.queue.pool().try_alloc(bytes).unwrap();
        let (result, buffer) = self.execute(Request::Read { lba: Lba::new(lba), buffer });
        let mut data = vec![0; bytes];
        buffer.unwrap().read_at(0, &mut data);
        result.map(|()| data)
    }
}

/// A row at every command, load and moment. Returns the number of cases.
pub(crate) fn everywhere(row: &Row, commands: &[Command]) -> usize {
    everywhere_in(&[World::Inline, World::Stepped], row, commands)
}

/// The same in certain worlds.
pub(crate) fn everywhere_in(worlds: &[World], row: &Row, commands: &[Command]) -> usize {
    let mut cases = 0;
    for &command in commands {
        for load in LOADS {
            for moment in MOMENTS {
                let duringes: &[AdminOpcode] = match (command, moment) {
                    (Command::Admin, Moment::Resetting) => &RESET_COMMANDS,
                    _ => &[AdminOpcode::IDENTIFY],
                };
                for &during in duringes {
                    for &world in worlds {
                        run(row, Place { world, command, load, moment, during });
                        cases += 1;
                    }
                }
            }
        }
    }
    cases
}

/// What a reset asks of a controller.
pub(crate) const RESET_COMMANDS: [AdminOpcode; 4] =
    [AdminOpcode::IDENTIFY, AdminOpcode::SET_FEATURES, AdminOpcode::CREATE_IO_CQ, AdminOpcode::CREATE_IO_SQ];

/// Any command of the admin queue with this opcode.
pub(crate) fn admin(opcode: AdminOpcode) -> CommandMatch {
    CommandMatch::admin(opcode).on_queue(QueueMatch::Admin)
}

/// Rows that meet every command of a kind: one command at a time, at every moment.
pub(crate) fn only_victims(name: &str, rows: &[Row], commands: &[Command]) {
    let mut cases = 0;
    for row in rows {
        for &command in commands {
            for moment in MOMENTS {
                for world in [World::Inline, World::Stepped] {
                    run(
                        row,
                        Place { world, command, load: Load::DepthOne, moment, during: AdminOpcode::IDENTIFY },
                    );
                    cases += 1;
                }
            }
        }
    }
    println!("{name}: {cases} cases");
}
