//! The simulator: repeatability, virtual time, deadlock detection.

use super::*;
use crate::block::{Durability, Lba};
use crate::{SendError, mailbox, oneshot};
use std::cell::RefCell;

fn simulator(seed: u64, reactors: u16) -> Simulator {
    let disk = SimDisk::new(SimDiskOptions { seed, ..SimDiskOptions::default() });
    Simulator::new(SimOptions { seed, reactors, disk: Some(disk), ..SimOptions::default() })
}

/// Several reactors exchange messages, sleep and write; the hash covers the order of it all.
fn busy_run(seed: u64) -> u64 {
    let sim = simulator(seed, 3);
    let (sender, mut receiver) = mailbox::<u64>(2, &sim.handle(2));
    for reactor in 0..2 {
        for task in 0..4_u64 {
            let sender = sender.clone();
            sim.spawn(reactor, move |ctx| async move {
                for round in 0..5 {
                    ctx.sleep(Duration::from_nanos(ctx.random() % 10_000)).await;
                    let mut buffer = ctx.disk().pool().alloc(4096).await.unwrap();
                    buffer.fill(0, 4096, task as u8);
                    let lba = Lba::new(ctx.random() % 100);
                    let (result, _) = ctx.disk().write(lba, buffer, Durability::Cached).await;
                    result.unwrap();
                    sender.send(task * 10 + round).await.unwrap();
                }
            });
        }
    }
    drop(sender);
    let sum = sim.block_on(2, |_| async move {
        let mut sum = 0;
        while let Some(value) = receiver.recv().await {
            sum += value;
        }
        sum
    });
    assert_eq!(sum, Ok(2 * (0..4).map(|task| 50 * task + 10).sum::<u64>()));
    sim.trace_hash()
}

#[test]
fn same_seed_gives_the_same_trace_and_another_seed_another() {
    for seed in 0..5 {
        assert_eq!(busy_run(seed), busy_run(seed), "seed {seed}");
        assert_ne!(busy_run(seed), busy_run(seed + 1), "seed {seed}");
    }
}

#[test]
fn time_jumps_to_the_next_timer() {
    let sim = Simulator::new(SimOptions::default());
    let slept = sim.block_on(0, |ctx| async move {
        let start = ctx.now();
        ctx.sleep(Duration::from_secs(3600)).await;
        ctx.now() - start
    });
    let slept = slept.unwrap();
    assert!(slept >= Duration::from_secs(3600) && slept < Duration::from_secs(3601), "{slept:?}");
}

#[test]
fn waiting_for_nothing_is_reported_as_deadlock() {
    let sim = simulator(3, 2);
    let (_sender, mut receiver) = mailbox::<()>(1, &sim.handle(1));
    sim.spawn(1, move |_| async move {
        receiver.recv().await;
    });
    let (_keep, reply) = oneshot::<()>();
    let error = sim.block_on(0, |_| reply).unwrap_err();
    assert!(
        matches!(&error, SimError::Deadlock { seed: 3, reactors, .. } if reactors.contains("reactor 1: 1 tasks"))
    );
    // The simulation goes on after that.
    assert_eq!(sim.block_on(0, |_| async { 5 }), Ok(5));
}

#[test]
fn endless_run_stops_at_the_limit_of_rounds() {
    let sim = Simulator::new(SimOptions { max_rounds: 1000, ..SimOptions::default() });
    let result: Result<(), _> = sim.block_on(0, |ctx| async move {
        loop {
            ctx.yield_now().await;
        }
    });
    assert!(matches!(result, Err(SimError::TooManyRounds { .. })));
}

#[test]
fn tasks_run_in_different_orders_under_different_seeds() {
    let order = |seed| {
        let sim = Simulator::new(SimOptions { seed, ..SimOptions::default() });
        let log = Rc::new(RefCell::new(Vec::new()));
        for task in 0..6 {
            let log = Rc::clone(&log);
            sim.spawn(0, move |_| async move { log.borrow_mut().push(task) });
        }
        sim.run_until_idle().unwrap();
        log.take()
    };
    let orders: std::collections::BTreeSet<_> = (0..20).map(order).collect();
    assert!(orders.len() > 5, "{orders:?}");
}

#[test]
fn tasks_are_dropped_with_the_simulator() {
    let alive = Rc::new(());
    let sim = Simulator::new(SimOptions::default());
    let held = Rc::clone(&alive);
    sim.spawn(0, move |ctx| async move {
        ctx.sleep(Duration::MAX).await;
        drop(held);
    });
    sim.run_for(Duration::from_secs(1)).unwrap();
    assert_eq!(Rc::strong_count(&alive), 2);
    drop(sim);
    assert_eq!(Rc::strong_count(&alive), 1);
}

#[test]
fn run_for_stops_before_what_lies_beyond() {
    let sim = Simulator::new(SimOptions::default());
    let fired = Rc::new(Cell::new(false));
    let seen = Rc::clone(&fired);
    sim.spawn(0, move |ctx| async move {
        ctx.sleep(Duration::from_secs(2)).await;
        seen.set(true);
    });
    sim.run_for(Duration::from_secs(1)).unwrap();
    assert!(!fired.get());
    sim.run_for(Duration::from_secs(2)).unwrap();
    assert!(fired.get());
}

#[test]
fn full_mailbox_gives_the_message_back() {
    let sim = Simulator::new(SimOptions::default());
    let (sender, mut receiver) = mailbox(1, &sim.handle(0));
    assert_eq!(sender.try_send(1), Ok(()));
    assert_eq!(sender.try_send(2), Err(SendError::Full(2)));
    assert_eq!(receiver.try_recv(), Some(1));
    drop(receiver);
    assert_eq!(sender.try_send(3), Err(SendError::Closed(3)));
}
