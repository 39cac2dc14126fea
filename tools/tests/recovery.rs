//! A filesystem on a controller in trouble: where the driver can recover, it sees a pause and never an error; where the
//! device is gone, errors and never a hang; where the device lies, an error and never wrong data.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fs_core::fsck::{DataCheck, check_with};
use fs_core::mkfs::{Force, FormatOptions, Owner, format};
use fs_core::request::{Caller, KillPrivileges, NewInode, Reply, Request, SyncScope, WriteSource};
use fs_core::types::{FileOffset, InodeNr};
use fs_core::{FsError, MountOptions, Volume};
use nvme::transport::embedded::EmbeddedTransport;
use nvme::transport::{SystemTiming, Timing};
use nvme::{Controller, ControllerOptions, Life, QueueOptions};
use nvme_emulator::{
    CommandMatch, ControllerConfig, Effect, EmulatedController, FaultRule, HeldAbort, Mode, NamespaceConfig,
    RegisterFault, RuleId, ThreadOptions, Times, When,
};
use nvme_spec::{AdminOpcode, NvmOpcode, Status, StatusCode};
use pollux::device::Device;
use reactor::clock::Instant;
use reactor::{Context, ReactorConfig, SystemClock};

/// How much faster the driver's time goes, so that nobody waits for half a minute.
const SPEED: u32 = 10;
/// What a command is given, in the driver's time.
const TIMEOUT: Duration = Duration::from_secs(5);
const DEVICE_BYTES: u64 = 128 << 20;
/// Blocks but for both rings of superblocks. A superblock that is lost or old is a state of the volume like any other.
const NO_SUPERBLOCKS: [std::ops::Range<u64>; 2] = [24..4160, 4168..u64::MAX];

struct FastTiming(SystemTiming);

impl Timing for FastTiming {
    fn now(&self) -> Instant {
        Instant::ZERO.saturating_add(self.0.now().duration_since(Instant::ZERO) * SPEED)
    }

    fn pause(&self, duration: Duration) {
        self.0.pause(duration / SPEED);
    }
}

fn emulator() -> Arc<EmulatedController> {
    let namespace = NamespaceConfig::memory(DEVICE_BYTES).with_lba_size(4096);
    let mode = Mode::Threaded(ThreadOptions { workers: 2, ..ThreadOptions::default() });
    EmulatedController::new(ControllerConfig { mode, to: 1, ..ControllerConfig::with_namespace(namespace) })
        .unwrap()
}

fn controller(emulator: &Arc<EmulatedController>) -> Arc<Controller> {
    let transport = Arc::new(EmbeddedTransport::new(Arc::clone(emulator), "emu:recovery"));
    let timing = Arc::new(FastTiming(SystemTiming::default()));
    Controller::bring_up(transport, timing, &ControllerOptions::default()).unwrap()
}

fn queue_options() -> QueueOptions {
    QueueOptions { command_timeout: TIMEOUT, pool_bytes: 16 << 20, ..QueueOptions::default() }
}

/// Runs a task on a reactor of this thread, with a controller of its own.
fn on_one_reactor<T, Fut: Future<Output = T>>(
    emulator: &Arc<EmulatedController>,
    task: impl FnOnce(Context) -> Fut,
) -> T {
    let controller = controller(emulator);
    let queue = controller.create_queue(&queue_options()).unwrap();
    let outcome = reactor::block_on(Some(Box::new(queue)), Arc::new(SystemClock::new()), 1, task);
    controller.shutdown().unwrap();
    outcome
}

fn make_volume(emulator: &Arc<EmulatedController>) {
    let options =
        FormatOptions { shards: 2, label: "recovery".to_owned(), force: Force::Refuse, owner: Owner::ROOT };
    on_one_reactor(emulator, |ctx: Context| async move { format(&ctx, &options).await.map(drop) }).unwrap();
}

/// Findings of a check of everything, as text.
fn findings(emulator: &Arc<EmulatedController>) -> Vec<String> {
    on_one_reactor(emulator, |ctx: Context| async move {
        match check_with(&ctx, DataCheck::Verify, &mut |_| ()).await {
            Ok(report) => report.findings.iter().map(|finding| format!("{finding:?}")).collect(),
            Err(error) => vec![error.to_string()],
        }
    })
}

