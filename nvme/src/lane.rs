//! What an I/O queue's owner and the keeper tell each other about one queue: the owner asks, the keeper answers.
//!
//! Owns: [`Lane`] (how the queue is created, and the answer to the owner's last question) and [`Ask`].
//!
//! Invariants:
//! - an owner asks one thing at a time, and marks it [`Answer::Pending`] before the keeper can see the question;
//! - the keeper answers each question once, or lets it fall when the controller's life has changed since it was asked (then
//!   the owner sees that change instead).
//!
//! *Memory ordering*: an answer is stored with release after what it reports was done on the device; the owner loads it
//! with acquire before it relies on that.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use nvme_spec::{CommandId, QueueId, SubmissionEntry};

use crate::fault::Pulse;
use crate::planted::Bug;
use crate::sync::{AtomicU8, Ordering, order_unless};
use crate::wake;

/// What an owner wants done by admin command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Errand {
    /// Abort a command that is overdue.
    Abort {
        /// The command.
        command: CommandId,
    },
    /// Delete the queue, to be rid of its commands.
    Delete {
        /// The command that is overdue, its opcode and what it was given: for the fault if that does not help either.
        command: CommandId,
        opcode: u8,
        timeout: Duration,
    },
    /// Create the queue (again).
    Create,
    /// Look whether the controller is still there: a command takes suspiciously long.
    Look,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Answer {
    /// Not known yet.
    Pending = 0,
    /// The command was aborted; its completion says so (bit 0 of the Abort's result was 0, NVMe 1.4 §5.1).
    Aborted = 1,
    /// The command was not aborted: it is unknown to the controller, or beyond abortion.
    NotAborted = 2,
    /// The queue is gone, and with it every command that was on it.
    Deleted = 3,
    /// The queue exists.
    Created = 4,
    /// The controller is there, and reports no fatal error.
    Alive = 5,
}

/// One I/O queue, as both sides know it.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) id: QueueId,
    pub(crate) create_cq: SubmissionEntry,
    pub(crate) create_sq: SubmissionEntry,
    /// What a sleeping owner waits on.
    pub(crate) waker: Option<Arc<OwnedFd>>,
    /// The controller's pulse when the queue was created first.
    pub(crate) born: Pulse,
    answer: AtomicU8,
    /// Creations in a row that the controller did not survive.
    failed_creations: AtomicU32,
}

/// How an attempt to create a queue ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Creation {
    Succeeded,
    /// With a fault of the controller.
    Failed,
}

/// A question on its way to the keeper.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) lane: Arc<Lane>,
    pub(crate) errand: Errand,
    /// The controller's pulse when it was asked.
    pub(crate) pulse: Pulse,
}

impl Lane {
    pub(crate) fn new(
        id: QueueId,
        create_cq: SubmissionEntry,
        create_sq: SubmissionEntry,
        waker: Option<Arc<OwnedFd>>,
        born: Pulse,
    ) -> Self {
        let answer = AtomicU8::new(Answer::Pending as u8);
        Self { id, create_cq, create_sq, waker, born, answer, failed_creations: AtomicU32::new(0) }
    }

    /// Notes how an attempt to create the queue ended. Returns how many failed since one succeeded. The keeper's.
    pub(crate) fn note_creation(&self, outcome: Creation) -> u32 {
        // Relaxed: only the keeper looks, under the admin queue's lock.
        match outcome {
            Creation::Succeeded => {
                self.failed_creations.store(0, Ordering::Relaxed);
                0
            }
            Creation::Failed => self.failed_creations.fetch_add(1, Ordering::Relaxed) + 1,
        }
    }

    /// Forgets the last answer. The owner's, before it asks.
    pub(crate) fn expect(&self) {
        // Relaxed: the question travels through a mutex, which orders this before its answer.
        self.answer.store(Answer::Pending as u8, Ordering::Relaxed);
    }

    /// The keeper's.
    pub(crate) fn reply(&self, answer: Answer) {
        // Release: pairs with the acquire in `answer`.
        self.answer.store(answer as u8, order_unless(Bug::AnswerRelaxed, Ordering::Release));
        if let Some(waker) = &self.waker {
            wake::signal(waker);
        }
    }

    pub(crate) fn answer(&self) -> Answer {
        // Acquire: what the keeper did before it replied is visible.
        match self.answer.load(order_unless(Bug::AnswerReadRelaxed, Ordering::Acquire)) {
            1 => Answer::Aborted,
            2 => Answer::NotAborted,
            3 => Answer::Deleted,
            4 => Answer::Created,
            5 => Answer::Alive,
            _ => Answer::Pending,
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::planted::assert_caught;
    use loom::sync::atomic::AtomicU32;
    use loom::sync::{Arc, Mutex};
    use loom::thread;

    fn lane() -> Lane {
        let entry = SubmissionEntry::default();
        Lane::new(QueueId::new(1), entry, entry, None, Pulse::NONE)
    }

    /// Whoever reads an answer sees what was done for it, and never the answer to the question before.
    fn ask_and_answer() {
        loom::model(|| {
            let lane = Arc::new(lane());
            let (desk, done) = (Arc::new(Mutex::new(false)), Arc::new(AtomicU32::new(0)));
            lane.reply(Answer::Deleted); // the question before
            let keeper = {
                let (lane, desk, done) = (Arc::clone(&lane), Arc::clone(&desk), Arc::clone(&done));
                thread::spawn(move || {
                    if *desk.lock().unwrap() {
                        done.store(1, Ordering::Relaxed);
                        lane.reply(Answer::Created);
                    }
                })
            };
            lane.expect();
            *desk.lock().unwrap() = true;
            match lane.answer() {
                Answer::Pending => {}
                Answer::Created => assert_eq!(done.load(Ordering::Relaxed), 1),
                other => panic!("{other:?} answers another question"),
            }
            keeper.join().unwrap();
        });
    }

    #[test]
    fn loom_an_answer_is_of_this_question_and_comes_after_the_deed() {
        ask_and_answer();
    }

    #[test]
    fn loom_an_answer_that_orders_nothing_is_caught() {
        assert_caught(Bug::AnswerRelaxed, ask_and_answer);
        assert_caught(Bug::AnswerReadRelaxed, ask_and_answer);
    }
}
