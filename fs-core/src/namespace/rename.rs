//! Renaming.
//!
//! Owns: `renameat2(2)`: replacing, not replacing, exchanging; within a directory, between directories, between shards.
//!
//! | step | why |
//! |---|---|
//! | look both names up | to know what to lock |
//! | write the file's data, if it replaces another | "write a temporary, rename it" must never leave an empty file |
//! | the volume's rename lock, if a directory changes its parent | else two renames could put two directories into each other |
//! | lock directories and both inodes, look again | names may have changed their meaning: then all begins anew |
//! | walk from the new place to the root | a directory must not move below itself |
//! | decide, commit | |
//!
//! Parents of directories change only under the rename lock, so the walk, which takes no other lock, sees a path that
//! is there.

use std::rc::Rc;

use crate::alloc::Priority;
use crate::error::FsError;
use crate::format::items::EntryTarget;
use crate::planted::{Bug, is_planted};
use crate::request::{FileKind, Name, RenameMode};
use crate::shard::Shard;
use crate::types::InodeNr;

use super::change::Change;
use super::create::check_new_name;
use super::lockset::Locks;
use super::peer::NamespaceCall;
use super::remove::Attempt;
use super::transaction::TransactionId;

/// Directories between a directory and the root, at most: more can only be a cycle, hence damage.
const MAX_DEPTH: u32 = 1 << 20;

/// What is to be renamed.
#[derive(Clone, Debug)]
pub(crate) struct Renaming {
    /// Directory of the old name.
    pub(crate) parent: InodeNr,
    /// Old name.
    pub(crate) name: Name,
    /// Directory of the new name.
    pub(crate) new_parent: InodeNr,
    /// New name.
    pub(crate) new_name: Name,
    /// What happens to an existing destination.
    pub(crate) mode: RenameMode,
}

/// What the two names stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ends {
    source: EntryTarget,
    target: Option<EntryTarget>,
}

fn is_directory(end: EntryTarget) -> bool {
    end.kind == FileKind::Directory
}

impl Renaming {
    fn check(&self) -> Result<(), FsError> {
        for name in [&self.name, &self.new_name] {
            match check_new_name(name) {
                Err(FsError::Exists) => return Err(FsError::Invalid),
                checked => checked?,
            }
        }
        Ok(())
    }

    /// Directories that get another parent, each with the parent it gets.
    fn moved(&self, ends: Ends) -> Vec<(InodeNr, InodeNr)> {
        if self.parent == self.new_parent {
            return Vec::new();
        }
        let mut moved = Vec::new();
        if is_directory(ends.source) {
            moved.push((ends.source.inode, self.new_parent));
        }
        if self.mode == RenameMode::Exchange
            && let Some(target) = ends.target
            && is_directory(target)
        {
            moved.push((target.inode, self.parent));
        }
        moved
    }

    /// Whether there is, or is not, a destination as the mode wants it.
    fn check_target(&self, target: Option<EntryTarget>) -> Result<(), FsError> {
        match (self.mode, target) {
            (RenameMode::NoReplace, Some(_)) => Err(FsError::Exists),
            (RenameMode::Exchange, None) => Err(FsError::NotFound),
            _ => Ok(()),
        }
    }

    /// What to commit, by what is known under the locks; nothing if the rename changes nothing.
    ///
    /// # Errors
    /// What stands against it.
    fn decide(&self, ends: Ends, target_entries: u64) -> Result<Vec<Change>, FsError> {
        let Ends { source, target } = ends;
        match (self.mode, target) {
            // Two names of one inode, or one name: POSIX wants nothing to happen.
            (_, Some(target)) if target.inode == source.inode => Ok(Vec::new()),
            (RenameMode::Exchange, Some(target)) => Ok(self.exchange(source, target)),
            (_, Some(target)) => {
                match (is_directory(source), is_directory(target)) {
                    (true, false) => return Err(FsError::NotDirectory),
                    (false, true) => return Err(FsError::IsDirectory),
                    (true, true) if target_entries > 0 => return Err(FsError::NotEmpty),
                    _ => {}
                }
                Ok(self.replace(source, target))
            }
            (_, None) => Ok(self.plain(source)),
        }
    }

    fn remove_old(&self, source: EntryTarget) -> Change {
        Change::RemoveEntry { directory: self.parent, name: self.name.clone(), expected: source.inode }
    }

    fn plain(&self, source: EntryTarget) -> Vec<Change> {
        let (directory, name) = (self.new_parent, self.new_name.clone());
        let mut changes =
            vec![self.remove_old(source), Change::InsertEntry { directory, name, target: source }];
        if is_directory(source) && self.parent != self.new_parent {
            changes.push(Change::DropSubdirectory { directory: self.parent });
            changes.push(Change::AddSubdirectory { directory: self.new_parent });
            changes.push(Change::SetParent { directory: source.inode, parent: self.new_parent });
        }
        changes.push(Change::Touch { inode: source.inode });
        changes
    }

