//! What a task sees of its reactor: [`Context`], and the futures that wait for time.
//!
//! Invariants: a context never leaves its reactor's thread. Excludes: the loop (`core`).

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use crate::clock::{Instant, WallTime};
use crate::core::Core;
use crate::disk::Disk;
use crate::handle::{ReactorHandle, ReactorId, SpawnError};
use crate::timers::TimerKey;

/// A task's handle on the reactor it runs on. Clones are cheap and mean the same reactor.
#[derive(Clone)]
pub struct Context {
    core: Rc<Core>,
}

impl Context {
    pub(crate) fn new(core: Rc<Core>) -> Self {
        Self { core }
    }

    /// The number of this reactor.
    pub fn reactor(&self) -> ReactorId {
        self.core.shared().id
    }

    /// Starts `future` as a task of this reactor.
    ///
    /// # Errors
    /// All task slots are taken, or the reactor is stopping.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) -> Result<(), SpawnError> {
        self.core.spawn(Box::pin(future))
    }

    /// Monotonic time.
    pub fn now(&self) -> Instant {
        self.core.clock().now()
    }

    /// Calendar time, for time stamps.
    pub fn wall(&self) -> WallTime {
        self.core.clock().wall()
    }

    /// 64 bits of this reactor's stream of seeded randomness. Not for secrets.
    pub fn random(&self) -> u64 {
        self.core.random().next()
    }

    /// Waits for `duration`, at least.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        self.sleep_until(self.now().saturating_add(duration))
    }

    /// Waits until `deadline`, at least. Cancel-safe: dropping it leaves nothing behind.
    pub fn sleep_until(&self, deadline: Instant) -> Sleep {
        Sleep { core: Rc::clone(&self.core), deadline, timer: None }
    }

    /// Lets every task that is ready now run once.
    pub fn yield_now(&self) -> YieldNow {
        YieldNow { yielded: false }
    }

    /// This reactor's device.
    ///
    /// # Panics
    /// If the reactor was built without one.
    pub fn disk(&self) -> &Disk {
        self.try_disk().expect("this reactor was built without a device")
    }

    /// This reactor's device, if it has one.
    pub fn try_disk(&self) -> Option<&Disk> {
        self.core.disk()
    }

    /// This reactor as other threads see it.
    pub fn handle(&self) -> ReactorHandle {
        ReactorHandle { shared: self.core.shared().clone() }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("reactor", &self.reactor()).finish_non_exhaustive()
    }
}

/// Future of [`Context::sleep`].
#[must_use = "futures do nothing unless awaited"]
pub struct Sleep {
    core: Rc<Core>,
    deadline: Instant,
    timer: Option<TimerKey>,
}

impl Sleep {
    /// When it ends.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    fn disarm(&mut self) {
        if let Some(timer) = self.timer.take() {
            self.core.timers().borrow_mut().cancel(timer);
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<()> {
        if self.core.clock().now() >= self.deadline {
            self.disarm();
            return Poll::Ready(());
        }
        match self.timer {
            Some(timer) => self.core.timers().borrow_mut().update(timer, cx.waker()),
            None => {
                let timer = self.core.timers().borrow_mut().insert(self.deadline, cx.waker().clone());
                self.timer = Some(timer);
            }
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.disarm();
    }
}

/// Future of [`Context::yield_now`].
#[must_use = "futures do nothing unless awaited"]
#[derive(Debug)]
pub struct YieldNow {
    yielded: bool,
}

impl Future for YieldNow {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<()> {
        if self.yielded {
            return Poll::Ready(());
        }
        self.yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
