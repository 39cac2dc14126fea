//! Plans over a tree in memory, against models.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use proptest::prelude::*;
use reactor::WallTime;

use crate::batch::{Batch, BatchContext, Interrupt, Plan};
use crate::error::FsError;
use crate::format::items::{DIR_HASH, EntryTarget, InodeRecord, Intent, intent_key};
use crate::format::node::{Key, TreeIdentity};
use crate::namespace::change::{Change, Effects, MAX_LINKS, NewRecord, plan_changes};
use crate::namespace::{directory, inode, xattr};
use crate::request::{FileKind, SetXattrMode};
use crate::tree::{NodeSpace, Tree};
use crate::types::{BlockNr, Epoch, InodeNr, ShardId};

/// Space without end; nothing is written here, so nothing has to be kept.
struct EndlessSpace(u64);

impl NodeSpace for EndlessSpace {
    fn allocate_node(&mut self) -> BlockNr {
        self.0 += 4;
        BlockNr::new(self.0)
    }

    fn free_node(&mut self, _address: BlockNr) {}

    fn discard_node(&mut self, _address: BlockNr) {}
}

/// A shard's tree, with all its nodes in memory.
struct Bench {
    tree: Tree,
    space: EndlessSpace,
    context: BatchContext,
    epoch: Epoch,
}

impl Bench {
    /// With an empty root directory.
    fn new() -> Self {
        let shard = ShardId::new(0).unwrap();
        let epoch = Epoch::new(1);
        let mut space = EndlessSpace(0);
        let tree = Tree::empty(TreeIdentity { volume: 1, shard }, epoch, &mut space);
        let now = WallTime::new(1000, 0).unwrap();
        let mut bench = Self { tree, space, context: BatchContext { now, hash_seed: [3; 16] }, epoch };
        bench.commit(|batch| {
            let mut root = InodeRecord::new(FileKind::Directory, 0o755, 0, 0, batch.now());
            root.parent = InodeNr::ROOT;
            inode::store(batch, InodeNr::ROOT, &root);
            Ok(())
        });
        bench
    }

    fn try_commit<T>(&mut self, plan: impl FnOnce(&mut Batch<'_>) -> Plan<T>) -> Result<T, FsError> {
        self.context.now = WallTime::new(self.context.now.secs() + 1, 0).unwrap();
        let mut batch = Batch::new(&self.tree, self.context);
        let value = plan(&mut batch).map_err(|interrupt| match interrupt {
            Interrupt::Failed(error) => error,
            Interrupt::Missing(_) => panic!("every node is in memory"),
        })?;
        let changes = batch.finish();
        for (key, value) in changes.items() {
            match value {
                Some(value) => {
                    self.tree.insert(*key, value, self.epoch, &mut self.space).unwrap();
                }
                None => {
                    self.tree.remove(key, self.epoch, &mut self.space).unwrap();
                }
            }
        }
        Ok(value)
    }

    fn commit<T>(&mut self, plan: impl FnOnce(&mut Batch<'_>) -> Plan<T>) -> T {
        self.try_commit(plan).unwrap()
    }

    fn change(&mut self, changes: &[Change]) -> Result<Effects, FsError> {
        self.try_commit(|batch| plan_changes(batch, changes))
    }

    fn record(&mut self, inode: InodeNr) -> InodeRecord {
        self.commit(|batch| inode::load(batch, inode))
    }

    fn names(&mut self, directory: InodeNr) -> Vec<(u64, Vec<u8>, InodeNr)> {
        let listed = self.commit(|batch| directory::list(batch, directory, 0, usize::MAX));
        listed.into_iter().map(|entry| (entry.cookie, entry.name.into_vec(), entry.inode)).collect()
    }

    fn items_of_kind(&self, directory: InodeNr, kind: crate::format::node::ItemKind) -> usize {
        let (mut from, mut count) = (Key::new(directory.get(), kind, 0, 0), 0);
        while let Some((key, _)) = self.tree.next(&from).unwrap()
            && (key.object, key.kind) == (directory.get(), kind)
        {
            count += 1;
            from = key.successor().unwrap();
        }
        count
    }
}

fn file(number: u64) -> EntryTarget {
    EntryTarget { inode: InodeNr::new(number * 64), kind: FileKind::Regular }
}

fn new_record(kind: FileKind) -> NewRecord {
    NewRecord { kind, permissions: 0o644, uid: 1, gid: 2, device: 0, target: None, parent: InodeNr::ROOT }
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u8, u64),
    Remove(u8),
    Replace(u8, u64),
    ListAfter(u64, usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..40_u8, 2..100_u64).prop_map(|(name, inode)| Step::Insert(name, inode)),
        2 => (0..40_u8).prop_map(Step::Remove),
        1 => (0..40_u8, 2..100_u64).prop_map(|(name, inode)| Step::Replace(name, inode)),
        1 => (0..60_u64, 0..20_usize).prop_map(|(after, limit)| Step::ListAfter(after, limit)),
    ]
}

