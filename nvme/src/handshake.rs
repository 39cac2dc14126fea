//! The register handshake: disable, enable, shut down; every wait has a deadline.
//!
//! Invariants:
//! - CC.EN is changed only once CSTS.RDY matches its old value (NVMe 1.4 §3.1.5), unless CSTS.CFS says that it never will;
//! - each wait looks for removal (all ones), then for CSTS.CFS, then for what it waits for;
//! - a wait that ends without success names the register and its value.
//!
//! Excludes: queues and commands.

use std::sync::Arc;
use std::time::Duration;

use nvme_spec::registers::{self, Aqa, Cap, Cc, Csts, Shutdown, Version, shst};
use thiserror::Error;

use crate::fault::{Fault, Health};
use crate::transport::{Timing, Transport, TransportError};

/// Shortest time given for CSTS.RDY to follow CC.EN: CAP.TO may be 0.
pub const READY_FLOOR: Duration = Duration::from_secs(5);
/// Shortest time given for a shutdown (§7.6.2 suggests RTD3E).
pub const SHUTDOWN_FLOOR: Duration = Duration::from_secs(10);
/// Longest time given for a shutdown, whatever RTD3E says.
pub const SHUTDOWN_CEILING: Duration = Duration::from_secs(120);
/// Time for which a register may read as all ones before the device counts as removed.
pub const REMOVAL_GRACE: Duration = Duration::from_secs(1);
/// Looks at a register before the first pause: an embedded controller is ready at once.
const EAGER_LOOKS: u32 = 16;
/// First pause between looks; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_micros(20);
/// Longest pause between looks.
const LONGEST_PAUSE: Duration = Duration::from_millis(2);

/// Why a controller could not be brought to a state.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The way to the controller broke.
    #[error("{0}")]
    Transport(#[from] TransportError),
    /// A register reads as all ones.
    #[error("{register} reads as all ones: the device is gone or its memory space is off")]
    Removed {
        /// The register.
        register: &'static str,
    },
    /// CSTS.CFS became set.
    #[error("fatal controller status while waiting for {goal} (CSTS is {csts:#x})")]
    FatalStatus {
        /// What was waited for.
        goal: &'static str,
        /// Controller status.
        csts: u32,
    },
    /// The deadline passed.
    #[error("no {goal} within {waited_ms} ms (CSTS is {csts:#x}, CC is {cc:#x})")]
    Timeout {
        /// What was waited for.
        goal: &'static str,
        /// How long.
        waited_ms: u64,
        /// Controller status at the end.
        csts: u32,
        /// Controller configuration at the end.
        cc: u32,
    },
    /// A capability that the driver needs is missing or absurd.
    #[error("CAP is {cap:#018x}: {problem}")]
    Capability {
        /// Capabilities register.
        cap: u64,
        /// What is wrong.
        problem: &'static str,
    },
}

/// The way to one controller and the state of its health: what every part of the driver shares.
pub(crate) struct Link {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) timing: Arc<dyn Timing>,
    pub(crate) health: Health,
}

