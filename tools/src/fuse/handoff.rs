//! Who sends a reply to the kernel: the reactor that made it, or the session thread that read its request.
//!
//! Owns: [`Handoff`]. While a request is the only one, its session thread has nothing else to do, and the program that waits
//! slept on the same core. A reply from there wakes it for a few microseconds less than one from the reactor's core, which has to
//! rouse an idle core first. So the thread spins for the reply, for [`PATIENCE`] at most; then the reactor sends it.
//!
//! | state of a request | on | to |
//! |---|---|---|
//! | `WAITING` | the reactor has a result | `DONE`: the session thread replies |
//! | `WAITING` | patience ends, or another request arrives | `LEFT`: the thread goes on |
//! | `LEFT` | the reactor has a result | the reactor replies |
//!
//! Invariants: exactly one of the two replies; no thread spins on a core that a reactor is pinned to, as it would keep the
//! reactor from working; a device too slow for it is noticed, and then hardly anybody spins.
//!
//! Memory ordering: the state changes by swaps with acquire and release; what the other side then takes was stored before.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fs_core::FsError;
use fs_core::request::{Reply, Request};

use super::front::VolumeFront;

/// How long a session thread spins: what an fsync on a fast device takes, and a little more.
const PATIENCE: Duration = Duration::from_micros(40);

/// Requests for which nobody spins after it was in vain.
const REST: u32 = 64;

const WAITING: u8 = 0;
const DONE: u8 = 1;
const LEFT: u8 = 2;

type Outcome = Result<Reply, FsError>;

/// Decides who replies. One for a front end.
#[derive(Default)]
pub(super) struct Handoff {
    /// Cores that belong to reactors; nobody spins if none are named.
    reactor_cores: Vec<usize>,
    in_flight: Arc<AtomicU32>,
    resting: AtomicU32,
}

/// A request whose session thread waits.
struct Waiting<F> {
    state: AtomicU8,
    answer: Mutex<Option<F>>,
    outcome: Mutex<Option<Outcome>>,
}

impl<F: FnOnce(Outcome)> Waiting<F> {
    /// Replies, from whichever side is entitled to by the state.
    fn reply(&self) {
        let answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(answer), Some(outcome)) = (answer, outcome) {
            answer(outcome);
        }
    }
}

/// Counts a request for as long as the volume has it, also if the volume drops it.
struct InFlight(Arc<AtomicU32>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed); // a hint only
    }
}

impl Handoff {
    /// Session threads spin on all cores but these.
    pub(super) fn beside(reactor_cores: &[usize]) -> Self {
        Self { reactor_cores: reactor_cores.to_vec(), ..Self::default() }
    }

    /// Gives the volume a request; `answer` is called here or by the volume.
    pub(super) fn submit<F>(&self, volume: &impl VolumeFront, request: Request, answer: F)
    where
        F: FnOnce(Outcome) + Send + 'static,
    {
        let alone = self.in_flight.fetch_add(1, Ordering::Relaxed) == 0;
        let counted = InFlight(Arc::clone(&self.in_flight));
        if !alone || !self.may_spin() {
            return volume.submit(request, move |outcome| {
                drop(counted);
                answer(outcome);
            });
        }
        let waiting = Arc::new(Waiting {
            state: AtomicU8::new(WAITING),
            answer: Mutex::new(Some(answer)),
            outcome: Mutex::new(None),
        });
        let served = Arc::clone(&waiting);
        volume.submit(request, move |outcome| {
            drop(counted);
            *served.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
            if served.state.swap(DONE, Ordering::AcqRel) == LEFT {
                served.reply();
            }
        });
        self.spin(&waiting);
    }

    fn spin<F: FnOnce(Outcome)>(&self, waiting: &Waiting<F>) {
        let began = Instant::now();
        // Not longer than it is the only one: more than one means that the other may need this thread, or its core.
        while waiting.state.load(Ordering::Acquire) != DONE {
            let impatient = began.elapsed() >= PATIENCE;
            if impatient || self.in_flight.load(Ordering::Relaxed) > 1 {
                if impatient {
                    self.resting.store(REST, Ordering::Relaxed);
                }
                break;
            }
            std::hint::spin_loop();
        }
        if waiting.state.swap(LEFT, Ordering::AcqRel) == DONE {
            waiting.reply();
        }
    }