    fn replace(&self, source: EntryTarget, target: EntryTarget) -> Vec<Change> {
        let (directory, name) = (self.new_parent, self.new_name.clone());
        let mut changes = vec![
            self.remove_old(source),
            Change::ReplaceEntry { directory, name, expected: target.inode, target: source },
        ];
        if is_directory(source) {
            // One subdirectory goes, one comes: only the old parent's count changes.
            changes.push(Change::DropSubdirectory { directory: self.parent });
            changes.push(Change::DropDirectory { directory: target.inode });
            if self.parent != self.new_parent {
                changes.push(Change::SetParent { directory: source.inode, parent: self.new_parent });
            }
        } else {
            changes.push(Change::DropLink { inode: target.inode });
        }
        changes.push(Change::Touch { inode: source.inode });
        changes
    }

    fn exchange(&self, source: EntryTarget, target: EntryTarget) -> Vec<Change> {
        let mut changes = vec![
            Change::ReplaceEntry {
                directory: self.parent,
                name: self.name.clone(),
                expected: source.inode,
                target,
            },
            Change::ReplaceEntry {
                directory: self.new_parent,
                name: self.new_name.clone(),
                expected: target.inode,
                target: source,
            },
        ];
        let moved = self.moved(Ends { source, target: Some(target) });
        if moved.len() == 1 {
            let (from, to) = if is_directory(source) {
                (self.parent, self.new_parent)
            } else {
                (self.new_parent, self.parent)
            };
            changes.push(Change::DropSubdirectory { directory: from });
            changes.push(Change::AddSubdirectory { directory: to });
        }
        changes.extend(moved.into_iter().map(|(directory, parent)| Change::SetParent { directory, parent }));
        changes.push(Change::Touch { inode: source.inode });
        changes.push(Change::Touch { inode: target.inode });
        changes
    }
}

impl Shard {
    /// Renames.
    pub(super) async fn rename(self: &Rc<Self>, renaming: Renaming) -> Result<(), FsError> {
        renaming.check()?;
        let mut flushed = None;
        loop {
            let ends = self.look_up_ends(&renaming).await?;
            if renaming.mode == RenameMode::Replace
                && ends.target.is_some()
                && ends.source.kind == FileKind::Regular
                && flushed != Some(ends.source.inode)
                && !is_planted(Bug::RenameWithoutFlush)
            {
                let inode = ends.source.inode;
                self.ask(inode.shard(), NamespaceCall::Flush { inode }).await?;
                flushed = Some(inode);
            }
            let transaction = self.new_transaction();
            let moves = !renaming.moved(ends).is_empty();
            if moves {
                self.lock_rename(transaction).await?;
            }
            let attempt = self.rename_once(transaction, &renaming, ends).await;
            if moves {
                self.unlock_rename(transaction).await;
            }
            if attempt? == Attempt::Done {
                return Ok(());
            }
        }
    }

    async fn look_up_ends(self: &Rc<Self>, renaming: &Renaming) -> Result<Ends, FsError> {
        let source = self.find(renaming.parent, &renaming.name).await?;
        let target = self.find(renaming.new_parent, &renaming.new_name).await?;
        Ok(Ends { source: source.ok_or(FsError::NotFound)?, target })
    }

    async fn rename_once(
        self: &Rc<Self>,
        transaction: TransactionId,
        renaming: &Renaming,
        ends: Ends,
    ) -> Result<Attempt, FsError> {
        let directories = [renaming.parent, renaming.new_parent, ends.source.inode];
        let inodes = directories.into_iter().chain(ends.target.map(|target| target.inode));
        let locks = self.lock(transaction, inodes).await?;
        let attempt = self.rename_locked(&locks, renaming, ends).await;
        self.unlock(locks).await;
        attempt
    }

    async fn rename_locked(
        self: &Rc<Self>,
        locks: &Locks,
        renaming: &Renaming,
        ends: Ends,
    ) -> Result<Attempt, FsError> {
        if self.look_up_ends(renaming).await? != ends {
            return Ok(Attempt::Again);
        }
        renaming.check_target(ends.target)?;
        for (directory, parent) in renaming.moved(ends) {
            if self.is_within(parent, directory).await? {
                return Err(FsError::Invalid);
            }
        }
        let target_entries = match ends.target {
            Some(target) => locks.record(target.inode)?.entries,
            None => 0,
        };
        let changes = renaming.decide(ends, target_entries)?;
        if !changes.is_empty() {
            self.commit_changes(locks.transaction(), changes, Priority::Normal).await?;
        }
        Ok(Attempt::Done)
    }

    /// Whether `inner` is `outer` or lies below it. Under the rename lock.
    async fn is_within(self: &Rc<Self>, inner: InodeNr, outer: InodeNr) -> Result<bool, FsError> {
        let mut place = inner;
        for _ in 0..MAX_DEPTH {
            if place == outer {
                return Ok(true);
            }
            if place == InodeNr::ROOT {
                return Ok(false);
            }
            place = self.parent_of(place).await?;
        }
        let what = "a directory's path to the root does not end".to_owned();
        Err(FsError::Damaged { what, block: None, inode: Some(inner) })
    }
}
