//! Which programs have which device nodes open, as `/proc` shows it.
//!
//! Invariant: what the caller may not look into (other users' programs, for all but root) is left out, not guessed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{InUse, Sysfs, entries, text};

/// Device nodes that were open at one moment.
pub(super) struct OpenFiles {
    /// Processes by node, each once.
    by_node: BTreeMap<PathBuf, Vec<u32>>,
}

impl OpenFiles {
    /// Looks into the descriptors of all processes.
    pub(super) fn scan(sysfs: &Sysfs) -> Self {
        let mut by_node: BTreeMap<PathBuf, Vec<u32>> = BTreeMap::new();
        let processes = entries(&sysfs.proc("")).unwrap_or_default();
        for pid in processes.iter().filter_map(|name| name.parse::<u32>().ok()) {
            let directory = sysfs.proc(pid.to_string()).join("fd");
            for name in entries(&directory).unwrap_or_default() {
                let Ok(target) = fs::read_link(directory.join(name)) else { continue };
                if !is_device(&target) {
                    continue;
                }
                let holders = by_node.entry(target).or_default();
                if holders.last() != Some(&pid) {
                    holders.push(pid);
                }
            }
        }
        Self { by_node }
    }

    /// Programs that had `node` open.
    pub(super) fn of(&self, sysfs: &Sysfs, node: &Path) -> Vec<InUse> {
        let holders = self.by_node.get(node).map(Vec::as_slice).unwrap_or_default();
        holders
            .iter()
            .map(|&pid| {
                let program = text(&sysfs.proc(pid.to_string()).join("comm")).unwrap_or_default();
                InUse::Open { node: node.to_owned(), pid, program }
            })
            .collect()
    }
}

/// Whether a link of `/proc/PID/fd` leads to something below a `dev` directory: sockets, pipes and the usual files are many.
fn is_device(target: &Path) -> bool {
    target.components().rev().skip(1).any(|part| part.as_os_str() == "dev")
}

/// Programs that have `node` open, as far as the caller may look into their descriptors: all of them for root, one's own
/// otherwise. The caller's own process is among them.
pub fn who_has_open(sysfs: &Sysfs, node: &Path) -> Vec<InUse> {
    OpenFiles::scan(sysfs).of(sysfs, node)
}
