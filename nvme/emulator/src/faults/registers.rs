//! Faults of the registers and of the handshake behind them.
//!
//! Invariants: what a fault shows to the host is not what the controller believes, except where the variant says so;
//! once the fault is removed the host sees the truth again.

use std::time::Duration;

use nvme_spec::registers::{self, Csts};

/// How long CSTS.RDY stays 0 after an enable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadyDelay {
    /// For so many reads of CSTS.
    Reads(u64),
    /// For so long: real time with threads, otherwise that of [`advance`](crate::EmulatedController::advance).
    Time(Duration),
}

/// A register that can read as all ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllOnesRegister {
    /// Controller Capabilities.
    Cap,
    /// Controller Status.
    Csts,
}

/// What goes wrong with registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterFault {
    /// An enable is not acted on: RDY stays 0.
    NeverReady,
    /// A disable is not acted on: RDY stays 1, and commands go on being executed. Only a function reset, a power cut, or the
    /// end of the rule stops the controller.
    NeverStops,
    /// RDY shows late after each enable.
    SlowReady(ReadyDelay),
    /// An enable ends in CSTS.CFS.
    FatalOnEnable,
    /// CAP reads as this.
    CapPatched(u64),
    /// A register reads as all ones, as if the device was gone.
    AllOnes {
        /// The register.
        register: AllOnesRegister,
        /// 32-bit reads for which it does; `None` means for ever.
        reads: Option<u64>,
    },
    /// A shutdown notification is answered by "occurring" for ever; commands are no longer executed.
    ShutdownNeverCompletes,
}

/// A fault in force.
#[derive(Debug)]
pub(super) struct ActiveRegisterFault {
    pub(super) id: super::RuleId,
    pub(super) fault: RegisterFault,
    pub(super) fired: u64,
    /// Reads of CSTS since the last enable, for [`ReadyDelay::Reads`]; reads so far, for [`RegisterFault::AllOnes`].
    reads: u64,
    /// When the controller was last enabled, in the controller's nanoseconds.
    enabled_ns: u64,
}

impl ActiveRegisterFault {
    pub(super) fn new(id: super::RuleId, fault: RegisterFault, now_ns: u64) -> Self {
        Self { id, fault, fired: 0, reads: 0, enabled_ns: now_ns }
    }

    /// The controller was enabled.
    pub(super) fn enabled(&mut self, now_ns: u64) {
        if matches!(self.fault, RegisterFault::SlowReady(_)) {
            self.reads = 0;
            self.enabled_ns = now_ns;
        }
    }

    /// What a read of the 32 bits at `offset`, which would give `value`, gives.
    pub(super) fn distort(&mut self, offset: u64, value: u32, now_ns: u64) -> u32 {
        const CAP_HIGH: u64 = registers::CAP + 4;
        let new = match (self.fault, offset) {
            (RegisterFault::CapPatched(cap), registers::CAP) => cap as u32,
            (RegisterFault::CapPatched(cap), CAP_HIGH) => (cap >> 32) as u32,
            (RegisterFault::AllOnes { register: AllOnesRegister::Cap, reads }, registers::CAP | CAP_HIGH)
            | (RegisterFault::AllOnes { register: AllOnesRegister::Csts, reads }, registers::CSTS) => {
                self.reads += 1;
                if reads.is_some_and(|limit| self.reads > limit) {
                    return value;
                }
                u32::MAX
            }
            (RegisterFault::SlowReady(delay), registers::CSTS) if Csts::from(value).rdy() => {
                self.reads += 1;
                let still = match delay {
                    ReadyDelay::Reads(reads) => self.reads <= reads,
                    ReadyDelay::Time(time) => {
                        u128::from(now_ns - self.enabled_ns.min(now_ns)) < time.as_nanos()
                    }
                };
                if !still {
                    return value;
                }
                Csts::from(value).with_rdy(false).into()
            }
            _ => return value,
        };
        self.fired += 1;
        new
    }
}