/// Pauses that grow, between looks at something.
pub(crate) struct Backoff {
    looks: u32,
    pause: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { looks: 0, pause: FIRST_PAUSE }
    }

    pub(crate) fn wait(&mut self, timing: &dyn Timing) {
        self.looks += 1;
        if self.looks <= EAGER_LOOKS {
            std::hint::spin_loop();
            return;
        }
        timing.pause(self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

/// What [`Link::enable`] tells the controller.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdminQueueAddresses {
    pub(crate) sq_entries: u32,
    pub(crate) cq_entries: u32,
    pub(crate) sq_iova: u64,
    pub(crate) cq_iova: u64,
}

/// Longest wait for CSTS.RDY.
pub(crate) fn ready_timeout(cap: Cap) -> Duration {
    (Duration::from_millis(500) * u32::from(cap.to())).max(READY_FLOOR)
}

/// Longest wait for a shutdown, from Identify Controller's RTD3E.
pub(crate) fn shutdown_timeout(rtd3e_us: u32) -> Duration {
    Duration::from_micros(u64::from(rtd3e_us)).clamp(SHUTDOWN_FLOOR, SHUTDOWN_CEILING)
}

impl Link {
    /// Reads and checks the capabilities, and the version.
    pub(crate) fn capabilities(&self) -> Result<(Cap, Version), HandshakeError> {
        let bits = self.transport.read64(registers::CAP)?;
        if bits == u64::MAX {
            return Err(HandshakeError::Removed { register: "CAP" });
        }
        let version = self.transport.read32(registers::VS)?;
        if version == u32::MAX {
            return Err(HandshakeError::Removed { register: "VS" });
        }
        let cap = Cap::from(bits);
        let refuse = |problem| Err(HandshakeError::Capability { cap: bits, problem });
        if cap.css() & Cap::CSS_NVM == 0 {
            return refuse("the NVM command set is not supported");
        }
        if cap.mqes_z() == 0 {
            return refuse("queues of two entries are not supported (MQES is 0)");
        }
        if cap.mpsmin() > cap.mpsmax() {
            return refuse("the smallest memory page exceeds the largest (MPSMIN, MPSMAX)");
        }
        if cap.mpsmin() > MAX_PAGE_SHIFT - 12 {
            return refuse("memory pages of 64 KiB or less are not supported (MPSMIN)");
        }
        // Room for the admin queue's doorbells at least; I/O queues are limited to what BAR0 holds.
        if self.transport.bar_bytes() < registers::DOORBELL_BASE + 2 * (4 << cap.dstrd()) {
            return refuse("the admin queue's doorbells lie beyond BAR0 (DSTRD)");
        }
        Ok((cap, Version::from(version)))
    }

    /// CSTS, or that the device is gone.
    pub(crate) fn status(&self) -> Result<Csts, HandshakeError> {
        let csts = self.transport.read32(registers::CSTS)?;
        if csts == Csts::ALL_ONES {
            return Err(HandshakeError::Removed { register: "CSTS" });
        }
        Ok(Csts::from(csts))
    }

    /// The fault that CSTS shows, if it shows one. A device that reads as all ones is given [`REMOVAL_GRACE`]: it may be in
    /// the middle of a reset that somebody else began, and is then to be reset properly.
    pub(crate) fn check_status(&self) -> Result<(), Fault> {
        let first = self.status();
        match first {
            Ok(csts) if csts.cfs() => return Err(Fault::FatalStatus { csts: csts.into() }),
            Ok(_) => return Ok(()),
            Err(HandshakeError::Transport(error)) => return Err(Fault::Transport(error)),
            Err(_) => {}
        }
        let deadline = self.timing.now() + REMOVAL_GRACE;
        while self.timing.now() < deadline {
            self.timing.pause(LONGEST_PAUSE);
            if let Ok(csts) = self.status() {
                return Err(Fault::FatalStatus { csts: csts.into() });
            }
        }
        Err(Fault::Removed)
    }

    fn configuration(&self) -> Result<Cc, HandshakeError> {
        let cc = self.transport.read32(registers::CC)?;
        if cc == u32::MAX {
            return Err(HandshakeError::Removed { register: "CC" });
        }
        Ok(Cc::from(cc))
    }

    fn wait_for(
        &self,
        goal: &'static str,
        timeout: Duration,
        fatal: OnFatal,
        reached: impl Fn(Csts) -> bool,
    ) -> Result<(), HandshakeError> {
        let deadline = self.timing.now() + timeout;
        let mut backoff = Backoff::new();
        loop {
            // The clock is read first: whoever is preempted between the two still takes a last look in time.
            let late = self.timing.now() >= deadline;
            let csts = self.status()?;
            let reached = reached(csts);
            // A shutdown that is complete is complete, whatever else the controller has to say.
            if csts.cfs() && (fatal == OnFatal::GiveUp || fatal == OnFatal::GiveUpUnlessReached && !reached) {
                return Err(HandshakeError::FatalStatus { goal, csts: csts.into() });
            }
            if reached {
                return Ok(());
            }
            if late {
                let cc = self.transport.read32(registers::CC)?;
                let waited_ms = timeout.as_millis() as u64;
                return Err(HandshakeError::Timeout { goal, waited_ms, csts: csts.into(), cc });
            }
            backoff.wait(&*self.timing);
        }
    }

    /// Takes the controller from whatever state it was left in to disabled (CC.EN 0, CSTS.RDY 0).
    pub(crate) fn disable(&self, cap: Cap) -> Result<(), HandshakeError> {
        let timeout = ready_timeout(cap);
        let cc = self.configuration()?;
        let csts = self.status()?;
        if cc.en() {
            let may_never_be_ready = csts.cfs() || csts.shst() != shst::NORMAL;
            if !csts.rdy() && !may_never_be_ready {
                // Its last owner left it between EN and RDY. If it is broken, resetting it is the way out all the same.
                match self.wait_for("CSTS.RDY=1 of an enable in progress", timeout, OnFatal::GiveUp, |csts| {
                    csts.rdy()
                }) {
                    Ok(()) | Err(HandshakeError::FatalStatus { .. } | HandshakeError::Timeout { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            self.transport.write32(registers::CC, cc.with_en(false).with_shn(Shutdown::None as u8).into())?;
        }
        self.wait_for("CSTS.RDY=0 after CC.EN=0", timeout, OnFatal::Ignore, |csts| !csts.rdy())
    }

    /// Sets up the admin queue and enables a disabled controller.
    pub(crate) fn enable(
        &self,
        cap: Cap,
        page_shift: u8,
        admin: AdminQueueAddresses,
    ) -> Result<(), HandshakeError> {
        let aqa =
            Aqa::new().with_asqs_z((admin.sq_entries - 1) as u16).with_acqs_z((admin.cq_entries - 1) as u16);
        self.transport.write32(registers::AQA, aqa.into())?;
        self.transport.write64(registers::ASQ, admin.sq_iova)?;
        self.transport.write64(registers::ACQ, admin.cq_iova)?;
        let cc = Cc::new().with_mps(page_shift - 12).with_iosqes(6).with_iocqes(4).with_en(true);
        self.transport.write32(registers::CC, cc.into())?;
        self.wait_for("CSTS.RDY=1 after CC.EN=1", ready_timeout(cap), OnFatal::GiveUp, |csts| csts.rdy())
    }

    /// Notifies the controller of a shutdown and waits for it (§7.6.2).
    pub(crate) fn notify_shutdown(&self, timeout: Duration) -> Result<(), HandshakeError> {
        let cc = self.configuration()?;
        self.transport.write32(registers::CC, cc.with_shn(Shutdown::Normal as u8).into())?;
        self.wait_for("CSTS.SHST=2 after CC.SHN=1", timeout, OnFatal::GiveUpUnlessReached, |csts| {
            csts.shst() == shst::COMPLETE
        })
    }
}

/// Largest memory page that the driver works with, as a power of two.
pub(crate) const MAX_PAGE_SHIFT: u8 = 16;

#[derive(Clone, Copy, PartialEq, Eq)]
enum OnFatal {
    GiveUp,
    GiveUpUnlessReached,
    Ignore,
}
