//! The register file (§3.1) and the state machine behind CC and CSTS.
//!
//! Owns: the values of all registers, the controller's [`State`] and its transitions.
//!
//! | state \ event | enable          | disable  | shutdown notice | fatal error |
//! |---------------|-----------------|----------|-----------------|-------------|
//! | `Disabled`    | `Ready` (start) | –        | – (flush)       | `Failed`    |
//! | `Ready`       | –               | `Disabled` (reset) | `Shutdown` (flush) | `Failed` |
//! | `Shutdown`    | –               | `Disabled` (reset) | –    | `Failed`    |
//! | `Failed`      | –               | `Disabled` (reset) | –    | –           |
//!
//! A start that finds bad queue attributes ends in `Failed` instead of `Ready`.
//!
//! Memory ordering: `state` is stored with release order after what it announces, and loaded with acquire order before
//! each command.
//!
//! Excludes: carrying transitions out (`handshake`).

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use nvme_spec::registers::{Cap, Cc, Csts, Version};

use crate::config::ControllerConfig;

/// What the controller is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    Disabled = 0,
    Ready = 1,
    Shutdown = 2,
    Failed = 3,
    /// The device is gone.
    Removed = 4,
}

/// What can happen to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Enable,
    Disable,
    ShutdownNotice,
    Fatal,
    Remove,
    Insert,
}

impl State {
    /// The state after `event`.
    pub(crate) fn after(self, event: Event) -> Self {
        match (self, event) {
            (_, Event::Remove) => Self::Removed,
            (Self::Removed, Event::Insert) => Self::Disabled,
            (state, Event::Insert) => state,
            (Self::Removed, _) => Self::Removed,
            (Self::Disabled, Event::Enable) => Self::Ready,
            (Self::Disabled, Event::Disable | Event::ShutdownNotice) => Self::Disabled,
            (Self::Ready, Event::ShutdownNotice) => Self::Shutdown,
            (Self::Ready, Event::Enable) => Self::Ready,
            (Self::Ready | Self::Shutdown | Self::Failed, Event::Disable) => Self::Disabled,
            (Self::Shutdown, Event::Enable | Event::ShutdownNotice) => Self::Shutdown,
            (Self::Failed, Event::Enable | Event::ShutdownNotice) => Self::Failed,
            (_, Event::Fatal) => Self::Failed,
        }
    }

    fn from_raw(raw: u8) -> Self {
        match raw {
            0 => Self::Disabled,
            1 => Self::Ready,
            2 => Self::Shutdown,
            3 => Self::Failed,
            _ => Self::Removed,
        }
    }
}

/// The registers.
#[derive(Debug)]
pub(crate) struct Registers {
    pub(crate) cap: Cap,
    pub(crate) version: Version,
    cc: AtomicU32,
    csts: AtomicU32,
    pub(crate) aqa: AtomicU32,
    pub(crate) asq: AtomicU64,
    pub(crate) acq: AtomicU64,
    state: AtomicU8,
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
}

impl Registers {
    pub(crate) fn new(config: &ControllerConfig) -> Self {
        let cap = Cap::new()
            .with_mqes_z(config.mqes_z)
            .with_cqr(true)
            .with_to(config.to)
            .with_dstrd(config.dstrd)
            .with_css(Cap::CSS_NVM)
            .with_mpsmin(config.mpsmin)
            .with_mpsmax(config.mpsmax);
        Self {
            cap,
            version: Version::V1_4,
            cc: AtomicU32::new(0),
            csts: AtomicU32::new(0),
            aqa: AtomicU32::new(0),
            asq: AtomicU64::new(0),
            acq: AtomicU64::new(0),
            state: AtomicU8::new(State::Disabled as u8),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
        }
    }

    #[inline]
    pub(crate) fn state(&self) -> State {
        State::from_raw(self.state.load(Ordering::Acquire))
    }

    /// Moves to the state after `event`.
    pub(crate) fn apply(&self, event: Event) {
        let mut raw = self.state.load(Ordering::Acquire);
        loop {
            let after = State::from_raw(raw).after(event) as u8;
            match self.state.compare_exchange_weak(raw, after, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(now) => raw = now,
            }
        }
    }

    pub(crate) fn cc(&self) -> Cc {
        Cc::from(self.cc.load(Ordering::Acquire))
    }

    /// Stores CC and returns the value before.
    pub(crate) fn set_cc(&self, value: u32) -> Cc {
        Cc::from(self.cc.swap(value, Ordering::AcqRel))
    }

    /// CSTS as the host reads it: CFS is nothing but the state.
    pub(crate) fn csts(&self) -> Csts {
        Csts::from(self.csts.load(Ordering::Acquire)).with_cfs(self.state() == State::Failed)
    }

    /// A fatal error met while executing. Ignored once a reset has begun: what it is about is being taken away.
    pub(crate) fn fail_if_enabled(&self) {
        let mut raw = self.state.load(Ordering::Acquire);
        while State::from_raw(raw) != State::Disabled {
            let failed = State::from_raw(raw).after(Event::Fatal) as u8;
            match self.state.compare_exchange_weak(raw, failed, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(now) => raw = now,
            }
        }
    }

    /// Changes CSTS (but for CFS) atomically.
    pub(crate) fn update_csts(&self, change: impl Fn(Csts) -> Csts) {
        let mut raw = self.csts.load(Ordering::Acquire);
        loop {
            let new = u32::from(change(Csts::from(raw)));
            match self.csts.compare_exchange_weak(raw, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(now) => raw = now,
            }
        }
    }

    /// Power-on values.
    pub(crate) fn power_on(&self) {
        for register in [&self.cc, &self.csts, &self.aqa] {
            register.store(0, Ordering::Release);
        }
        self.asq.store(0, Ordering::Release);
        self.acq.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transitions_are_those_of_the_table() {
        use Event::{Disable, Enable, Fatal, Insert, Remove, ShutdownNotice};
        use State::{Disabled, Failed, Ready, Removed, Shutdown};
        let table = [
            (Disabled, [Ready, Disabled, Disabled, Failed, Removed, Disabled]),
            (Ready, [Ready, Disabled, Shutdown, Failed, Removed, Ready]),
            (Shutdown, [Shutdown, Disabled, Shutdown, Failed, Removed, Shutdown]),
            (Failed, [Failed, Disabled, Failed, Failed, Removed, Failed]),
            (Removed, [Removed, Removed, Removed, Removed, Removed, Disabled]),
        ];
        for (state, row) in table {
            let events = [Enable, Disable, ShutdownNotice, Fatal, Remove, Insert];
            for (event, after) in events.into_iter().zip(row) {
                assert_eq!(state.after(event), after, "{state:?} {event:?}");
            }
        }
    }

    /// A queue that was found unmapped while a reset took it away left the controller `Failed` without CFS: it could
    /// never be enabled again.
    #[test]
    fn fatal_error_met_during_a_reset_does_not_outlive_it() {
        let registers = Registers::new(&ControllerConfig::default());
        registers.fail_if_enabled();
        assert_eq!(registers.state(), State::Disabled);
        registers.apply(Event::Enable);
        registers.fail_if_enabled();
        assert_eq!((registers.state(), registers.csts().cfs()), (State::Failed, true));
        registers.apply(Event::Disable);
        assert!(!registers.csts().cfs());
    }
}
