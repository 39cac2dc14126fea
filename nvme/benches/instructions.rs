//! A program for an instruction counter: requests of 4 KiB through the driver, to a controller that costs nothing of its own.
//!
//! `instructions read|write DEPTH REQUESTS` submits REQUESTS reads or writes, DEPTH at a time. The controller is a transport whose doorbell posts the
//! completions of whatever was announced. An instruction counter counts inside `measured_submit` and `measured_complete` and, within
//! them, leaves out [`NullTransport`]'s `doorbell`; the difference of two runs leaves out everything that happens once. `cargo xtask bench driver` does both.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nvme::transport::{Listen, SystemTiming, Transport, TransportError};
use nvme::{Controller, ControllerOptions, Interrupts, Keeper, QueueOptions, QueuePair};
use nvme_spec::identify::{Cns, IdentifyController, IdentifyNamespace, NamespaceList};
use nvme_spec::registers::{self, Cap, Cc, Csts, Doorbell, Version, doorbell_at};
use nvme_spec::{AdminOpcode, CompletionEntry, Status, SubmissionEntry};
use reactor::block::{BlockDevice, Durability, Lba, OpTag, Request};
use reactor::dma::{DmaBuffer, DmaRegion, HeapRegion};
use vm_memory::Bytes;
use zerocopy::{FromZeros, IntoBytes};

/// Blocks of the namespace.
const BLOCKS: u64 = 1 << 30;

/// A queue pair as the controller keeps it.
#[derive(Clone, Copy, Default)]
struct NullQueue {
    sq: u64,
    cq: u64,
    sq_entries: u32,
    cq_entries: u32,
    head: u32,
    cq_tail: u32,
    lap: u32,
}

/// Registers, the admin commands of bring-up, and success for everything else.
#[derive(Default)]
struct NullTransport {
    cc: AtomicU32,
    asq: AtomicU64,
    acq: AtomicU64,
    aqa: AtomicU32,
    regions: Mutex<Vec<Arc<HeapRegion>>>,
    queues: Mutex<[NullQueue; 2]>,
}

impl NullTransport {
    fn copy(&self, iova: u64, bytes: &mut [u8], write: bool) {
        let regions = self.regions.lock().expect("no panic holds it");
        let region = regions
            .iter()
            .find(|region| (region.iova()..region.iova() + region.slice().len() as u64).contains(&iova))
            .expect("the driver names its own memory");
        let at = (iova - region.iova()) as usize;
        if write {
            region.slice().write_slice(bytes, at).expect("within the region");
        } else {
            region.slice().read_slice(bytes, at).expect("within the region");
        }
    }

    fn admin(&self, queues: &mut [NullQueue; 2], command: &SubmissionEntry) -> u32 {
        let entries = u32::from(command.create_queue().qsize_z()) + 1;
        match AdminOpcode(command.opcode) {
            AdminOpcode::IDENTIFY => {
                let mut data = match command.identify_cns() {
                    Cns::CONTROLLER => {
                        let mut identity = IdentifyController::new_zeroed();
                        (identity.sqes, identity.cqes) = (0x66, 0x44);
                        identity.nn.set(1);
                        identity.as_bytes().to_vec()
                    }
                    Cns::NAMESPACE => {
                        let mut identity = IdentifyNamespace::new_zeroed();
                        identity.nsze.set(BLOCKS);
                        identity.ncap.set(BLOCKS);
                        identity.lbaf[0].lbads = 12;
                        identity.as_bytes().to_vec()
                    }
                    _ => {
                        let mut list = NamespaceList::new_zeroed();
                        list.ids[0].set(u32::from(command.nsid.get() == 0));
                        list.as_bytes().to_vec()
                    }
                };
                self.copy(command.prp1.get(), &mut data, true);
            }
            AdminOpcode::CREATE_IO_CQ => {
                (queues[1].cq, queues[1].cq_entries) = (command.prp1.get(), entries);
            }
            AdminOpcode::CREATE_IO_SQ => {
                (queues[1].sq, queues[1].sq_entries) = (command.prp1.get(), entries);
            }
            _ => {}
        }
        0
    }

    fn serve(&self, id: usize, tail: u32) {
        let mut queues = self.queues.lock().expect("no panic holds it");
        while queues[id].head != tail {
            let NullQueue { sq, head, sq_entries, .. } = queues[id];
            let mut command = SubmissionEntry::default();
            self.copy(sq + u64::from(head) * 64, command.as_mut_bytes(), false);
            queues[id].head = (head + 1) % sq_entries;
            if id == 0 && command.opcode == AdminOpcode::ASYNC_EVENT_REQUEST.0 {
                continue;
            }
            let dw0 = if id == 0 { self.admin(&mut queues, &command) } else { 0 };
            let queue = &mut queues[id];
            let mut entry = CompletionEntry::default();
            entry.dw0.set(dw0);
            entry.cid.set(command.cid.get());
            entry.sq_id.set(id as u16);
            entry.sq_head.set(queue.head as u16);
            entry.set_status(Status::SUCCESS, queue.lap.is_multiple_of(2));
            self.copy(queue.cq + u64::from(queue.cq_tail) * 16, entry.as_mut_bytes(), true);
            queue.cq_tail += 1;
            if queue.cq_tail == queue.cq_entries {
                (queue.cq_tail, queue.lap) = (0, queue.lap + 1);
            }
        }
    }
}

