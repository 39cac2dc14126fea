//! Names, inodes and their attributes: everything a program does to a file tree but reading and writing contents.
//!
//! Owns: the operations (each a method of [`Shard`](crate::shard::Shard), reached through its `serve`), the locks they take, the
//! transactions that span shards, and the deletion of inodes that lost their last name.
//!
//! | module | holds |
//! |---|---|
//! | [`serve`] | from request to operation |
//! | [`lookup`], [`attributes`], [`xattr`] | reading and changing one inode |
//! | [`create`], [`remove`], [`link`], [`rename`] | changing names: look up, lock, look again, decide, commit |
//! | [`lockset`] | locks of inodes of several shards, the volume's rename lock |
//! | [`change`] | what an operation decided on, as a value; its plan |
//! | [`transaction`] | committing changes, on one shard or on several in one epoch |
//! | [`peer`] | what shards ask of each other |
//! | [`orphan`] | inodes without a name: deletion, recovery |
//! | [`inode`], [`directory`] | plans on the items |
//! | [`state`] | what a shard keeps of all this in memory |
//!
//! Invariants:
//! - names, link counts and parents change only under the exclusive inode locks of all inodes concerned, taken in
//!   (shard, inode) order; a directory changes its place in the tree only under the volume's rename lock besides;
//! - lookups and listings take the directory's lock shared, so they see a transaction that spans shards whole or not
//!   at all;
//! - an inode without names is deleted only when no front end holds a lookup on it.
//!
//! Excludes: contents (`crate::data`), permission checks (the kernel's), paths.

mod attributes;
pub(crate) mod change;
mod create;
pub(crate) mod directory;
pub(crate) mod inode;
mod link;
mod lockset;
mod lookup;
mod orphan;
mod peer;
mod remove;
mod rename;
mod serve;
mod state;
pub(crate) mod transaction;
pub(crate) mod xattr;

#[cfg(test)]
mod tests;

pub use self::change::MAX_LINKS;
pub(crate) use self::inode::without_privileges;
pub(crate) use self::peer::{NamespaceCall, NamespaceReply};
pub(crate) use self::state::NamespaceState;