/// A mounted volume on two reactors.
struct Mounted {
    device: Device,
    volume: Volume,
}

impl Mounted {
    fn try_mount(emulator: &Arc<EmulatedController>) -> Result<Self, String> {
        let device = Device::over(
            controller(emulator),
            "emu:recovery",
            &[0, 0],
            ReactorConfig::default(),
            queue_options(),
        )
        .unwrap();
        // So little memory that most reads have to go to the device.
        let options = MountOptions { page_memory: 1 << 20, tree_memory: 1 << 20, ..MountOptions::default() };
        match Volume::mount_blocking(device.runtime().handles(), options) {
            Ok(volume) => Ok(Self { device, volume }),
            Err(error) => {
                // The device has done its worst; what matters is that it ends.
                let _ = device.stop();
                Err(error.to_string())
            }
        }
    }

    fn mount(emulator: &Arc<EmulatedController>) -> Self {
        Self::try_mount(emulator).unwrap()
    }

    fn end(self) -> Result<(), FsError> {
        let unmounted = self.volume.unmount_blocking();
        drop(self.volume);
        let stopped = self.device.stop();
        if unmounted.is_ok() {
            stopped.unwrap();
        }
        unmounted
    }
}

fn name_of(file: u64) -> Box<[u8]> {
    format!("file {file}").into_bytes().into()
}

fn contents(file: u64, version: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64)
        .map(|at| {
            ((file * 31 + version * 7 + at / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (at % 8 * 8)) as u8
        })
        .collect()
}

fn create(volume: &Volume, file: u64) -> Result<InodeNr, FsError> {
    let request = Request::Create {
        parent: Volume::ROOT,
        name: name_of(file),
        new: NewInode::Regular,
        permissions: 0o644,
        caller: Caller { uid: 0, gid: 0 },
    };
    match volume.call_blocking(request)? {
        Reply::Entry(attributes) => Ok(attributes.inode),
        other => panic!("{other:?}"),
    }
}

fn find(volume: &Volume, file: u64) -> Result<InodeNr, FsError> {
    match volume.call_blocking(Request::Lookup { parent: Volume::ROOT, name: name_of(file) })? {
        Reply::Entry(attributes) => Ok(attributes.inode),
        other => panic!("{other:?}"),
    }
}

fn write(volume: &Volume, inode: InodeNr, data: &[u8]) -> Result<(), FsError> {
    for (piece, at) in data.chunks(64 << 10).zip((0..).step_by(64 << 10)) {
        let request = Request::Write {
            inode,
            offset: FileOffset::new(at),
            data: piece.into(),
            source: WriteSource::Call,
            kill_privileges: KillPrivileges::Keep,
        };
        volume.call_blocking(request)?;
    }
    Ok(())
}

fn sync(volume: &Volume, inode: InodeNr) -> Result<(), FsError> {
    volume.call_blocking(Request::Sync { inode, scope: SyncScope::File }).map(drop)
}

fn read(volume: &Volume, inode: InodeNr, bytes: usize) -> Result<Vec<u8>, FsError> {
    let mut data = Vec::new();
    while data.len() < bytes {
        let offset = FileOffset::new(data.len() as u64);
        match volume.call_blocking(Request::Read { inode, offset, length: 64 << 10 })? {
            Reply::Data(piece) if piece.is_empty() => break,
            Reply::Data(piece) => data.extend(piece),
            other => panic!("{other:?}"),
        }
    }
    Ok(data)
}

const FILE_BYTES: usize = 192 << 10;

/// Creates, writes, syncs, reads and rewrites; the first error ends it.
fn work(volume: &Volume, files: std::ops::Range<u64>) -> Result<(), FsError> {
    for file in files.clone() {
        let inode = create(volume, file)?;
        write(volume, inode, &contents(file, 0, FILE_BYTES))?;
        if file % 3 == 0 {
            sync(volume, inode)?;
        }
        let back = files.start + (file - files.start) / 2;
        let data = read(volume, find(volume, back)?, FILE_BYTES)?;
        assert!(data == contents(back, 0, FILE_BYTES), "file {back} holds something else");
    }
    Ok(())
}

fn io(opcode: NvmOpcode) -> CommandMatch {
    CommandMatch::io(opcode)
}

