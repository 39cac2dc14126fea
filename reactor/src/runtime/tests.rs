//! Reactors on real threads: starting, waking, stopping, draining.

use super::*;
use crate::sim::{SimDisk, SimDiskOptions};
use crate::{Durability, Lba, SpawnError, SystemClock, mailbox, oneshot};
use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};

fn options(reactors: usize) -> Options {
    // All on the first processor: the tests are about order, not about speed, and must not fight for cores.
    let core = CoreId::available().first().copied().unwrap_or(CoreId::new(0));
    let config = ReactorConfig { idle_spin: Duration::from_micros(1), ..ReactorConfig::default() };
    Options { cores: vec![core; reactors], config, clock: Arc::new(SystemClock::new()), seed: 1 }
}

fn without_devices(reactors: usize) -> Runtime {
    Runtime::start(options(reactors), |_| Ok::<_, io::Error>(None)).unwrap()
}

fn clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock::new())
}

#[test]
fn request_and_reply_cross_reactors_and_outside_threads() {
    let runtime = without_devices(2);
    let (sender, mut receiver) = mailbox::<(u64, crate::OneshotSender<u64>)>(4, &runtime.handles()[1]);
    let serve = move |ctx: Context| {
        let task = async move {
            while let Some((number, reply)) = receiver.recv().await {
                let _ = reply.send(number * 2);
            }
        };
        ctx.spawn(task).unwrap();
    };
    runtime.handles()[1].spawn_with(serve).unwrap();
    let (done, result) = oneshot();
    let requests = sender.clone();
    let ask = move |ctx: Context| {
        let task = async move {
            let mut sum = 0;
            for number in 0..100 {
                let (reply, answer) = oneshot();
                requests.send((number, reply)).await.unwrap();
                sum += answer.await.unwrap();
            }
            done.send(sum).unwrap();
        };
        ctx.spawn(task).unwrap();
    };
    runtime.handles()[0].spawn_with(ask).unwrap();
    assert_eq!(result.recv_blocking(), Ok(9900));
    let (reply, answer) = oneshot();
    sender.send_blocking((21, reply)).unwrap();
    assert_eq!(answer.recv_blocking(), Ok(42));
    runtime.stop().unwrap();
    assert!(sender.is_closed(), "the receiving task went with its reactor");
}

/// Every round lets the reactor go idle (spinning hardly at all), so that message and sleep meet in every order.
#[test]
fn no_wake_up_is_lost_between_a_message_and_going_to_sleep() {
    const ROUNDS: u32 = 3_000;
    let runtime = without_devices(1);
    let (sender, mut receiver) = mailbox::<crate::OneshotSender<u32>>(1, &runtime.handles()[0]);
    let serve = move |ctx: Context| {
        let task = async move {
            let mut count = 0;
            while let Some(reply) = receiver.recv().await {
                count += 1;
                let _ = reply.send(count);
            }
        };
        ctx.spawn(task).unwrap();
    };
    runtime.handles()[0].spawn_with(serve).unwrap();
    for round in 1..=ROUNDS {
        let (reply, answer) = oneshot();
        sender.send_blocking(reply).unwrap();
        assert_eq!(answer.recv_blocking(), Ok(round));
        // Vary the moment of the next message relative to the reactor's way to sleep.
        for _ in 0..round % 64 {
            hint::spin_loop();
        }
    }
    runtime.stop().unwrap();
}

#[test]
fn idle_reactor_sleeps_and_makes_no_rounds_until_woken() {
    let runtime = without_devices(1);
    let handle = runtime.handles()[0].clone();
    while handle.stats().sleeps == 0 {
        thread::yield_now();
    }
    // Nobody wakes it, so the number of rounds cannot change, however long this takes.
    let before = handle.stats();
    thread::sleep(Duration::from_millis(20));
    let after = handle.stats();
    assert_eq!(before.loops, after.loops);
    handle.wake();
    while handle.stats().loops == after.loops {
        thread::yield_now();
    }
    runtime.stop().unwrap();
}

#[test]
fn timers_end_sleep_on_real_time() {
    let slept = block_on(None, clock(), 0, |ctx| async move {
        let start = ctx.now();
        ctx.sleep(Duration::from_millis(3)).await;
        ctx.now() - start
    });
    assert!(slept >= Duration::from_millis(3));
}

