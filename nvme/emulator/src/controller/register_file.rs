//! The registers of BAR0 before the doorbells (§3.1): what they read as, and what writes to them do.
//!
//! Invariant: a removed device reads as all ones and takes no writes. Reserved registers read as 0.
//!
//! Excludes: what a change of CC leads to (`handshake`), doorbells (`command_path`).

use std::sync::atomic::{AtomicU64, Ordering};

use nvme_spec::registers;

use super::Core;
use crate::interrupt::{MASK_REGISTER, Vector};
use crate::registers::State;

/// Vectors that INTMS and INTMC can mask.
const REGISTER_VECTORS: usize = 32;

impl Core {
    pub(super) fn read_register(&self, offset: u64) -> u32 {
        let value = self.true_register(offset);
        if self.faults.registers_armed() { self.faults.distort(offset, value, self.now_ns()) } else { value }
    }

    fn true_register(&self, offset: u64) -> u32 {
        let r = &self.registers;
        if r.state() == State::Removed {
            return u32::MAX;
        }
        match offset {
            registers::CAP => u64::from(r.cap) as u32,
            o if o == registers::CAP + 4 => (u64::from(r.cap) >> 32) as u32,
            registers::VS => r.version.into(),
            registers::INTMS | registers::INTMC => self.interrupt_mask(),
            registers::CC => r.cc().into(),
            registers::CSTS => r.csts().into(),
            registers::AQA => r.aqa.load(Ordering::Acquire),
            registers::ASQ => r.asq.load(Ordering::Acquire) as u32,
            o if o == registers::ASQ + 4 => (r.asq.load(Ordering::Acquire) >> 32) as u32,
            registers::ACQ => r.acq.load(Ordering::Acquire) as u32,
            o if o == registers::ACQ + 4 => (r.acq.load(Ordering::Acquire) >> 32) as u32,
            _ => 0,
        }
    }

    pub(super) fn write_register(&self, offset: u64, value: u32) {
        let r = &self.registers;
        if r.state() == State::Removed {
            return;
        }
        let set_half = |register: &AtomicU64, high: bool| {
            let shift = if high { 32 } else { 0 };
            let keep = !(u64::from(u32::MAX) << shift);
            let change = |old: u64| Some((old & keep | u64::from(value) << shift) & !0xfff);
            // The closure always returns a value, so the update cannot fail.
            let _ = register.fetch_update(Ordering::AcqRel, Ordering::Acquire, change);
        };
        match offset {
            registers::INTMS => self.change_interrupt_mask(value, |v| v.mask(MASK_REGISTER)),
            registers::INTMC => self.change_interrupt_mask(value, |v| v.unmask(MASK_REGISTER)),
            registers::CC => self.write_cc(value),
            registers::AQA => r.aqa.store(value & 0x0fff_0fff, Ordering::Release),
            registers::ASQ => set_half(&r.asq, false),
            o if o == registers::ASQ + 4 => set_half(&r.asq, true),
            registers::ACQ => set_half(&r.acq, false),
            o if o == registers::ACQ + 4 => set_half(&r.acq, true),
            _ => tracing::debug!(offset, value, "write to a reserved or read-only register ignored"),
        }
    }

    fn interrupt_mask(&self) -> u32 {
        let masked = self.vectors.iter().take(REGISTER_VECTORS).enumerate();
        masked.fold(0, |mask, (i, v)| mask | u32::from(v.is_register_masked()) << i)
    }

    fn change_interrupt_mask(&self, bits: u32, change: impl Fn(&Vector)) {
        for (i, vector) in self.vectors.iter().take(REGISTER_VECTORS).enumerate() {
            if bits & 1 << i != 0 {
                change(vector);
            }
        }
    }
}
