//! The NVMe driver against a controller that follows a script of misdeeds: bring-up, admin commands, I/O, recovery, the end.
//!
//! Checks, beside the absence of panics:
//! - each accepted request is answered exactly once, with its buffer, within bounded virtual time;
//! - the pool is whole once all were answered, unless the controller was abandoned;
//! - a controller that was disabled keeps no memory, and one that was not is not robbed of it (`hostile`).
//!
//! The first byte and some after it shape the controller; the rest are decisions, taken in turn by the controller and by whoever
//! uses the driver here. All time is virtual, all in one thread.

mod hostile;
mod identity;
mod memory;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use nvme::{
    Controller, ControllerOptions, DataPointers, Feature, FormatOptions, Interrupts, Keeper,
    LatencyRecording, Life, NvmRequest, Persistence, QueueOptions, QueuePair, Recovery,
};
use nvme_spec::NamespaceId;
use nvme_spec::feature::{FeatureId, FeatureSelect};
use nvme_spec::identify::Cns;
use nvme_spec::log::LogPageId;
use reactor::block::{BlockDevice, Durability, Lba, LbaCount, LbaRange, OpTag, Request};
use reactor::dma::DmaBuffer;

use crate::script::Script;
use hostile::Hostile;

/// Steps of the user; then everything is drained.
const STEPS: usize = 96;
/// Poll rounds until everything must have been answered.
const DRAIN_ROUNDS: usize = 20_000;
/// Virtual time between two of them.
const ROUND: Duration = Duration::from_millis(100);
/// Bytes of a queue's pool.
const POOL_BYTES: usize = 256 << 10;

/// Runs one script.
pub fn run(data: &[u8]) {
    let hostile = Arc::new(Hostile::new(Script::new(data.to_vec())));
    let options = ControllerOptions {
        queues: Some(2),
        namespace: None,
        keeper: Keeper::Polled,
        recovery: if hostile.byte() > 240 { Recovery::Off } else { Recovery::Automatic },
    };
    let (transport, timing) = (Arc::clone(&hostile), Arc::clone(&hostile));
    let Ok(controller) = Controller::bring_up(transport, timing, &options) else {
        check_memory(&hostile);
        return;
    };
    let mut user = User { hostile: &hostile, controller: &controller, queues: Vec::new(), next_tag: 0 };
    user.open();
    for _ in 0..STEPS {
        if hostile.script_is_over() {
            break;
        }
        user.step();
    }
    user.drain();
    drop(user);
    let _ = controller.shutdown();
    let life = controller.life();
    drop(controller);
    if life != Life::Abandoned {
        check_memory(&hostile);
    }
}

fn check_memory(hostile: &Hostile) {
    if hostile.is_disabled() {
        assert_eq!(hostile.regions_alive(), 0, "a disabled controller keeps memory");
    }
}

struct User<'h> {
    hostile: &'h Hostile,
    controller: &'h Arc<Controller>,
    queues: Vec<(QueuePair, BTreeSet<u64>)>,
    next_tag: u64,
}