#[test]
fn block_on_drives_a_device_and_spawned_tasks() {
    let disk = SimDisk::new(SimDiskOptions::default());
    let shown = disk.clone();
    let byte = block_on(Some(disk.queue(ReactorId::new(0))), clock(), 0, |ctx| async move {
        let (done, wait) = oneshot();
        let writer = ctx.clone();
        let task = async move {
            let mut buffer = writer.disk().pool().alloc(4096).await.unwrap();
            buffer.fill(0, 4096, 0x5a);
            let (result, _) = writer.disk().write(Lba::new(3), buffer, Durability::Durable).await;
            let _ = done.send(result);
        };
        ctx.spawn(task).unwrap();
        wait.await.unwrap().unwrap();
        let (result, buffer) =
            ctx.disk().read(Lba::new(3), ctx.disk().pool().alloc(4096).await.unwrap()).await;
        result.unwrap();
        let mut byte = [0];
        buffer.read_at(4095, &mut byte);
        byte[0]
    });
    assert_eq!(byte, 0x5a);
    assert_eq!(shown.write_count(), 1);
}

#[test]
fn block_on_is_woken_by_other_threads() {
    let (sender, receiver) = oneshot();
    let thread = thread::spawn(move || {
        thread::sleep(Duration::from_millis(2));
        sender.send(8)
    });
    assert_eq!(block_on(None, clock(), 0, |_| receiver), Ok(8));
    thread.join().unwrap().unwrap();
}

#[test]
fn device_that_cannot_be_opened_stops_the_start_and_names_the_reactor() {
    let result = Runtime::start(options(3), |reactor| match reactor.get() {
        1 => Err("no such device"),
        _ => Ok(None),
    });
    let Err(StartError::Device { reactor, source }) = result else { panic!("started: {result:?}") };
    assert_eq!((reactor.get(), source), (1, "no such device"));
    assert!(matches!(Runtime::start(options(0), |_| Ok::<_, ()>(None)), Err(StartError::CoreCount(0))));
}

#[test]
fn factory_that_panics_is_an_error_not_a_hang() {
    let result = Runtime::start(options(2), |reactor| -> Result<_, io::Error> {
        assert_eq!(reactor.get(), 0, "planted");
        Ok(None)
    });
    assert!(matches!(result, Err(StartError::System { reactor, .. }) if reactor.get() == 1));
}

#[test]
fn panicking_task_closes_its_reactor_and_is_reported() {
    let runtime = without_devices(1);
    let handle = runtime.handles()[0].clone();
    let (held, canceled) = oneshot::<()>();
    let doomed = move |ctx: Context| {
        let task = async move {
            let _held = held;
            panic!("planted");
        };
        ctx.spawn(task).unwrap();
    };
    handle.spawn_with(doomed).unwrap();
    assert_eq!(canceled.recv_blocking(), Err(crate::Canceled));
    while handle.spawn_with(|_| ()) != Err(SpawnError::Stopped) {
        thread::yield_now();
    }
    assert_eq!(runtime.stop(), Err(StopError::Panicked { reactor: ReactorId::new(0) }));
}

#[test]
fn stop_drops_tasks_and_jobs_after_it_are_refused() {
    static DROPPED: AtomicUsize = AtomicUsize::new(0);
    struct Guard;
    impl Drop for Guard {
        fn drop(&mut self) {
            DROPPED.fetch_add(1, Ordering::SeqCst);
        }
    }
    let runtime = without_devices(2);
    for handle in runtime.handles() {
        let guard = Guard;
        let sleep = move |ctx: Context| {
            let own = ctx.clone();
            let task = async move {
                let _guard = guard;
                own.sleep(Duration::MAX).await;
            };
            ctx.spawn(task).unwrap();
        };
        handle.spawn_with(sleep).unwrap();
    }
    let handle = runtime.handles()[0].clone();
    runtime.stop().unwrap();
    assert_eq!(DROPPED.load(Ordering::SeqCst), 2);
    assert_eq!(handle.spawn_with(|_| ()), Err(SpawnError::Stopped));
}

#[test]
fn tasks_beyond_the_limit_are_refused_and_slots_are_reused() {
    let core = Core::new(CoreParts {
        shared: Shared::new(ReactorId::new(0), 2, Bell::silent()),
        config: ReactorConfig { max_tasks: 2, ..ReactorConfig::default() },
        clock: clock(),
        seed: 0,
        schedule: Schedule::Fifo,
    });
    let _entered = core.enter();
    for _ in 0..3 {
        let log = Rc::new(RefCell::new(0));
        for _ in 0..2 {
            let log = Rc::clone(&log);
            core.spawn(Box::pin(async move {
                // Queued again while ending: the slot must survive until that entry is taken.
                std::future::poll_fn(|cx| {
                    cx.waker().wake_by_ref();
                    Poll::Ready(())
                })
                .await;
                *log.borrow_mut() += 1;
            }))
            .unwrap();
        }
        assert_eq!(core.spawn(Box::pin(async {})), Err(SpawnError::Full));
        while core.turn() {}
        assert_eq!((*log.borrow(), core.live_tasks()), (2, 0));
    }
}
