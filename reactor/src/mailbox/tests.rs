//! Mailboxes between threads: order, backpressure, closing.

use super::*;
use crate::bell::Bell;
use crate::handle::Shared;
use crate::park::{CountingWaker, wait_for};
use std::pin::pin;
use std::task::Waker;
use std::thread;

fn handle() -> ReactorHandle {
    ReactorHandle { shared: Shared::new(ReactorId::new(0), 8, Bell::silent()) }
}

fn poll_once<F: Future>(future: Pin<&mut F>, waker: &Waker) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(waker))
}

#[test]
fn nothing_is_lost_or_reordered_between_many_threads_and_a_tiny_mailbox() {
    const THREADS: u64 = 4;
    const MESSAGES: u64 = 3_000;
    let (sender, mut receiver) = mailbox::<(u64, u64)>(2, &handle());
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let sender = sender.clone();
            thread::spawn(move || {
                for message in 0..MESSAGES {
                    match message % 3 {
                        0 => sender.send_blocking((thread, message)).unwrap(),
                        1 => wait_for(sender.send((thread, message))).unwrap(),
                        _ => {
                            let mut value = (thread, message);
                            while let Err(SendError::Full(back)) = sender.try_send(value) {
                                value = back;
                                thread::yield_now();
                            }
                        }
                    }
                }
            })
        })
        .collect();
    drop(sender);
    let mut next = [0; THREADS as usize];
    while let Some((thread, message)) = wait_for(receiver.recv()) {
        assert_eq!(message, next[thread as usize], "messages of thread {thread} out of order");
        next[thread as usize] += 1;
    }
    assert_eq!(next, [MESSAGES; THREADS as usize]);
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn receiver_that_leaves_releases_every_blocked_sender_with_its_message() {
    let (sender, mut receiver) = mailbox::<u32>(1, &handle());
    sender.try_send(0).unwrap();
    let threads: Vec<_> = (1..4)
        .map(|message| {
            let sender = sender.clone();
            thread::spawn(move || (message, sender.send_blocking(message)))
        })
        .collect();
    assert_eq!(receiver.try_recv(), Some(0));
    drop(receiver);
    // One of them may have got its message in before the receiver left; none hangs, and none gets a foreign message.
    let mut refused = 0;
    for thread in threads {
        if let (message, Err(Closed(back))) = thread.join().unwrap() {
            assert_eq!(back, message);
            refused += 1;
        }
    }
    assert!(refused >= 2);
}

#[test]
fn waiting_senders_are_served_in_order_of_arrival() {
    let (sender, mut receiver) = mailbox::<u32>(1, &handle());
    sender.try_send(0).unwrap();
    let mut first = pin!(sender.send(1));
    let mut second = pin!(sender.send(2));
    let (first_wakes, second_wakes) = (CountingWaker::new(), CountingWaker::new());
    assert!(poll_once(first.as_mut(), &first_wakes.waker()).is_pending());
    assert!(poll_once(second.as_mut(), &second_wakes.waker()).is_pending());
    assert_eq!(receiver.try_recv(), Some(0));
    assert_eq!((first_wakes.count(), second_wakes.count()), (1, 0));
    assert!(poll_once(first.as_mut(), &first_wakes.waker()).is_ready());
    assert_eq!(receiver.try_recv(), Some(1));
    assert_eq!(second_wakes.count(), 1);
    assert!(poll_once(second.as_mut(), &second_wakes.waker()).is_ready());
}

#[test]
fn called_sender_that_goes_away_passes_the_call_on() {
    let (sender, mut receiver) = mailbox::<u32>(1, &handle());
    sender.try_send(0).unwrap();
    let mut first = Box::pin(sender.send(1));
    let mut second = pin!(sender.send(2));
    let wakes = CountingWaker::new();
    assert!(poll_once(first.as_mut(), Waker::noop()).is_pending());
    assert!(poll_once(second.as_mut(), &wakes.waker()).is_pending());
    assert_eq!(receiver.try_recv(), Some(0));
    drop(first);
    assert_eq!(wakes.count(), 1);
    assert!(poll_once(second.as_mut(), &wakes.waker()).is_ready());
    assert_eq!(receiver.try_recv(), Some(2), "the message of a dropped send is not sent");
}

#[test]
fn called_sender_that_was_overtaken_keeps_its_place() {
    let (sender, mut receiver) = mailbox::<u32>(1, &handle());
    sender.try_send(0).unwrap();
    let mut first = pin!(sender.send(1));
    let mut second = pin!(sender.send(2));
    assert!(poll_once(first.as_mut(), Waker::noop()).is_pending());
    assert!(poll_once(second.as_mut(), Waker::noop()).is_pending());
    assert_eq!(receiver.try_recv(), Some(0));
    sender.try_send(9).unwrap();
    let wakes = CountingWaker::new();
    assert!(poll_once(first.as_mut(), &wakes.waker()).is_pending());
    assert_eq!(receiver.try_recv(), Some(9));
    assert_eq!(wakes.count(), 1, "still the first in line");
}

#[test]
fn dropped_recv_loses_no_message() {
    let (sender, mut receiver) = mailbox::<u32>(4, &handle());
    {
        let mut recv = pin!(receiver.recv());
        assert!(poll_once(recv.as_mut(), Waker::noop()).is_pending());
        sender.try_send(5).unwrap();
    }
    assert_eq!(receiver.try_recv(), Some(5));
}
