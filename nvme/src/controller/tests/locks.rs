//! Every lock of the driver is held by somebody else, and requests come and go all the same.
//!
//! A thread that wanted one of these locks would wait for as long as the test holds them. [`PATIENCE`] only bounds how long a
//! failure takes; it decides nothing while the driver is right.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;

use super::*;
use crate::queue_pair::{Interrupts, LatencyRecording};
use crate::transport::SystemTiming;
use crate::transport::embedded::EmbeddedTransport;
use nvme_emulator::{ControllerConfig, EmulatedController, NamespaceConfig};
use reactor::block::{BlockDevice, Durability, Lba, OpTag, Request};

const DEPTH: u16 = 16;
/// More polls than lie between two looks at the clock.
const ROUNDS: usize = 3000;
/// For a thread that ought to get through.
const PATIENCE: Duration = Duration::from_secs(60);
/// For a thread that cannot get through before the locks are let go, however long one waits.
const GLANCE: Duration = Duration::from_millis(20);

fn controller() -> Arc<Controller> {
    let emulator =
        EmulatedController::new(ControllerConfig::with_namespace(NamespaceConfig::memory(1 << 20))).unwrap();
    let transport = Arc::new(EmbeddedTransport::new(emulator, "emu:test"));
    Controller::bring_up(transport, Arc::new(SystemTiming::default()), &ControllerOptions::default()).unwrap()
}

/// What a thread says: that it is ready, and that it is done.
struct Voice {
    said: Sender<()>,
    go: Receiver<()>,
}

/// Runs `work` on each of `count` threads once all have a queue and every lock is held. Whether they got through, with the
/// locks held for `patience` at most.
fn get_through(
    controller: &Arc<Controller>,
    count: usize,
    patience: Duration,
    work: impl Fn(&Controller, &mut QueuePair) + Sync,
) -> bool {
    let (said, heard) = channel();
    thread::scope(|scope| {
        let go: Vec<Sender<()>> = (0..count)
            .map(|_| {
                let (go, told) = channel();
                let (voice, work) = (Voice { said: said.clone(), go: told }, &work);
                scope.spawn(move || {
                    let options = QueueOptions {
                        depth: DEPTH,
                        pool_bytes: 1 << 20,
                        interrupts: Interrupts::Disabled,
                        latency: LatencyRecording::On,
                        ..QueueOptions::default()
                    };
                    let mut queue = controller.create_queue(&options).unwrap();
                    voice.said.send(()).unwrap();
                    voice.go.recv().unwrap();
                    work(controller, &mut queue);
                    // Nobody listens any more if it took too long.
                    let _ = voice.said.send(());
                    // The queue goes after the locks were let go: deleting it takes them.
                    let _ = voice.go.recv();
                });
                go
            })
            .collect();
        for _ in 0..count {
            heard.recv().unwrap();
        }
        let shared = controller.shared();
        let admin = shared.admin.lock().unwrap();
        let asks = shared.desk.asks();
        let sleepers = shared.sleepers.lock().unwrap();
        let events = shared.events.lock().unwrap();
        let namespaces = shared.namespaces.write().unwrap();
        let cause = shared.link.health.hold_cause();
        for go in &go {
            go.send(()).unwrap();
        }
        let through = (0..count).all(|_| heard.recv_timeout(patience) != Err(RecvTimeoutError::Timeout));
        drop((admin, asks, sleepers, events, namespaces, cause));
        drop(go);
        through
    })
}

/// Keeps the queue full, with reads and writes by turns.
fn work(_: &Controller, queue: &mut QueuePair) {
    let mut idle: Vec<_> = (0..DEPTH).map(|_| queue.pool().try_alloc(4096).unwrap()).collect();
    for round in 0..ROUNDS {
        while let Some(buffer) = idle.pop() {
            let lba = Lba::new(idle.len() as u64);
            let request = if (round + idle.len()).is_multiple_of(2) {
                Request::Read { lba, buffer }
            } else {
                Request::Write { lba, buffer, durability: Durability::Durable }
            };
            queue.submit(OpTag(0), request).unwrap();
        }
        queue.ring();
        queue.process_completions(usize::from(DEPTH), &mut |completion| {
            completion.result.unwrap();
            idle.extend(completion.buffer);
        });
    }
}

#[test]
fn requests_come_and_go_while_every_lock_is_held() {
    assert!(get_through(&controller(), 2, PATIENCE, work));
}

/// Each lock held does stop who takes it: the test above can fail.
#[test]
fn whoever_takes_a_lock_does_not_get_through() {
    let takers: [fn(&Controller, &mut QueuePair); 6] = [
        |controller, _| drop(controller.smart_log()),
        |controller, _| drop(controller.take_events()),
        |controller, _| drop(controller.namespaces()),
        |controller, _| drop(controller.shared().desk.asks()),
        |controller, _| controller.shared().wake_queues(),
        |controller, _| drop(controller.shared().link.health.cause()),
    ];
    for (number, taker) in takers.into_iter().enumerate() {
        assert!(!get_through(&controller(), 1, GLANCE, taker), "taker {number}");
    }
}