/// Names of different lengths, up to the longest.
fn name(number: u8) -> Vec<u8> {
    vec![b'a' + number % 26; 1 + usize::from(number) * 254 / 39]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn directory_equals_model(steps in proptest::collection::vec(step(), 1..200)) {
        let mut bench = Bench::new();
        let root = InodeNr::ROOT;
        // Name → (sequence, inode).
        let mut model: BTreeMap<Vec<u8>, (u64, InodeNr)> = BTreeMap::new();
        let mut next_sequence = 3;
        for step in steps {
            match step {
                Step::Insert(number, inode) => {
                    let result = bench.try_commit(|batch| directory::insert(batch, root, &name(number), file(inode)));
                    if let Entry::Vacant(free) = model.entry(name(number)) {
                        prop_assert_eq!(result, Ok(()));
                        free.insert((next_sequence, file(inode).inode));
                        next_sequence += 1;
                    } else {
                        prop_assert_eq!(result, Err(FsError::Exists));
                    }
                }
                Step::Remove(number) => {
                    let expected = model.remove(&name(number));
                    let inode = expected.map_or(InodeNr::new(7), |(_, inode)| inode);
                    let result = bench.try_commit(|batch| directory::remove(batch, root, &name(number), inode));
                    prop_assert_eq!(result, expected.map(|_| ()).ok_or(FsError::NotFound));
                }
                Step::Replace(number, inode) => {
                    let known = model.get_mut(&name(number));
                    let old = known.as_ref().map_or(InodeNr::new(7), |known| known.1);
                    let result =
                        bench.try_commit(|batch| directory::replace(batch, root, &name(number), old, file(inode)));
                    prop_assert_eq!(result, known.as_ref().map(|_| ()).ok_or(FsError::NotFound));
                    if let Some(known) = known {
                        known.1 = file(inode).inode;
                    }
                }
                Step::ListAfter(after, limit) => {
                    let listed = bench.commit(|batch| directory::list(batch, root, after, limit));
                    let mut expected: Vec<u64> = model.values().map(|(sequence, _)| *sequence).collect();
                    expected.retain(|sequence| *sequence > after);
                    expected.sort_unstable();
                    expected.truncate(limit);
                    let cookies: Vec<u64> = listed.iter().map(|entry| entry.cookie).collect();
                    prop_assert_eq!(cookies, expected);
                }
            }
        }
        let mut expected: Vec<_> = model.iter().map(|(name, (cookie, inode))| (*cookie, name.clone(), *inode)).collect();
        expected.sort();
        prop_assert_eq!(bench.names(root), expected);
        let record = bench.record(root);
        prop_assert_eq!(record.entries, model.len() as u64);
        prop_assert_eq!(record.size, model.keys().map(|name| name.len() as u64).sum::<u64>());
        for (name, (sequence, inode)) in &model {
            let found = bench.commit(|batch| directory::find(batch, root, name)).unwrap();
            prop_assert_eq!((found.sequence, found.target.inode), (*sequence, *inode));
        }
        prop_assert_eq!(bench.items_of_kind(root, DIR_HASH), model.len());
    }

    #[test]
    fn attributes_equal_model(steps in proptest::collection::vec((0..12_u8, 0..3_u8, 0..300_usize), 1..120)) {
        let mut bench = Bench::new();
        let root = InodeNr::ROOT;
        let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        for (number, action, length) in steps {
            let name = format!("user.{number}").into_bytes();
            let value = vec![number; length * 13];
            let known = model.contains_key(&name);
            match action {
                0 => {
                    let result = bench.try_commit(|batch| xattr::remove(batch, root, &name));
                    prop_assert_eq!(result, if known { Ok(()) } else { Err(FsError::NoAttribute) });
                    model.remove(&name);
                }
                1 => {
                    bench.commit(|batch| xattr::set(batch, root, &name, &value, SetXattrMode::Set));
                    model.insert(name, value);
                }
                _ => {
                    let mode = if length % 2 == 0 { SetXattrMode::Create } else { SetXattrMode::Replace };
                    let result = bench.try_commit(|batch| xattr::set(batch, root, &name, &value, mode));
                    let expected = match (mode, known) {
                        (SetXattrMode::Create, true) => Err(FsError::Exists),
                        (SetXattrMode::Replace, false) => Err(FsError::NoAttribute),
                        _ => Ok(()),
                    };
                    if expected.is_ok() {
                        model.insert(name, value);
                    }
                    prop_assert_eq!(result, expected);
                }
            }
        }
        for (name, value) in &model {
            prop_assert_eq!(&bench.commit(|batch| xattr::get(batch, root, name)), value);
        }
        let listed = bench.commit(|batch| xattr::list(batch, root));
        let mut names: Vec<&[u8]> = listed.split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
        names.sort_unstable();
        prop_assert_eq!(names, model.keys().map(Vec::as_slice).collect::<Vec<_>>());
        prop_assert_eq!(bench.record(root).xattr_names as usize, listed.len());
    }
}