fn verify(volume: &Volume, files: std::ops::Range<u64>) {
    for file in files {
        let data = read(volume, find(volume, file).unwrap(), FILE_BYTES).unwrap();
        assert!(data == contents(file, 0, FILE_BYTES), "file {file} holds something else");
    }
}

/// Runs the workload with the rules in force; nobody above notices.
fn assert_a_pause_and_no_more(rules: Vec<FaultRule>) -> Arc<Controller> {
    let emulator = emulator();
    make_volume(&emulator);
    let mounted = Mounted::mount(&emulator);
    let ids: Vec<RuleId> = rules.into_iter().map(|rule| emulator.faults().add(rule)).collect();
    work(&mounted.volume, 0..60).unwrap();
    for (index, id) in ids.into_iter().enumerate() {
        assert!(emulator.faults().fired(id) > 0, "rule {index} met nothing");
    }
    let controller = mounted.device.controller().clone();
    assert_eq!(controller.life(), Life::Running);
    let queues = mounted.device.queues().report();
    assert!(queues.iter().map(|queue| queue.retried).sum::<u64>() > 0, "nothing was repeated");
    assert_eq!(queues.iter().map(|queue| queue.errors).sum::<u64>(), 0);
    mounted.end().unwrap();
    assert_eq!(findings(&emulator), Vec::<String>::new());
    assert_eq!(emulator.memory().fault_count(), 0);
    let again = Mounted::mount(&emulator);
    verify(&again.volume, 0..60);
    again.end().unwrap();
    controller
}

#[test]
fn lost_and_stuck_commands_are_a_pause() {
    let hold = Effect::Hold { abort: HeldAbort::Ignored };
    let controller = assert_a_pause_and_no_more(vec![
        FaultRule::new(io(NvmOpcode::WRITE), Effect::Drop).skip(5),
        FaultRule::new(io(NvmOpcode::WRITE), Effect::LoseCompletion).skip(30),
        FaultRule::new(io(NvmOpcode::READ), hold.clone()).skip(3),
        FaultRule::new(io(NvmOpcode::FLUSH), Effect::Drop).skip(4),
        FaultRule::new(io(NvmOpcode::WRITE), Effect::StalePhase).skip(38),
        FaultRule::new(io(NvmOpcode::WRITE), hold).skip(45),
    ]);
    assert_eq!(controller.resets(), 0, "aborts and new queues were enough");
}

#[test]
fn resets_of_the_controller_are_a_pause() {
    let busy = Status::from_code(StatusCode::NAMESPACE_NOT_READY);
    let controller = assert_a_pause_and_no_more(vec![
        FaultRule::new(io(NvmOpcode::WRITE), Effect::FatalStatus).skip(7),
        FaultRule::new(io(NvmOpcode::FLUSH), Effect::FatalStatus).skip(3),
        FaultRule::new(io(NvmOpcode::READ), Effect::Drop).skip(2),
        FaultRule::new(CommandMatch::admin(AdminOpcode::DELETE_IO_SQ), Effect::FatalStatus),
        FaultRule::new(io(NvmOpcode::WRITE), Effect::Status { status: busy, when: When::BeforeExecution })
            .skip(40)
            .times(Times::N(3)),
    ]);
    assert!(controller.resets() >= 2, "{} resets", controller.resets());
}

#[test]
fn a_stuck_controller_does_not_stop_another() {
    let (well, stuck) = (emulator(), emulator());
    make_volume(&well);
    make_volume(&stuck);
    let (well, ill) = (Mounted::mount(&well), Mounted::mount(&stuck));
    let hold = Effect::Hold { abort: HeldAbort::Ignored };
    let everything = FaultRule::new(CommandMatch::any(), hold).times(Times::Forever);
    let rule = stuck.faults().add(everything);
    let slow = stuck.faults().add_register(RegisterFault::NeverStops);
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let outcome = work(&ill.volume, 0..6);
            // Relaxed: a flag that nothing hangs on.
            (outcome, finished.load(Ordering::Relaxed))
        });
        work(&well.volume, 0..20).unwrap();
        finished.store(true, Ordering::Relaxed);
        stuck.faults().remove(slow);
        stuck.faults().remove(rule);
        // Whatever became of it, it came to an end, and not before the other.
        let (_, after) = waiting.join().unwrap();
        assert!(after, "the stuck one was first");
    });
    verify(&well.volume, 0..20);
    well.end().unwrap();
    let _ = ill.end();
}

