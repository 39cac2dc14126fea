//! The load of a mail server or a build: files that are made, replaced, linked, renamed, cloned and removed.
//!
//! Owns: the history of each client and the check. A client has two directories, which may be of different shards, and does one step after
//! the other in them; what gets a name has been synced before.
//!
//! | journal | means |
//! |---|---|
//! | `do CLIENT STEP SLOT FILE …` | the step is about to give these slots these files (0: none) |
//! | `ack CLIENT STEP` | both directories were synced after this step |
//!
//! *Legal crash outcomes*: the names of a client are those after some step, not before the one that was acknowledged last nor after
//! the one that was begun last; each file that has a name has all its bytes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{Journal, clone_into, lines, numbers, sync_directory, together, word};
use crate::harness::{Random, read_file};

const CLIENTS: u64 = 3;

/// Names in each of a client's directories.
const SLOTS: u64 = 12;

const DIRECTORIES: [&str; 2] = ["a", "b"];

/// Largest file, in bytes.
const LARGEST: u64 = 40_000;

/// Runs in the current directory until the daemon is gone.
///
/// # Errors
/// The one that ended it.
pub fn run(journal: &Journal, seed: u64) -> Result<()> {
    let mut parts: Vec<Box<dyn FnOnce() -> Result<()> + Send + '_>> = Vec::new();
    for number in 0..CLIENTS {
        for directory in DIRECTORIES {
            fs::create_dir_all(format!("{number}/{directory}"))?;
        }
        sync_directory(Path::new(&number.to_string()))?;
        let slots = vec![0; DIRECTORIES.len() * SLOTS as usize];
        parts.push(Box::new(move || Client { number, journal, seed, slots, step: 0, files: 0 }.work()));
    }
    sync_directory(Path::new("."))?;
    (0..CLIENTS).try_for_each(|number| journal.say(&format!("ack {number} 0")))?;
    journal.ready()?;
    together(parts)
}

struct Client<'a> {
    number: u64,
    journal: &'a Journal,
    seed: u64,
    /// The file in each slot; 0 is none.
    slots: Vec<u64>,
    step: u64,
    files: u64,
}

impl Client<'_> {
    fn work(mut self) -> Result<()> {
        let mut random = Random(self.seed ^ (self.number + 1) << 40);
        let all = self.slots.len() as u64;
        loop {
            let (one, other) = (random.below(all) as usize, random.below(all) as usize);
            match random.below(12) {
                0..4 => self.replace(one)?,
                4..6 => self.replace_with_clone(one, other)?,
                6..8 if self.slots[one] != 0 => {
                    self.begin(&[(one, 0)])?;
                    fs::remove_file(self.path(one))?;
                }
                8 if self.slots[one] != 0 && self.slots[other] == 0 => {
                    self.begin(&[(other, self.slots[one])])?;
                    fs::hard_link(self.path(one), self.path(other))?;
                }
                // Renaming one name of a file to another of its names does nothing.
                9..11 if self.slots[one] != 0 && self.slots[one] != self.slots[other] => {
                    self.begin(&[(other, self.slots[one]), (one, 0)])?;
                    fs::rename(self.path(one), self.path(other))?;
                }
                11 => {
                    let step = self.step;
                    for directory in DIRECTORIES {
                        sync_directory(Path::new(&format!("{}/{directory}", self.number)))?;
                    }
                    self.journal.say(&format!("ack {} {step}", self.number))?;
                }
                _ => {}
            }
        }
    }

    /// A new file in place of what is there.
    fn replace(&mut self, slot: usize) -> Result<()> {
        self.files += 1;
        let number = self.number << 32 | self.files;
        let fresh = self.fresh(slot);
        let mut file = File::create(&fresh)?;
        file.write_all(&contents(self.seed, number))?;
        file.sync_all()?;
        self.begin(&[(slot, number)])?;
        Ok(fs::rename(fresh, self.path(slot))?)
    }

    /// A clone of another slot's file in place of what is there.
    fn replace_with_clone(&mut self, slot: usize, source: usize) -> Result<()> {
        if self.slots[source] == 0 {
            return Ok(());
        }
        let fresh = self.fresh(slot);
        let file = File::create(&fresh)?;
        clone_into(&File::open(self.path(source))?, &file)?;
        file.sync_all()?;
        self.begin(&[(slot, self.slots[source])])?;
        Ok(fs::rename(fresh, self.path(slot))?)
    }

    /// Tells what the next step gives the slots, before it does.
    fn begin(&mut self, given: &[(usize, u64)]) -> Result<()> {
        self.step += 1;
        let given_words: String = given.iter().map(|(slot, file)| format!(" {slot} {file}")).collect();
        self.journal.say(&format!("do {} {}{given_words}", self.number, self.step))?;
        given.iter().for_each(|(slot, file)| self.slots[*slot] = *file);
        Ok(())
    }

    fn path(&self, slot: usize) -> PathBuf {
        place(Path::new("."), self.number, slot as u64)
    }

    /// Where a file that replaces the slot's is made.
    fn fresh(&self, slot: usize) -> PathBuf {
        self.path(slot).with_file_name("new")
    }
}