/// Names whose hashes are equal share one item, and keep apart in it.
#[test]
fn names_with_one_hash_share_an_item() {
    let mut bench = Bench::new();
    let root = InodeNr::ROOT;
    bench.commit(|batch| directory::insert(batch, root, b"first", file(2)));
    // A collision of a 64-bit hash cannot be found in a test, so one is planted: another name in the same chain.
    let hash = directory::name_hash(&[3; 16], b"first");
    let key = crate::format::items::hash_key(root, hash);
    bench.commit(|batch| {
        let mut chain = crate::format::items::HashEntry::decode_chain(&batch.get(&key)?.unwrap()).unwrap();
        let mut other = chain[0].clone();
        other.name = b"second"[..].into();
        other.sequence = 100;
        chain.insert(0, other);
        batch.put(key, crate::format::items::HashEntry::encode_chain(&chain));
        Ok(())
    });
    let found = bench.commit(|batch| directory::find(batch, root, b"first")).unwrap();
    assert_eq!(found.target, file(2));
    bench.commit(|batch| directory::remove(batch, root, b"first", file(2).inode));
    assert_eq!(bench.commit(|batch| directory::find(batch, root, b"first")), None);
    let left = bench.commit(|batch| batch.get(&key)).unwrap();
    let left = crate::format::items::HashEntry::decode_chain(&left).unwrap();
    assert_eq!((left.len(), &*left[0].name), (1, &b"second"[..]));
}

#[test]
fn last_link_makes_an_orphan() {
    let mut bench = Bench::new();
    let inode = file(5).inode;
    let insert =
        |name: &[u8]| Change::InsertEntry { directory: InodeNr::ROOT, name: name.into(), target: file(5) };
    let remove =
        |name: &[u8]| Change::RemoveEntry { directory: InodeNr::ROOT, name: name.into(), expected: inode };
    let created =
        bench.change(&[Change::CreateInode { inode, new: new_record(FileKind::Regular) }, insert(b"a")]);
    assert_eq!(created, Ok(Effects { created: 1, orphans: vec![] }));
    bench.change(&[insert(b"b"), Change::AddLink { inode }]).unwrap();
    assert_eq!(bench.record(inode).links, 2);
    let dropped = bench.change(&[remove(b"a"), Change::DropLink { inode }]);
    assert_eq!(dropped, Ok(Effects::default()));
    assert_eq!(bench.commit(|batch| batch.get(&intent_key(inode, Intent::Orphan))), None);
    let dropped = bench.change(&[remove(b"b"), Change::DropLink { inode }]);
    assert_eq!(dropped, Ok(Effects { created: 0, orphans: vec![inode] }));
    assert_eq!(bench.record(inode).links, 0);
    let intent = bench.commit(|batch| batch.get(&intent_key(inode, Intent::Orphan))).unwrap();
    assert_eq!(Intent::decode(&intent), Ok(Intent::Orphan));
    assert_eq!(bench.change(&[Change::AddLink { inode }]), Err(FsError::NotFound));
}

