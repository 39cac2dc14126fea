//! Locking that outlives a panic of another thread.
//!
//! A panic while one of the controller's locks is held is a failed assertion of this crate; it has already been reported
//! on its own thread. Later callers go on with the state as it is rather than panic once more for the same cause.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
