//! Several clients at once.
//!
//! Whatever the order, the tree must be a tree afterwards, every count must be right, and no request may hang: the
//! simulator reports a deadlock as soon as nothing can run any more.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{join, join_all};

use super::harness::{Client, Machine};
use crate::error::FsError;
use crate::request::{NewInode, RenameMode};
use crate::types::InodeNr;

const ROOT: InodeNr = InodeNr::ROOT;

/// Rounds of work that a test waits for the power to go.
const MAX_ROUNDS: u64 = 400;

/// A stream of numbers from a seed (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((value ^ (value >> 31)) % limit as u64) as usize
    }
}

/// Machines of all shapes, each with so many seeds; a campaign multiplies their number by `POLLUX_SIM_FACTOR`.
fn machines(seeds: u64) -> impl Iterator<Item = Machine> {
    let factor = std::env::var("POLLUX_SIM_FACTOR").map_or(1, |factor| factor.parse().expect("a number"));
    (0..seeds * factor).flat_map(|seed| {
        [(1, 1), (1, 2), (2, 3), (3, 4)].map(|(reactors, shards)| Machine { seed, reactors, shards })
    })
}

/// Two renames in opposite directions, between directories of two shards, again and again.
#[test]
fn opposite_renames_meet() {
    for machine in machines(15) {
        machine.run(async |client| {
            let (one, two) = (client.directory(ROOT, "one").await, client.directory(ROOT, "two").await);
            let (left, right) = (client.file(one, "x").await, client.file(two, "y").await);
            let forth = async {
                for _ in 0..10 {
                    client.rename((one, "x"), (two, "y"), RenameMode::Exchange).await.unwrap();
                }
            };
            let back = async {
                for _ in 0..10 {
                    client.rename((two, "y"), (one, "x"), RenameMode::Exchange).await.unwrap();
                }
            };
            join(forth, back).await;
            // Twenty exchanges: all is where it was.
            assert_eq!(client.lookup(one, "x").await.unwrap().inode, left);
            assert_eq!(client.lookup(two, "y").await.unwrap().inode, right);
            client.walk().await;
        });
    }
}

/// Two links in opposite directions: each file gets a name in the other's directory.
#[test]
fn opposite_links_meet() {
    for machine in machines(15) {
        machine.run(async |client| {
            let (one, two) = (client.directory(ROOT, "one").await, client.directory(ROOT, "two").await);
            let (left, right) = (client.file(one, "f").await, client.file(two, "f").await);
            let names: Vec<String> = (0..8).map(|number| format!("n{number}")).collect();
            let forth = join_all(names.iter().map(|name| client.link(left, two, name)));
            let back = join_all(names.iter().map(|name| client.link(right, one, name)));
            let (forth, back) = join(forth, back).await;
            assert!(forth.iter().chain(&back).all(Result::is_ok));
            assert_eq!(client.attributes(left).await.unwrap().links, 9);
            assert_eq!(client.attributes(right).await.unwrap().links, 9);
            client.walk().await;
        });
    }
}

/// Two directories are to move below each other, by operations that have no inode in common: only the volume's rename
/// lock keeps them apart. Whoever comes second finds the new place inside of what it moves.
#[test]
fn directories_do_not_move_into_each_other() {
    for machine in machines(25) {
        machine.run(async |client| {
            let (left, right) = (client.directory(ROOT, "left").await, client.directory(ROOT, "right").await);
            let (one, two) = (client.directory(left, "one").await, client.directory(right, "two").await);
            let (deep_one, deep_two) =
                (client.directory(one, "deep").await, client.directory(two, "deep").await);
            let (forth, back) = join(
                client.rename((left, "one"), (deep_two, "one"), RenameMode::Replace),
                client.rename((right, "two"), (deep_one, "two"), RenameMode::Replace),
            )
            .await;
            assert!(
                matches!((&forth, &back), (Ok(()), Err(FsError::Invalid)) | (Err(FsError::Invalid), Ok(()))),
                "{forth:?} {back:?}"
            );
            assert_eq!(client.walk().await.len(), 6);
        });
    }
}

/// A directory is removed while another client makes something in it: one of the two fails.
#[test]
fn removed_directory_stays_empty() {
    for machine in machines(25) {
        machine.run(async |client| {
            let directory = client.directory(ROOT, "d").await;
            let (made, removed) =
                join(client.make(directory, "f", NewInode::Directory), client.remove_directory(ROOT, "d"))
                    .await;
            match (&made, &removed) {
                (Ok(_), Err(FsError::NotEmpty)) | (Err(FsError::NotFound), Ok(())) => {}
                other => panic!("{other:?}"),
            }
            client.walk().await;
        });
    }
}

