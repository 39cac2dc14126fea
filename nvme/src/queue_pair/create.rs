//! How a queue pair comes to be: limits of options, namespace and controller, memory, and the queue on the device.
//!
//! Invariants: everything that the I/O path needs is allocated here.
//!
//! Excludes: creating the queue on the device and its number (`controller`).

use super::*;
use crate::ops::MAX_COUNT_16;
use crate::sgl::Pointing;
use crate::slots::MAX_SLOTS;

/// Bytes of one Write Zeroes or Verify: controllers may take long for it and MDTS does not bound it.
const MAX_ZEROES_BYTES: u64 = 32 << 20;
/// Unit of CRDT1 to 3.
const RETRY_DELAY_UNIT: Duration = Duration::from_millis(100);

impl QueuePair {
    pub(crate) fn create(
        controller: &Arc<Controller>,
        namespace: &Namespace,
        options: &QueueOptions,
    ) -> Result<Self, QueueError> {
        if options.depth == 0 || options.depth > MAX_SLOTS {
            return Err(QueueError::Option("queue depth must lie between 1 and 4096"));
        }
        if options.command_timeout.is_zero() {
            return Err(QueueError::Option("the command timeout must not be zero"));
        }
        let info = controller.info();
        let shared = controller.shared();
        let transport = &shared.link.transport;
        let max_transfer = transfer_limit(controller, namespace, options)?;
        let wake = match options.interrupts {
            Interrupts::Enabled if transport.interrupt_vectors() > 0 => {
                Some(Wake::new().map_err(|error| QueueError::Descriptor(error.to_string()))?)
            }
            _ => None,
        };
        let pool_region = transport.allocate(options.pool_bytes)?;
        let mut vector = None;
        let interrupt = |id: QueueId| {
            let Some(wake) = wake.as_ref().filter(|_| id.get() < transport.interrupt_vectors()) else {
                return Ok(QueueInterrupt::Disabled);
            };
            transport.connect_interrupt(id.get(), wake.eventfd().as_fd())?;
            transport.listen(id.get(), Listen::Off);
            vector = Some(id.get());
            Ok(QueueInterrupt::Vector(id.get()))
        };
        let max_entries = u32::from(info.cap.mqes_z()) + 1;
        let slots = u32::from(options.depth).min(max_entries - 1) as u16;
        let pointing = Pointing::choose(options.data_pointers, info.raw.sgls())
            .ok_or(QueueError::Option("SGLs were asked for, which the controller does not take"))?;
        let builder = CommandBuilder::new(&**transport, namespace, info, slots, max_transfer, pointing)?;
        let (queue, lane) =
            shared.attach_queue(namespace, slots, interrupt, wake.as_ref().map(Wake::eventfd))?;
        let now = shared.link.timing.now();
        let interval = (options.command_timeout / 8).clamp(Duration::from_millis(1), Duration::from_secs(1));
        Ok(Self {
            ops: Ops::new(slots),
            first_lbas: vec![0; usize::from(slots)].into(),
            backlog: VecDeque::with_capacity(usize::from(slots)),
            done: VecDeque::with_capacity(usize::from(slots)),
            attention: false,
            copies: vec![None; usize::from(slots)].into(),
            pair_waiting: false,
            abilities: NvmAbilities::of(info, namespace, (max_transfer as u64) >> namespace.lba_shift, slots),
            simple: Simple::new(namespace, max_transfer, builder.list_free_bytes()),
            cutter: cutter(info, namespace, max_transfer as u64),
            builder,
            geometry: Geometry {
                lba_size: namespace.lba_size(),
                lba_count: LbaCount::new(namespace.blocks),
                preferred_transfer: max_transfer as u32,
                volatile_write_cache: info.volatile_write_cache,
                deallocate: info.oncs.contains(Oncs::DATASET_MANAGEMENT),
                queue_depth: slots,
                name: controller.name().to_owned(),
            },
            oncs: info.oncs,
            latencies: (options.latency == LatencyRecording::On).then(Arc::default),
            counters: Arc::default(),
            watchdog: Watchdog {
                seen: vec![Watch { sequence: 0, since: None }; usize::from(slots)].into(),
                polls_left: WATCH_POLLS,
                next_check: now + interval,
                timeout: options.command_timeout,
                interval,
            },
            taking: options.taking,
            wake: wake.zip(vector),
            listening: false,
            delayed: Vec::with_capacity(usize::from(slots)),
            retry_delays: info
                .raw
                .crdt
                .map(|delay| (RETRY_DELAY_UNIT * u32::from(delay.get())).min(MAX_RETRY_DELAY)),
            stage: Stage::Running,
            // If the controller has been reset since the queue was attached, the first look takes care of it.
            pulse: lane.born,
            aborting: None,
            looking: false,
            settled: false,
            lane,
            namespace: namespace.clone(),
            pool: DmaPool::new(Arc::clone(&pool_region)),
            pool_region,
            queue,
            shared: Arc::clone(shared),
            controller: Arc::clone(controller),
        })
    }
}

/// How many blocks the commands of each kind take.
fn cutter(info: &ControllerInfo, namespace: &Namespace, max_transfer: u64) -> Cutter {
    let blocks = |bytes: u64| (bytes >> namespace.lba_shift).clamp(1, MAX_COUNT_16);
    // Before 2.0 nothing bounds a Verify; some controllers bound it as they do transfers.
    let verify = if info.version < Version::V2_0 { max_transfer } else { u64::MAX };
    Cutter {
        transfer: max_transfer >> namespace.lba_shift,
        boundary: u64::from(namespace.optimal_boundary),
        zeroes: blocks(info.max_zeroes.unwrap_or(u64::MAX).min(MAX_ZEROES_BYTES)),
        verify: blocks(info.max_verify.unwrap_or(verify).min(MAX_ZEROES_BYTES)),
        deallocate: info.max_deallocate.unwrap_or(u64::MAX).clamp(1, u64::from(u32::MAX)),
    }
}

/// Bytes of the largest command: what the options ask for, the controller allows, and whole blocks and pages make up.
fn transfer_limit(
    controller: &Controller,
    namespace: &Namespace,
    options: &QueueOptions,
) -> Result<usize, QueueError> {
    let lba_size = namespace.lba_size() as usize;
    if !(lba_size..=MAX_TRANSFER).contains(&options.max_transfer) {
        return Err(QueueError::Option("the largest transfer must lie between one block and 64 MiB"));
    }
    let asked = controller.info().max_transfer.filter(|_| !is_planted(Bug::TransferLimitIgnored));
    let device = asked.unwrap_or(u64::MAX);
    let by_count = MAX_COUNT_16 << namespace.lba_shift;
    let limit = (options.max_transfer as u64).min(device).min(by_count) as usize;
    // Checked with the namespace: the device's limit is at least a block.
    Ok(limit / lba_size * lba_size)
}
