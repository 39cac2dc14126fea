//! Regions share slabs, never pages; slabs come and go within their limit.

use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;

/// Hands out addresses and keeps what is mapped.
#[derive(Default)]
struct Ledger {
    next: AtomicU64,
    mapped: Mutex<BTreeMap<u64, u64>>,
    refuse: bool,
}

impl DmaMapper for Ledger {
    fn map(&self, memory: &SlabMemory) -> Result<u64, TransportError> {
        if self.refuse {
            return Err(TransportError::Unsupported("map"));
        }
        let bytes = memory.bytes() as u64;
        let iova = (1 << 32) + self.next.fetch_add(bytes, Ordering::Relaxed);
        self.mapped.lock().unwrap().insert(iova, bytes);
        Ok(iova)
    }

    fn unmap(&self, iova: u64, bytes: u64) {
        assert_eq!(self.mapped.lock().unwrap().remove(&iova), Some(bytes), "unmap must match a map");
    }
}

fn pool(max_slabs: usize) -> Arc<SlabPool<Arc<Ledger>>> {
    SlabPool::new(Arc::default(), max_slabs)
}

impl DmaMapper for Arc<Ledger> {
    fn map(&self, memory: &SlabMemory) -> Result<u64, TransportError> {
        Ledger::map(self, memory)
    }

    fn unmap(&self, iova: u64, bytes: u64) {
        Ledger::unmap(self, iova, bytes);
    }
}

fn is_zero(region: &Arc<dyn DmaRegion>) -> bool {
    let mut bytes = vec![1; region.slice().len()];
    region.slice().read_slice(&mut bytes, 0).unwrap();
    bytes.iter().all(|&byte| byte == 0)
}

#[test]
fn small_regions_share_a_slab() {
    let pool = pool(1);
    let regions: Vec<_> = (0..100).map(|_| pool.allocate(5000).unwrap()).collect();
    assert_eq!(pool.mapped_slabs(), 1);
    assert!(regions.iter().all(|region| region.slice().len() == 2 * PAGE_SIZE));
    assert!(regions.iter().all(|region| region.iova().is_multiple_of(PAGE_SIZE as u64)));
}

#[test]
fn large_region_has_a_slab_that_goes_with_it() {
    let pool = pool(2);
    let small = pool.allocate(1).unwrap();
    let large = pool.allocate(LARGEST_SHARED + 1).unwrap();
    assert_eq!(large.slice().len(), LARGEST_SHARED + PAGE_SIZE);
    assert_eq!(pool.mapped_slabs(), 2);
    drop(large);
    assert_eq!(pool.mapped_slabs(), 1);
    drop(small);
}

#[test]
fn limit_of_slabs_is_an_error_that_names_it() {
    let pool = pool(2);
    let _first = pool.allocate(SHARED_SLAB).unwrap();
    let second = pool.allocate(SHARED_SLAB).unwrap();
    let error = pool.allocate(4096).err().unwrap();
    assert!(error.to_string().contains("at most 2"), "{error}");
    drop(second);
    pool.allocate(4096).unwrap();
}

#[test]
fn one_empty_slab_is_kept_and_goes_with_the_pool() {
    let ledger = Arc::new(Ledger::default());
    let pool = SlabPool::new(Arc::clone(&ledger), 8);
    let regions: Vec<_> = (0..12).map(|_| pool.allocate(LARGEST_SHARED).unwrap()).collect();
    assert_eq!(pool.mapped_slabs(), 3);
    drop(regions);
    assert_eq!(pool.mapped_slabs(), 1);
    drop(pool);
    assert!(ledger.mapped.lock().unwrap().is_empty());
}

#[test]
fn region_that_is_never_dropped_keeps_its_slab_mapped() {
    let ledger = Arc::new(Ledger::default());
    let pool = SlabPool::new(Arc::clone(&ledger), 8);
    std::mem::forget(pool.allocate(4096).unwrap());
    drop(pool);
    assert_eq!(ledger.mapped.lock().unwrap().len(), 1);
}

#[test]
fn refused_mapping_leaves_nothing_behind() {
    let pool = SlabPool::new(Arc::new(Ledger { refuse: true, ..Ledger::default() }), 1);
    for _ in 0..2 {
        assert_eq!(pool.allocate(4096).err(), Some(TransportError::Unsupported("map")));
    }
    assert_eq!(pool.mapped_slabs(), 0);
}

#[test]
fn impossible_sizes_are_refused() {
    let pool = pool(1);
    assert!(matches!(pool.allocate(0), Err(TransportError::Memory { bytes: 0, .. })));
    assert!(matches!(pool.allocate(usize::MAX), Err(TransportError::Memory { bytes: usize::MAX, .. })));
}

#[test]
fn slab_memory_is_what_its_descriptor_maps() {
    let memory = SlabMemory::new(1).unwrap();
    assert_eq!(memory.bytes(), SLAB_UNIT);
    memory.slice().write_slice(b"seen", 4096).unwrap();
    let mut bytes = [0; 4];
    if memory.page_bytes() == PAGE_SIZE {
        nix::sys::uio::pread(memory.fd(), &mut bytes, 4096).unwrap();
        assert_eq!(&bytes, b"seen");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(usize),
    Free(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let size = prop_oneof![8 => 1usize..70_000, 2 => 70_000usize..(5 << 20)];
    let step = prop_oneof![3 => size.prop_map(Step::Allocate), 2 => any::<usize>().prop_map(Step::Free)];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn regions_never_overlap_and_begin_zeroed(steps in steps()) {
        let ledger = Arc::new(Ledger::default());
        let pool = SlabPool::new(Arc::clone(&ledger), 64);
        let mut live: Vec<Arc<dyn DmaRegion>> = Vec::new();
        for step in steps {
            match step {
                Step::Allocate(bytes) => {
                    let region = pool.allocate(bytes).unwrap();
                    let (start, end) = (region.iova(), region.iova() + region.slice().len() as u64);
                    prop_assert!(region.slice().len() >= bytes && is_zero(&region));
                    let apart = |other: &Arc<dyn DmaRegion>| {
                        end <= other.iova() || other.iova() + other.slice().len() as u64 <= start
                    };
                    prop_assert!(live.iter().all(apart));
                    let mapped = ledger.mapped.lock().unwrap();
                    let (&slab, &length) = mapped.range(..=start).next_back().unwrap();
                    prop_assert!(slab <= start && end <= slab + length, "a region lies in one slab");
                    drop(mapped);
                    region.slice().write_slice(&vec![0xa5; region.slice().len()], 0).unwrap();
                    live.push(region);
                }
                Step::Free(which) if !live.is_empty() => {
                    live.swap_remove(which % live.len());
                }
                Step::Free(_) => {}
            }
        }
        live.clear();
        prop_assert!(pool.mapped_slabs() <= 1);
    }

    #[test]
    fn free_pages_are_whole_again_when_all_are_back(sizes in prop::collection::vec(1usize..20, 1..40), order in any::<u64>()) {
        let mut extents = Extents::new(400);
        let mut taken: Vec<_> = sizes.iter().filter_map(|&pages| Some((extents.take(pages)?, pages))).collect();
        let mut order = order;
        while !taken.is_empty() {
            let (first, pages) = taken.swap_remove((order % taken.len() as u64) as usize);
            order = order.rotate_right(7).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            extents.give(first, pages);
        }
        prop_assert_eq!(extents.runs, BTreeMap::from([(0, 400)]));
        prop_assert_eq!(extents.free, 400);
    }
}