/// Of several clients that make, remove or rename the same name, exactly one succeeds.
#[test]
fn one_winner_for_a_name() {
    for machine in machines(10) {
        machine.run(async |client| {
            let directory = client.directory(ROOT, "d").await;
            let made = join_all((0..6).map(|_| client.make(directory, "x", NewInode::Directory))).await;
            assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 1);
            let renames = (0..6).map(|number| {
                let client = client.clone();
                async move {
                    let name = format!("r{number}");
                    client.rename((directory, "x"), (ROOT, &name), RenameMode::NoReplace).await
                }
            });
            let renamed = join_all(renames).await;
            assert_eq!(renamed.iter().filter(|renamed| renamed.is_ok()).count(), 1);
            let name = format!("r{}", renamed.iter().position(Result::is_ok).unwrap());
            let removed = join_all((0..6).map(|_| client.remove_directory(ROOT, &name))).await;
            assert_eq!(removed.iter().filter(|removed| removed.is_ok()).count(), 1);
            assert_eq!(client.walk().await.len(), 1);
        });
    }
}

/// Directories that all clients know, and inodes that were made.
struct Known {
    directories: Vec<InodeNr>,
    files: Vec<InodeNr>,
    lookups: Vec<InodeNr>,
}

async fn work(client: Client, known: Rc<RefCell<Known>>, mut numbers: Numbers, steps: usize) {
    for _ in 0..steps {
        let mut directory = || {
            let known = known.borrow();
            known.directories[numbers.below(known.directories.len())]
        };
        let (from, to) = (directory(), directory());
        let name = ["a", "b", "c", "d", "e"][numbers.below(5)];
        let new_name = ["a", "b", "c", "d", "e"][numbers.below(5)];
        let mode = [RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange][numbers.below(3)];
        let file = {
            let known = known.borrow();
            (!known.files.is_empty()).then(|| known.files[numbers.below(known.files.len())])
        };
        // Failures are part of it: names come and go.
        match numbers.below(12) {
            0..3 => {
                if let Ok(made) = client.make(from, name, NewInode::Regular).await {
                    let mut known = known.borrow_mut();
                    known.files.push(made.inode);
                    known.lookups.push(made.inode);
                }
            }
            3..5 => {
                if let Ok(made) = client.make(from, name, NewInode::Directory).await {
                    let mut known = known.borrow_mut();
                    known.directories.push(made.inode);
                    known.lookups.push(made.inode);
                }
            }
            5 => drop(client.unlink(from, name).await),
            6 => drop(client.remove_directory(from, name).await),
            7 => {
                if let Some(file) = file
                    && let Ok(linked) = client.link(file, to, new_name).await
                {
                    known.borrow_mut().lookups.push(linked.inode);
                }
            }
            8 => {
                if let Ok(found) = client.lookup(from, name).await {
                    known.borrow_mut().lookups.push(found.inode);
                }
            }
            _ => drop(client.rename((from, name), (to, new_name), mode).await),
        }
    }
}

/// Several clients at work, while checkpoints close epochs under the transactions' feet. Returns the lookups counted.
async fn work_together(client: &Client, machine: Machine, clients: u64, steps: usize) -> Vec<InodeNr> {
    let known = Known { directories: vec![ROOT], files: Vec::new(), lookups: Vec::new() };
    let known = Rc::new(RefCell::new(known));
    let workers = (0..clients).map(|number| {
        let numbers = Numbers(machine.seed.wrapping_mul(1000).wrapping_add(number));
        work(client.clone(), Rc::clone(&known), numbers, steps)
    });
    let done = Cell::new(false);
    let working = async {
        join_all(workers).await;
        done.set(true);
    };
    let checkpoints = async {
        while !done.get() && client.sync().await.is_ok() {
            client.ctx.sleep(Duration::from_micros(5)).await;
        }
    };
    join(working, checkpoints).await;
    std::mem::take(&mut known.borrow_mut().lookups)
}

fn random_work(machine: Machine, clients: u64, steps: usize) -> u64 {
    let ((), trace) = machine.run(async |client| {
        let lookups = work_together(client, machine, clients, steps).await;
        client.walk().await;
        for inode in lookups {
            client.forget(inode, 1).await;
        }
        client.check().await;
    });
    trace
}

#[test]
fn random_work_of_several_clients_leaves_a_tree() {
    for machine in machines(12) {
        random_work(machine, 12, 60);
    }
}

#[test]
fn same_seed_does_the_same() {
    let machine = Machine { seed: 4711, reactors: 3, shards: 4 };
    assert_eq!(random_work(machine, 5, 40), random_work(machine, 5, 40));
}

/// The power goes at any time: whatever is found then is a tree with right counts, transactions that span shards are
/// there whole or not at all, and inodes without names are deleted.
#[test]
fn power_cut_leaves_a_tree() {
    let (mut rounds, mut struck, mut found) = (0, 0, 0);
    for (round, machine) in machines(12).enumerate() {
        let writes = 1 + round as u64 * 37 % 240;
        let (early, names) = machine.run_and_crash(
            writes,
            async |client| {
                for seed in 0..MAX_ROUNDS {
                    work_together(client, Machine { seed, ..machine }, 6, 15).await;
                    if client.sync().await.is_err() {
                        break; // the power is off
                    }
                }
            },
            async |client| client.check().await.len(),
        );
        rounds += 1;
        struck += u32::from(early);
        found += names;
    }
    // The test would prove nothing if the power never went, or if nothing was there before.
    assert!(struck == rounds && found >= 100, "{struck} of {rounds} struck, {found} names found");
}