#[test]
fn hot_removal_gives_errors_and_unmount_ends() {
    let emulator = emulator();
    make_volume(&emulator);
    let mounted = Mounted::mount(&emulator);
    work(&mounted.volume, 0..4).unwrap();
    mounted.volume.call_blocking(Request::Sync { inode: Volume::ROOT, scope: SyncScope::Volume }).unwrap();
    emulator.faults().add(FaultRule::new(io(NvmOpcode::WRITE), Effect::Remove).skip(9));
    let outcome = work(&mounted.volume, 4..40);
    assert!(matches!(outcome, Err(FsError::Io(_) | FsError::ReadOnly)), "{outcome:?}");
    assert!(mounted.end().is_err());
    emulator.reinsert();
    emulator.faults().clear();
    assert_eq!(findings(&emulator), Vec::<String>::new());
    let again = Mounted::mount(&emulator);
    verify(&again.volume, 0..4);
    work(&again.volume, 100..104).unwrap();
    again.end().unwrap();
}

/// What a device does to data without saying so.
fn lies() -> Vec<(NvmOpcode, Effect)> {
    let (write, read) = (NvmOpcode::WRITE, NvmOpcode::READ);
    vec![
        (write, Effect::LoseWrite),
        (write, Effect::TearWrite { sectors: 3 }),
        (write, Effect::MisdirectWrite { lba_delta: 9000 }),
        (write, Effect::CorruptData { byte: 700, bit: 5 }),
        (write, Effect::ShortTransfer { bytes: 1536 }),
        (write, Effect::NoTransfer),
        (read, Effect::CorruptData { byte: 9, bit: 0 }),
        (read, Effect::MisdirectWrite { lba_delta: 77 }),
        (read, Effect::ShortTransfer { bytes: 512 }),
        (read, Effect::NoTransfer),
        (read, Effect::StaleRead),
    ]
}

/// Each lie at each of the first so many commands that it can meet.
const LIES_OF_A_KIND: u64 = 12;

#[test]
fn a_device_that_lies_is_an_error_and_never_wrong_data() {
    let (mut cases, mut told) = (0, 0);
    for (opcode, effect) in lies() {
        let mut told_of_this = 0;
        for (nth, blocks) in (0..LIES_OF_A_KIND).flat_map(|nth| NO_SUPERBLOCKS.map(|blocks| (nth, blocks))) {
            let emulator = emulator();
            make_volume(&emulator);
            let lie = io(opcode).on_lbas(blocks);
            let rule = FaultRule::new(lie, effect.clone()).skip(nth);
            let mounted = Mounted::mount(&emulator);
            // A stale read needs to have seen what was written.
            let from_the_start = opcode == NvmOpcode::WRITE || effect == Effect::StaleRead;
            if from_the_start {
                emulator.faults().add(rule.clone());
            }
            let worked = work(&mounted.volume, 0..3).and_then(|()| mounted.end());
            if !from_the_start {
                emulator.faults().add(rule);
            }
            told_of_this += u32::from(worked.is_err() | !all_right(&emulator, 0..3));
            cases += 1;
        }
        assert!(told_of_this > 0, "{effect:?} was never noticed");
        told += told_of_this;
    }
    println!("lies: {cases} cases, {told} noticed");
}

/// Mounts and reads everything: false if there was an error. Wrong data is a failure of the test.
fn all_right(emulator: &Arc<EmulatedController>, files: std::ops::Range<u64>) -> bool {
    let Ok(mounted) = Mounted::try_mount(emulator) else { return false };
    let mut right = true;
    for file in files {
        match find(&mounted.volume, file).and_then(|inode| read(&mounted.volume, inode, FILE_BYTES)) {
            Ok(data) => assert!(data == contents(file, 0, FILE_BYTES), "wrong data without an error"),
            Err(FsError::Io(_) | FsError::Damaged { .. } | FsError::ReadOnly) => right = false,
            Err(error) => panic!("{error}"),
        }
    }
    let ended = mounted.end();
    right && ended.is_ok()
}
