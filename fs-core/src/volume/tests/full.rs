//! Full volumes: what was accepted finds its place, what gives space back always works, and all of it comes back.

use std::cell::RefCell;
use std::rc::Rc;

use super::client::{Client, Ending};
use super::model::{Made, NodeId, Op, TOP};
use super::world::{SeedNote, Shape, prepared, seeds, session};
use super::*;
use crate::request::{FileKind, SpaceReport, SyncScope};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 2;

/// Clients that fill the volume together.
const CLIENTS: usize = 2;

/// Refusals after which a client takes the volume for full.
const REFUSALS: u64 = 12;

/// Times that the volume is filled.
const ROUNDS: usize = 2;

async fn space(volume: &Volume) -> SpaceReport {
    match volume.call(Request::StatFs).await {
        Ok(Reply::Space(space)) => space,
        other => panic!("statfs: {other:?}"),
    }
}

async fn must(client: &mut Client, op: Op) {
    assert_eq!(client.step(&op).await, Ending::Finished);
}

/// Writes files until there is no room, now and then with something else between.
async fn fill(client: &mut Client, round: usize) {
    client.may_be_full = true;
    client.refused = 0;
    let mut number = 0;
    while client.refused < REFUSALS {
        if client.chance(6) {
            assert_eq!(client.run(1).await, Ending::Finished);
            continue;
        }
        let node = client.model.next_node();
        let name = format!("fill{round}.{number}");
        number += 1;
        must(client, Op::Create { parent: TOP, name, made: Made::Regular, permissions: 0o600 }).await;
        if client.model.nodes.contains_key(&node) {
            let length = if client.chance(3) { 5000 } else { 200_000 + 1000 * number % 300_000 };
            let data = super::client::stamped(client.number, number as usize, 0, length);
            must(client, Op::Write { node, offset: 0, data }).await;
        }
    }
    client.may_be_full = false;
}

/// Removes about one in `part` of what can be removed.
async fn remove_some(client: &mut Client, part: u64) {
    let directories = client.model.of_kind(FileKind::Directory);
    for parent in directories.into_iter().rev() {
        let entries: Vec<(String, NodeId)> = {
            let entries = &client.model.node(parent).entries;
            entries.iter().map(|(name, node)| (name.clone(), *node)).collect()
        };
        for (name, node) in entries {
            if !client.chance(part) {
                continue;
            }
            let there = client.model.node(node).clone();
            let op = match there.kind {
                FileKind::Directory if !there.entries.is_empty() => continue,
                FileKind::Directory => Op::RemoveDirectory { parent, name },
                FileKind::Regular if part > 1 && client.chance(2) => {
                    Op::Truncate { node, size: there.contents.size / 3 }
                }
                _ => Op::Unlink { parent, name },
            };
            must(client, op).await;
            if client.model.nodes.contains_key(&node) && client.model.node(node).links == 0 {
                must(client, Op::Forget { node }).await;
            }
        }
    }
}

async fn fill_and_empty(client: &mut Client) -> Ending {
    for round in 0..ROUNDS {
        fill(client, round).await;
        // Whatever was accepted has its place.
        must(client, Op::Sync { node: TOP, scope: SyncScope::Volume }).await;
        client.check_all().await.expect("a full volume can be read");
        remove_some(client, 2).await;
        client.check_all().await.expect("what is left can be read");
    }
    fill(client, ROUNDS).await;
    while client.model.nodes.len() > 1 {
        remove_some(client, 1).await;
        let nameless: Vec<NodeId> =
            client.model.nodes.iter().filter(|(_, node)| node.links == 0).map(|(id, _)| *id).collect();
        for node in nameless {
            must(client, Op::Forget { node }).await;
        }
    }
    must(client, Op::Sync { node: TOP, scope: SyncScope::Volume }).await;
    Ending::Finished
}

pub(super) fn full_volume(seed: u64) {
    let shape = Shape { shards: 1 + (seed % 3) as u8, ..Shape::random(seed) };
    let shape = Shape { blocks: 8500 * u64::from(shape.shards), ..shape };
    let (disk, history) = prepared(&shape, CLIENTS);
    let history = Rc::new(RefCell::new(history));
    let free = |salt| {
        let measure = async |_: &Context, volume: &Volume| {
            let space = space(volume).await;
            volume.unmount().await.expect("an idle volume unmounts");
            space
        };
        shape.mounted(&disk, salt, measure).expect("the volume mounts")
    };
    let before = free(2);
    session(&shape, &disk, &history, 10, async |client: &mut Client| fill_and_empty(client).await);
    let after = free(3);
    assert_eq!(after.free, before.free, "all space comes back; before {before:?}");
    assert_eq!((after.dirty_bytes, before.dirty_bytes), (0, 0));
}

#[test]
fn accepted_writes_find_space_and_deletion_gives_all_of_it_back() {
    for seed in seeds(SEEDS) {
        let _note = SeedNote(seed);
        full_volume(seed);
    }
}

/// A shard's reserve was smaller than the worst case of one truncation: with everything else promised, truncating a
/// file on the full volume was refused with ENOSPC.
#[test]
fn truncation_on_a_full_volume_finds_its_reserve() {
    full_volume(1006);
}