    /// Whether this thread's core is its own, and it was not in vain lately.
    fn may_spin(&self) -> bool {
        if self.reactor_cores.is_empty() {
            return false;
        }
        let resting = self.resting.load(Ordering::Relaxed);
        if resting > 0 {
            self.resting.store(resting - 1, Ordering::Relaxed);
            return false;
        }
        nix::sched::sched_getcpu().is_ok_and(|core| !self.reactor_cores.contains(&core))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread::{self, ThreadId};

    use fs_core::WriteOutcome;
    use fs_core::request::{KillPrivileges, WriteSource};
    use fs_core::types::{FileOffset, InodeNr};

    use super::*;

    type Serve = Box<dyn FnOnce(Outcome) + Send>;

    /// A volume that does with a request whatever it is told to.
    struct Told<S>(S);

    impl<S: Fn(Serve) + Send + Sync + 'static> VolumeFront for Told<S> {
        fn submit(&self, _request: Request, reply: impl FnOnce(Outcome) + Send + 'static) {
            self.0(Box::new(reply));
        }

        fn write(
            &self,
            _inode: InodeNr,
            _offset: FileOffset,
            _data: &[u8],
            _source: WriteSource,
            _kill_privileges: KillPrivileges,
        ) -> WriteOutcome {
            WriteOutcome::Slow
        }
    }

    fn keeper() -> (Told<impl Fn(Serve) + Send + Sync + 'static>, mpsc::Receiver<Serve>) {
        let (sender, kept) = mpsc::channel();
        (Told(move |reply| sender.send(reply).unwrap()), kept)
    }

    fn at_once() -> Told<impl Fn(Serve) + Send + Sync + 'static> {
        Told(|reply: Serve| reply(Ok(Reply::Done)))
    }

    /// No machine has this core, so a thread is never on it.
    const ELSEWHERE: usize = usize::MAX;

    fn answered() -> (impl FnOnce(Outcome) + Send, mpsc::Receiver<ThreadId>) {
        let (sender, by) = mpsc::channel();
        (move |_outcome| sender.send(thread::current().id()).unwrap(), by)
    }

    #[test]
    fn a_quick_result_is_replied_by_the_thread_that_asked() {
        let (answer, by) = answered();
        Handoff::beside(&[ELSEWHERE]).submit(&at_once(), Request::StatFs, answer);
        assert_eq!(by.try_recv(), Ok(thread::current().id()));
    }

    #[test]
    fn a_slow_result_is_replied_by_whoever_has_it_and_nobody_spins_for_the_next() {
        let handoff = Handoff::beside(&[ELSEWHERE]);
        let (answer, by) = answered();
        let (volume, kept) = keeper();
        handoff.submit(&volume, Request::StatFs, answer);
        assert!(by.try_recv().is_err(), "there is no result yet");
        let served = thread::spawn(move || kept.recv().unwrap()(Ok(Reply::Done)));
        let server = served.thread().id();
        served.join().unwrap();
        assert_eq!(by.try_recv(), Ok(server));
        assert_eq!(handoff.resting.load(Ordering::Relaxed), REST);
        assert!(!handoff.may_spin());
    }

    #[test]
    fn of_two_requests_at_once_neither_is_waited_for() {
        let handoff = Handoff::beside(&[ELSEWHERE]);
        let (first, first_by) = answered();
        let (second, second_by) = answered();
        let (volume, kept) = keeper();
        handoff.in_flight.fetch_add(1, Ordering::Relaxed);
        handoff.submit(&volume, Request::StatFs, first);
        handoff.submit(&at_once(), Request::StatFs, second);
        assert!(second_by.try_recv().is_ok() && first_by.try_recv().is_err());
        kept.recv().unwrap()(Ok(Reply::Done));
        assert!(first_by.try_recv().is_ok());
        assert_eq!(handoff.in_flight.load(Ordering::Relaxed), 1);
        assert_eq!(handoff.resting.load(Ordering::Relaxed), 0, "nobody has spun");
    }

    #[test]
    fn nobody_spins_where_reactors_run() {
        let cores: Vec<usize> = (0..4096).collect();
        assert!(!Handoff::beside(&cores).may_spin());
        assert!(!Handoff::default().may_spin());
    }

    #[test]
    fn a_request_that_the_volume_drops_is_dropped_here_too() {
        let handoff = Handoff::beside(&[ELSEWHERE]);
        let (answer, by) = answered();
        handoff.submit(&Told(drop), Request::StatFs, answer);
        assert_eq!(by.recv(), Err(mpsc::RecvError));
        assert_eq!(handoff.in_flight.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn whoever_is_first_every_request_is_answered_once() {
        let handoff = Handoff::beside(&[ELSEWHERE]);
        let (volume, queue) = keeper();
        let server = thread::spawn(move || {
            for (number, reply) in queue.into_iter().enumerate() {
                for _ in 0..(number % 32) * 100 {
                    std::hint::spin_loop();
                }
                reply(Ok(Reply::Done));
            }
        });
        let answers = Arc::new(AtomicU32::new(0));
        for _ in 0..10_000 {
            handoff.resting.store(0, Ordering::Relaxed);
            let count = Arc::clone(&answers);
            let answer = move |_outcome| {
                count.fetch_add(1, Ordering::Relaxed);
            };
            handoff.submit(&volume, Request::StatFs, answer);
        }
        drop(volume);
        server.join().unwrap();
        assert_eq!(answers.load(Ordering::Relaxed), 10_000);
    }
}