fn place(root: &Path, client: u64, slot: u64) -> PathBuf {
    let directory = DIRECTORIES[(slot / SLOTS) as usize % DIRECTORIES.len()];
    root.join(format!("{client}/{directory}/f{}", slot % SLOTS))
}

/// The bytes of a file: its number, and what follows from it.
fn contents(seed: u64, file: u64) -> Vec<u8> {
    let mut random = Random(seed ^ file << 8);
    let length = random.below(LARGEST);
    let mut bytes = file.to_le_bytes().to_vec();
    bytes.extend(random.bytes(length as usize));
    bytes
}

/// What a client has done.
#[derive(Default)]
struct History {
    /// Which slots each step gave which files.
    steps: Vec<Vec<u64>>,
    acknowledged: u64,
}

/// Checks what a load has left in `root`; returns how many steps were acknowledged.
///
/// # Errors
/// Says which client's names are those of no moment, or which file is not whole.
pub fn check(root: &Path, journal: &Path, seed: u64) -> Result<u64> {
    let mut histories: BTreeMap<u64, History> = BTreeMap::new();
    for line in lines(journal)? {
        match (line[0].as_str(), numbers(&line).unwrap_or_default().as_slice()) {
            ("do", [client, _, given @ ..]) => {
                histories.entry(*client).or_default().steps.push(given.to_vec());
            }
            ("ack", [client, step]) => histories.entry(*client).or_default().acknowledged = *step,
            _ => {}
        }
    }
    for (client, history) in &histories {
        let found = found(root, *client, seed)?;
        history.explains(&found).with_context(|| format!("client {client} in {}", root.display()))?;
    }
    Ok(histories.values().map(|history| history.acknowledged).sum())
}

impl History {
    fn explains(&self, found: &[u64]) -> Result<()> {
        let mut slots = vec![0; found.len()];
        let mut nearest = (usize::MAX, String::new());
        for step in 0..=self.steps.len() {
            if let Some(given) = step.checked_sub(1).and_then(|index| self.steps.get(index)) {
                for pair in given.chunks_exact(2) {
                    *slots.get_mut(usize::try_from(pair[0])?).context("a slot")? = pair[1];
                }
            }
            if (step as u64) < self.acknowledged {
                continue;
            }
            if slots == found {
                return Ok(());
            }
            let wrong = (0..slots.len()).filter(|slot| slots[*slot] != found[*slot]);
            let wrong: Vec<String> = wrong
                .map(|slot| format!("slot {slot} has {:#x} instead of {:#x}", found[slot], slots[slot]))
                .collect();
            if wrong.len() < nearest.0 {
                nearest = (wrong.len(), format!("after step {step}, where {}", wrong.join(", ")));
            }
        }
        anyhow::bail!(
            "the names are those of no moment between step {}, which was acknowledged, and {}, the last; nearest is {}",
            self.acknowledged,
            self.steps.len(),
            nearest.1
        )
    }
}

/// Which file is in each slot of a client.
fn found(root: &Path, client: u64, seed: u64) -> Result<Vec<u64>> {
    let slots = DIRECTORIES.len() as u64 * SLOTS;
    (0..slots)
        .map(|slot| {
            let path = place(root, client, slot);
            if !fs::exists(&path)? {
                return Ok(0);
            }
            let bytes = read_file(&path)?;
            let file = word(&bytes, 0).unwrap_or(0);
            ensure!(
                contents(seed, file) == bytes,
                "{} is not whole: {} bytes, it says that it is file {file:#x}",
                path.display(),
                bytes.len()
            );
            Ok(file)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_no_moment_or_from_before_the_acknowledgement_are_refused() {
        let history =
            History { steps: vec![vec![0, 7], vec![1, 8], vec![1, 7, 0, 0], vec![0, 9]], acknowledged: 2 };
        for (found, legal) in [
            ([7, 8], true),
            ([0, 7], true),
            ([9, 7], true),
            ([7, 0], false),
            ([7, 7], false),
            ([9, 8], false),
        ] {
            assert_eq!(history.explains(&found).is_ok(), legal, "{found:?}");
        }
    }
}
