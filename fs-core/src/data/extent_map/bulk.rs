//! The plan of a clone for hundreds of extents at once.
//!
//! Owns: [`share_many`], which does what [`share()`](super::share()) does for extents that are shared whole, without a search
//! of its own for each item: extents are read in file order, then runs in physical order, and what becomes of them is
//! listed in key order, so that the tree can merge it leaf by leaf.
//!
//! Invariants: those of the extent map, before and after.
//!
//! Excludes: extents that reach over the range's ends, where runs may have to be split; those remain for `share`.

use std::ops::{ControlFlow, Range};

use zerocopy::{FromBytes, IntoBytes};

use super::{
    Batch, ExtentKind, InodeNr, Mapped, Plan, block_at, check_run, damaged, decode_mapped, next_extent,
};
use crate::batch::ItemList;
use crate::error::FsError;
use crate::format::extent::{
    Backref, RawBackref, RawExtent, RawRun, RunHead, backref_key, extent_key, run_key,
};
use crate::types::BlockNr;

/// Extents of a slice; fewer in tests, where clones are short and crashes are to hit their middle.
const SLICE_EXTENTS: usize = if cfg!(test) { 32 } else { 256 };

/// Bytes of the values that an extent of one block has: the extent, the run with one checksum, the back-reference.
const BYTES_EACH: usize = size_of::<RawExtent>() + size_of::<RawRun>() + 4 + size_of::<RawBackref>();

/// How much one plan does at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Extents.
    pub(crate) extents: usize,
    /// Items listed, but for those of the first extent.
    pub(crate) items: usize,
    /// Bytes of their values, but for those of the first extent.
    pub(crate) bytes: usize,
}

impl Limits {
    /// One slice of a clone. The shard serves nobody else meanwhile: some 50 µs. The bytes bound its new tree nodes.
    pub(crate) const SLICE: Self =
        Self { extents: SLICE_EXTENTS, items: 4 * SLICE_EXTENTS, bytes: 128 << 10 };
}

/// What [`share_many`] has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SharedMany {
    /// Offset in the source up to which nothing is left to do. The range's start if its first extent has to be split.
    pub(crate) up_to: u64,
    /// Blocks that the target has more than before.
    pub(crate) blocks: u64,
    /// Extents that it has more.
    pub(crate) extents: u64,
}

/// Gives `target` references to the beginning of `range` (whole blocks) of `source`, at file offset `offset`, where it
/// has nothing. Nothing else of this plan may change or read extents and runs.
pub(crate) fn share_many(
    batch: &mut Batch<'_>,
    source: InodeNr,
    range: &Range<u64>,
    (target, offset): (InodeNr, u64),
    limits: Limits,
) -> Plan<SharedMany> {
    let (mut extents, mut up_to) = whole_extents(batch, source, range, limits.extents)?;
    let shift = offset.wrapping_sub(range.start);
    loop {
        match list_items(batch, source, &extents, (target, shift), limits)? {
            Listed::All(list) => {
                batch.put_list(list);
                break;
            }
            Listed::TooMany(fewer) => {
                up_to = extents[fewer].offset;
                extents.truncate(fewer);
            }
        }
    }
    let blocks = extents.iter().map(|mapped| mapped.extent.blocks.get()).sum();
    Ok(SharedMany { up_to, blocks, extents: extents.len() as u64 })
}

/// The first extents with data that lie within `range` as a whole, and where the rest of the range begins.
fn whole_extents(
    batch: &Batch<'_>,
    source: InodeNr,
    range: &Range<u64>,
    most: usize,
) -> Plan<(Vec<Mapped>, u64)> {
    let mut extents = Vec::new();
    let Some(first) = next_extent(batch, source, range.start)?.filter(|mapped| mapped.offset < range.end)
    else {
        return Ok((extents, range.end));
    };
    if first.offset < range.start {
        return Ok((extents, range.start));
    }
    extents.reserve(most);
    let (mut up_to, mut ended) = (range.end, Ok(()));
    let from = extent_key(source, first.offset);
    batch.stored().scan(&from, &extent_key(source, range.end - 1), |key, value| {
        let mapped = match decode_mapped(source, key.offset, value) {
            Ok(mapped) => mapped,
            Err(error) => {
                ended = Err(error);
                return ControlFlow::Break(());
            }
        };
        let data = mapped.extent.kind == ExtentKind::Data;
        if mapped.end() > range.end || data && extents.len() == most {
            up_to = mapped.offset;
            return ControlFlow::Break(());
        }
        if data {
            extents.push(mapped);
        }
        ControlFlow::Continue(())
    })?;
    ended?;
    Ok((extents, up_to))
}

/// What [`list_items`] finds.
enum Listed {
    All(ItemList),
    /// So many extents only, at least one and fewer than there are, can be shared by one plan.
    TooMany(usize),
}

/// Lists the items by which `target` gets references to `extents`, at their own offsets plus `shift`.
fn list_items(
    batch: &Batch<'_>,
    source: InodeNr,
    extents: &[Mapped],
    (target, shift): (InodeNr, u64),
    limits: Limits,
) -> Plan<Listed> {
    // As if each extent were one run of one block: then the list never moves.
    let mut list = ItemList::with_capacity(3 * extents.len(), BYTES_EACH * extents.len());
    let place = |mapped: &Mapped| mapped.offset.wrapping_add(shift);
    for mapped in extents {
        list.push(extent_key(target, place(mapped)), mapped.extent.raw().as_bytes());
    }
    let starts = extents.iter().map(|mapped| mapped.extent.start);
    let mut order: Vec<(BlockNr, usize)> = starts.zip(0..).collect();
    order.sort_unstable();
    let mut cursor = batch.stored().cursor();
    let mut last: Option<(usize, BlockNr)> = None;
    for (start, index) in order {
        let mapped = &extents[index];
        let blocks = mapped.extent.blocks;
        if let Some((before, end)) = last
            && start < end
        {
            // Both share a run, which has to be counted twice: the later one waits.
            return Ok(Listed::TooMany(index.max(before)));
        }
        let mut position = 0;
        while position < blocks.get() {
            let at = block_at(start, position);
            let key = run_key(at);
            let value = cursor.get(&key)?;
            let value = value.ok_or_else(|| damaged("extent without a run", at, source))?;
            let run = RunHead::decode(value).map_err(|error| error.of("run", Some(at), Some(source)))?;
            check_run(&run, at, &mapped.extent, position, source)?;
            position += run.blocks.get();
            let references = run.references.checked_add(1).ok_or(FsError::TooManyLinks)?;
            list.push(key, value);
            let (raw, _) = RawRun::mut_from_prefix(list.last_mut()).expect("a run was decoded of it");
            raw.references = references.into();
            if at == start {
                let backref = Backref { blocks };
                list.push(backref_key(start, target, place(mapped)), backref.raw().as_bytes());
            }
        }
        if (list.len() > limits.items || list.bytes() > limits.bytes) && extents.len() > 1 {
            return Ok(Listed::TooMany(extents.len() / 2));
        }
        last = Some((index, block_at(start, blocks.get())));
    }
    Ok(Listed::All(list))
}