#[test]
fn full_directory_is_not_dropped() {
    let mut bench = Bench::new();
    let directory = InodeNr::new(128);
    let target = EntryTarget { inode: directory, kind: FileKind::Directory };
    bench
        .change(&[
            Change::CreateInode { inode: directory, new: new_record(FileKind::Directory) },
            Change::InsertEntry { directory: InodeNr::ROOT, name: b"d"[..].into(), target },
            Change::AddSubdirectory { directory: InodeNr::ROOT },
            Change::InsertEntry { directory, name: b"f"[..].into(), target: file(9) },
        ])
        .unwrap();
    assert_eq!(bench.record(InodeNr::ROOT).links, 3);
    let drop = Change::DropDirectory { directory };
    assert_eq!(bench.change(std::slice::from_ref(&drop)), Err(FsError::NotEmpty));
    let empty = Change::RemoveEntry { directory, name: b"f"[..].into(), expected: file(9).inode };
    let dropped = bench.change(&[empty, Change::DropSubdirectory { directory: InodeNr::ROOT }, drop]);
    assert_eq!(dropped.map(|effects| effects.orphans), Ok(vec![directory]));
    // A removed directory takes no new entries.
    let insert = Change::InsertEntry { directory, name: b"g"[..].into(), target: file(9) };
    assert_eq!(bench.change(&[insert]), Err(FsError::NotFound));
}

#[test]
fn links_end_at_the_limit() {
    let mut bench = Bench::new();
    let inode = file(5).inode;
    bench.commit(|batch| {
        let mut record = InodeRecord::new(FileKind::Regular, 0o600, 0, 0, batch.now());
        record.links = MAX_LINKS - 1;
        inode::store(batch, inode, &record);
        Ok(())
    });
    assert!(bench.change(&[Change::AddLink { inode }]).is_ok());
    assert_eq!(bench.change(&[Change::AddLink { inode }]), Err(FsError::TooManyLinks));
    assert_eq!(bench.record(inode).links, MAX_LINKS);
}

/// A failed list of changes leaves nothing behind, wherever it fails.
#[test]
fn failed_changes_leave_nothing() {
    let mut bench = Bench::new();
    bench.commit(|batch| directory::insert(batch, InodeNr::ROOT, b"taken", file(2)));
    let before = (bench.record(InodeNr::ROOT), bench.names(InodeNr::ROOT));
    let insert =
        |name: &[u8]| Change::InsertEntry { directory: InodeNr::ROOT, name: name.into(), target: file(3) };
    let create = Change::CreateInode { inode: file(3).inode, new: new_record(FileKind::Regular) };
    assert_eq!(bench.change(&[create, insert(b"free"), insert(b"taken")]), Err(FsError::Exists));
    assert_eq!((bench.record(InodeNr::ROOT), bench.names(InodeNr::ROOT)), before);
    assert_eq!(bench.commit(|batch| inode::find(batch, file(3).inode)), None);
}

#[test]
fn deletion_takes_attributes_in_steps() {
    let mut bench = Bench::new();
    for number in 0..10 {
        let name = format!("user.{number}").into_bytes();
        bench.commit(|batch| xattr::set(batch, InodeNr::ROOT, &name, b"x", SetXattrMode::Set));
    }
    assert!(bench.commit(|batch| xattr::delete_some(batch, InodeNr::ROOT, 4)));
    assert!(bench.commit(|batch| xattr::delete_some(batch, InodeNr::ROOT, 4)));
    assert!(!bench.commit(|batch| xattr::delete_some(batch, InodeNr::ROOT, 4)));
    assert_eq!(bench.items_of_kind(InodeNr::ROOT, crate::format::items::XATTR), 0);
}
