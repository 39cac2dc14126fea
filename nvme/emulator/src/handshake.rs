//! Enabling, resetting, shutting down, losing power: the transitions of `registers` carried out.
//!
//! Invariants: one at a time (`Core::handshake`); a transition to `Disabled` ends with every queue gone and no command
//! executing, and only then does CSTS say so.
//!
//! With threads, CC is acted on by thread 0, so the host sees the handshake take its time; otherwise within the write.

use std::sync::atomic::Ordering;

use nvme_spec::registers::{Aqa, Cc, Csts, Doorbell, shst};

use crate::config::{FusedOperations, Mode};
use crate::controller::Core;
use crate::dma::DmaDirection;
use crate::faults::RegisterFault;
use crate::interrupt::{MASK_REGISTER, MASK_VECTOR};
use crate::locks::lock;
use crate::power_cut::{CutPolicy, CutReport, PowerCut};
use crate::queue::{CompletionQueue, RingShape, SubmissionQueue};
use crate::registers::{Event, State};

/// Memory page of 4 KiB as a power of two; CC.MPS counts from there.
const MIN_PAGE_SHIFT: u32 = 12;

impl Core {
    /// A write to CC (§3.1.5).
    pub(crate) fn write_cc(&self, value: u32) {
        let before = self.registers.set_cc(value);
        if before.en() && !Cc::from(value).en() {
            self.reset_requested.store(true, Ordering::Release);
        }
        self.rethink_cc();
    }

    /// Brings the controller's state in line with CC.
    pub(crate) fn apply_cc(&self) {
        let _one_at_a_time = lock(&self.handshake);
        if self.registers.state() == State::Removed {
            return;
        }
        if self.reset_requested.load(Ordering::Acquire)
            && !self.faults.register_fault(RegisterFault::NeverStops)
            && self.reset_requested.swap(false, Ordering::AcqRel)
        {
            self.reset();
        }
        let cc = self.registers.cc();
        if cc.en()
            && self.registers.state() == State::Disabled
            && !self.faults.register_fault(RegisterFault::NeverReady)
        {
            self.start(cc);
        }
        if cc.shn() != 0 && self.registers.csts().shst() != shst::COMPLETE {
            self.shut_down();
        }
    }

    /// Looks at CC again, because a fault that kept it from being acted on may be gone.
    pub(crate) fn rethink_cc(&self) {
        match self.config.mode {
            Mode::Inline | Mode::Stepped => self.apply_cc(),
            Mode::Threaded(_) => self.workers.request_handshake(),
        }
    }

    /// EN from 0 to 1: checks the settings, sets up the admin queue, becomes ready (§7.6.1).
    fn start(&self, cc: Cc) {
        let fatal = self.faults.register_fault(RegisterFault::FatalOnEnable);
        let installed = if fatal { Err("a fault rule says so") } else { self.install_admin_queue(cc) };
        if let Err(why) = installed {
            tracing::error!(why, "controller cannot be enabled");
            self.registers.apply(Event::Fatal);
            return;
        }
        lock(&self.admin).clean_shutdown = false;
        self.faults.enabled(self.now_ns());
        self.registers.apply(Event::Enable);
        self.registers.update_csts(|csts| csts.with_rdy(true));
    }