impl Transport for NullTransport {
    fn name(&self) -> &str {
        "null"
    }

    fn bar_bytes(&self) -> u64 {
        0x2000
    }

    fn read32(&self, offset: u64) -> Result<u32, TransportError> {
        let cc = self.cc.load(Ordering::Relaxed);
        Ok(match offset {
            registers::VS => Version::V1_4.into(),
            registers::CC => cc,
            _ => Csts::new().with_rdy(Cc::from(cc).en()).into(),
        })
    }

    fn read64(&self, _: u64) -> Result<u64, TransportError> {
        Ok(Cap::new().with_mqes_z(1023).with_css(Cap::CSS_NVM).into())
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), TransportError> {
        match offset {
            registers::AQA => self.aqa.store(value, Ordering::Relaxed),
            _ => {
                let entries = (self.aqa.load(Ordering::Relaxed) & 0xfff) + 1;
                self.cc.store(value, Ordering::Relaxed);
                self.queues.lock().expect("no panic holds it")[0] = NullQueue {
                    sq: self.asq.load(Ordering::Relaxed),
                    cq: self.acq.load(Ordering::Relaxed),
                    sq_entries: entries,
                    cq_entries: (self.aqa.load(Ordering::Relaxed) >> 16) + 1,
                    ..NullQueue::default()
                };
            }
        }
        Ok(())
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), TransportError> {
        let register = if offset == registers::ASQ { &self.asq } else { &self.acq };
        register.store(value, Ordering::Relaxed);
        Ok(())
    }

    #[inline(never)]
    fn doorbell(&self, offset: u64, value: u32) {
        if let Some((queue, Doorbell::SubmissionTail)) = doorbell_at(0, offset) {
            self.serve(usize::from(queue.get()), value);
        }
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        let region = HeapRegion::new(bytes)
            .map_err(|error| TransportError::Memory { bytes, reason: error.to_string() })?;
        self.regions.lock().expect("no panic holds it").push(Arc::clone(&region));
        Ok(region)
    }

    fn interrupt_vectors(&self) -> u16 {
        0
    }

    fn connect_interrupt(&self, _: u16, _: BorrowedFd<'_>) -> Result<(), TransportError> {
        Err(TransportError::Unsupported("interrupt"))
    }

    fn listen(&self, _: u16, _: Listen) {}

    fn revoke_dma(&self) -> Result<(), TransportError> {
        Ok(())
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |text: &str| text.parse::<u64>().ok();
    // The test runner calls benches with arguments of its own: nothing to do then.
    let [kind, depth, requests] = arguments.as_slice() else { return };
    let (Some(depth), Some(requests)) = (number(depth), number(requests)) else { return };
    let writes = kind == "write";
    let options = ControllerOptions { keeper: Keeper::Polled, ..ControllerOptions::default() };
    let transport = Arc::new(NullTransport::default());
    let controller = Controller::bring_up(transport, Arc::new(SystemTiming::default()), &options)
        .expect("it does as told");
    let options = QueueOptions {
        depth: 256,
        pool_bytes: 4 << 20,
        interrupts: Interrupts::Disabled,
        ..QueueOptions::default()
    };
    let mut queue = controller.create_queue(&options).expect("a queue is left");
    let mut buffers: Vec<Option<DmaBuffer>> =
        (0..depth).map(|_| Some(queue.pool().try_alloc(4096).expect("the pool is larger"))).collect();
    let mut state = 1u64;
    for _ in 0..requests / depth {
        for (tag, buffer) in buffers.iter_mut().enumerate() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Multiply-shift instead of a division.
            let lba = Lba::new(((u128::from(state) * u128::from(BLOCKS)) >> 64) as u64);
            let buffer = buffer.take().expect("returned by the last round");
            let request = if writes {
                Request::Write { lba, buffer, durability: Durability::Cached }
            } else {
                Request::Read { lba, buffer }
            };
            measured_submit(&mut queue, OpTag(tag as u64), request);
        }
        let taken = measured_complete(&mut queue, depth as usize, &mut buffers);
        assert_eq!(taken as u64, depth);
    }
    println!("{} doorbell writes", queue.counters().read().doorbells);
}

#[inline(never)]
fn measured_submit(queue: &mut QueuePair, tag: OpTag, request: Request) {
    queue.submit(tag, request).expect("there is room");
}

#[inline(never)]
fn measured_complete(queue: &mut QueuePair, budget: usize, buffers: &mut [Option<DmaBuffer>]) -> usize {
    queue.ring();
    queue.process_completions(budget, &mut |completion| {
        assert!(completion.result.is_ok());
        buffers[completion.tag.0 as usize] = completion.buffer;
    })
}
