//! The calls against a kernel that keeps to linux/iommufd.h: it knows one address space, and refuses what Linux refuses.

use super::*;
use crate::pci::Sysfs;
use crate::transport::TransportError;
use crate::transport::slab::{DmaMapper, SlabMemory};
use crate::transport::vfio::dma::{Iommu, Mapper};
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Mutex, MutexGuard};

/// The number of its address space.
const SPACE: u32 = 7;
/// Where the addresses of the second range begin.
const SECOND: u64 = 1 << 32;

#[derive(Default)]
struct State {
    /// The descriptor that the device was bound to.
    bound: Option<u32>,
    allocated: bool,
    attached: bool,
    mapped: BTreeMap<u64, u64>,
    calls: Vec<Call>,
    refuse: Option<(Call, Errno)>,
    /// Ranges that it tells of.
    ranges: usize,
}

#[derive(Default)]
struct Fake(Mutex<State>);

impl Fake {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn is_free(state: &State, iova: u64, bytes: u64) -> bool {
        state.mapped.iter().all(|(&at, &length)| at + length <= iova || iova + bytes <= at)
    }
}

impl Kernel for Fake {
    unsafe fn call(
        &self,
        _: BorrowedFd<'_>,
        call: Call,
        words: &mut [u64],
        array: Option<(usize, &mut [u64])>,
    ) -> Result<(), Errno> {
        let mut state = self.state();
        let state = &mut *state;
        state.calls.push(call);
        if let Some((_, errno)) = state.refuse.filter(|(refused, _)| *refused == call) {
            return Err(errno);
        }
        let second = |word: u64| low(word.rotate_left(32));
        let shortest = match call {
            Call::Bind => 16,
            Call::Attach | Call::AllocateSpace => 12,
            Call::Ranges => 32,
            Call::Map => 40,
            Call::Unmap => 24,
        };
        assert_eq!(low(words[0]), shortest, "{call:?} says how long it is");
        assert!(size_of_val(words) >= shortest as usize);
        match call {
            Call::Bind => {
                assert_eq!(second(words[0]), 0);
                state.bound = Some(low(words[1]));
            }
            Call::AllocateSpace => {
                state.allocated = true;
                words[1] = pair(SPACE, 0);
            }
            Call::Attach if state.bound.is_none() || !state.allocated => return Err(Errno::EINVAL),
            Call::Attach => {
                assert_eq!(low(words[1]), SPACE);
                state.attached = true;
            }
            Call::Ranges => {
                assert_eq!(second(words[0]), SPACE);
                assert!(state.attached, "before it is attached, the ranges are not the device's");
                let (_, array) = array.expect("there is an array for the ranges");
                let room = low(words[1]) as usize;
                assert!(array.len() >= 2 * room);
                words[1] = pair(state.ranges as u32, 0);
                if state.ranges > room {
                    return Err(Errno::EMSGSIZE);
                }
                for (index, range) in array.chunks_exact_mut(2).take(state.ranges).enumerate() {
                    let first = index as u64 * SECOND;
                    range.copy_from_slice(&[first, first + SECOND / 2]);
                }
            }
            Call::Map => {
                assert_eq!((second(words[0]), low(words[1])), (7, SPACE), "fixed, writable, readable");
                let (address, bytes, iova) = (words[2], words[3], words[4]);
                assert!(
                    address != 0 && bytes > 0 && address.is_multiple_of(4096) && iova.is_multiple_of(4096)
                );
                if !Self::is_free(state, iova, bytes) {
                    return Err(Errno::EEXIST);
                }
                state.mapped.insert(iova, bytes);
            }
            Call::Unmap => {
                assert_eq!(second(words[0]), SPACE);
                // Whole mappings only.
                match state.mapped.remove(&words[1]) {
                    Some(bytes) if bytes == words[2] => {}
                    Some(_) | None => return Err(Errno::ENOENT),
                }
            }
        }
        Ok(())
    }
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn open(fake: &Arc<Fake>) -> Result<Iommufd, Refused> {
    let device = null();
    Iommufd::open(fake.clone(), null(), device.as_fd())
}

fn fake() -> Arc<Fake> {
    let fake = Arc::new(Fake::default());
    fake.state().ranges = 2;
    fake
}

fn mapper(fake: &Arc<Fake>) -> Mapper {
    Mapper::new(Iommu::Iommufd(open(fake).unwrap()), Sysfs::default()).unwrap()
}

#[test]
fn numbers_are_those_of_linux() {
    assert_eq!(Call::Bind.request(), 0x3b76);
    assert_eq!(Call::Attach.request(), 0x3b77);
    assert_eq!(Call::AllocateSpace.request(), 0x3b81);
    assert_eq!(Call::Ranges.request(), 0x3b84);
    assert_eq!(Call::Unmap.request(), 0x3b86);
}

#[test]
fn a_device_is_bound_before_it_is_attached() {
    let fake = fake();
    let iommufd = open(&fake).unwrap();
    assert_eq!(fake.state().calls, [Call::Bind, Call::AllocateSpace, Call::Attach]);
    assert_eq!(fake.state().bound, Some(iommufd.fd.as_raw_fd() as u32));
    assert_eq!(iommufd.space, SPACE);
}

#[test]
fn a_refused_step_is_named_and_the_last_one() {
    for (step, says) in [
        (Call::Bind, "BIND_IOMMUFD"),
        (Call::AllocateSpace, "IOAS_ALLOC"),
        (Call::Attach, "ATTACH_IOMMUFD_PT"),
    ] {
        let fake = fake();
        fake.state().refuse = Some((step, Errno::EBUSY));
        let refused = open(&fake).unwrap_err();
        assert!(refused.step.contains(says) && refused.errno == Errno::EBUSY, "{refused:?}");
        assert_eq!(fake.state().calls.last(), Some(&step));
    }
}

#[test]
fn ranges_are_asked_for_again_with_room_for_all() {
    for count in [0, 1, 16, 17, 300] {
        let fake = fake();
        fake.state().ranges = count;
        let ranges = open(&fake).unwrap().ranges().unwrap();
        let expected: Vec<_> = (0..count as u64).map(|n| n * SECOND..=n * SECOND + SECOND / 2).collect();
        assert_eq!(ranges, expected);
    }
    let fake = fake();
    fake.state().ranges = MAX_RANGES + 1;
    assert_eq!(open(&fake).unwrap().ranges(), Err(Errno::EMSGSIZE));
}

#[test]
fn slabs_are_mapped_where_the_mapper_says_and_unmapped_whole() {
    let fake = fake();
    let mapper = mapper(&fake);
    let slabs = [SlabMemory::new(2 << 20).unwrap(), SlabMemory::new(4 << 20).unwrap()];
    let iovas = slabs.each_ref().map(|slab| mapper.map(slab).unwrap());
    let mapped: Vec<_> = iovas.into_iter().zip(slabs.iter().map(|slab| slab.bytes() as u64)).collect();
    assert_eq!(fake.state().mapped.clone().into_iter().collect::<Vec<_>>(), mapped);
    mapper.unmap(mapped[0].0, mapped[0].1);
    assert_eq!(fake.state().mapped.len(), 1);
    mapper.revoke().unwrap();
    assert!(fake.state().mapped.is_empty(), "nothing is within the device's reach");
    assert!(mapper.map(&slabs[0]).is_err(), "and nothing will be");
}

#[test]
fn a_refused_mapping_leaves_its_address_free() {
    let fake = fake();
    let mapper = mapper(&fake);
    let slab = SlabMemory::new(2 << 20).unwrap();
    fake.state().refuse = Some((Call::Map, Errno::EFAULT));
    let Err(TransportError::Memory { reason, .. }) = mapper.map(&slab) else { panic!("it was refused") };
    assert!(reason.contains("EFAULT"), "{reason}");
    fake.state().refuse = None;
    let iova = mapper.map(&slab).unwrap();
    fake.state().refuse = Some((Call::Unmap, Errno::EIO));
    assert!(mapper.revoke().is_err(), "what stays mapped is said");
    assert!(fake.state().mapped.contains_key(&iova));
}

/// A kernel without it, or a node of something else, answers like this one.
#[test]
fn a_descriptor_of_something_else_is_refused_with_the_kernels_reason() {
    let device = null();
    let refused = Iommufd::open(Arc::new(Linux), null(), device.as_fd()).unwrap_err();
    assert_eq!(refused.errno, Errno::ENOTTY);
    assert!(refused.step.contains("VFIO_DEVICE_BIND_IOMMUFD"));
}