    fn install_admin_queue(&self, cc: Cc) -> Result<(), &'static str> {
        if cc.css() != 0 {
            return Err("CC.CSS selects a command set that is not supported");
        }
        if cc.ams() != 0 {
            return Err("CC.AMS selects an arbitration that is not supported");
        }
        if !(self.config.mpsmin..=self.config.mpsmax).contains(&cc.mps()) {
            return Err("CC.MPS is beyond CAP.MPSMIN and CAP.MPSMAX");
        }
        let aqa = Aqa::from(self.registers.aqa.load(Ordering::Acquire));
        if aqa.asqs_z() == 0 || aqa.acqs_z() == 0 {
            return Err("AQA gives an admin queue fewer than two entries");
        }
        let sq = RingShape {
            iova: self.registers.asq.load(Ordering::Acquire),
            entries: u32::from(aqa.asqs_z()) + 1,
        };
        let cq = RingShape {
            iova: self.registers.acq.load(Ordering::Acquire),
            entries: u32::from(aqa.acqs_z()) + 1,
        };
        let mut view = self.dma.view();
        view.resolve(sq.iova, u64::from(sq.entries) * nvme_spec::SQE_BYTES as u64, DmaDirection::FromHost)
            .map_err(|_| "ASQ is not mapped")?;
        view.resolve(cq.iova, u64::from(cq.entries) * nvme_spec::CQE_BYTES as u64, DmaDirection::ToHost)
            .map_err(|_| "ACQ is not mapped")?;
        let page_shift = MIN_PAGE_SHIFT + u32::from(cc.mps());
        let queue = CompletionQueue::new(cq, Some(0), &self.dma);
        self.completion[0].install(&mut lock(&self.completion[0].queue), queue);
        let queue = SubmissionQueue::new(FusedOperations::Absent, sq, 0, page_shift, &self.dma);
        self.submission[0].install(&mut lock(&self.submission[0].queue), queue);
        self.queue_began(0, Doorbell::SubmissionTail);
        self.queue_began(0, Doorbell::CompletionHead);
        Ok(())
    }

    /// EN from 1 to 0, and the first part of a power cut.
    fn reset(&self) {
        self.registers.apply(Event::Disable);
        // From here on no command is begun; taking each lock waits for the one being executed. Queue 0 first: it may
        // be creating another.
        for slot in &self.submission {
            slot.remove(&mut lock(&slot.queue));
        }
        for slot in &self.completion {
            slot.remove(&mut lock(&slot.queue));
        }
        self.reset_features();
        lock(&self.admin).forget_commands();
        for vector in &self.vectors {
            vector.reset(MASK_REGISTER);
        }
        self.registers.update_csts(|_| Csts::new());
    }

    /// CC.SHN: stops executing and makes everything durable (§7.6.2).
    fn shut_down(&self) {
        self.registers.update_csts(|csts| csts.with_shst(shst::OCCURRING));
        self.registers.apply(Event::ShutdownNotice);
        for slot in &self.submission {
            drop(lock(&slot.queue)); // waits for a command being executed
        }
        if self.faults.register_fault(RegisterFault::ShutdownNeverCompletes) {
            return;
        }
        for namespace in self.namespaces.list().iter() {
            if let Err(status) = namespace.flush() {
                tracing::error!(nsid = %namespace.nsid(), %status, "flush at shutdown failed");
            }
        }
        lock(&self.admin).clean_shutdown = true;
        self.registers.update_csts(|csts| csts.with_shst(shst::COMPLETE));
    }

    /// Back to the registers of power-on. The caller holds the handshake's lock.
    fn reset_registers(&self) {
        self.reset_requested.store(false, Ordering::Release);
        self.reset();
        self.registers.power_on();
        for vector in &self.vectors {
            vector.reset(MASK_REGISTER | MASK_VECTOR);
        }
    }

    /// Resets the function: what a disable cannot stop, this does.
    pub(crate) fn reset_function(&self) {
        let _one_at_a_time = lock(&self.handshake);
        self.reset_registers();
    }

    /// The device is gone, from this instant for whoever looks at the state. Does not wait for commands being executed, and so
    /// may be called by one.
    pub(crate) fn vanish(&self) {
        tracing::warn!("controller removed");
        self.registers.apply(Event::Remove);
    }

    /// Removes the device. When it returns, no memory is touched and nothing completes any more.
    pub(crate) fn remove(&self) {
        let _one_at_a_time = lock(&self.handshake);
        self.vanish();
        self.reset(); // waits for each command being executed
    }

    /// Puts the device back, as after power-on.
    pub(crate) fn reinsert(&self) {
        let _one_at_a_time = lock(&self.handshake);
        if self.registers.state() == State::Removed {
            self.reset_registers();
            self.registers.apply(Event::Insert);
        }
    }

    /// Power fails and returns.
    pub(crate) fn power_cut(&self, policy: CutPolicy) -> CutReport {
        let _one_at_a_time = lock(&self.handshake);
        self.reset_registers();
        lock(&self.admin).power_returned();
        let mut cut = PowerCut::new(policy);
        let mut report = CutReport::default();
        for namespace in self.namespaces.list().iter() {
            report.add(namespace.store().power_cut(&mut cut));
        }
        report
    }
}
