//! The offline tools on volumes that were changed, with every checksum right: `fsck`, with data and without, and `dump`.
//!
//! Checks: both end in a bounded number of rounds and write nothing; a check that also reads the data finds no less; a volume with
//! nothing to find has no line in its dump that says something is damaged, but for a superblock whose write may have been cut short.

use fs_core::dump::{Part, Selection, dump};
use fs_core::fsck::DataCheck;
use reactor::Context;
use reactor::sim::SimDisk;

use crate::script::Script;
use crate::volume::images::{disk, simulator};
use crate::volume::look::{checked, shown};
use crate::volume::{BASES, bases, damaged};

/// Bytes of a dump at most: a hundred times what an honest one has.
const LONGEST_DUMP: usize = 32 << 20;

/// Changes a volume, checks it, and shows it.
pub fn run(data: &[u8]) {
    let mut script = Script::new(data.to_vec());
    let base = &bases()[usize::from(script.byte()) % BASES];
    let disk = disk(damaged(base, &mut script));
    let quick = checked(&disk, DataCheck::Skip);
    let thorough = checked(&disk, DataCheck::Verify);
    let damage = dumped(&disk);
    match (quick, thorough) {
        (Ok(quick), Ok(thorough)) => {
            let (few, all) = (shown(&quick), shown(&thorough));
            assert!(quick.total_findings <= thorough.total_findings, "without data {few}, with data {all}");
            // What is noted is a log, which the check takes into account and a dump does not.
            let as_dumped = quick.is_clean() && quick.notes.is_empty();
            assert!(
                !as_dumped || damage.as_ref().is_some_and(Vec::is_empty),
                "fsck finds nothing, dump {damage:?}"
            );
        }
        (quick, thorough) => {
            assert_eq!(quick.err(), thorough.err(), "why there is nothing to check");
            assert_eq!(damage, None, "a dump of what cannot be checked");
        }
    }
}

/// Lines of dumps that say something is damaged; `None` if nothing can be shown.
fn dumped(disk: &SimDisk) -> Option<Vec<String>> {
    let writes = disk.write_count();
    let mut damaged = Some(Vec::new());
    for part in [Part::Superblock, Part::Groups, Part::Nodes, Part::Items] {
        let selection = Selection { part, ..Selection::default() };
        let mut out = Vec::new();
        let show = async |ctx: Context| dump(&ctx, &selection, &mut out).await;
        let summary = simulator(disk).block_on(0, show).expect("a dump ends");
        assert!(out.len() < LONGEST_DUMP, "a dump of {part:?} of {} bytes", out.len());
        let text = String::from_utf8_lossy(&out);
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with('!')).collect();
        match (summary, &mut damaged) {
            (Ok(summary), damaged) => {
                assert_eq!(
                    summary.damaged,
                    lines.len() as u64,
                    "what a dump counts and what it shows, of {part:?}"
                );
                // A superblock that is not whole may be one whose write the power cut: the one before it counts.
                if let Some(damaged) = damaged
                    && part != Part::Superblock
                {
                    damaged.extend(lines.into_iter().map(str::to_owned));
                }
            }
            (Err(_), damaged) => *damaged = None,
        }
    }
    assert_eq!(disk.write_count(), writes, "a dump writes nothing");
    damaged
}
