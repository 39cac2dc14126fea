//! MSI-X without an interrupt controller: each vector's message is a store into a word of RAM, and a thread watches the
//! words.
//!
//! Owns: the words, the MSI-X table's contents, the watching thread. The thread also sends doorbells that found the socket
//! full, and looks now and then whether the function is still there.
//!
//! Invariants:
//! - vectors are never masked at the device: one that is not listened to changes its word, and nobody looks;
//! - a word is cleared before its eventfd is written to, so a message that arrives later is seen.
//!
//! *Memory ordering*: the device stores a completion before its message. The acquire load of the word makes it visible to
//! the thread, the eventfd to whoever it wakes.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reactor::dma::{DmaRegion, PAGE_SIZE};
use vm_memory::Bytes;

use super::connection::{Connection, RequestError};
use super::function::Function;
use super::ram::Ram;
use crate::transport::{Listen, TransportError};

/// Bytes of an entry of the MSI-X table, and the word at its end that masks it (PCI Local Bus 3.0 §6.8.2).
const ENTRY_BYTES: u64 = 16;
const ENTRY_CONTROL: u64 = 12;
/// How often words are looked at while something happens, and while nothing does.
const SHORT: Duration = Duration::from_micros(50);
const LONG: Duration = Duration::from_millis(1);
/// Looks without anything new after which the pause becomes long.
const PATIENCE: u32 = 200;
/// How often somebody looks whether the function is still there.
const PRESENCE: Duration = Duration::from_millis(500);

/// What a vector leads to.
struct Vector {
    eventfd: Option<OwnedFd>,
    listen: Listen,
}

struct State {
    vectors: Vec<Vector>,
    listened: usize,
    stopping: bool,
}

struct Shared {
    connection: Arc<Connection>,
    function: Arc<Function>,
    words: Arc<dyn DmaRegion>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The vectors of a function.
pub(super) struct Interrupts {
    shared: Arc<Shared>,
    watcher: Mutex<Option<JoinHandle<()>>>,
}

impl Interrupts {
    pub(super) fn start(
        connection: &Arc<Connection>,
        function: &Arc<Function>,
        ram: &Arc<Ram>,
    ) -> io::Result<Self> {
        let entries = function.msix.map_or(0, |table| usize::from(table.entries).min(PAGE_SIZE / 4));
        let words = ram.allocate(PAGE_SIZE).map_err(io::Error::other)?;
        let vectors = (0..entries).map(|_| Vector { eventfd: None, listen: Listen::Off }).collect();
        let shared = Arc::new(Shared {
            connection: Arc::clone(connection),
            function: Arc::clone(function),
            words,
            state: Mutex::new(State { vectors, listened: 0, stopping: false }),
            changed: Condvar::new(),
        });
        let watching = Arc::clone(&shared);
        let watcher =
            std::thread::Builder::new().name("qtest-watch".to_owned()).spawn(move || watching.watch())?;
        Ok(Self { shared, watcher: Mutex::new(Some(watcher)) })
    }

    pub(super) fn vectors(&self) -> u16 {
        self.shared.lock().vectors.len() as u16
    }

    pub(super) fn connect(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), TransportError> {
        let refused = |reason: String| TransportError::Interrupt { vector, reason };
        let eventfd = eventfd.try_clone_to_owned().map_err(|error| refused(error.to_string()))?;
        {
            let mut state = self.shared.lock();
            let count = state.vectors.len();
            let slot = state.vectors.get_mut(usize::from(vector));
            let slot = slot.ok_or_else(|| refused(format!("the function has {count} vectors")))?;
            slot.eventfd = Some(eventfd);
        }
        match self.shared.write_entry(vector) {
            Ok(()) | Err(RequestError::Gone(_)) => Ok(()),
            Err(error) => Err(refused(error.to_string())),
        }
    }

    pub(super) fn listen(&self, vector: u16, listen: Listen) {
        let mut state = self.shared.lock();
        let Some(slot) = state.vectors.get_mut(usize::from(vector)) else { return };
        if slot.listen == listen {
            return;
        }
        slot.listen = listen;
        if listen == Listen::On {
            state.listened += 1;
            // What came before is the listener's to find.
            self.shared.clear(vector);
            drop(state);
            self.shared.changed.notify_one();
        } else {
            state.listened -= 1;
        }
    }

    /// Writes the table again, after a reset of the function.
    pub(super) fn restore(&self) -> Result<(), RequestError> {
        let connected: Vec<u16> = {
            let state = self.shared.lock();
            let with_eventfd =
                state.vectors.iter().enumerate().filter(|(_, vector)| vector.eventfd.is_some());
            with_eventfd.map(|(index, _)| index as u16).collect()
        };
        connected.into_iter().try_for_each(|vector| self.shared.write_entry(vector))
    }

    /// Ends the watching thread.
    pub(super) fn stop(&self) {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_one();
        let watcher = self.watcher.lock().unwrap_or_else(PoisonError::into_inner).take();
        if watcher.is_some_and(|watcher| watcher.join().is_err()) {
            tracing::error!("the thread that watches for interrupts has panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_entry(&self, vector: u16) -> Result<(), RequestError> {
        let Some(table) = self.function.msix else { return Ok(()) };
        let entry = table.address + u64::from(vector) * ENTRY_BYTES;
        let word = self.words.iova() + u64::from(vector) * 4;
        self.connection.write("writeq", entry, word)?;
        self.connection.write("writel", entry + 8, 1)?;
        self.connection.write("writel", entry + ENTRY_CONTROL, 0)
    }

    fn clear(&self, vector: u16) {
        let cleared = self.words.slice().store(0_u32, usize::from(vector) * 4, Ordering::Release);
        debug_assert!(cleared.is_ok(), "there are no more vectors than words");
    }

    /// Whether a message has arrived; takes it.
    fn take(&self, vector: u16) -> bool {
        let arrived = self.words.slice().load::<u32>(usize::from(vector) * 4, Ordering::Acquire);
        if arrived.is_ok_and(|word| word != 0) {
            self.clear(vector);
            return true;
        }
        false
    }

    fn watch(&self) {
        let mut idle = 0;
        let mut looked = Instant::now();
        let mut present = true;
        let mut state = self.lock();
        while !state.stopping {
            let mut news = false;
            for (index, vector) in state.vectors.iter().enumerate() {
                if vector.listen == Listen::On && self.take(index as u16) {
                    news = true;
                    if let Some(eventfd) = &vector.eventfd {
                        // Full means that it is readable, which is all that matters.
                        let _ = nix::unistd::write(eventfd, &1_u64.to_ne_bytes());
                    }
                }
            }
            let listened = state.listened > 0;
            idle = if news { 0 } else { idle + 1 };
            let waiting = self.connection.has_waiting();
            if waiting || present && looked.elapsed() >= PRESENCE {
                drop(state);
                self.connection.send_waiting();
                if present && looked.elapsed() >= PRESENCE {
                    present = self.look();
                    looked = Instant::now();
                }
                state = self.lock();
            }
            let busy = waiting || listened && idle < PATIENCE;
            let pause = if busy {
                SHORT
            } else if listened {
                LONG
            } else {
                Duration::from_millis(10)
            };
            if !state.stopping {
                state = self.changed.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Whether the function is there; tells if not.
    fn look(&self) -> bool {
        if self.connection.is_gone() {
            return false;
        }
        let present = matches!(self.function.is_present(&self.connection), Ok(true));
        if !present {
            tracing::warn!(device = self.connection.name(), "the function has left QEMU's PCI bus");
            self.connection.tell_of_removal();
        }
        present
    }
}