impl User<'_> {
    fn open(&mut self) {
        let shape = self.hostile.byte();
        let options = QueueOptions {
            depth: [8, 1, 2, 31][usize::from(shape & 3)],
            pool_bytes: POOL_BYTES,
            max_transfer: if shape & 4 == 0 { 64 << 10 } else { 8 << 10 },
            command_timeout: Duration::from_secs(1),
            interrupts: Interrupts::Enabled,
            latency: if shape & 8 == 0 { LatencyRecording::Off } else { LatencyRecording::On },
            data_pointers: if shape & 16 == 0 { DataPointers::Automatic } else { DataPointers::Prp },
            ..QueueOptions::default()
        };
        if let Ok(queue) = self.controller.create_queue(&options) {
            self.queues.push((queue, BTreeSet::new()));
        }
    }

    fn step(&mut self) {
        let action = self.hostile.byte();
        match action {
            0..=159 if !self.queues.is_empty() => self.submit(action),
            160..=189 => self.poll(),
            190..=199 => self.hostile.work(Duration::from_millis(u64::from(self.hostile.byte()) * 20)),
            200..=239 => self.command(),
            240..=245 => self.open(),
            246..=250 if !self.queues.is_empty() => {
                // With whatever is in flight: its requests go with it.
                let index = usize::from(action) % self.queues.len();
                drop(self.queues.swap_remove(index));
            }
            251 => {
                let _ = self.controller.shutdown();
            }
            _ => {
                let _ = self.controller.take_events();
            }
        }
    }

    fn submit(&mut self, action: u8) {
        let index = usize::from(action) % self.queues.len();
        let (queue, waiting) = &mut self.queues[index];
        let lba_size = queue.geometry().lba_size as usize;
        let lba = Lba::new(self.hostile.byte().into());
        let blocks = usize::from(self.hostile.byte() % 40) + 1;
        let range = LbaRange { start: lba, count: LbaCount::new(blocks as u64) };
        let buffer = |queue: &QueuePair| -> Option<DmaBuffer> { queue.pool().try_alloc(blocks * lba_size) };
        self.next_tag += 1;
        let tag = OpTag(self.next_tag);
        let accepted = match action / 16 {
            0..=2 => {
                buffer(queue).is_some_and(|buffer| queue.submit(tag, Request::Read { lba, buffer }).is_ok())
            }
            3 | 4 => {
                let durability = if action & 1 == 0 { Durability::Cached } else { Durability::Durable };
                buffer(queue).is_some_and(|buffer| {
                    queue.submit(tag, Request::Write { lba, buffer, durability }).is_ok()
                })
            }
            5 if action & 1 == 0 => queue.submit(tag, Request::WriteZeroes(range)).is_ok(),
            5 => queue.submit(tag, Request::Deallocate(range)).is_ok(),
            6 => queue.submit(tag, Request::Flush).is_ok(),
            7 => buffer(queue)
                .is_some_and(|buffer| queue.submit_nvm(tag, NvmRequest::Compare { lba, buffer }).is_ok()),
            8 => buffer(queue).is_some_and(|buffer| {
                queue.submit_nvm(tag, NvmRequest::CompareAndWrite { lba, buffer }).is_ok()
            }),
            _ if action & 1 == 0 => queue.submit_nvm(tag, NvmRequest::Verify(range)).is_ok(),
            _ => {
                let destination = Lba::new(lba.get() + blocks as u64);
                queue.submit_nvm(tag, NvmRequest::Copy { sources: vec![range], destination }).is_ok()
            }
        };
        if accepted {
            waiting.insert(tag.0);
        }
        if action & 3 != 0 {
            queue.ring();
        }
    }

    fn poll(&mut self) {
        let budget = usize::from(self.hostile.byte() % 8) + 1;
        for (queue, waiting) in &mut self.queues {
            queue.ring();
            poll_queue(queue, waiting, budget);
        }
    }

    /// An admin command; any answer will do.
    fn command(&self) {
        let (which, detail) = (self.hostile.byte(), self.hostile.byte());
        let controller = self.controller;
        let nsid = NamespaceId::new(u32::from(detail % 3));
        let feature = Feature::of_controller(FeatureId(detail));
        match which % 14 {
            0 => drop(controller.smart_log()),
            1 => drop(controller.get_feature_data(feature, FeatureSelect::CURRENT, &mut [0; 64])),
            2 => drop(controller.set_feature(feature, Persistence::UntilReset, &[detail; 8])),
            3 => {
                let mut data = vec![0; usize::from(detail) * 64];
                drop(controller.read_log(LogPageId(detail), nsid, 0, &mut data));
            }
            4 => drop(controller.identify(Cns(detail), nsid)),
            5 => drop(controller.namespace_uids(nsid)),
            6 => drop(
                controller
                    .format_nvm(nsid, &FormatOptions { lba_format: detail % 3, ..FormatOptions::default() }),
            ),
            7 => drop(controller.error_log()),
            8 => drop(controller.firmware_log()),
            9 => drop(controller.changed_namespaces()),
            10 => drop(controller.command_effects()),
            11 => drop(controller.timestamp()),
            12 => drop(controller.feature_capabilities(FeatureId(detail))),
            _ => drop(controller.namespace_smart_log(nsid)),
        }
    }

    fn drain(&mut self) {
        for _ in 0..DRAIN_ROUNDS {
            let mut busy = false;
            for (queue, waiting) in &mut self.queues {
                queue.ring();
                poll_queue(queue, waiting, 64);
                // Looks for overdue commands at once, not only every so many polls.
                queue.arm_interrupt();
                assert_eq!(queue.in_flight(), waiting.len(), "a request is lost");
                busy |= !waiting.is_empty();
            }
            if !busy {
                break;
            }
            self.hostile.work(ROUND);
        }
        let life = self.controller.life();
        for (queue, waiting) in &self.queues {
            assert!(waiting.is_empty(), "never answered: {waiting:?}, the controller is {life:?}");
            let pool = queue.pool();
            assert!(
                life == Life::Abandoned || pool.available() == pool.capacity(),
                "{} of {} bytes are left in the pool of a controller that is {life:?}",
                pool.available(),
                pool.capacity()
            );
        }
    }
}

fn poll_queue(queue: &mut QueuePair, waiting: &mut BTreeSet<u64>, budget: usize) {
    queue.process_completions(budget, &mut |completion| {
        assert!(waiting.remove(&completion.tag.0), "{:?} was answered twice, or never asked", completion.tag);
    });
}
